"""Results as tables and sentences: in the terminal, in a notebook, and as plain text."""

from collections.abc import Iterator
from io import StringIO

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..attacks.suites import ATTACKS
from .plotting import VERDICT_COLORS, verdict_at
from .result import EpsResult, Result


def show(result: Result, title: str) -> None:
    """Print a result: the accuracies, a row per eps for a sweep, and below them the verdict with its evidence."""
    console, point = Console(), result.points[-1]
    console.print(Text(title, style="italic"))  # as a Text, since brackets in a name would be read as markup
    if result.is_sweep:
        console.print(_curve(result))
        console.print(Group(*_verdict(point, f"verdict at {point.eps}")))
    else:
        console.print(rendered(point))


def rendered(at: EpsResult) -> RenderableType:
    """Return the accuracies, the verdict and its evidence at one eps, for a rich console."""
    return Group(_accuracies(at), *_carlini_wagner(at), *_verdict(at, "verdict"))


def as_text(at: EpsResult) -> str:
    """Return what `rendered` shows as text without colors."""
    console = Console(file=StringIO(), width=100, color_system=None)
    with console.capture() as capture:
        console.print(rendered(at))
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def as_html(at: EpsResult) -> str:
    """Return what `rendered` shows as an HTML fragment, in which nothing of the result is taken as HTML."""
    console = Console(file=StringIO(), width=100, record=True)
    console.print(rendered(at))
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def _accuracies(at: EpsResult) -> Table:
    table = Table("attack", "kind", "accuracy", box=SIMPLE)
    table.add_row("none (clean)", "", _percent(at.clean))
    for name, accuracy in at.accuracy.items():
        table.add_row(name, ATTACKS[name].kind if name in ATTACKS else "sequence", _percent(accuracy))
    table.add_section()
    # An upper bound, unless white-box attacks find nearly everything.
    bound = "" if at.verdict.verdict == "sound" or not at.worst else "≤ "
    table.add_row("worst case", "", f"{bound}{_percent(at.worst)}", style="bold")
    if at.certified is not None:
        table.add_row("certified", "interval bounds", f"≥ {_percent(at.certified)}")
    table.add_row("zero input gradients", "", _percent(at.zero_gradient_share))
    return table


def _curve(result: Result) -> Table:
    table = Table("eps", caption="accuracy in %", box=SIMPLE)
    with_bounds = result.points[0].certified is not None
    for column in ("clean", *result.points[0].accuracy, "worst", *(["certified"] if with_bounds else [])):
        table.add_column(column, justify="right", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for at in result.points:
        accuracies = [at.clean, *at.accuracy.values(), at.worst, *([] if at.certified is None else [at.certified])]
        table.add_row(at.eps, *(f"{100 * accuracy:.1f}" for accuracy in accuracies), verdict_at(at))
    return table


def _carlini_wagner(at: EpsResult) -> Iterator[RenderableType]:
    if cw := at.cw_l2:
        needs = "fools the model on fewer than half of the examples"
        if cw.median_l2 is not None:
            needs = f"needs a median L2 distance of {cw.median_l2:.3f}"
        yield f"cw-l2 {needs}; accuracy at L2 {cw.budget:.3f}: {_percent(cw.accuracy_at_budget)}"


def _verdict(at: EpsResult, heading: str) -> Iterator[RenderableType]:
    verdict = at.verdict.verdict
    yield Text.assemble(f"{heading}: ", (verdict, f"bold {VERDICT_COLORS[verdict]}"))
    for sentence in at.verdict.evidence:
        yield Padding(Text(sentence), (0, 0, 0, 2))
    if at.not_certified is not None:
        yield Text(at.not_certified)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
