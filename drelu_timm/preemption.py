"""What to do when the machine is taken away: SIGTERM, as SLURM, Kubernetes and spot instances send it."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again


class Preempted(Exception):
    """SIGTERM came, and the state is saved; the command line prints the message and exits with `EXIT_CODE`."""


@contextmanager
def noticed_sigterm() -> Iterator[Callable[[], bool]]:
    """Instead of ending the process, SIGTERM makes the function that is given here return True.

    Only the main thread can listen; in another one SIGTERM does what it always does.
    """
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
