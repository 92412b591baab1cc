"""Sections of a report: the opening, statistics, figures, and how the models were trained and attacked."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..errors import InputError
from ..formatting import written
from ..results.plotting import save_figure
from .evaluated_runs import EvaluatedRun, EvaluatedRuns
from .figures import draw_cap_weights, draw_caps, draw_critical_difference, draw_eps, read_caps
from .methods import GroupMethods, Method, families
from .paper import COLUMNS, PRINTED_STATISTICS, model_name, paper_scores
from .statistics import Comparison, attack_differences, compare_methods, compare_pair, counted, scores
from .tables import papers_number, slug
from .training_settings import TrainingSettings

# Settings that the names of groups and trainings contain already.
_IN_NAMES = {"dataset", "model", "objective", "beta", "activation", "placement", "cap_weight", "cap_penalty"}


@dataclass(frozen=True)
class Section:
    """Section of a report: a heading, and below it text, a table and a picture.

    Attributes:
        title: Heading, and the alternative text of the picture.
        text: Plain text; a blank line ends a paragraph.
        table: Table whose cells are shown by `str`, missing ones as empty; its index is not shown.
        picture: PNG file.
        missing: Why the section could not be made, in one sentence; "" for one that was made.
    """

    title: str
    text: str = ""
    table: pd.DataFrame | None = None
    picture: Path | None = None
    missing: str = ""

    @property
    def paragraphs(self) -> list[str]:
        """Paragraphs of the text, without empty ones."""
        return [paragraph.strip() for paragraph in self.text.split("\n\n") if paragraph.strip()]


def missing_as_lines(sections: Sequence[Section]) -> list[Section]:
    """Replace the sections that could not be made by one section at the end, with one line for each."""
    lines = [f"{section.title}: {section.missing}" for section in sections if section.missing]
    made = [section for section in sections if not section.missing]
    return [*made, Section("Not made", "\n\n".join(lines))] if lines else made


def opening(runs: EvaluatedRuns, groups: Sequence[GroupMethods]) -> Section:
    """Return what a reader has to know before the first table."""
    shown = [method for methods in groups for method in methods.shown]
    masked, undecided = (
        "; ".join(dict.fromkeys(method.label for method in shown if method.worst_verdict == verdict))
        for verdict in ("masked", "undecided")
    )
    text = [f"This report is incomplete. {' '.join(runs.unfinished)}"] if runs.unfinished else []
    text.append(
        "The worst case is the robust accuracy: the share of the test images on which nothing fooled the model."
    )
    if masked:
        text.append(
            "The accuracy of a masked row under gradient attacks is not robustness: the model hides its gradients, so "
            f"these attacks fail where others succeed. Masked: {masked}."
        )
    if not masked and not undecided:
        without = "" if any(method.first.cap_weight is not None for method in shown) else " No model has a D-ReLU."
        text.append(f"The verdict on all rows of the main tables is sound.{without}")
    if undecided:
        text.append(f"For these rows the probes show neither a sound nor a masked accuracy: {undecided}.")
    if len(groups) > 1:
        listed = "; ".join(str(methods.group) for methods in groups)
        text.append(f"The {len(groups)} groups cannot be compared with each other and have separate tables: {listed}.")
    return Section(f"Robustness of {counted(len({run.path for run in runs.found}), 'run')}", "\n\n".join(text))


# Statistics


def statistics(methods: GroupMethods, folder: Path) -> list[Section]:
    """Return whether the methods differ: under the paper's attacks, in the worst case, and pair by pair."""
    without_natural = replace(methods, shown=[one for one in methods.shown if one.first.method != "natural"])
    worst, remarks = scores(methods, ["worst"])
    return [
        _comparison(
            f"Methods under the paper's attacks: {methods.group}",
            *scores(without_natural, [*COLUMNS]),
            folder / f"methods-{slug(methods.group)}.png",
            "A block is a model under one of the paper's attacks or none, as in the paper. Blocks of one model are not "
            "independent, so p is too small, and accuracies of masked rows count as if they were robustness. Natural "
            "training is left out, as in the paper: it is so far below that any methods would differ.",
        ),
        _comparison(
            f"Methods in the worst case: {methods.group}",
            worst,
            f"{remarks} {attack_differences(methods.shown)}".strip(),
            folder / f"methods-worst-{slug(methods.group)}.png",
            "A block is a model.",
        ),
        _pairs(methods),
    ]


def papers_statistics(groups: Iterable[GroupMethods]) -> list[Section]:
    """Return the statistics of every table of the paper that has a group's numbers, once each."""
    numbers = dict.fromkeys(number for methods in groups if (number := papers_number(methods.group)))
    printed = ", ".join(f"{name} = {value}" for name, value in PRINTED_STATISTICS.items())
    text = {2: f" It prints {printed}."}
    return [
        _comparison(
            f"Methods in the paper's table {number}",
            paper_scores(number),
            "",
            None,
            f"From the accuracies that the paper prints.{text.get(number, '')}",
        )
        for number in numbers
    ]


def _comparison(title: str, frame: pd.DataFrame, remarks: str, picture: Path | None, text: str) -> Section:
    try:
        comparison = compare_methods(frame)
    except InputError as error:
        return Section(title, missing=str(error))
    text = " ".join(filter(None, [_statistics_text(comparison), text, remarks]))
    if picture is not None:
        try:
            save_figure(draw_critical_difference(comparison, title), picture)
        except InputError as error:
            text, picture = f"{text} Not drawn: {error}", None
    return Section(title, text, _mean_ranks(comparison), picture)


def _statistics_text(comparison: Comparison) -> str:
    def number(value: float, form: str = ".2f") -> str:
        return "not defined" if isnan(value) else f"{value:{form}}"

    return (
        f"Over {comparison.n_blocks} blocks: one-way ANOVA F = {number(comparison.anova_f)}, "
        f"p = {number(comparison.anova_p, '.2g')}; Friedman chi-square = {number(comparison.friedman_chi2)}, "
        f"p = {number(comparison.friedman_p, '.2g')}, F_F = {number(comparison.f_f)}, "
        f"p = {number(comparison.f_f_p, '.2g')}; mean ranks further apart than Nemenyi's critical difference, "
        f"{comparison.critical_difference:.2f}, differ at alpha {comparison.alpha:g}."
    )


def _mean_ranks(comparison: Comparison) -> pd.DataFrame:
    """Return mean ranks and Nemenyi's p of every pair, as text."""
    methods = sorted(comparison.mean_ranks, key=lambda method: comparison.mean_ranks[method])
    p = comparison.nemenyi_p.loc[methods, methods]
    table = {"Method": methods, "Mean rank": [f"{comparison.mean_ranks[method]:.2f}" for method in methods]}
    return pd.DataFrame(table | {f"p against {method}": [f"{value:.2g}" for value in p[method]] for method in methods})


def _pairs(methods: GroupMethods) -> Section:
    """Return McNemar's test of every two methods of a model, on the test images of the first seed that both have."""
    title = f"Pairs of methods in the worst case: {methods.group}"
    rows: list[dict[str, str]] = []
    untested: list[str] = []
    for first, second in (pair for shown in methods.by_architecture.values() for pair in combinations(shown, 2)):
        if row := _pair(first, second):
            rows.append(row)
        else:
            untested.append(f"{first.label} and {second.training}")
    needed = "a common seed with rows per example on the same number of test images"
    if not rows:
        return Section(title, missing=f"No two methods of a model have {needed}.")
    text = (
        "McNemar's exact test on the test images of the first common seed, and the difference of the two accuracies in "
        "percentage points with its 95 % interval. An image counts as correct if no evaluation fooled the model on it. "
        "p is for one pair, not corrected for the number of pairs, and for these two trained models, not other seeds."
    )
    without = f"\n\nNot tested, without {needed}: {'; '.join(untested)}." if untested else ""
    return Section(title, f"{text} {attack_differences(methods.shown)}".strip() + without, pd.DataFrame(rows))


def _pair(first: Method, second: Method) -> dict[str, str] | None:
    """Return a row of the table; None if the two cannot be tested."""
    common = [seed for seed in first.seeds if seed in second.seeds]
    if not common:
        return None
    one, other = (next(run for run in method.runs if run.seed == common[0]) for method in (first, second))
    correct = one.survivors(), other.survivors()
    if correct[0] is None or correct[1] is None or len(correct[0]) != len(correct[1]):
        return None
    pair = compare_pair(correct[0], correct[1])
    return {
        "Model": model_name(first.architecture),
        "First": first.training,
        "Second": second.training,
        "Seed": str(common[0]),
        "Images": str(pair.n_examples),
        "Only first correct": str(pair.only_first),
        "Only second": str(pair.only_second),
        "Difference": f"{pair.difference:+.2f} ({pair.interval[0]:+.2f} to {pair.interval[1]:+.2f})",
        "p": f"{pair.p:.2g}",
    }


# Figures


def figures(methods: GroupMethods, folder: Path, runs: EvaluatedRuns) -> list[Section]:
    """Return accuracy over cap weights, and the learned caps. Weights that cannot be read are recorded in ``runs``."""
    group, sections = methods.group, []
    for family in families(methods.all):
        if len(family) > 1:
            title = f"Cap weights: {model_name(family[0].architecture)}, {family[0].name}: {group}"
            seeds = ", ".join(f"{written(one.first.cap_weight)} {len(one.runs)}" for one in family)
            images = " or ".join(map(str, sorted({count for one in family for count in one.n_examples})))
            text = (
                f"On the first {images} test images; seeds by cap weight: {seeds}. A line has a gap where an attack "
                "was not run. CW_L2, which does not search inside the threat model, is in the tables only."
            )
            of_family = [run for one in family for run in one.runs]
            sections.append(_drawn(title, folder, draw_cap_weights, of_family, text))
    for architecture, shown in methods.by_architecture.items():
        if caps := _caps(shown, runs):
            title = f"Learned caps: {model_name(architecture)}, {group}"
            sections.append(_drawn(title, folder, draw_caps, caps))
    return sections


def over_eps(groups: Iterable[GroupMethods], folder: Path) -> list[Section]:
    """Return accuracy over eps, one figure per model, with and without generated images as in the paper.

    Each suite and number of images has its own figure, since only curves of the same ones can be averaged and compared.
    """
    kinds: dict[tuple[str, str, str, int], dict[str, dict[Path, EvaluatedRun]]] = {}
    for methods in groups:
        group = methods.group
        for method in methods.shown:
            name = f"{model_name(method.architecture)}, {group.title}, {group.norm}"
            training = method.training + (" + generated images" if group.generated else "")
            for run in method.runs:
                if sweep := run.sweep:
                    kind = (name, group.dataset, sweep.suite, sweep.n_examples)
                    kinds.setdefault(kind, {}).setdefault(training, {})[run.path] = run  # once for all eps
    names = [name for name, *_ in kinds]
    sections = []
    for (name, _, suite, images), of_kind in kinds.items():
        title = f"Over eps: {name}" + (f", suite {suite} on {images} images" if names.count(name) > 1 else "")
        seeds = ", ".join(f"{training} {len(runs)}" for training, runs in of_kind.items())
        text = (
            f"The rows of the main tables at other eps, under the suite {suite}, on the first {images} test images. "
            f"Seeds: {seeds}."
        )
        curves = {training: [run.curve for run in runs.values()] for training, runs in of_kind.items()}
        sections.append(_drawn(title, folder, draw_eps, curves, text))
    return sections


def _caps(shown: Iterable[Method], runs: EvaluatedRuns) -> dict[str, np.ndarray]:
    """Return the caps of all seeds of each method that has any."""
    caps: dict[str, list[np.ndarray]] = {}
    for method in shown:
        for run in method.runs if method.first.cap_weight is not None else ():
            try:
                learned = read_caps(run.path)
            except InputError as error:
                runs.skip(error)
                continue
            if learned is not None:
                caps.setdefault(method.training, []).append(learned)
    return {training: np.concatenate(of_seeds) for training, of_seeds in caps.items()}


def _drawn(title: str, folder: Path, draw: Callable[..., Any], content: object, text: str = "") -> Section:
    picture = folder / f"{slug(title)}.png"
    try:
        save_figure(draw(content, title), picture)
    except InputError as error:
        return Section(title, missing=str(error))
    return Section(title, text, picture=picture)


# How the models were trained and attacked


def trainings(groups: Iterable[GroupMethods]) -> Section:
    """Return the training settings: shared ones as text, the others in one row per method."""
    rows = [(str(methods.group), method) for methods in groups for method in methods.all]
    settings = [_settings(method.first) for _, method in rows]
    shared = [text for text in settings[0] if all(text in others for others in settings)]
    table = pd.DataFrame(
        {
            "Group": group,
            "Model": model_name(method.architecture),
            "Training": method.training,
            "Settings": ", ".join(text for text in own if text not in shared),
            "Starts from": "; ".join(f"{start.method}: {', '.join(_settings(start))}" for start in method.first.starts),
        }
        for (group, method), own in zip(rows, settings, strict=True)
    )
    text = (
        f"Shared by all rows: {', '.join(shared)}. The presets paper-drelu, paper-at and paper-trades of train have "
        "the settings that the paper states."
    )
    return Section("How the models were trained", text, _without_constant(table))


def _settings(settings: TrainingSettings) -> list[str]:
    """Return the settings that a name does not contain, without flags that have no value or no effect."""
    unused = set() if settings.train.get("schedule") == "onecycle" else {"warmup"}
    unused |= set() if settings.activation == "drelu" else {"cap", "cap_lr"}
    named = ((name, value) for name, value in settings.own_settings.items() if name not in unused | _IN_NAMES)
    return [
        f"{name} {value if isinstance(value, str) else written(value)}"
        for name, value in named
        if value not in (None, 0, "", [], "no")
    ]


def attacks(groups: Iterable[GroupMethods]) -> Section:
    """Return the settings of each attack, by group, and the methods or runs attacked by it if they are not all."""
    rows: list[tuple[str, str, str, str]] = []
    for methods in groups:
        tried: dict[tuple[str, str], list[EvaluatedRun]] = {}
        for run in (run for method in methods.all for run in method.runs):
            elsewhere = {(name, f"{settings}, {n} images") for name, settings, n in run.combined.tried_elsewhere}
            for attack in sorted(run.combined.tried | elsewhere):
                tried.setdefault(attack, []).append(run)
        for (attack, settings), by in sorted(tried.items()):
            rows.append((str(methods.group), attack, settings or "none", _named_runs(by, methods.all)))
    table = pd.DataFrame(rows, columns=["Group", "Attack", "Settings", "Attacked"])
    several = table[table.duplicated(["Group", "Attack"], keep=False)]
    text = "The driver projects what an attack returns into the threat model and judges it on the model itself."
    if len(several):
        names = ", ".join(dict.fromkeys(several["Attack"]))
        text += f" Runs were attacked differently by {names}: their accuracies under it are not comparable."
    return Section("How the models were attacked", text, _without_constant(table))


def _named_runs(runs: Sequence[EvaluatedRun], methods: Sequence[Method]) -> str:
    """Return "all", or the methods that some runs are of, with the seeds if these are not all of a method."""
    names = []
    for method in methods:
        seeds = [str(run.seed) for run in method.runs if run in runs]
        if seeds:
            names.append(method.label if len(seeds) == len(method.runs) else f"{method.label} seed {', '.join(seeds)}")
    return "all" if names == [method.label for method in methods] else "; ".join(names)


def _without_constant(table: pd.DataFrame) -> pd.DataFrame:
    """Drop the column of the group if there is one group, and columns without any text."""
    return table.drop(
        columns=[name for name in table if set(table[name]) == {""} or (name == "Group" and table[name].nunique() == 1)]
    )


def origin(runs: EvaluatedRuns, groups: Sequence[GroupMethods], files: Iterable[str]) -> list[Section]:
    """Return what the report was made from, notes, broken files, and the files next to it."""
    found = runs.found
    evaluations = {result.path: result for run in found for result in run.combined.all}
    results = {path for path, result in evaluations.items() if not result.is_sweep}
    sweeps = ({*evaluations} - results) | {run.sweep.path for run in found if run.sweep}
    measured = dict.fromkeys(result.measured_with for run in found for result in run.combined.results)
    n_runs = counted(len({run.path for run in found}), "run")
    made_from = [
        f"{n_runs}, {counted(len(results), 'result file')} and {counted(len(sweeps), 'sweep')} over eps. Nothing was "
        "measured again. numbers.json names the files that every accuracy comes from.",
        *(f"Measured with: {line}." for line in measured),
    ]
    notes = [*runs.notes, *(note for methods in groups for note in _incomplete_rows(methods))]
    sections = [Section("Made from", "\n\n".join(made_from))]
    if notes:
        sections.append(Section("Notes", "\n\n".join(notes)))
    if runs.broken:
        sections.append(Section("Broken files, left out", "\n\n".join(runs.broken)))
    return [*sections, Section("Files", "\n\n".join(files))]


def _incomplete_rows(methods: GroupMethods) -> list[str]:
    """Return sentences on seeds that some rows lack, and on different numbers of test images."""
    lacking: dict[str, list[str]] = {}
    for method in methods.all:
        if missing := ", ".join(str(seed) for seed in methods.seeds if seed not in method.seeds):
            lacking.setdefault(missing, []).append(method.label)
    notes = [
        f"{methods.group}: seed {missing}, which other rows have, is missing for {'; '.join(labels)}."
        for missing, labels in lacking.items()
    ]
    images = sorted({count for method in methods.all for count in method.n_examples})
    if len(images) > 1:
        notes.append(f"{methods.group}: the rows have different numbers of test images: {', '.join(map(str, images))}.")
    return notes
