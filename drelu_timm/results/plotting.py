"""Plots of accuracies: their common style, and the curve of a sweep over eps."""

from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import cycle, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..files import atomic_file
from .result import EpsResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


VERDICT_COLORS = {"sound": "green", "masked": "red", "undecided": "yellow"}  # in the terminal
# Okabe and Ito's colors, which color-blind readers can distinguish (https://jfly.uni-koeln.de/color/), without black,
# which is for the worst case, and yellow, which is faint on white; the markers distinguish them in gray.
POINTS = tuple(zip(("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"), "osDv^P", strict=True))
_DASHES = ("-", "--", ":", "-.")  # distinguish lines of one color
CLEAN = {"color": "grey", "linewidth": 1.2}
WORST_CASE = {"color": "black", "linewidth": 4}


def require_matplotlib() -> None:
    """Check, before any work, that plots can be drawn.

    Raises:
        InputError: matplotlib is missing; it is in the extra `report` only.
    """
    if find_spec("matplotlib") is None:
        raise InputError("matplotlib, which draws the pictures, is missing; pip install 'drelu-timm[report]'")


def accuracy_axes(title: str) -> tuple["Figure", "Axes"]:
    """Return a figure with empty axes whose y axis is accuracy in %.

    Raises:
        InputError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # pyplot would add global state

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(ylim=(0, 100), ylabel="accuracy in %", title=title)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def attack_styles() -> Iterator[dict[str, Any]]:
    """Yield the style of one attack's line after the other; the first 24 differ."""
    for dash, (color, marker) in cycle(product(_DASHES, POINTS)):
        yield {"color": color, "linestyle": dash, "linewidth": 1.2, "marker": marker, "markersize": 4}


def legend_outside(axes: "Axes", **content: Any) -> None:
    """Add a legend right of the axes, of their lines or of ``content``; the figure grows to its height."""
    legend = axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, handlelength=4, **content)
    labels = [text.get_text() for text in legend.get_texts()]
    inches = sum(0.1 + 0.17 * (label.count("\n") + 1) for label in labels)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_figheight(max(figure.get_figheight(), inches + 0.5))


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG with a palette of 256 colors, a third of the size, atomically and without Matplotlib's version."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure.set_dpi(150)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    with atomic_file(path) as temporary:
        picture.quantize(256, dither=Image.Dither.NONE).save(temporary, "PNG", optimize=True)


def draw_curve(points: Sequence[EpsResult], path: Path, *, title: str) -> None:
    """Draw accuracy over eps: a thin line per attack, a thick one for the worst case, the verdict below every eps.

    Args:
        points: From the smallest eps, all under the same attacks.
        path: PNG file to write.
        title: Title of the plot.

    Raises:
        InputError: matplotlib is not installed.
    """
    save_figure(_curve(points, title), path)


def verdict_at(point: EpsResult) -> str:
    """Return the verdict at an eps; "-" at 0, where there is nothing to attack."""
    return str(point.verdict) if point.radius else "-"


def _curve(points: Sequence[EpsResult], title: str) -> "Figure":
    figure, axes = accuracy_axes(title)
    eps = [point.radius for point in points]

    def line(accuracies: Iterable[float], label: str, **style: Any) -> None:
        axes.plot(eps, [100 * accuracy for accuracy in accuracies], label=label, clip_on=False, **style)

    line((point.worst for point in points), "worst case", **WORST_CASE)  # first, so that attacks are drawn over it
    for attack, style in zip(points[0].accuracy, attack_styles(), strict=False):
        line((point.accuracy[attack] for point in points), attack, **style)
    line((point.clean for point in points), "clean", **CLEAN)
    axes.set_xticks(eps, [f"{point.eps}  {verdict_at(point)}" for point in points], rotation=90)
    axes.set(xlim=(eps[0], eps[-1]), xlabel="eps and verdict")
    legend_outside(axes)
    return figure
