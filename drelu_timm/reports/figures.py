"""Figures of a report: accuracy over cap weight and over eps, the learned caps, and which methods differ.

Each ``draw_`` function returns a Matplotlib figure. It raises `InputError` if there is nothing to draw, or if
Matplotlib is not installed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
)
from ..results.result import EpsResult
from .evaluated_runs import EvaluatedRun
from .statistics import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ATTACK = "apgd-ce"  # of the paper's Figures 25 to 27


def read_caps(run: Path) -> np.ndarray | None:
    """Read all caps of a run's model, [N]; None if its weights were left out or have no caps.

    Raises:
        InputError: The weights file is cut short.
    """
    weights = run / "model" / WEIGHTS
    if not weights.is_file():
        return None
    try:
        with safe_open(weights, "pt") as tensors:  # NumPy has no bfloat16
            names = [name for name in tensors.keys() if name.rpartition(".")[2] == "cap"]  # noqa: SIM118 (not a dict)
            caps = [tensors.get_tensor(name) for name in names]
    except (OSError, SafetensorError) as error:
        raise InputError(f"{weights} cannot be read ({one_line(error)}). Restore it or train again.") from error
    return np.concatenate([cap.float().numpy().ravel() for cap in caps]) if caps else None


def draw_cap_weights(runs: Sequence[EvaluatedRun], title: str) -> "Figure":
    """Draw accuracy over the cap weight, as in the paper's Figures 11 to 24, with the verdict below each cap weight.

    Each attack inside the threat model is a thin line and the worst case a bold one. Lines are means over the seeds
    that have the attack, with error bars of one standard deviation where there are several.

    Args:
        runs: Runs of one model and method; those without a cap weight are ignored.
        title: Title.
    """
    by_weight: dict[float, list[EvaluatedRun]] = {}
    for run in runs:
        if run.cap_weight is not None:
            by_weight.setdefault(run.cap_weight, []).append(run)
    if not by_weight:
        raise InputError("No run has a D-ReLU with a cap weight, so there is nothing to draw.")
    by_weight = dict(sorted(by_weight.items()))
    figure, axes = accuracy_axes(_wrapped(title, 68))
    place = _logarithmic_with_zero(axes, list(by_weight))

    def line(accuracy: Callable[[Combined], float | None], label: str, **style: Any) -> None:
        measured = [
            [value for run in same if (value := accuracy(run.combined)) is not None] or [math.nan]
            for same in by_weight.values()
        ]
        _line_of_means(axes, [place(cap_weight) for cap_weight in by_weight], measured, label=label, **style)

    line(lambda combined: combined.worst, "worst case", marker="o", **WORST_CASE)  # first, below the attacks
    attacks = dict.fromkeys(attack for same in by_weight.values() for run in same for attack in run.combined.accuracy)
    attacks.pop("cw-l2", None)  # it does not search inside the threat model
    for attack, style in zip(attacks, attack_styles(), strict=False):
        line(lambda combined, attack=attack: combined.accuracy.get(attack), attack, **style)
    line(lambda combined: combined.clean, "clean", marker=".", **CLEAN)
    verdicts = [worst_verdict(run.verdict for run in same) for same in by_weight.values()]
    labels = [f"{cap_weight:g}  {verdict}" for cap_weight, verdict in zip(by_weight, verdicts, strict=True)]
    axes.set_xticks([place(cap_weight) for cap_weight in by_weight], labels, rotation=90)
    axes.set_xlabel("cap weight (the paper's balancer) and verdict")
    legend_outside(axes)
    return figure


def draw_eps(curves: Mapping[str, Sequence[Sequence[EpsResult]]], title: str) -> "Figure":
    """Draw accuracy under APGD-CE over eps, as in the paper's Figures 25 to 27, and the worst case.

    Each method has two lines of one color; the worst case is dashed. They are means over seeds at the eps that all
    seeds have. The legend has the worst verdict of a method, and the line of a masked method is annotated.

    Args:
        curves: By method, the curve of each seed; methods without APGD-CE are ignored.
        title: Title.
    """
    by_method = {label: at for label, of_seeds in curves.items() if (at := _by_eps(of_seeds))}
    if not by_method:
        raise InputError(f"No run has a curve under {_ATTACK}. Evaluate them with several --eps first.")
    figure, axes = accuracy_axes(_wrapped(title, 68))
    from matplotlib.lines import Line2D

    entries = []
    for (label, at), style in zip(by_method.items(), _method_styles(), strict=False):
        under_attack = [[point.accuracies[_ATTACK] for point in points] for points in at.values()]
        _line_of_means(axes, list(at), under_attack, label=label, **style)
        worst = [[point.worst for point in points] for points in at.values()]
        _line_of_means(axes, list(at), worst, label=f"{label}, worst case", **style, linestyle="--")
        verdict = worst_verdict(point.verdict.verdict for points in at.values() for point in points)
        if verdict == "masked":
            _annotate_masked(axes, list(at), [100 * float(np.mean(values)) for values in under_attack], style["color"])
        entries.append(Line2D([], [], label=_wrapped(f"{label} ({verdict})", 40), **style))
    entries += [Line2D([], [], color="black", label="under APGD-CE")]
    entries += [Line2D([], [], color="black", linestyle="--", label="worst case")]
    axes.set_xlabel("eps, in units of a [0, 1] pixel")
    legend_outside(axes, handles=entries, title="method (worst verdict over eps)", alignment="left")
    return figure


def _annotate_masked(axes: "Axes", eps: Sequence[float], accuracy: Sequence[float], color: str) -> None:
    """Write above the last point of a masked line that its accuracy is not robustness."""
    axes.annotate(
        "masked: not robustness",
        (eps[-1], accuracy[-1]),
        xytext=(-4, 8),
        textcoords="offset points",
        ha="right",
        color=color,
        fontsize=9,
    )


def _logarithmic_with_zero(axes: "Axes", values: Sequence[float]) -> Callable[[float], float]:
    """Make the x axis logarithmic, with 0 one decade below the smallest positive value, after a break.

    Returns:
        Function from a value to its position.
    """
    positive = [value for value in values if value > 0] or [1.0]
    zero = min(positive) / 10
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xlim((zero if 0 in values else min(positive)) / 2, max(positive) * 2)
    if 0 in values:
        at = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "center"}
        axes.text(zero * math.sqrt(10), 0, "//", **at, bbox={"facecolor": "white", "linewidth": 0, "pad": 0})
    return lambda value: value if value > 0 else zero


def _by_eps(curves: Sequence[Sequence[EpsResult]]) -> dict[float, list[EpsResult]]:
    """Return the points of all seeds at each eps that all of them have."""
    of_seeds = [{point.radius: point for point in curve if _ATTACK in point.accuracies} for curve in curves]
    common = set.intersection(*(set(at) for at in of_seeds)) if of_seeds else set()
    return {eps: [at[eps] for at in of_seeds] for eps in sorted(common)}


def _method_styles() -> Iterator[dict[str, Any]]:
    """Yield a style for each method; the first 12 differ. Dashes are reserved for the worst case."""
    for step in range(len(POINTS)):  # after 12, a color gets another marker
        markers = [marker for _, marker in POINTS[step:] + POINTS[:step]]
        for filled, ((color, _), marker) in product((True, False), zip(POINTS, markers, strict=True)):
            face = color if filled else "white"
            yield {"color": color, "linewidth": 1.5, "marker": marker, "markersize": 5, "markerfacecolor": face}


def draw_caps(caps: Mapping[str, np.ndarray], title: str) -> "Figure":
    """Draw histograms of learned caps, one panel per method, on one logarithmic axis.

    Args:
        caps: By method, the caps, [N], in units of the pre-activation. The leftmost bin also counts very small caps and
            caps of 0 or below, whose share is stated. Caps that are not finite are ignored.
        title: Title.
    """
    caps = {label: finite for label, values in caps.items() if (finite := values[np.isfinite(values)]).size}
    if not caps:
        raise InputError("No run has caps: the weights were left out, or they have no D-ReLU.")
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
    """Return edges, [41], over at least two decades, for tick labels, and at most eight below the largest cap."""
    high = max(caps.max(), 0) or 1.0
    low = max(caps[caps > 0].min(initial=high), high / 1e8)
    margin = math.sqrt(max(100 * low / high, 1.2))
    return np.geomspace(low / margin, high * margin, 41)


def draw_critical_difference(comparison: Comparison, title: str) -> "Figure":
    """Draw the mean ranks of methods on a line; bars join the ones that do not differ by Nemenyi's test."""
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # Wider margins, since the labels move with the axes after the layout has measured them.
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
        bar.set_xdata(sorted(bar.get_xdata()))  # the library iterates over a set, whose order differs in every process
    last = max(len(ranks), min(ranks.values()) + comparison.critical_difference)
    axes.set_xlim(1 - margin, last + margin)
    axes.set_xticks(range(1, len(ranks) + 1))


def _line_of_means(axes: "Axes", places: Sequence[float], measured: Sequence[Sequence[float]], **style: Any) -> None:
    """Draw a line through means of accuracies in [0, 1], with a gap at NaN.

    Error bars are one standard deviation (n - 1), where there are several values.
    """
    means = [100 * np.mean(values) for values in measured]
    deviations = [100 * np.std(values, ddof=1) if len(values) > 1 else 0 for values in measured]
    axes.plot(places, means, clip_on=False, **style)
    if any(deviations):  # separate from the line, since they would appear in its legend entry
        axes.errorbar(places, means, deviations, fmt="none", ecolor=style["color"], elinewidth=1, capsize=2)


def _wrapped(text: str, width: int) -> str:
    return fill(text, width, break_on_hyphens=False)
