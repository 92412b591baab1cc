"""Runs that differ in their seed only become one line of a table: means over seeds, labels, the balancer to show."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from .outcomes import VERDICTS, Group, Outcome
from .paper import net_name, paper_order
from .suites import ATTACKS

HELD_OUT = "held-out"  # under the inner attack, on training images that were held out
_NAMED = 3  # settings, at most, that go into a name
WHITE_BOX = "white-box"  # the lowest of a run's accuracies under single white-box attacks


@dataclass(frozen=True)
class Mean:
    """An accuracy over the seeds that have it.

    Attributes:
        mean: In percent.
        std: Standard deviation over seeds (n - 1), in percentage points; None for one seed.
        n_seeds: How many seeds.
        sources: The files that it comes from.
    """

    mean: float
    std: float | None
    n_seeds: int
    sources: tuple[Path, ...]


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
    def verdict(self) -> str:
        """The worst on gradient masking, with counts where seeds differ: "masked 2 of 3"."""
        verdicts = [outcome.at.verdict for outcome in self.outcomes]
        worst = max(verdicts, key=VERDICTS.index)
        count = verdicts.count(worst)
        return worst if count == len(verdicts) else f"{worst} {count} of {len(verdicts)}"

    @property
    def masked(self) -> bool:
        """Whether any seed is."""
        return self.verdict.startswith(VERDICTS[-1])

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
        logs = column == HELD_OUT
        sources = [path for one, _ in known for path in ([one.run / "log.jsonl"] if logs else one.sources)]
        return Mean(fmean(values), stdev(values) if len(values) > 1 else None, len(values), tuple(sources))


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
        name, written = _family(family[0]), ", ".join(settings)
        net, method = net_name(family[0].first.net), family[0].first.method
        details[name] = "" if name == plain else written if len(settings) <= _NAMED else f"settings {number}"
        if details[name] != written:
            named = f"{method} without more words" if name == plain else f"{method}, {details[name]}"
            sentences.append(f"{net}: {named} is {method} with {written}.")
    return details, sentences


def choose_balancers(averages: Sequence[Average]) -> tuple[list[Average], list[str]]:
    """Of lines that differ in the balancer only, the one with the highest held-out accuracy; of equal ones the smaller.

    Returns:
        The lines that are left, in their order, and how they were chosen, in sentences.
    """
    shown, choices, sentences, masked = [], [], [], []
    for family in families(averages):
        best = _best(family)
        shown += family if best is None else [best]
        if len(family) == 1:
            continue
        of = ", ".join(f"{one.first.cap_weight:g}" for one in family)
        if best is None or (held_out := best.mean(HELD_OUT)) is None:
            named = f"{net_name(family[0].first.net)}, {family[0].method}"
            sentences.append(f"{named}: no run has a log, so all balancers are shown: {of}.")
            continue
        choices.append(f"{_named(best)} (of {of}; {held_out.mean:.2f} %)")
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


def _best(family: Sequence[Average]) -> Average | None:
    if len(family) == 1:
        return family[0]
    known = [(held_out.mean, -(one.first.cap_weight or 0), one) for one in family if (held_out := one.mean(HELD_OUT))]
    return max(known, key=lambda one: one[:2])[2] if known else None


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


def _accuracy(outcome: Outcome, column: str) -> float | None:
    at = outcome.at
    if column == WHITE_BOX:
        single = [left for name, left in at.accuracy.items() if name in ATTACKS and ATTACKS[name].kind == WHITE_BOX]
        return min(single, default=None)
    named = {"clean": at.clean, "worst": at.worst, "cw-l2": at.cw_l2, HELD_OUT: outcome.held_out}
    return named[column] if column in named else at.accuracy.get(column)


def _differing(one: Average, namesakes: Sequence[Average]) -> list[str]:
    """The flags that are not the same in all of ``namesakes``, with their values in ``one``.

    Those of the run that it went on from tell apart only from others that went on from one.
    """
    own = _flags(one)
    others = [_flags(other) for other in namesakes]

    def differs(name: str) -> bool:
        start = name.startswith("init_from ")
        return any(other.get(name) != own[name] for other in others if name in other or not start)

    return [f"{name} {_written(own[name])}" for name in own if differs(name)]


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
