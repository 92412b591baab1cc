"""Several evaluations of the same weights at one eps, counted together."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ..formatting import written
from .examples import share
from .result import VERDICTS, EpsResult, Result, Verdict


def worst_verdict(verdicts: Iterable[str]) -> str:
    """Return the worst of at least one, in a word."""
    return max(verdicts, key=VERDICTS.index)


@dataclass(frozen=True)
class Combined:
    """Evaluations of the same weights at one eps, on the first images of the same test set.

    An image counts as broken where any of them broke it, an attack by its lowest accuracy, and the worst verdict holds.

    Attributes:
        eps: As written.
        results: The evaluations that accuracies are of, on as many examples each; at least one.
        others: Those on other numbers of examples, of which the broken images and the verdict count.
        survivors: bool [N], on which examples of ``results`` nothing in any of them all fooled the model; None where
            that is not known, or where there is one evaluation only.
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
        """Return what one of the evaluations found at the eps."""
        point = result.at(self.eps)
        assert point is not None  # of those that have none, none is combined
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
        """Share of the examples that stayed robust in all evaluations, or an upper bound of it: see ``at_most``."""
        lowest = min(point.worst for point in self.points)
        return lowest if self.survivors is None else min(lowest, share(self.survivors))

    @property
    def at_most(self) -> bool:
        """Whether ``worst`` is only an upper bound: that of several evaluations whose rows are not all there."""
        return len(self.all) > 1 and self.survivors is None

    @property
    def zero_gradient_share(self) -> float:
        """Of the examples classified right, the share with an input gradient of zero, at most."""
        return max(point.zero_gradient_share for point in self.points)

    @property
    def cw_l2(self) -> float | None:
        """Accuracy at the L2 radius ``cw_budget`` under Carlini and Wagner's attack, which knows no epsilon ball."""
        return None if self._cw is None else self._cw[0]

    @property
    def cw_budget(self) -> float | None:
        """eps for L2; for Linf the radius of the corners of the epsilon ball, eps * sqrt(C * H * W)."""
        return None if self._cw is None else self._cw[1]

    @property
    def _cw(self) -> tuple[float, float] | None:
        found = [(point.cw_l2.accuracy_at_budget, point.cw_l2.budget) for point in self.points if point.cw_l2]
        return min(found, default=None)

    @cached_property
    def decisive(self) -> tuple[Result, ...]:
        """The evaluations that have the worst verdict on gradient masking of all."""
        words = [self.point_of(result).verdict.verdict for result in self.all]
        worst = worst_verdict(words)
        return tuple(result for result, word in zip(self.all, words, strict=True) if word == worst)

    @property
    def verdict(self) -> Verdict:
        """The worst on gradient masking of all evaluations, as the first of them explains it."""
        return self.point_of(self.decisive[0]).verdict

    @property
    def verdict_images(self) -> int | None:
        """The number of test images of the verdict where none of ``results`` has it."""
        images = [result.n_examples for result in self.decisive]
        return None if self.n_examples in images else max(images)

    @cached_property
    def tried(self) -> frozenset[tuple[str, str]]:
        """Every attack of ``results`` with its settings as text; the settings decide what it finds."""
        return frozenset(one for result in self.results for one in _tried(result, self.point_of(result)))

    @cached_property
    def tried_elsewhere(self) -> frozenset[tuple[str, str, int]]:
        """The same of ``others``, with their numbers of examples."""
        return frozenset(
            (*one, other.n_examples) for other in self.others for one in _tried(other, self.point_of(other))
        )

    @property
    def columns(self) -> set[str]:
        """The attacks that there is an accuracy for; "cw-l2" is the one at its L2 budget."""
        return set().union(*(point.columns for point in self.points))


def _tried(result: Result, point: EpsResult) -> Iterable[tuple[str, str]]:
    """Each attack with its settings; the precision of the search is one of them, and a sequence is its attacks."""
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
