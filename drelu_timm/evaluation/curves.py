"""The picture of a sweep over eps: what every attack leaves of a model's accuracy as the ball grows."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..attacks.threat_model import radius_of
from .pictures import CLEAN, WORST_CASE, accuracy_axes, attack_styles, legend_outside, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_curve(curve: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Draw accuracy over eps: a thin line an attack, a bold one for the worst case, the verdict beneath every eps.

    Args:
        curve: As in a result file, a mapping an eps, in rising order: ``eps`` as written, ``clean``, ``accuracy`` by
            attack and ``worst`` in [0, 1], and ``verdict`` with the word under ``verdict``.
        path: The picture, a PNG; a reader sees it whole or not at all.
        title: Above it.

    Raises:
        InputError: Matplotlib is not installed.
    """
    save_figure(_figure(curve, title), path)


def verdict_at(at: Mapping[str, Any]) -> str:
    """The verdict at an eps of a curve; none at 0, where there is nothing to withstand."""
    return at["verdict"]["verdict"] if _radius(at) else "-"


def _radius(at: Mapping[str, Any]) -> float:
    return radius_of(at["eps"])


def _figure(curve: Sequence[Mapping[str, Any]], title: str) -> "Figure":
    figure, axes = accuracy_axes(title)
    eps = [_radius(at) for at in curve]

    def line(accuracies: Iterable[float], label: str, **style) -> None:
        axes.plot(eps, [100 * accuracy for accuracy in accuracies], label=label, clip_on=False, **style)

    line((at["worst"] for at in curve), "worst case", **WORST_CASE)  # first: attacks may lie upon it
    for attack, style in zip(curve[0]["accuracy"], attack_styles(), strict=False):
        line((at["accuracy"][attack] for at in curve), attack, **style)
    line((at["clean"] for at in curve), "clean", **CLEAN)
    axes.set_xticks(eps, [f"{at['eps']}  {verdict_at(at)}" for at in curve], rotation=90)
    axes.set(xlim=(eps[0], eps[-1]), xlabel="eps and verdict")
    legend_outside(axes)
    return figure
