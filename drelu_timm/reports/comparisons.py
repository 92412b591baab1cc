"""The statistics of a report: which methods differ, over nets and attacks, and pair by pair on the same images."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations, product
from math import isnan
from pathlib import Path

import pandas as pd

from ..errors import InputError
from ..results.combined import worst_verdict
from .averages import Average, Lines
from .comparability import incomparable, unequal
from .figures import draw_critical_difference
from .formats import Section
from .paper import COLUMNS, net_name, paper_scores
from .reading import Outcomes
from .statistics import Comparison, compare_methods, compare_pair
from .tables import HEADINGS, papers_number, slug


def statistics(lines: Lines, folder: Path, outcomes: Outcomes) -> list[Section]:
    """Whether the methods differ: over clean accuracy and the paper's attacks, over the worst case, and pair by pair.

    Args:
        lines: The group.
        folder: For the pictures.
        outcomes: Rows that cannot be read are noted down here.
    """
    worst, blocks = scores(lines, ["worst"])
    return [
        _comparison(
            f"Methods under the paper's attacks: {lines.group}",
            *scores(_without_natural(lines), [*COLUMNS]),
            folder / f"methods-{slug(lines.group)}.png",
            "Blocks are net x (clean and the paper's attacks), as in the paper. Those of one net are not independent, "
            "so that p comes out too small, and accuracies of masked rows count as if they were robustness. Natural "
            "training, which the paper's tables lack, is left out: far below, it would make any methods differ.",
        ),
        _comparison(
            f"Methods in the worst case: {lines.group}",
            worst,
            f"{blocks} {unequal(lines.shown)}".strip(),
            folder / f"methods-worst-{slug(lines.group)}.png",
            "Blocks are the nets.",
        ),
        _pairs(lines, outcomes),
    ]


def _without_natural(lines: Lines) -> Lines:
    return replace(lines, shown=[one for one in lines.shown if one.first.method != "natural"])


def papers_statistics(groups: Iterable[Lines]) -> list[Section]:
    """The statistics of every table of the paper that has a group's numbers, once each."""
    numbers = dict.fromkeys(number for lines in groups if (number := papers_number(lines.group)))
    return [_papers(number) for number in numbers]


def _papers(number: int) -> Section:
    text = "From the accuracies that the paper prints."
    if number == 2:
        text += " It prints F = 17.4, chi-square = 39.43, F_F = 20.12 and a critical difference of 0.656."
    return _comparison(f"Methods in the paper's table {number}", paper_scores(number), "", None, text)


def scores(lines: Lines, columns: Sequence[str]) -> tuple[pd.DataFrame, str]:
    """What the statistics compare: a row a net and column, a column a method and its verdict if not sound, in percent.

    Methods that some net lacks, and then rows that some method lacks or whose accuracies cannot be compared, are left
    out.

    Returns:
        The accuracies, and sentences on the rows that there are and on what was left out.
    """
    nets = {net: {lines.label(one): one for one in shown} for net, shown in lines.by_net.items()}
    missing = {
        method: [net_name(net) for net in nets if method not in nets[net]]
        for method in dict.fromkeys(lines.label(one) for one in lines.shown)
    }
    methods = [method for method, of_nets in missing.items() if not of_nets]
    left_out = [f"{method}, which {_lack(of_nets)}" for method, of_nets in missing.items() if of_nets]
    unlike = incomparable([nets[net][method] for net in nets for method in methods], columns)
    rows: dict[tuple[str, str], list[float]] = {}
    for net, column in product(nets, columns):
        means = {method: nets[net][method].mean(column) for method in methods}
        if lacking := [method for method, mean in means.items() if mean is None]:
            of_it = "all methods lack" if len(lacking) == len(methods) else _lack(lacking)
            left_out.append(f"{net_name(net)} x {HEADINGS[column]}, which {of_it}")
        elif (net, column) in unlike:
            left_out.append(f"{net_name(net)} x {HEADINGS[column]}, as not all rows were attacked alike")
        else:
            rows[net, column] = [mean.mean for mean in means.values() if mean]
    said = f"Blocks: {', '.join(f'{net_name(net)} x {HEADINGS[column]}' for net, column in rows) or 'none'}."
    said += f" Left out: {'; '.join(left_out)}." if left_out else ""
    names = [_with_verdict(method, [nets[net][method] for net in nets]) for method in methods]
    return pd.DataFrame(list(rows.values()), index=list(rows), columns=names, dtype=float), said


def _with_verdict(method: str, on_nets: Iterable[Average]) -> str:
    """A method's name, with the worst verdict on masking behind it where that is not sound."""
    verdict = worst_verdict(one.worst_verdict for one in on_nets)
    return method if verdict == "sound" else f"{method} ({verdict})"


def _lack(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'lacks' if len(names) == 1 else 'lack'}"


def _comparison(title: str, frame: pd.DataFrame, said: str, picture: Path | None, text: str) -> Section:
    try:
        comparison = compare_methods(frame)
    except InputError as error:
        return Section(title, f"Not made: {error}. {said}".strip())
    section = Section(title, " ".join(filter(None, [_statistics(comparison), text, said])), _ranks(comparison))
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
    rows: list[dict[str, str]] = []
    untested: dict[str, list[str]] = {}
    for first, second in (pair for shown in lines.by_net.values() for pair in combinations(shown, 2)):
        try:
            pair = _pair(first, second)
        except InputError as error:
            outcomes.skip(error)
            pair = "rows that can be read"
        if isinstance(pair, str):
            untested.setdefault(pair, []).append(f"{net_name(first.first.net)} {first.training} and {second.training}")
        else:
            rows.append(pair)
    if not rows:
        return Section(title, "Not made: no two methods of a net have a seed in common with rows for each test image.")
    text = (
        "McNemar's exact test on the test images of the first common seed, which withstand where no evaluation broke "
        "them, and the difference of the two accuracies in percentage points with its 95 % interval. p is of one pair, "
        "not corrected for the number of pairs, and speaks of these two trained nets, not of other seeds."
    )
    text = f"{text} {unequal(lines.shown)}".strip()
    if untested:
        named = (f"{', '.join(pairs)} for want of {wanted}" for wanted, pairs in untested.items())
        text += f"\n\nNot tested: {'; '.join(named)}."
    return Section(title, text, pd.DataFrame(rows))


def _pair(first: Average, second: Average) -> dict[str, str] | str:
    """A row of the table, or for want of what there is none.

    Raises:
        InputError: Rows an example that cannot be read.
    """
    common = [seed for seed in first.seeds if seed in second.seeds]
    if not common:
        return "a common seed"
    one, other = (average.outcomes[average.seeds.index(common[0])] for average in (first, second))
    if one.at.n_examples != other.at.n_examples:
        return "as many test images"
    withstood = one.survivors(), other.survivors()
    if withstood[0] is None or withstood[1] is None:
        return "rows for each test image"
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
