"""The pictures of a report: accuracy over balancer and over eps, the learned caps, and which methods differ."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from scikit_posthocs import critical_difference_diagram

from ..errors import InputError, one_line
from ..models.weights import WEIGHTS
from ..results.combined import Combined, worst_verdict
from ..results.plotting import (
    CLEAN,
    POINTS,
    WORST_CASE,
    accuracy_axes,
    attack_styles,
    legend_outside,
    require_matplotlib,
    save_figure,
)
from ..results.result import EpsResult
from .outcomes import Outcome
from .statistics import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ATTACK = "apgd-ce"  # of the paper's Figures 25 to 27


def draw_balancers(outcomes: Sequence[Outcome], path: Path, *, title: str) -> None:
    """Draw accuracy over the balancer, as in the paper's Figures 11 to 24, with the verdict beneath every balancer.

    A thin line an attack that searches the ball, a bold one for the worst case; means over seeds, with bars of a
    standard deviation where there are several. An attack that not all seeds were evaluated with is averaged over those
    that were.

    Args:
        outcomes: Of one net and method; those without a balancer are passed over.
        path: The picture, a PNG.
        title: Above it.

    Raises:
        InputError: No balancer among the outcomes, or Matplotlib is not installed.
    """
    save_figure(_balancers(outcomes, title), path)


def draw_eps(curves: Mapping[str, Sequence[Sequence[EpsResult]]], path: Path, *, title: str) -> None:
    """Draw accuracy under APGD-CE over eps, as in the paper's Figures 25 to 27, and the worst case beside it.

    Two lines of one colour a method, the worst case dashed; means over seeds at the radii that all of them have, with
    bars of a standard deviation. The legend gives the worst verdict of a method's seeds and radii.

    Args:
        curves: By method, the curve of each of its seeds; methods without APGD-CE are passed over.
        path: The picture, a PNG.
        title: Above it.

    Raises:
        InputError: No curve under APGD-CE, or Matplotlib is not installed.
    """
    save_figure(_eps(curves, title), path)


def draw_caps(caps: Mapping[str, np.ndarray], path: Path, *, title: str) -> None:
    """Draw histograms of learned caps, a panel a net, all on one logarithmic axis.

    Args:
        caps: By net, the caps, [N], in units of the pre-activation. Very small ones, and those not above 0, are counted
            in the leftmost bin; how many are not above 0 is said. Those that are not finite are left out.
        path: The picture, a PNG.
        title: Above it.

    Raises:
        InputError: No caps, or Matplotlib is not installed.
    """
    save_figure(_caps(caps, title), path)


def draw_critical_difference(comparison: Comparison, path: Path, *, title: str) -> None:
    """Draw the mean ranks of methods on a line; bars join those that do not differ by Nemenyi's test.

    Args:
        comparison: What was compared.
        path: The picture, a PNG.
        title: Above it.

    Raises:
        InputError: Matplotlib is not installed.
    """
    save_figure(_critical_difference(comparison, title), path)


def read_caps(run: Path) -> np.ndarray | None:
    """All caps of a run's model, [N]; None where its weights were left out, or hold no cap.

    Raises:
        InputError: A weights file that is cut short.
    """
    weights = run / "model" / WEIGHTS
    if not weights.is_file():
        return None
    try:
        with safe_open(weights, "pt") as tensors:  # NumPy knows no bfloat16
            names = [name for name in tensors.keys() if name.rpartition(".")[2] == "cap"]  # noqa: SIM118 (no dict)
            caps = [tensors.get_tensor(name) for name in names]
    except (OSError, SafetensorError) as error:
        raise InputError(f"{weights} cannot be read ({one_line(error)}); restore it or train anew") from error
    return np.concatenate([cap.float().numpy().ravel() for cap in caps]) if caps else None


def _balancers(outcomes: Sequence[Outcome], title: str) -> "Figure":
    by_balancer: dict[float, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.cap_weight is not None:
            by_balancer.setdefault(outcome.cap_weight, []).append(outcome)
    if not by_balancer:
        raise InputError("no D-ReLU with a balancer among the runs: there is nothing to draw over the balancer")
    by_balancer = dict(sorted(by_balancer.items()))
    figure, axes = accuracy_axes(_wrapped(title, 68))
    place = _logarithmic_with_zero(axes, list(by_balancer))

    def line(accuracy: Callable[[Combined], float | None], label: str, **style: Any) -> None:
        measured = [_present(accuracy(one.at) for one in of_it) or [math.nan] for of_it in by_balancer.values()]
        _line_of_means(axes, [place(balancer) for balancer in by_balancer], measured, label=label, **style)

    line(lambda point: point.worst, "worst case", marker="o", **WORST_CASE)  # first: attacks may lie upon it
    attacks = dict.fromkeys(attack for of_it in by_balancer.values() for one in of_it for attack in one.at.accuracy)
    attacks.pop("cw-l2", None)  # it knows no ball
    for attack, style in zip(attacks, attack_styles(), strict=False):
        line(lambda point, attack=attack: point.accuracy.get(attack), attack, **style)
    line(lambda point: point.clean, "clean", marker=".", **CLEAN)
    verdicts = [worst_verdict(one.verdict for one in of_it) for of_it in by_balancer.values()]
    labels = [f"{balancer:g}  {verdict}" for balancer, verdict in zip(by_balancer, verdicts, strict=True)]
    axes.set_xticks([place(balancer) for balancer in by_balancer], labels, rotation=90)
    axes.set_xlabel("balancer (cap weight) and verdict")
    legend_outside(axes)
    return figure


def _eps(curves: Mapping[str, Sequence[Sequence[EpsResult]]], title: str) -> "Figure":
    by_method = {label: at for label, of_seeds in curves.items() if (at := _by_radius(of_seeds))}
    if not by_method:
        raise InputError(f"no curve under {_ATTACK} among the runs: evaluate them with several --eps first")
    figure, axes = accuracy_axes(_wrapped(title, 68))
    from matplotlib.lines import Line2D

    entries = []
    for (label, at), style in zip(by_method.items(), _method_styles(), strict=False):
        under_attack = [[point.accuracies[_ATTACK] for point in points] for points in at.values()]
        _line_of_means(axes, list(at), under_attack, label=label, **style)
        worst = [[point.worst for point in points] for points in at.values()]
        _line_of_means(axes, list(at), worst, label=f"{label}, worst case", **style, linestyle="--")
        verdict = worst_verdict(point.verdict.verdict for points in at.values() for point in points)
        entries.append(Line2D([], [], label=_wrapped(f"{label} ({verdict})", 40), **style))
    entries += [Line2D([], [], color="black", label="under APGD-CE")]
    entries += [Line2D([], [], color="black", linestyle="--", label="worst case")]
    axes.set_xlabel("eps, in units of a [0, 1] pixel")
    legend_outside(axes, handles=entries, title="method (worst verdict over eps)", alignment="left")
    return figure


def _logarithmic_with_zero(axes: "Axes", values: Sequence[float]) -> Callable[[float], float]:
    """Make the x axis logarithmic, with a place for 0 a decade below the smallest other value, behind a break."""
    positive = [value for value in values if value > 0] or [1.0]
    zero = min(positive) / 10
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xlim((zero if 0 in values else min(positive)) / 2, max(positive) * 2)
    if 0 in values:
        at = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "center"}
        axes.text(zero * math.sqrt(10), 0, "//", **at, bbox={"facecolor": "white", "linewidth": 0, "pad": 0})
    return lambda value: value if value > 0 else zero


def _by_radius(curves: Sequence[Sequence[EpsResult]]) -> dict[float, list[EpsResult]]:
    """The points of all seeds, by the radii that each of them was attacked at."""
    of_seeds = [{point.radius: point for point in curve if _ATTACK in point.accuracies} for curve in curves]
    radii = set.intersection(*(set(at) for at in of_seeds)) if of_seeds else set()
    return {radius: [at[radius] for at in of_seeds] for radius in sorted(radii)}


def _method_styles() -> Iterator[dict[str, Any]]:
    """A look for every method, one after the other; dashes are for the worst case, so the first 12 differ."""
    for step in range(len(POINTS)):  # beyond 12, a colour gets another marker
        markers = [marker for _, marker in POINTS[step:] + POINTS[:step]]
        for filled, ((colour, _), marker) in product((True, False), zip(POINTS, markers, strict=True)):
            face = colour if filled else "white"
            yield {"color": colour, "linewidth": 1.5, "marker": marker, "markersize": 5, "markerfacecolor": face}


def _caps(caps: Mapping[str, np.ndarray], title: str) -> "Figure":
    caps = {label: finite for label, values in caps.items() if (finite := values[np.isfinite(values)]).size}
    if not caps:
        raise InputError("no caps among the runs: their weights were left out, or they have no D-ReLU")
    require_matplotlib()
    from matplotlib.figure import Figure

    columns = min(len(caps), 3)
    rows = math.ceil(len(caps) / columns)
    figure = Figure(figsize=(9, 1.4 + 1.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    bins = _logarithmic_bins(np.concatenate(list(caps.values())))
    for axes, (label, values) in zip(panels, caps.items(), strict=False):
        _histogram(axes, label, values, bins)
    for axes in panels[len(caps) :]:
        axes.set_visible(False)
    panels[0].set(xscale="log", xlim=(bins[0], bins[-1]))
    figure.suptitle(_wrapped(title, 68))
    figure.supxlabel("learned cap, in units of the pre-activation (all smaller ones in the leftmost bin)")
    figure.supylabel("share of caps in %")
    return figure


def _histogram(axes: "Axes", label: str, caps: np.ndarray, bins: np.ndarray) -> None:
    within = np.clip(caps, bins[0], bins[-1])
    axes.hist(within, bins.tolist(), weights=np.full(caps.size, 100 / caps.size), color=POINTS[0][0])
    below = f", {np.mean(caps <= 0):.0%} not above 0" if (caps <= 0).any() else ""
    axes.set_title(f"{_wrapped(label, 32)}\n{caps.size:,} caps{below}", fontsize=9)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _logarithmic_bins(caps: np.ndarray) -> np.ndarray:
    """Edges, [41]: two decades at least, so that there are tick labels, and eight below the largest cap at most."""
    high = max(caps.max(), 0) or 1.0
    low = max(caps[caps > 0].min(initial=high), high / 1e8)
    margin = math.sqrt(max(100 * low / high, 1.2))
    return np.geomspace(low / margin, high * margin, 41)


def _critical_difference(comparison: Comparison, title: str) -> "Figure":
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # Wider margins, as labels that move with the axes end beside where the layout was told they would.
    figure = Figure(figsize=(9, 4), layout=ConstrainedLayoutEngine(w_pad=0.2))
    axes = figure.subplots()
    _rank_diagram(axes, comparison)
    bottom, top = axes.get_ylim()
    lines = max(text.get_text().count("\n") + 1 for text in axes.texts)
    figure.set_figheight(1 + (top - bottom) * max(0.55, 0.1 + 0.17 * lines))
    axes.set_title(_wrapped(title, 68), pad=20)
    figure.supxlabel(
        f"mean rank over {comparison.n_blocks} blocks, 1 is the best; bars join methods whose difference is not "
        f"significant\n(Nemenyi, alpha {comparison.alpha:g}, critical difference {comparison.critical_difference:.2f})",
        fontsize=9,
    )
    return figure


def _rank_diagram(axes: "Axes", comparison: Comparison) -> None:
    labels = {method: _wrapped(method, 32) for method in comparison.mean_ranks}
    ranks = {labels[method]: rank for method, rank in comparison.mean_ranks.items()}
    margin = 0.015 * len(ranks)
    drawn = critical_difference_diagram(
        ranks,
        comparison.nemenyi_p.rename(index=labels, columns=labels),
        cd=comparison.critical_difference,
        alpha=comparison.alpha,
        ax=axes,
        label_fmt_left="{label} ({rank:.2f})",
        label_fmt_right="({rank:.2f}) {label}",
        elbow_props={"color": "0.3", "linewidth": 1},
        marker_props={"color": "black"},
        text_h_margin=margin,
    )
    for bar in [bar for bars in drawn["crossbars"] for bar in bars]:
        bar.set_xdata(sorted(bar.get_xdata()))  # the library goes through a set, in an order that every process changes
    last = max(len(ranks), min(ranks.values()) + comparison.critical_difference)
    axes.set_xlim(1 - margin, last + margin)
    axes.set_xticks(range(1, len(ranks) + 1))


def _line_of_means(axes: "Axes", places: Sequence[float], measured: Sequence[Sequence[float]], **style: Any) -> None:
    """A line through means of accuracies in [0, 1], broken where one is no number.

    With bars of a standard deviation (n - 1) where there are several.
    """
    means = [100 * np.mean(values) for values in measured]
    deviations = [100 * np.std(values, ddof=1) if len(values) > 1 else 0 for values in measured]
    axes.plot(places, means, clip_on=False, **style)
    if any(deviations):  # apart from the line, whose look in the legend they would change
        axes.errorbar(places, means, deviations, fmt="none", ecolor=style["color"], elinewidth=1, capsize=2)


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _wrapped(text: str, width: int) -> str:
    return fill(text, width, break_on_hyphens=False)
