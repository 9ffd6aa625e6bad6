"""SIGINT and SIGTERM: a run under way first writes a checkpoint."""

import contextlib
import os
import signal
import sys
import threading

INTERRUPTED = "interrupted; a run goes on from its last checkpoint with --resume RUN"


class Stopped(Exception):
    """The run stopped because a signal asked for it; all it needs is on disk."""


def leave(code: int, told: str) -> None:
    """Says something and ends the process, whatever threads are still at."""
    with contextlib.suppress(RuntimeError):  # a print elsewhere may not end
        give_up = threading.Timer(2.0, os._exit, (code,))
        give_up.daemon = True
        give_up.start()
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"{told}\n")):
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # nobody listens
            stream.write(text)
            stream.flush()
    os._exit(code)


class Signals:
    """SIGINT and SIGTERM: at once, while `patient` after the present chunk.

    A second signal does not wait. Python runs handlers between two lines of the main
    thread, which may be in a compiled chunk for long; so a thread listens.
    """

    def __init__(self) -> None:
        self.asked, self.patient = 0, False

    def install(self) -> None:
        """Takes over from Python's handlers."""
        numbers, told = os.pipe()
        os.set_blocking(told, False)
        threading.Thread(target=self._listen, args=(numbers,), daemon=True).start()
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):  # a handler, or none is told
            signal.signal(number, lambda *_: None)

    def _listen(self, numbers: int) -> None:
        while number := os.read(numbers, 1):
            if number[0] in (signal.SIGINT, signal.SIGTERM):
                self._handle(number[0])

    def _handle(self, number: int) -> None:
        first, self.asked = not self.asked, number
        if not (first and self.patient):
            leave(128 + number, INTERRUPTED)
        told = "stopping after this chunk and the evaluation under way"
        with contextlib.suppress(OSError, RuntimeError):  # nobody may be listening
            print(
                f"\n{told}; a second signal stops at once", file=sys.stderr, flush=True
            )


SIGNALS = Signals()  # the process's own
