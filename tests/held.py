"""`drelu-timm` that stops at a call of a function until a signal comes: `python -m held VERB ...`.

A test that kills a process or sends SIGTERM to it does so while the process is held, so that the result does not
depend on the speed of the machine.
"""

import itertools
import os
import pkgutil
import runpy
import signal
import threading
from pathlib import Path

VARIABLE = "HELD_AT"
_NOBODY_COMES = 600  # seconds, after which the test that holds the process is gone


def hold(function: str, call: int, reached: Path) -> None:
    """Make one call of a function create a file, then wait for SIGTERM before it continues.

    Args:
        function: "module:name" or "module:Class.name".
        call: Number of the call, from 1.
        reached: File that is created.
    """
    module, _, path = function.partition(":")
    owner_path, _, name = path.rpartition(".")
    owner = pkgutil.resolve_name(f"{module}:{owner_path}")
    original, calls = getattr(owner, name), itertools.count(1)

    def counted(*args, **kwargs):
        if next(calls) == call:
            _wait_for_sigterm(reached)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def _wait_for_sigterm(reached: Path) -> None:
    came, handler = threading.Event(), signal.getsignal(signal.SIGTERM)

    def hear(number, frame) -> None:
        came.set()
        if callable(handler):
            handler(number, frame)

    signal.signal(signal.SIGTERM, hear)
    reached.touch()
    if not came.wait(_NOBODY_COMES):
        os._exit(1)
    signal.signal(signal.SIGTERM, handler)


def hold_first_process() -> None:
    """Hold this process as HELD_AT states ("function call file"), if it is the first of its launch."""
    if VARIABLE in os.environ and os.environ.get("RANK", "0") == "0":
        function, call, reached = os.environ[VARIABLE].split(maxsplit=2)
        hold(function, int(call), Path(reached))


if __name__ == "__main__":
    hold_first_process()
    runpy.run_module("drelu_timm", run_name="__main__", alter_sys=True)
