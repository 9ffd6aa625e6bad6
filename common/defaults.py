"""What a run does where its options say nothing. Imports nothing, so costs nothing.

In locomotion a run of TD3-BST has another length, `td3_bst.LOCOMOTION_UPDATES`.
"""

EMBEDDED = "td3-bst/pointmaze/zigzag-v0"  # what is trained on if nothing is named


def counts(embedded: bool, maze: bool) -> dict[str, int]:
    """The options of `RunOptions` that count something, unset ones.

    Args:
        embedded: the dataset is EMBEDDED.
        maze: its episodes end at success.
    """
    return dict(
        num_updates=20_000 if embedded else 1_000_000,
        num_morse_updates=8_000 if embedded else 20_000,
        eval_every=50_000 if maze and not embedded else 5_000,
        eval_episodes=100 if maze else 10,
    )
