"""The order in which the cells of a sweep run: each once those that it begins with are done, so many at once."""

import time
from collections.abc import Sequence
from math import inf

from ..errors import InputError, one_line
from ..launches import Launch
from ..preemption import Preempted, noticed_sigterm
from .cells import Cell
from .jobs import CellJob, Place, Refused
from .progress import Ended, Progress, Running, Screen

_LOOKS_EVERY = 0.2  # seconds
_TRIES_EVERY = 60.0  # seconds after a refusal; a cluster may take as long to forget a job that has ended


class Scheduler:
    """Runs cells to their end, one way or the other.

    Args:
        title: Of the sweep.
        cells: In the order in which they are begun, but that a cell waits for the one that it begins with.
        place: Where they run.
        launch: How their commands are started.
    """

    def __init__(self, title: str, cells: Sequence[Cell], place: Place, launch: Launch):
        self._place, self._launch = place, launch
        self._progress = Progress({cell.name: cell for cell in cells})
        self._screen = Screen(title, self._progress, place.capacity)
        self._last_ran = self._last_refused = -inf  # by the monotonic clock

    def run(self) -> bool:
        """Run all cells that are not done; whether any failed.

        Raises:
            Preempted: SIGTERM came; what ran has saved its state.
        """
        progress = self._progress
        self._leave_out_done()
        try:
            with noticed_sigterm() as sigterm_came, self._screen.live():
                while progress.waiting or progress.running:
                    if sigterm_came():
                        raise Preempted("SIGTERM came: what ran was stopped")
                    self._note_ended()
                    self._begin()
                    time.sleep(_LOOKS_EVERY)
        finally:
            self._place.stop()
        self._screen.end()
        return bool(progress.failed)

    def _leave_out_done(self) -> None:
        """Cells that are done, or that `train` or `evaluate` would refuse to go on with: no process is started."""
        for cell in list(self._progress.waiting.values()):
            try:
                if cell.is_done():
                    self._end(cell)
            except InputError as error:
                self._end(cell, one_line(error))

    def _note_ended(self) -> None:
        for running in list(self._progress.running.values()):
            if running.job.done():
                self._end(running.cell, _error(running), time.monotonic() - running.begun)

    def _begin(self) -> None:
        """Begin what can be begun."""
        progress = self._progress
        if progress.running:
            self._last_ran = time.monotonic()
        for cell in list(progress.waiting.values()):
            start = progress.ended.get(cell.start or "")
            if start is not None and start.error:
                self._end(cell, f"not run, since {start.cell.name} failed, which it begins with")
            elif len(progress.running) < self._place.capacity and (cell.start is None or start is not None):
                self._submit(cell)

    def _submit(self, cell: Cell) -> None:
        """Begin a cell; one that its place refuses waits for what may be in its way, or has failed if nothing is."""
        now = time.monotonic()
        if now - self._last_refused < _TRIES_EVERY:
            return
        try:
            job = self._place.submit(cell.name, CellJob(cell.commands(self._launch), cell.log))
        except Refused as refused:
            if self._progress.running or now - self._last_ran < _TRIES_EVERY:
                self._last_refused = now
                self._screen.waits(cell, str(refused), _TRIES_EVERY)
            else:
                self._end(cell, f"it was refused ({refused})")
            return
        self._screen.begins(cell)
        self._progress.running[cell.name] = Running(self._progress.waiting.pop(cell.name), job, time.monotonic())

    def _end(self, cell: Cell, error: str = "", seconds: float | None = None) -> None:
        progress = self._progress
        for cells in (progress.waiting, progress.running):
            cells.pop(cell.name, None)
        progress.ended[cell.name] = Ended(cell, error, seconds)
        self._screen.ends(progress.ended[cell.name])


def _error(running: Running) -> str:
    """What went wrong in a cell that has ended; "" if nothing did."""
    try:
        return running.job.result()
    except Exception as error:  # a job can be lost in as many ways as there are clusters
        return one_line(error)
