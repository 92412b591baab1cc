"""What attacks leave of a net at one radius, by one evaluation or by several."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..attacks.threat_model import radius_of
from ..spelling import written
from .masking import VERDICTS


@dataclass(frozen=True)
class Point:
    """What attacks leave of a net at one radius.

    Attributes:
        eps: The radius as written.
        n_examples: Test images.
        clean: Accuracy in [0, 1].
        accuracy: Likewise, by attack or sequence of attacks; the first attack of a sequence, which saw all examples,
            is an attack of its own too.
        worst: Likewise, over all of them and the probes for gradient masking.
        verdict: On gradient masking: "sound", "undecided" or "masked".
        zero_gradient_share: Of the examples classified right, those whose input gradient is zero, in [0, 1].
        cw_l2: Accuracy at the L2 radius ``cw_budget`` under Carlini and Wagner's attack, which looks for the nearest
            adversarial example and knows no ball; its ``accuracy`` counts only what lies in the ball.
        cw_budget: eps for L2; for Linf the radius of the ball's corners, eps * sqrt(C * H * W).
        tried: Every attack with its settings as text, each once; what these decide is what it finds.
        at_most: Whether ``worst`` is only an upper bound: that of several evaluations whose rows are not all there.
    """

    eps: str
    n_examples: int
    clean: float
    accuracy: dict[str, float]
    worst: float
    verdict: str
    zero_gradient_share: float
    cw_l2: float | None = None
    cw_budget: float | None = None
    tried: frozenset[tuple[str, str]] = field(default_factory=frozenset)
    at_most: bool = False

    @property
    def radius(self) -> float:
        """eps as a number."""
        return radius_of(self.eps)

    @property
    def columns(self) -> set[str]:
        """The attacks that it has an accuracy for; "cw-l2" is the one at its L2 budget."""
        return {*self.accuracy} - {"cw-l2"} | ({"cw-l2"} if self.cw_l2 is not None else set())


def point_of(at: dict[str, Any], n_examples: int, precision: str) -> Point:
    """A point as a result file holds it, checked before; the precision of the search is a setting of its attacks."""
    sequences = at.get("sequences") or {}
    first = [next(iter(stages.items())) for stages in sequences.values() if stages]
    cw = at.get("cw_l2") or {}
    settings = {attack: {} for attack in at["accuracy"]} | at.get("settings", {})
    return Point(
        eps=at["eps"],
        n_examples=n_examples,
        clean=at["clean"],
        accuracy={**dict(first), **at["accuracy"]},
        worst=at["worst"],
        verdict=at["verdict"]["verdict"],
        zero_gradient_share=at["zero_gradient_share"],
        cw_l2=cw.get("accuracy_at_budget"),
        cw_budget=cw.get("budget"),
        tried=frozenset(
            (attack, _listed(of_it if precision == "float32" else {**of_it, "precision": precision}))
            for attack, of_it in settings.items()
            if attack not in sequences
        ),
    )


def together(points: Sequence[Point], others: Sequence[Point], survivors: np.ndarray | None) -> Point:
    """Several evaluations of one net: each attack's lowest accuracy, the worst case over all, and the worst verdict.

    Args:
        points: One an evaluation, on the same examples.
        others: Those on other numbers of examples, of which only what they broke counts here.
        survivors: Which examples [N] of ``points`` nothing broke in any of them all; None where that is not known.
    """
    first = points[0]
    if len(points) + len(others) == 1:
        return first
    accuracy: dict[str, float] = {}
    for attack in dict.fromkeys(attack for point in points for attack in point.accuracy):
        accuracy[attack] = min(point.accuracy[attack] for point in points if attack in point.accuracy)
    by_cw = sorted((point.cw_l2, point.cw_budget) for point in points if point.cw_l2 is not None)
    lowest = min(point.worst for point in points)
    return Point(
        eps=first.eps,
        n_examples=first.n_examples,
        clean=first.clean,
        accuracy=accuracy,
        worst=lowest if survivors is None else min(lowest, float(survivors.mean())),
        verdict=worst_verdict(point.verdict for point in points),
        zero_gradient_share=max(point.zero_gradient_share for point in points),
        cw_l2=by_cw[0][0] if by_cw else None,
        cw_budget=by_cw[0][1] if by_cw else None,
        tried=frozenset().union(*(point.tried for point in points)),
        at_most=survivors is None,
    )


def worst_verdict(verdicts: Iterable[str]) -> str:
    """Of at least one."""
    return max(verdicts, key=VERDICTS.index)


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {', '.join(map(written, value)) if isinstance(value, list) else written(value)}"
        for name, value in settings.items()
    )
