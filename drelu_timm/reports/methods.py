"""Methods: runs that differ only in their seed, their mean accuracies, and their names."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from ..attacks.suites import ATTACKS
from ..formatting import written
from ..results.combined import worst_verdict
from .evaluated_runs import EvaluatedRun, Group
from .paper import COLUMNS, SQUARE_COLUMNS, model_name, paper_order
from .training_settings import Flags

HELD_OUT = "held-out"  # column: under the inner attack, on held-out training images
WHITE_BOX = "white-box"  # column: the lowest accuracy under a single white-box attack in the threat model
HEADINGS = {
    **COLUMNS,
    **SQUARE_COLUMNS,
    "autoattack": "AutoAttack",
    "worst": "Worst case",
    "certified": "Certified",
    HELD_OUT: "Held-out PGD",
    "masking": "Verdict",
    "images": "Test images",
    "seeds": "Seeds",
}
_MAX_IN_NAME = 3  # settings in a name; methods that differ in more get a number
_START = "init_from "  # prefix of the settings of the run that a run started from


@dataclass(frozen=True)
class Mean:
    """Mean accuracy over the seeds that have it.

    Attributes:
        mean: In percent.
        std: Standard deviation over seeds (n - 1), in percentage points; None for one seed.
        n_seeds: Number of seeds.
        n_examples: The different numbers of test images.
        sources: Files that it comes from.
        at_most: Whether it is only an upper bound because rows of an evaluation are missing.
    """

    mean: float
    std: float | None
    n_seeds: int
    n_examples: tuple[int, ...]
    sources: tuple[Path, ...]
    at_most: bool = False


@dataclass(frozen=True)
class Method:
    """Runs with equal settings, one per seed: a row of a table.

    Attributes:
        runs: At least one, by ascending seed.
        detail: Settings that distinguish it from methods of the same architecture and name, such as "cap_lr 0.001".
    """

    runs: tuple[EvaluatedRun, ...]
    detail: str = ""

    @property
    def first(self) -> EvaluatedRun:
        """The run with the smallest seed; all runs share its settings."""
        return self.runs[0]

    @property
    def architecture(self) -> str:
        """Name of the architecture."""
        return self.first.architecture

    @property
    def name(self) -> str:
        """Name without the cap weight."""
        return ", ".join(filter(None, [self.first.method, self.detail]))

    @property
    def training(self) -> str:
        """Name with the cap weight, as in tables."""
        return ", ".join(filter(None, [self.first.training, self.detail]))

    @property
    def label(self) -> str:
        """Model and training, such as "Dense D-ReLU-0.1"."""
        return f"{model_name(self.architecture)} {self.training}"

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs."""
        return [run.seed for run in self.runs]

    @property
    def n_examples(self) -> list[int]:
        """The different numbers of test images, ascending."""
        return sorted({run.combined.n_examples for run in self.runs})

    @property
    def worst_verdict(self) -> str:
        """Worst verdict of all seeds."""
        return worst_verdict(run.verdict for run in self.runs)

    @property
    def verdict(self) -> str:
        """Worst verdict, with counts where seeds differ: "masked 2 of 3 (on 500 images)".

        The number of images is given where no evaluation that the accuracies come from has that verdict.
        """
        worst = self.worst_verdict
        with_it = [run for run in self.runs if run.verdict == worst]
        text = worst if len(with_it) == len(self.runs) else f"{worst} {len(with_it)} of {len(self.runs)}"
        images = [run.combined.verdict_images for run in with_it]
        elsewhere = sorted({count for count in images if count is not None})
        return text if None in images else f"{text} (on {', '.join(map(str, elsewhere))} images)"

    def mean(self, column: str) -> Mean | None:
        """Return the mean accuracy over seeds; None if no run has it.

        Args:
            column: `HELD_OUT`, "clean", "worst", "certified", `WHITE_BOX`, or an attack; "cw-l2" is the accuracy at its
                L2 budget.
        """
        known = [(run, value) for run in self.runs if (value := _accuracy(run, column)) is not None]
        if not known:
            return None
        values = [100 * value for _, value in known]
        return Mean(
            mean=fmean(values),
            std=stdev(values) if len(values) > 1 else None,
            n_seeds=len(values),
            n_examples=tuple(sorted({run.combined.n_examples for run, _ in known})),
            sources=tuple(
                path
                for run, _ in known
                for path in ((run.path / "log.jsonl",) if column == HELD_OUT else run.sources(column))
            ),
            at_most=column == "worst" and any(run.combined.at_most for run, _ in known),
        )


def _accuracy(run: EvaluatedRun, column: str) -> float | None:
    combined = run.combined
    if column == WHITE_BOX:
        return min((value for name, value in combined.accuracy.items() if _is_white_box(name)), default=None)
    named = {"clean": combined.clean, "worst": combined.worst, "certified": combined.certified}
    named |= {"cw-l2": combined.cw_l2, HELD_OUT: run.held_out}
    return named[column] if column in named else combined.accuracy.get(column)


def _is_white_box(attack: str) -> bool:
    """Return whether it is a single white-box attack inside the threat model; a minimum-norm attack is not."""
    return attack in ATTACKS and ATTACKS[attack].kind == WHITE_BOX and not ATTACKS[attack].minimum_norm


@dataclass(frozen=True)
class GroupMethods:
    """Methods of a group.

    Attributes:
        group: What they have in common.
        all: All methods, in the paper's order.
        shown: Methods of the main tables: at the head, and of each method the cap weight chosen on held-out images.
        remarks: One sentence for each name that needs an explanation and each choice.
    """

    group: Group
    all: list[Method]
    shown: list[Method]
    remarks: list[str]

    @property
    def seeds(self) -> list[int]:
        """Seeds of all methods together."""
        return sorted({seed for method in self.all for seed in method.seeds})

    def short_name(self, shown: Method) -> str:
        """Return the name of a shown method, with the cap weight if several cap weights are shown."""
        same = [other for other in self.by_architecture[shown.architecture] if other.name == shown.name]
        return shown.name if len(same) == 1 else shown.training

    @property
    def by_architecture(self) -> dict[str, list[Method]]:
        """The shown methods by architecture."""
        return by_architecture(self.shown)


def by_architecture(methods: Iterable[Method]) -> dict[str, list[Method]]:
    """Return the methods of each architecture."""
    found: dict[str, list[Method]] = {}
    for method in methods:
        found.setdefault(method.architecture, []).append(method)
    return found


def methods_of(group: Group, runs: Iterable[EvaluatedRun]) -> GroupMethods:
    """Average the runs of a group over seeds and choose what the main tables show."""
    methods, names = average(runs)
    at_head = [method for method in methods if method.first.placement == "head"]
    shown, choices = choose_cap_weights(at_head or methods)
    return GroupMethods(group, methods, shown, [*names, *choices])


def average(runs: Iterable[EvaluatedRun]) -> tuple[list[Method], list[str]]:
    """Return the methods of a group in the paper's order, and a sentence on each abbreviated name.

    Methods of one architecture and name are distinguished by their settings; those with the most runs keep the plain
    name.
    """
    by_settings: dict[tuple[str, str], list[EvaluatedRun]] = {}
    for run in runs:
        by_settings.setdefault((run.architecture, run.settings_key), []).append(run)
    methods = [Method(tuple(sorted(same, key=lambda run: run.seed))) for same in by_settings.values()]
    namesakes: dict[tuple[str, str], list[list[Method]]] = {}
    for family in families(methods):
        namesakes.setdefault((family[0].architecture, family[0].first.method), []).append(family)
    details: dict[str, str] = {}
    sentences = []
    for same_name in namesakes.values():
        described, remarks = _distinguish(same_name)
        details |= described
        sentences += remarks
    named = [replace(method, detail=details[_family_key(method)]) for method in methods]
    return sorted(named, key=lambda method: paper_order(method.architecture, method.first.method)), sentences


def _distinguish(namesakes: Sequence[Sequence[Method]]) -> tuple[dict[str, str], list[str]]:
    """Return the detail in the name of each of several families of one name, and sentences on abbreviated ones."""
    details, sentences = {}, []
    counts = {_family_key(family[0]): sum(len(one.runs) for one in family) for family in namesakes}
    most = [key for key, count in counts.items() if count == max(counts.values())]
    plain = most[0] if len(most) == 1 else None
    for number, family in enumerate(namesakes, 1):
        key, method = _family_key(family[0]), family[0].first.method
        settings = _differing_settings(family[0], [other[0] for other in namesakes])
        complete = ", ".join(settings)
        details[key] = "" if key == plain else complete if len(settings) <= _MAX_IN_NAME else f"settings {number}"
        if details[key] != complete:
            named = ", ".join(filter(None, [method, details[key]]))
            sentences.append(f"{model_name(family[0].architecture)}: {named} has {complete}.")
    return details, sentences


def choose_cap_weights(methods: Sequence[Method]) -> tuple[list[Method], list[str]]:
    """Keep of methods that differ only in the cap weight the one with the highest held-out accuracy, or the smaller.

    The choice is among those for which the most seeds have a held-out accuracy.

    Returns:
        The remaining methods in their order, and sentences on the choices.
    """
    shown, choices, sentences, masked = [], [], [], []
    for family in families(methods):
        if len(family) == 1:
            shown += family
            continue
        held_out = {one.training: mean for one in family if (mean := one.mean(HELD_OUT))}
        if not held_out:
            shown += family
            sentences.append(
                f"{model_name(family[0].architecture)} {family[0].name}: no run has a log, so all cap weights are "
                "shown."
            )
            continue
        n_seeds = max(mean.n_seeds for mean in held_out.values())
        among = [one for one in family if one.training in held_out and held_out[one.training].n_seeds == n_seeds]
        best = max(among, key=lambda one: (round(held_out[one.training].mean, 9), -(one.first.cap_weight or 0)))
        shown.append(best)
        passed_over = [one for one in family if one not in among]
        fewer = f"; fewer seeds with a log: {_cap_weights(passed_over)}" if passed_over else ""
        seeds = "1 seed" if n_seeds == 1 else f"{n_seeds} seeds"
        accuracy = f"{held_out[best.training].mean:.2f} %, {seeds}"
        choices.append(f"{best.label} (of {_cap_weights(among)}; {accuracy}{fewer})")
        masked += [best.label] if best.worst_verdict == "masked" else []
    if choices:
        sentences.append(
            "Cap weights were chosen by the mean accuracy under the inner attack on held-out training images: "
            f"{'; '.join(choices)}."
        )
    if masked:
        sentences.append(
            f"Masked among these: {'; '.join(masked)}. The attack on held-out images is misled in the same way: a "
            "choice by gradient attacks, as in the paper, prefers the cap weight that hides the gradients best."
        )
    return [method for method in methods if method in shown], sentences


def _cap_weights(methods: Iterable[Method]) -> str:
    return ", ".join(written(method.first.cap_weight) for method in methods)


def families(methods: Iterable[Method]) -> list[list[Method]]:
    """Return the methods in lists that differ at most in the cap weight."""
    by_key: dict[str, list[Method]] = {}
    for method in methods:
        by_key.setdefault(_family_key(method), []).append(method)
    return list(by_key.values())


def _family_key(method: Method) -> str:
    return json.dumps([method.architecture, _family_settings(method)], sort_keys=True)


def _family_settings(method: Method) -> Flags:
    settings = dict(method.first.settings)
    if method.first.cap_weight is not None:
        del settings["cap_weight"]
    return settings


def _differing_settings(method: Method, namesakes: Sequence[Method]) -> list[str]:
    """Return the settings that differ among ``namesakes``, with their values in ``method``.

    A setting that a file of an earlier version lacks is "not known". Settings of a start distinguish a run only from
    other runs that have a start.
    """
    own, others = _family_settings(method), [_family_settings(other) for other in namesakes]
    names = dict.fromkeys(name for settings in (own, *others) for name in settings)

    def differs(name: str) -> bool:
        with_it = [settings for settings in (own, *others) if _applies(name, settings)]
        return len({json.dumps(settings.get(name, "not known")) for settings in with_it}) > 1

    return [f"{name} {written(own.get(name, 'not known'))}" for name in names if differs(name) and _applies(name, own)]


def _applies(name: str, settings: Flags) -> bool:
    """Return whether a setting is one of the run itself, or of a start that the run has."""
    before, of_start, _ = name.rpartition(_START)
    return not of_start or settings.get(f"{before}init_from", "none") != "none"
