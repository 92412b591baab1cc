"""What a report says beside its tables: statistics, figures, how it was measured and from what."""

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from math import isnan
from pathlib import Path

import numpy as np
import pandas as pd

from .averages import Average, Lines, families
from .errors import InputError
from .figures import draw_balancers, draw_caps, draw_critical_difference, draw_eps, read_caps
from .outcomes import Outcomes
from .page import Section
from .paper import COLUMNS, net_name, paper_scores, table_number
from .statistics import Comparison, compare_methods, compare_pair
from .tables import slug


def opening(outcomes: Outcomes, groups: Sequence[Lines]) -> Section:
    """What a reader has to know before the first table."""
    runs = {outcome.run for outcome in outcomes.found}
    masked = [f"{net_name(one.first.net)}, {one.training}" for lines in groups for one in lines.shown if one.masked]
    text = ["The worst case is the robust accuracy: the share of the test images that nothing broke."]
    if masked:
        text.append(
            "The accuracy of a masked row under gradient attacks is not robustness: the net hides its gradients, so "
            f"that these attacks fail where others succeed. Masked: {'; '.join(dict.fromkeys(masked))}."
        )
    else:
        text.append("No row of the main tables is masked, as far as the probes for masking can tell.")
    if len(groups) > 1:
        listed = "; ".join(str(lines.group) for lines in groups)
        text.append(f"These {len(groups)} groups cannot be compared with one another and are kept apart: {listed}.")
    return Section(
        f"What {_count(len(runs), 'run')} {'withstand' if len(runs) > 1 else 'withstands'}", "\n\n".join(text)
    )


def statistics(lines: Lines, folder: Path, outcomes: Outcomes) -> list[Section]:
    """Whether the methods differ: over clean accuracy and the paper's attacks, over the worst case, and pair by pair.

    Args:
        lines: The group.
        folder: For the pictures.
        outcomes: Rows that cannot be read are noted down here.
    """
    return [
        _comparison(
            f"Methods under the paper's attacks: {lines.group}",
            scores(lines, [*COLUMNS]),
            folder / f"methods-{slug(lines.group)}.png",
            "Blocks are net x (clean and the paper's attacks), as in the paper. Those of one net are not independent, "
            "so that p comes out too small, and accuracies of masked rows count as if they were robustness.",
        ),
        _comparison(
            f"Methods in the worst case: {lines.group}",
            scores(lines, ["worst"]),
            folder / f"methods-worst-{slug(lines.group)}.png",
            "Blocks are the nets.",
        ),
        _pairs(lines, outcomes),
    ]


def papers_statistics(lines: Lines) -> list[Section]:
    """The statistics of the paper's own table of a group, where it has one."""
    number = table_number(lines.group.dataset, generated=lines.group.generated)
    if number is None:
        return []
    text = "From the accuracies that the paper prints."
    if number == 2:
        text += " It prints F = 17.4, chi-square = 39.43, F_F = 20.12 and a critical difference of 0.656."
    return [_comparison(f"Methods in the paper's table {number}", paper_scores(number), None, text)]


def scores(lines: Lines, columns: Sequence[str]) -> pd.DataFrame:
    """What the statistics compare: a row a net and column, a column a method, in percent.

    Methods that some net lacks, and then rows that some method lacks, are left out.
    """
    labels = {net: {lines.label(one) for one in shown} for net, shown in lines.by_net.items()}
    methods = [
        method
        for method in dict.fromkeys(lines.label(one) for one in lines.shown)
        if all(method in of_net for of_net in labels.values())
    ]
    known = {
        (one.first.net, column, lines.label(one)): mean.mean
        for one in lines.shown
        for column in columns
        if (mean := one.mean(column))
    }
    blocks = dict.fromkeys((net, column) for net, column, _ in known)
    rows = [[known.get((*block, method)) for method in methods] for block in blocks]
    return pd.DataFrame(rows, index=list(blocks), columns=methods, dtype=float).dropna()


def figures(lines: Lines, folder: Path, outcomes: Outcomes) -> list[Section]:
    """Accuracy over balancers and over eps, and the learned caps; what cannot be drawn is said.

    Args:
        lines: The group.
        folder: For the pictures.
        outcomes: Weights that cannot be read are noted down here.
    """
    group, sections = lines.group, []
    for family in families(lines.all):
        if len(family) > 1:
            name = f"{net_name(family[0].first.net)}, {family[0].method}: {group}"
            runs = [outcome for one in family for outcome in one.outcomes]
            sections.append(_drawn(f"Balancers: {name}", folder, draw_balancers, runs))
    for net, shown in lines.by_net.items():
        name = f"{net_name(net)}, {group}"
        curves = {one.training: [outcome.curve for outcome in one.outcomes if outcome.curve] for one in shown}
        if any(curves.values()):
            images = {point.n_examples for of_seeds in curves.values() for curve in of_seeds for point in curve}
            of = f"The rows of the main table at other radii too, on the first {_listed(sorted(images))} test images."
            sections.append(_drawn(f"Over eps: {name}", folder, draw_eps, curves, of))
        if caps := _caps(shown, outcomes):
            sections.append(_drawn(f"Learned caps: {name}", folder, draw_caps, caps))
    return sections


def attacks(groups: Iterable[Lines]) -> Section:
    """How each attack was set, by group and number of lines where they differ."""
    rows: dict[tuple[str, str, str], dict[str, None]] = {}
    for lines in groups:
        for one in lines.all:
            for outcome in one.outcomes:
                for attack, settings in outcome.at.settings.items():
                    written = ", ".join(f"{name} {_listed(value)}" for name, value in settings.items())
                    rows.setdefault((str(lines.group), attack, written), {})[f"{one.first.net} {one.training}"] = None
    table = pd.DataFrame(
        [(group, attack, settings or "none", len(named)) for (group, attack, settings), named in rows.items()],
        columns=["Group", "Attack", "Settings", "Rows"],
    ).sort_values(["Group", "Attack", "Settings"])
    several = table[table.duplicated(["Group", "Attack"], keep=False)]
    text = "An attack's own settings; what it returns is brought into the ball and judged by the net itself."
    if len(several):
        names = ", ".join(dict.fromkeys(several["Attack"]))
        text += f" Not all rows were attacked alike by {names}: their accuracies under it cannot be compared."
    return Section("How the attacks were set", text, table.reset_index(drop=True).astype(str))


def origin(outcomes: Outcomes, groups: Sequence[Lines], files: Iterable[str]) -> list[Section]:
    """What the report was made from, what was noted on the way, and the files beside it."""
    found = outcomes.found
    results = {source for outcome in found for source in outcome.sources}
    sweeps = {outcome.curve_source for outcome in found} - {None}
    measured = dict.fromkeys(line for outcome in found for line in outcome.measured_with)
    runs = len({outcome.run for outcome in found})
    counts = f"{_count(runs, 'run')}, {_count(len(results), 'result file')} and {_count(len(sweeps), 'sweep')} over eps"
    made_from = [
        f"{counts}; nothing was measured anew. numbers.json names the files that every accuracy comes from.",
        *(f"Measured with: {line}." for line in measured),
    ]
    notes = [*outcomes.notes, *(note for lines in groups for note in _uneven(lines))]
    sections = [Section("Made from", "\n\n".join(made_from))]
    if notes:
        sections.append(Section("Notes", "\n\n".join(notes)))
    if outcomes.broken:
        sections.append(Section("Broken files, left out", "\n\n".join(outcomes.broken)))
    return [*sections, Section("Files", "\n\n".join(files))]


def _uneven(lines: Lines) -> list[str]:
    """Seeds that some lines lack, and other numbers of test images than the rest."""
    lacking: dict[str, list[str]] = {}
    for one in lines.all:
        if missing := ", ".join(str(seed) for seed in lines.seeds if seed not in one.seeds):
            lacking.setdefault(missing, []).append(f"{net_name(one.first.net)} {one.training}")
    notes = [
        f"{lines.group}: seed {missing}, which other rows have, is missing of {'; '.join(named)}."
        for missing, named in lacking.items()
    ]
    images = sorted({count for one in lines.all for count in one.n_examples})
    if len(images) > 1:
        notes.append(f"{lines.group}: not all rows have as many test images: {', '.join(map(str, images))}.")
    return notes


def _comparison(title: str, frame: pd.DataFrame, picture: Path | None, text: str) -> Section:
    try:
        comparison = compare_methods(frame)
    except InputError as error:
        return Section(title, f"Not made: {error}.")
    section = Section(title, f"{_statistics(comparison)} {text}", _ranks(comparison))
    if picture is None:
        return section
    try:
        draw_critical_difference(comparison, picture, title=title)
    except InputError as error:
        return Section(title, f"{section.text} Not drawn: {error}.", section.table)
    return Section(title, section.text, section.table, picture)


def _statistics(comparison: Comparison) -> str:
    return (
        f"Over {comparison.n_blocks} blocks: one-way ANOVA F = {_defined(comparison.anova_f)}, "
        f"p = {_defined(comparison.anova_p, '.2g')}; Friedman chi-square = {_defined(comparison.friedman_chi2)}, "
        f"p = {_defined(comparison.friedman_p, '.2g')}, F_F = {_defined(comparison.f_f)}, "
        f"p = {_defined(comparison.f_f_p, '.2g')}; mean ranks further apart than Nemenyi's critical difference, "
        f"{comparison.critical_difference:.2f}, differ at alpha {comparison.alpha:g}."
    )


def _defined(value: float, form: str = ".2f") -> str:
    return "not defined" if isnan(value) else f"{value:{form}}"


def _ranks(comparison: Comparison) -> pd.DataFrame:
    """Mean ranks and Nemenyi's p of every pair, as text."""
    methods = sorted(comparison.mean_ranks, key=lambda method: comparison.mean_ranks[method])
    p = comparison.nemenyi_p.loc[methods, methods]
    table = {"Method": methods, "Mean rank": [f"{comparison.mean_ranks[method]:.2f}" for method in methods]}
    return pd.DataFrame(table | {f"p against {method}": [f"{value:.2g}" for value in p[method]] for method in methods})


def _pairs(lines: Lines, outcomes: Outcomes) -> Section:
    """McNemar's test of every two methods of a net, on the test images of the first seed that both have."""
    title = f"Pairs of methods in the worst case: {lines.group}"
    rows = []
    for first, second in (pair for shown in lines.by_net.values() for pair in combinations(shown, 2)):
        try:
            row = _pair(first, second)
        except InputError as error:
            outcomes.skip(error)
            continue
        rows += [row] if row else []
    if not rows:
        return Section(title, "Not made: no two methods of a net have a seed in common with rows for each test image.")
    text = (
        "McNemar's exact test on the test images of the first common seed, which withstand where no evaluation broke "
        "them, and the difference of the two accuracies in percentage points with its 95 % interval. p is of one pair, "
        "not corrected for the number of pairs, and speaks of these two trained nets, not of other seeds."
    )
    return Section(title, text, pd.DataFrame(rows))


def _pair(first: Average, second: Average) -> dict[str, str] | None:
    common = [seed for seed in first.seeds if seed in second.seeds]
    if not common:
        return None
    one, other = (average.outcomes[average.seeds.index(common[0])] for average in (first, second))
    withstood = one.survivors(), other.survivors()
    if withstood[0] is None or withstood[1] is None or one.at.n_examples != other.at.n_examples:
        return None
    pair = compare_pair(withstood[0], withstood[1])
    return {
        "Model": net_name(first.first.net),
        "First": first.training,
        "Second": second.training,
        "Seed": str(common[0]),
        "Images": str(pair.n_examples),
        "Only first withstands": str(pair.only_first),
        "Only second": str(pair.only_second),
        "Difference": f"{pair.difference:+.2f} ({pair.interval[0]:+.2f} to {pair.interval[1]:+.2f})",
        "p": f"{pair.p:.2g}",
    }


def _caps(shown: Iterable[Average], outcomes: Outcomes) -> dict[str, np.ndarray]:
    """The caps of all seeds of each line that has any."""
    caps: dict[str, list[np.ndarray]] = {}
    for one in shown:
        for outcome in one.outcomes if one.first.cap_weight is not None else ():
            try:
                learned = read_caps(outcome.run)
            except InputError as error:
                outcomes.skip(error)
                continue
            if learned is not None:
                caps.setdefault(one.training, []).append(learned)
    return {training: np.concatenate(of_seeds) for training, of_seeds in caps.items()}


def _drawn(title: str, folder: Path, draw: Callable[..., None], what: object, text: str = "") -> Section:
    picture = folder / f"{slug(title)}.png"
    try:
        draw(what, picture, title=title)
    except InputError as error:
        return Section(title, f"Not drawn: {error}.")
    return Section(title, text, picture=picture)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _listed(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
