"""Runs the cells of a sweep, several at once, each after the one whose weights it starts from, and shows the progress.

Where a cell starts or ends a line is printed; a terminal shows a live table as well; a table of all cells comes last.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import inf

from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from ..command_line import duration
from ..errors import InputError, one_line
from ..launch import Launch, Preempted, noticed_sigterm
from ..reports.evaluated_runs import EvaluatedRun, read_evaluated_runs
from ..results.plotting import VERDICT_COLORS
from .cell import Cell
from .jobs import CellJob, Executor, Pending, Refused

_RETRY_EVERY = 60.0  # seconds after a refusal; a cluster may need as long to notice that a job has ended


@dataclass(frozen=True)
class Running:
    """A running cell, its job, and its start by the monotonic clock in seconds."""

    cell: Cell
    job: Pending
    start: float


@dataclass(frozen=True)
class Ended:
    """A cell that has ended.

    Attributes:
        cell: The cell.
        error: What went wrong; "" for a cell that is done.
        seconds: Time that it took; None for one that was done already, or that was not run.
    """

    cell: Cell
    error: str = ""
    seconds: float | None = None

    @cached_property
    def outcome(self) -> EvaluatedRun | None:
        """Result at the eps of the training, else at another eps; None without a result."""
        try:
            found = read_evaluated_runs([self.cell.path]).found
        except InputError:
            return None
        return next((one for one in found if one.group.eps == one.train["eps"]), next(iter(found), None))


class Scheduler:
    """Runs cells until each is done or has failed.

    Args:
        title: Title of the sweep.
        cells: Cells in the order in which they start, except that a cell waits for the one whose weights it starts
            from.
        executor: Runs their jobs.
        launch: How their commands are started.

    Attributes:
        waiting: Cells that have not started, by name.
        running: Cells that run, by name.
        ended: Cells that have ended, by name.
    """

    def __init__(self, title: str, cells: Sequence[Cell], executor: Executor, launch: Launch):
        self.waiting = {cell.name: cell for cell in cells}
        self.running: dict[str, Running] = {}
        self.ended: dict[str, Ended] = {}
        self._executor, self._launch = executor, launch
        self._screen = Screen(title, self)
        self._last_ran = self._last_refused = -inf  # by the monotonic clock

    @property
    def failed(self) -> list[Ended]:
        """The cells that have failed or were not run."""
        # Copies are taken, here and below, because the live table is drawn by another thread.
        return [ended for ended in list(self.ended.values()) if ended.error]

    def run(self) -> bool:
        """Run all cells that are not done.

        Returns:
            Whether any failed.

        Raises:
            Preempted: SIGTERM came; the running cells have saved their state.
        """
        self._skip_done()
        try:
            with noticed_sigterm() as sigterm_came, self._screen.live():
                while self.waiting or self.running:
                    if sigterm_came():
                        raise Preempted("SIGTERM came: the running cells were stopped")
                    self._note_ended()
                    self._start()
                    time.sleep(self._executor.poll_every)
        finally:
            self._executor.stop()
        self._screen.summary()
        return bool(self.failed)

    def seconds_left(self) -> float | None:
        """Return the time left if every cell takes the mean time of the finished ones; None before the first."""
        took = [ended.seconds for ended in list(self.ended.values()) if ended.seconds is not None and not ended.error]
        if not took:
            return None
        now = time.monotonic()
        mean = sum(took) / len(took)
        left = mean * len(self.waiting) + sum(max(0, mean - now + one.start) for one in list(self.running.values()))
        return left / min(self._executor.capacity, len(self.waiting) + len(self.running) or 1)

    def _skip_done(self) -> None:
        """End the cells that are done, or that `train` or `evaluate` would refuse to resume, without starting one."""
        for cell in list(self.waiting.values()):
            try:
                if cell.is_done():
                    self._end(cell)
            except InputError as error:
                self._end(cell, one_line(error))

    def _note_ended(self) -> None:
        for running in list(self.running.values()):
            if running.job.done():
                self._end(running.cell, _error(running.job), time.monotonic() - running.start)

    def _start(self) -> None:
        """Start the cells that can start now."""
        if self.running:
            self._last_ran = time.monotonic()
        for cell in list(self.waiting.values()):
            source = self.ended.get(cell.start or "")
            if source is not None and source.error:
                self._end(cell, f"not run, because {source.cell.name} failed, whose weights it starts from")
            elif len(self.running) < self._executor.capacity and (cell.start is None or source is not None):
                self._submit(cell)

    def _submit(self, cell: Cell) -> None:
        """Start a cell. If it is refused it waits while other cells run, and fails if none does."""
        now = time.monotonic()
        if now - self._last_refused < _RETRY_EVERY:
            return
        try:
            job = self._executor.submit(cell.name, CellJob(cell.commands(self._launch), cell.log))
        except Refused as refused:
            if self.running or now - self._last_ran < _RETRY_EVERY:
                self._last_refused = now
                self._screen.refused(cell, str(refused))
            else:
                self._end(cell, f"it was refused ({refused})")
            return
        self._screen.started(cell)
        self.running[cell.name] = Running(self.waiting.pop(cell.name), job, time.monotonic())

    def _end(self, cell: Cell, error: str = "", seconds: float | None = None) -> None:
        for cells in (self.waiting, self.running):
            cells.pop(cell.name, None)
        self.ended[cell.name] = Ended(cell, error, seconds)
        self._screen.ended(self.ended[cell.name])


def _error(job: Pending) -> str:
    """Return what went wrong in a job that has ended; "" if nothing did."""
    try:
        return job.result()
    except Exception as error:  # jobs of a cluster can be lost in many ways
        return one_line(error)


class Screen:
    """Prints the progress of a sweep.

    Args:
        title: Title of the sweep.
        scheduler: Scheduler whose cells are shown.
    """

    def __init__(self, title: str, scheduler: Scheduler):
        self._title, self._scheduler = title, scheduler
        self._console = Console(soft_wrap=True)
        self._refusal = ""

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show a table of the running cells, if this is a terminal."""
        if not self._console.is_terminal:
            yield
            return
        with Live(get_renderable=self._live_table, console=self._console, refresh_per_second=1, transient=True):
            yield

    def started(self, cell: Cell) -> None:
        """Print that a cell has started, where no live table shows it."""
        if not self._console.is_terminal:
            self._print(f"starts {escape(cell.name)}")

    def refused(self, cell: Cell, reason: str) -> None:
        """Print that a cell was refused, once for each reason."""
        if reason != self._refusal:
            again = f"it is submitted again every {duration(_RETRY_EVERY)} while others run"
            self._print(f"waits  {escape(cell.name)}: it was refused ({escape(reason)}); {again}")
        self._refusal = reason

    def ended(self, ended: Ended) -> None:
        """Print how a cell ended."""
        name, took = escape(ended.cell.name), "" if ended.seconds is None else f" in {duration(ended.seconds)}"
        if ended.error:
            log = f" (log: {escape(str(ended.cell.log))})" if ended.cell.log.exists() else ""
            self._print(f"[red]failed[/] {name}{took}: {escape(ended.error)}{log}")
        else:
            self._print(f"done   {name}{took or ' before'}: {_accuracies(ended.outcome)}")

    def summary(self) -> None:
        """Print a table of all cells with accuracies, verdict and time, and the errors of failed ones."""
        table = Table("cell", box=SIMPLE, caption="accuracy in %")
        for column in ("eps", "clean", "worst", "verdict", "time"):
            table.add_column(column, justify="right")
        for ended in self._scheduler.ended.values():
            took = ("" if ended.error else "before") if ended.seconds is None else duration(ended.seconds)
            table.add_row(escape(ended.cell.name), *_row(ended), took)
        self._console.print(table, soft_wrap=False)
        for ended in self._scheduler.failed:
            self._print(f"[red]failed[/] {escape(ended.cell.name)}: {escape(ended.error)}")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False)

    def _live_table(self) -> Table:
        scheduler = self._scheduler
        failed, left = len(scheduler.failed), scheduler.seconds_left()
        total = f"{len(scheduler.ended) - failed} done, {failed} failed, {len(scheduler.waiting)} waiting"
        total += "" if left is None else f", about {duration(left)} left if all cells take the same time"
        table = Table("cell", "what it does", "time", title=f"{escape(self._title)}: {total}", box=SIMPLE)
        for running in list(scheduler.running.values()):
            took = duration(time.monotonic() - running.start)
            table.add_row(escape(running.cell.name), escape(_doing(running.cell)), took)
        return table


def _doing(cell: Cell) -> str:
    try:
        return cell.doing()
    except InputError as error:  # it will be the error of the cell too
        return one_line(error)


def _accuracies(outcome: EvaluatedRun | None) -> str:
    if outcome is None:
        return "no accuracies"
    at = outcome.combined
    return f"clean {100 * at.clean:.1f} %, worst case {100 * at.worst:.1f} % at eps {at.eps}, {outcome.verdict}"


def _row(ended: Ended) -> tuple[str, str, str, str]:
    """Return the columns eps, clean, worst and verdict."""
    if ended.error or ended.outcome is None:
        return "", "", "", "[red]failed" if ended.error else ""
    at, verdict = ended.outcome.combined, ended.outcome.verdict
    return at.eps, f"{100 * at.clean:.1f}", f"{100 * at.worst:.1f}", f"[{VERDICT_COLORS[verdict]}]{verdict}"
