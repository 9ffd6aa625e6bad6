"""The one exception that means: the user, not the program, has to change something."""


class UserError(Exception):
    """A mistake in the input; `main` prints the message alone and exits with 2.

    The message says what was expected, what came and what to do about it.
    """
