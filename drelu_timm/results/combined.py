"""Several evaluations of the same weights at one eps, combined."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ..formatting import written
from .examples import share
from .result import VERDICTS, EpsResult, Result, Verdict


def worst_verdict(verdicts: Iterable[str]) -> str:
    """Return the worst of one or more verdicts."""
    return max(verdicts, key=VERDICTS.index)


@dataclass(frozen=True)
class Combined:
    """Evaluations of the same weights at one eps, on the first images of the same test set.

    An example is robust if it is in all of them; an attack counts by its lowest accuracy; the worst verdict holds.

    Attributes:
        eps: As written.
        results: Evaluations that accuracies are of, on the same number of examples; at least one.
        others: Evaluations on other numbers of examples, whose adversarial images and verdicts count.
        survivors: bool [N], the examples of ``results`` on which no evaluation fooled the model; None where rows are
            missing, or for a single evaluation.
    """

    eps: str
    results: tuple[Result, ...]
    others: tuple[Result, ...] = ()
    survivors: Tensor | None = None

    @property
    def all(self) -> tuple[Result, ...]:
        """All evaluations."""
        return (*self.results, *self.others)

    @cached_property
    def points(self) -> tuple[EpsResult, ...]:
        """The accuracies of ``results``."""
        return tuple(self.point_of(result) for result in self.results)

    def point_of(self, result: Result) -> EpsResult:
        """Return the accuracies of one of the evaluations."""
        point = result.at(self.eps)
        assert point is not None  # only evaluations at this eps are combined
        return point

    @property
    def n_examples(self) -> int:
        """Number of test images."""
        return self.results[0].n_examples

    @property
    def clean(self) -> float:
        """Clean accuracy in [0, 1]."""
        return self.points[0].clean

    @cached_property
    def accuracy(self) -> dict[str, float]:
        """The lowest accuracy in [0, 1] under each attack or column of attacks."""
        lowest: dict[str, float] = {}
        for point in self.points:
            for attack, accuracy in point.accuracies.items():
                lowest[attack] = min(accuracy, lowest.get(attack, 1.0))
        return lowest

    @property
    def worst(self) -> float:
        """Worst-case accuracy over all evaluations, or an upper bound of it: see ``at_most``."""
        lowest = min(point.worst for point in self.points)
        return lowest if self.survivors is None else min(lowest, share(self.survivors))

    @property
    def certified(self) -> float | None:
        """Largest certified accuracy of ``results``, each a lower bound of ``worst``; None where there is none."""
        return max((point.certified for point in self.points if point.certified is not None), default=None)

    @property
    def at_most(self) -> bool:
        """Whether ``worst`` is only an upper bound, since rows of an evaluation are missing."""
        return len(self.all) > 1 and self.survivors is None

    @property
    def zero_gradient_share(self) -> float:
        """Largest share of the correctly classified examples with an input gradient of zero."""
        return max(point.zero_gradient_share for point in self.points)

    @property
    def cw_l2(self) -> float | None:
        """Accuracy at the L2 radius ``cw_budget`` under Carlini and Wagner's minimum-norm attack."""
        return None if self._cw is None else self._cw[0]

    @property
    def cw_budget(self) -> float | None:
        """eps for L2; for Linf the distance of the corners, eps * sqrt(C * H * W)."""
        return None if self._cw is None else self._cw[1]

    @property
    def _cw(self) -> tuple[float, float] | None:
        found = [(point.cw_l2.accuracy_at_budget, point.cw_l2.budget) for point in self.points if point.cw_l2]
        return min(found, default=None)

    @cached_property
    def decisive(self) -> tuple[Result, ...]:
        """Evaluations with the worst verdict on gradient masking."""
        words = [self.point_of(result).verdict.verdict for result in self.all]
        worst = worst_verdict(words)
        return tuple(result for result, word in zip(self.all, words, strict=True) if word == worst)

    @property
    def verdict(self) -> Verdict:
        """Worst verdict on gradient masking, with the evidence of the first evaluation that has it."""
        return self.point_of(self.decisive[0]).verdict

    @property
    def verdict_images(self) -> int | None:
        """Number of test images of the verdict, if none of ``results`` has it."""
        images = [result.n_examples for result in self.decisive]
        return None if self.n_examples in images else max(images)

    @cached_property
    def tried(self) -> frozenset[tuple[str, str]]:
        """Every attack of ``results`` with its settings as text."""
        return frozenset(one for result in self.results for one in _tried(result, self.point_of(result)))

    @cached_property
    def tried_elsewhere(self) -> frozenset[tuple[str, str, int]]:
        """Every attack of ``others`` with its settings and number of examples."""
        return frozenset(
            (*one, other.n_examples) for other in self.others for one in _tried(other, self.point_of(other))
        )

    @property
    def columns(self) -> set[str]:
        """Attacks with an accuracy; "cw-l2" is at its L2 budget."""
        return set().union(*(point.columns for point in self.points))


def _tried(result: Result, point: EpsResult) -> Iterable[tuple[str, str]]:
    """Yield each attack with its settings and the precision of its search; a sequence yields its attacks."""
    precision = {} if result.precision == "float32" else {"precision": result.precision}
    settings = {attack: {} for attack in point.accuracy} | point.settings
    for attack, of_it in settings.items():
        if attack not in point.sequences:
            yield attack, _listed({**of_it, **precision})


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {', '.join(map(written, value)) if isinstance(value, list) else written(value)}"
        for name, value in settings.items()
    )
