"""Runs that differ in their seed only, as one: means over seeds, the lines of a group's tables, their names."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..attacks.suites import ATTACKS
from ..formatting import written
from ..results.combined import worst_verdict
from .outcomes import Group, Outcome
from .paper import net_name, paper_order

HELD_OUT = "held-out"  # under the inner attack, on training images that were held out
WHITE_BOX = "white-box"  # the lowest of a run's accuracies in the ball under single white-box attacks
_NAMED = 3  # settings, at most, that go into a name
_START = "init_from "  # before the flags of the run that another went on from


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
        images = [outcome.at.verdict_images for outcome in of_it]
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


@dataclass(frozen=True)
class Lines:
    """A group, line by line.

    Attributes:
        group: What all lines have in common.
        all: Every line.
        shown: Those of the main tables: of each method at the head the best balancer, chosen on held-out images.
        remarks: How they were named and chosen; a sentence each.
    """

    group: Group
    all: list[Average]
    shown: list[Average]
    remarks: list[str]

    @property
    def seeds(self) -> list[int]:
        """Of all lines together."""
        return sorted({seed for one in self.all for seed in one.seeds})

    def label(self, one: Average) -> str:
        """The method of a shown line, with its balancer where lines of several balancers are shown."""
        same = [other for other in self.by_net[one.first.net] if other.method == one.method]
        return one.method if len(same) == 1 else one.training

    @property
    def by_net(self) -> dict[str, list[Average]]:
        """The shown lines of each net."""
        nets: dict[str, list[Average]] = {}
        for one in self.shown:
            nets.setdefault(one.first.net, []).append(one)
        return nets


def lines_of(group: Group, outcomes: Iterable[Outcome]) -> Lines:
    """Average a group's outcomes, and choose what the main tables show of it."""
    averages, names = average(outcomes)
    at_head = [one for one in averages if one.first.placement == "head"]
    shown, choices = choose_balancers(at_head or averages)
    return Lines(group, averages, shown, [*names, *choices])


def average(outcomes: Iterable[Outcome]) -> tuple[list[Average], list[str]]:
    """The lines of a group, in the paper's order; those of a net that share a method are told apart by their settings.

    The settings with the most runs keep the plain name of the method.

    Returns:
        The lines, and a sentence on each name that does not say all.
    """
    by_settings: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        by_settings.setdefault((outcome.net, outcome.settings), []).append(outcome)
    averages = [Average(tuple(sorted(same, key=lambda outcome: outcome.seed))) for same in by_settings.values()]
    methods: dict[tuple[str, str], list[list[Average]]] = {}
    for family in families(averages):
        methods.setdefault((family[0].first.net, family[0].first.method), []).append(family)
    details: dict[str, str] = {}
    sentences = []
    for namesakes in methods.values():
        described, about = _told_apart(namesakes)
        details |= described
        sentences += about
    lines = [replace(one, detail=details[_family(one)]) for one in averages]
    return sorted(lines, key=lambda one: paper_order(one.first.net, one.first.method)), sentences


def _told_apart(namesakes: Sequence[Sequence[Average]]) -> tuple[dict[str, str], list[str]]:
    """What tells families of one net and method apart, and sentences on what names leave out."""
    details, sentences = {}, []
    plain = _most_runs(namesakes)
    for number, family in enumerate(namesakes, 1):
        settings = _differing(family[0], [other[0] for other in namesakes])
        name, said = _family(family[0]), ", ".join(settings)
        net, method = net_name(family[0].first.net), family[0].first.method
        details[name] = "" if name == plain else said if len(settings) <= _NAMED else f"settings {number}"
        if details[name] != said:
            named = f"{method} without more words" if name == plain else f"{method}, {details[name]}"
            sentences.append(f"{net}: {named} is {method} with {said}.")
    return details, sentences


def choose_balancers(averages: Sequence[Average]) -> tuple[list[Average], list[str]]:
    """Of lines that differ in the balancer only, the one with the highest held-out accuracy; of equal ones the smaller.

    Chosen among those with the most seeds that have one.

    Returns:
        The lines that are left, in their order, and how they were chosen, in sentences.
    """
    shown, choices, sentences, masked = [], [], [], []
    for family in families(averages):
        if len(family) == 1:
            shown += family
            continue
        among = _with_most_seeds(family)
        if not among:
            shown += family
            named = f"{net_name(family[0].first.net)}, {family[0].method}"
            sentences.append(f"{named}: no run has a log, so all balancers are shown: {_balancers(family)}.")
            continue
        best, held_out, n_seeds = _best(among)
        shown.append(best)
        passed_over = [one for one in family if one not in among]
        fewer = f"; not of {_balancers(passed_over)}, with fewer seeds that have a log" if passed_over else ""
        seeds = "1 seed" if n_seeds == 1 else f"{n_seeds} seeds"
        choices.append(f"{_named(best)} (of {_balancers(among)}{fewer}; {held_out:.2f} %, {seeds})")
        masked += [_named(best)] if best.masked else []
    if choices:
        sentences.append(
            "Balancers were chosen by the mean accuracy under the inner attack on held-out training images: "
            f"{'; '.join(choices)}."
        )
    if masked:
        sentences.append(
            f"Of these, masked: {'; '.join(masked)}. There the attack on held-out images is fooled as well: choosing "
            "by gradient attacks, as the paper does, picks the balancer that hides the gradients best."
        )
    return [one for one in averages if one in shown], sentences


def families(averages: Iterable[Average]) -> list[list[Average]]:
    """Lines that differ in the balancer at most, together."""
    by_family: dict[str, list[Average]] = {}
    for one in averages:
        by_family.setdefault(_family(one), []).append(one)
    return list(by_family.values())


def _with_most_seeds(family: Sequence[Average]) -> list[Average]:
    """Those with the most seeds that have a held-out accuracy; none where no seed has one."""
    seeds = [held_out.n_seeds if (held_out := one.mean(HELD_OUT)) else 0 for one in family]
    return [one for one, count in zip(family, seeds, strict=True) if count == max(seeds) > 0]


def _best(among: Sequence[Average]) -> tuple[Average, float, int]:
    """The line with the highest held-out accuracy, that accuracy in percent, and of how many seeds it is."""
    known = [(held_out, one) for one in among if (held_out := one.mean(HELD_OUT))]
    held_out, best = max(known, key=lambda one: (round(one[0].mean, 9), -(one[1].first.cap_weight or 0)))
    return best, held_out.mean, held_out.n_seeds


def _balancers(family: Iterable[Average]) -> str:
    return ", ".join(written(one.first.cap_weight) for one in family)


def _named(one: Average) -> str:
    return f"{net_name(one.first.net)}, {one.training}"


def _family(one: Average) -> str:
    """What lines have in common that differ in the balancer at most."""
    return json.dumps([one.first.net, _flags(one)], sort_keys=True)


def _flags(one: Average) -> dict[str, Any]:
    flags = dict(one.first.flags)
    if one.first.cap_weight is not None:
        del flags["cap_weight"]
    return flags


def _most_runs(namesakes: Sequence[Sequence[Average]]) -> str | None:
    """The family with more runs than any other; None where there is none such."""
    counts = {_family(same[0]): sum(len(one.outcomes) for one in same) for same in namesakes}
    most = [family for family, count in counts.items() if count == max(counts.values())]
    return most[0] if len(most) == 1 else None


def _differing(one: Average, namesakes: Sequence[Average]) -> list[str]:
    """The flags that are not the same in all of ``namesakes``, with their values in ``one``.

    A flag that one of them lacks, as those of an earlier version do, is not known there. Those of the run that it went
    on from tell apart only from others that went on from one.
    """
    own = _flags(one)
    others = [_flags(other) for other in namesakes]
    names = dict.fromkeys(name for flags in (own, *others) for name in flags)

    def differs(name: str) -> bool:
        with_it = [flags for flags in (own, *others) if _concerns(name, flags)]
        return len({json.dumps(flags[name]) if name in flags else None for flags in with_it}) > 1

    return [
        f"{name} {written(own[name]) if name in own else 'not known'}"
        for name in names
        if differs(name) and _concerns(name, own)
    ]


def _concerns(name: str, flags: dict[str, Any]) -> bool:
    """Whether a flag is one of the run itself, or of a start that the run has."""
    before, of_start, _ = name.rpartition(_START)
    return not of_start or flags.get(f"{before}init_from", "none") != "none"
