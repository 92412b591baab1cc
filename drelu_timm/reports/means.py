"""Runs that differ in their seed only, as one: means over seeds, and the worst verdict."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from ..attacks.suites import ATTACKS
from ..evaluation.points import worst_verdict
from .outcomes import Outcome

HELD_OUT = "held-out"  # under the inner attack, on training images that were held out
WHITE_BOX = "white-box"  # the lowest of a run's accuracies in the ball under single white-box attacks


@dataclass(frozen=True)
class Mean:
    """An accuracy over the seeds that have it.

    Attributes:
        mean: In percent.
        std: Standard deviation over seeds (n - 1), in percentage points; None for one seed.
        n_seeds: How many seeds.
        n_examples: How many test images, each number once.
        sources: The files that it comes from.
        at_most: Whether it is only an upper bound.
    """

    mean: float
    std: float | None
    n_seeds: int
    n_examples: tuple[int, ...]
    sources: tuple[Path, ...]
    at_most: bool = False


@dataclass(frozen=True)
class Average:
    """Runs of equal settings, by seed.

    Attributes:
        outcomes: One a seed, at least one.
        detail: The settings that tell it from others of the same net and method, such as "cap_lr 0.001"; or empty.
    """

    outcomes: tuple[Outcome, ...]
    detail: str = ""

    @property
    def first(self) -> Outcome:
        """Of the smallest seed; net, method and balancer are those of all."""
        return self.outcomes[0]

    @property
    def method(self) -> str:
        """Without the balancer."""
        return ", ".join(filter(None, [self.first.method, self.detail]))

    @property
    def training(self) -> str:
        """As tables call it: the method with its balancer."""
        return ", ".join(filter(None, [self.first.training, self.detail]))

    @property
    def seeds(self) -> list[int]:
        """Of the trainings."""
        return [outcome.seed for outcome in self.outcomes]

    @property
    def n_examples(self) -> list[int]:
        """How many test images the evaluations have, each number once."""
        return sorted({outcome.at.n_examples for outcome in self.outcomes})

    @property
    def worst_verdict(self) -> str:
        """On gradient masking, in a word: the worst of all seeds."""
        return worst_verdict(outcome.verdict for outcome in self.outcomes)

    @property
    def verdict(self) -> str:
        """The worst on gradient masking, with counts where seeds differ: "masked 2 of 3 (on 500 images)".

        The images are named where the evaluations that the accuracies come from do not have that verdict.
        """
        worst = self.worst_verdict
        of_it = [outcome for outcome in self.outcomes if outcome.verdict == worst]
        text = worst if len(of_it) == len(self.outcomes) else f"{worst} {len(of_it)} of {len(self.outcomes)}"
        images = [outcome.verdict_images for outcome in of_it]
        elsewhere = sorted({count for count in images if count is not None})
        return text if None in images else f"{text} (on {', '.join(map(str, elsewhere))} images)"

    @property
    def masked(self) -> bool:
        """Whether any seed is."""
        return self.worst_verdict == "masked"

    @property
    def undecided(self) -> bool:
        """Whether the verdict says neither."""
        return self.worst_verdict == "undecided"

    def mean(self, column: str) -> Mean | None:
        """Accuracy over seeds; None where no run has it.

        Args:
            column: `HELD_OUT`, "clean", "worst", `WHITE_BOX`, an attack or a sequence of attacks; "cw-l2" is the
                accuracy at its L2 budget.
        """
        known = [(outcome, value) for outcome in self.outcomes if (value := _accuracy(outcome, column)) is not None]
        if not known:
            return None
        values = [100 * value for _, value in known]
        return Mean(
            mean=fmean(values),
            std=stdev(values) if len(values) > 1 else None,
            n_seeds=len(values),
            n_examples=tuple(sorted({outcome.at.n_examples for outcome, _ in known})),
            sources=tuple(path for outcome, _ in known for path in _sources(outcome, column)),
            at_most=column == "worst" and any(outcome.at.at_most for outcome, _ in known),
        )


def _accuracy(outcome: Outcome, column: str) -> float | None:
    at = outcome.at
    if column == WHITE_BOX:
        return min((left for name, left in at.accuracy.items() if _in_ball(name)), default=None)
    named = {"clean": at.clean, "worst": at.worst, "cw-l2": at.cw_l2, HELD_OUT: outcome.held_out}
    return named[column] if column in named else at.accuracy.get(column)


def _in_ball(attack: str) -> bool:
    """Whether it is a single white-box attack that searches the ball, which Carlini and Wagner's does not."""
    return attack in ATTACKS and ATTACKS[attack].kind == WHITE_BOX and not ATTACKS[attack].minimum_norm


def _sources(outcome: Outcome, column: str) -> tuple[Path, ...]:
    return (outcome.run / "log.jsonl",) if column == HELD_OUT else outcome.sources(column)
