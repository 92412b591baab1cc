"""Results as the terminal shows them: the accuracies, the verdict and its evidence."""

from rich.box import SIMPLE
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from ..attacks.suites import ATTACKS
from .plotting import verdict_at
from .result import EpsResult, Result

VERDICT_COLOURS = {"sound": "green", "masked": "red", "undecided": "yellow"}


def show(result: Result, title: str) -> None:
    """Print a result: the accuracies with the verdict and its evidence beneath them, of a sweep a row per eps."""
    console = Console()
    console.print(title, style="italic")
    if result.is_sweep:
        console.print(_curve(result))
        _show_verdict(console, f"verdict at {result.points[-1].eps}", result.points[-1])
    else:
        console.print(_accuracies(result.point))
        _show_cw_l2(console, result.point)
        _show_verdict(console, "verdict on the white-box accuracies", result.point)


def _accuracies(at: EpsResult) -> Table:
    table = Table("attack", "kind", "accuracy")
    table.add_row("none (clean)", "", _percent(at.clean))
    for name, accuracy in at.accuracy.items():
        table.add_row(name, ATTACKS[name].kind if name in ATTACKS else "sequence", _percent(accuracy))
    table.add_section()
    table.add_row("worst case", "", _percent(at.worst), style="bold")
    table.add_row("zero input gradients", "", _percent(at.zero_gradient_share))
    return table


def _curve(result: Result) -> Table:
    table = Table("eps", caption="accuracy in %", box=SIMPLE)
    for column in ("clean", *result.points[0].accuracy, "worst"):
        table.add_column(column, justify="right", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for at in result.points:
        accuracies = [at.clean, *at.accuracy.values(), at.worst]
        table.add_row(at.eps, *(f"{100 * accuracy:.1f}" for accuracy in accuracies), verdict_at(at))
    return table


def _show_cw_l2(console: Console, at: EpsResult) -> None:
    if cw := at.cw_l2:
        needs = "breaks fewer than half"
        if cw.median_l2 is not None:
            needs = f"needs a median L2 distance of {cw.median_l2:.3f}"
        console.print(f"cw-l2 {needs}; accuracy at L2 {cw.budget:.3f}: {_percent(cw.accuracy_at_budget)}")


def _show_verdict(console: Console, title: str, at: EpsResult) -> None:
    console.print(f"{title}: [bold]{at.verdict}[/bold]")
    for sentence in at.verdict.evidence:
        console.print(Padding(sentence, (0, 0, 0, 2)), highlight=False)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
