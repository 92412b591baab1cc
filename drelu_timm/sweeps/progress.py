"""What is shown of a sweep: a line where a cell begins or ends, a live table in a terminal, a table at the end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from ..command_line import duration
from ..errors import InputError, one_line
from ..reports.outcomes import Outcome
from ..reports.reading import read_outcomes
from ..results.display import VERDICT_COLOURS
from .cells import Cell
from .jobs import Pending


@dataclass(frozen=True)
class Running:
    """A cell that was begun, its job, and when, by the monotonic clock."""

    cell: Cell
    job: Pending
    begun: float


@dataclass(frozen=True)
class Ended:
    """A cell that has ended.

    Attributes:
        cell: The cell.
        error: What went wrong; "" for a cell that is done.
        seconds: How long it took; None for one that was done before, or never begun.
    """

    cell: Cell
    error: str = ""
    seconds: float | None = None

    @cached_property
    def outcome(self) -> Outcome | None:
        """What its evaluations say at the radius it was trained for, or another one; None without any."""
        try:
            found = read_outcomes([self.cell.path]).found
        except InputError:
            return None
        return next((one for one in found if one.group.eps == one.train["eps"]), next(iter(found), None))


@dataclass
class Progress:
    """Where a sweep stands: every cell, by name, in one of three places."""

    waiting: dict[str, Cell]
    running: dict[str, Running] = field(default_factory=dict)
    ended: dict[str, Ended] = field(default_factory=dict)

    @property
    def failed(self) -> list[Ended]:
        """The cells that are not done, and will not be."""
        return [ended for ended in self.ended.values() if ended.error]

    def seconds_left(self, capacity: float) -> float | None:
        """From the mean of the cells that ended here; None before the first."""
        took = [ended.seconds for ended in self.ended.values() if ended.seconds is not None and not ended.error]
        if not took:
            return None
        now = time.monotonic()
        mean = sum(took) / len(took)
        left = mean * len(self.waiting) + sum(max(0, mean - now + one.begun) for one in self.running.values())
        return left / min(capacity, len(self.waiting) + len(self.running) or 1)


class Screen:
    """Prints what happens.

    Args:
        title: Of the sweep.
        progress: Is read whenever the live table is drawn.
        capacity: Cells at once.
    """

    def __init__(self, title: str, progress: Progress, capacity: float):
        self._title, self._progress, self._capacity = title, progress, capacity
        self._console = Console(soft_wrap=True)
        self._refusal = ""

    @contextmanager
    def live(self) -> Iterator[None]:
        """In a terminal, show a table of what runs."""
        if not self._console.is_terminal:
            yield
            return
        with Live(get_renderable=self._table, console=self._console, refresh_per_second=1, transient=True):
            yield

    def begins(self, cell: Cell) -> None:
        """Say that a cell begins, where no table shows it."""
        if not self._console.is_terminal:
            self._say(f"begins {escape(cell.name)}")

    def waits(self, cell: Cell, refusal: str, seconds: float) -> None:
        """Say, once for each reason, that a cell was refused and when it is tried again."""
        if refusal != self._refusal:
            again = f"tried again every {duration(seconds)}"
            self._say(f"waits  {escape(cell.name)}: it was refused ({escape(refusal)}); {again} while others run")
        self._refusal = refusal

    def ends(self, ended: Ended) -> None:
        """Say how a cell ended."""
        name, took = escape(ended.cell.name), "" if ended.seconds is None else f" in {duration(ended.seconds)}"
        if ended.error:
            log = f" (log: {escape(str(ended.cell.log))})" if ended.cell.log.exists() else ""
            self._say(f"[red]failed[/] {name}{took}: {escape(ended.error)}{log}")
        else:
            self._say(f"done   {name}{took}{' before' if ended.seconds is None else ''}: {_figures(ended.outcome)}")

    def end(self) -> None:
        """Show every cell: its accuracies and verdict, or why it failed."""
        table = Table("cell", box=SIMPLE, caption="accuracy in %")
        for column in ("eps", "clean", "worst", "verdict", "time"):
            table.add_column(column, justify="right")
        for ended in self._progress.ended.values():
            name = escape(ended.cell.name)
            took = "before" if ended.seconds is None else duration(ended.seconds)
            if ended.error:
                table.add_row(name, "", "", "", "[red]failed", "" if ended.seconds is None else took)
                continue
            outcome = ended.outcome
            if outcome is None:
                table.add_row(name, "", "", "", "", took)
                continue
            at = outcome.at
            accuracies = [f"{100 * accuracy:.1f}" for accuracy in (at.clean, at.worst)]
            table.add_row(name, at.eps, *accuracies, f"[{VERDICT_COLOURS[outcome.verdict]}]{outcome.verdict}", took)
        self._console.print(table, soft_wrap=False)
        for ended in self._progress.failed:
            self._say(f"[red]failed[/] {escape(ended.cell.name)}: {escape(ended.error)}")

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False)

    def _table(self) -> Table:
        progress = self._progress
        done = len(progress.ended) - len(progress.failed)
        left = progress.seconds_left(self._capacity)
        total = f"{done} done, {len(progress.failed)} failed, {len(progress.waiting)} waiting"
        total += "" if left is None else f", about {duration(left)} left if all cells take alike"
        table = Table("cell", "what it does", "time", title=f"{escape(self._title)}: {total}", box=SIMPLE)
        for running in list(progress.running.values()):
            cells = escape(running.cell.name), escape(_doing(running.cell))
            table.add_row(*cells, duration(time.monotonic() - running.begun))
        return table


def _doing(cell: Cell) -> str:
    try:
        return cell.doing()
    except InputError as error:  # the cell itself will say it
        return one_line(error)


def _figures(outcome: Outcome | None) -> str:
    if outcome is None:
        return "no accuracies"
    at = outcome.at
    return f"clean {100 * at.clean:.1f} %, worst case {100 * at.worst:.1f} % at eps {at.eps}, {outcome.verdict}"
