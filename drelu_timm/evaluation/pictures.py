"""What pictures of accuracies have in common: colours, axes, legends, and how they are saved."""

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import cycle, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's colours, which colour-blind readers can tell apart too (https://jfly.uni-koeln.de/color/), less black,
# which is for the worst case, and yellow, which is faint on white; the markers tell them apart in grey.
POINTS = tuple(zip(("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"), "osDv^P", strict=True))
_DASHES = ("-", "--", ":", "-.")  # tell apart what shares a colour
CLEAN = {"color": "grey", "linewidth": 1.2}
WORST_CASE = {"color": "black", "linewidth": 4}


def require_matplotlib() -> None:
    """Say before any work that the picture cannot be drawn.

    Raises:
        InputError: matplotlib is missing: it is in the extra `report` only.
    """
    if find_spec("matplotlib") is None:
        raise InputError("matplotlib, which draws the pictures, is missing; pip install 'drelu-timm[report]'")


def accuracy_axes(title: str) -> tuple["Figure", "Axes"]:
    """Empty axes with accuracy in % upwards.

    Raises:
        InputError: Matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot there is no global state

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(ylim=(0, 100), ylabel="accuracy in %", title=title)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def attack_styles() -> Iterator[dict[str, Any]]:
    """A look for every attack's line, one after the other; the first 24 differ."""
    for dash, (colour, marker) in cycle(product(_DASHES, POINTS)):
        yield {"color": colour, "linestyle": dash, "linewidth": 1.2, "marker": marker, "markersize": 4}


def legend_outside(axes: "Axes", **content: Any) -> None:
    """A legend to the right of the axes, of what is on them or of what ``content`` says; the figure grows with it."""
    legend = axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, handlelength=4, **content)
    labels = [text.get_text() for text in legend.get_texts()]
    inches = sum(0.1 + 0.17 * (label.count("\n") + 1) for label in labels)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_figheight(max(figure.get_figheight(), inches + 0.5))


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG whole or not at all, without Matplotlib's version in it."""
    with written_whole(path) as beside:
        figure.savefig(beside, format="png", dpi=150, metadata={"Software": None})
