"""Statistics: which methods can be compared, and whether they differ by more than chance.

Several methods are compared over many blocks (Demšar 2006, "Statistical Comparisons of Classifiers over Multiple Data
Sets", JMLR 7, https://www.jmlr.org/papers/v7/demsar06a.html: Friedman, Iman and Davenport's F_F, Nemenyi, the critical
difference). Two methods are compared on the same examples: McNemar 1947, "Note on the sampling error of the difference
between correlated proportions or percentages", Psychometrika 12, https://doi.org/10.1007/BF02295996; Newcombe 1998,
"Improved confidence intervals for the difference between binomial proportions based on paired data", Statistics in
Medicine 17, method 10, https://doi.org/10.1002/(SICI)1097-0258(19981130)17:22<2635::AID-SIM954>3.0.CO;2-C.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
from scikit_posthocs import posthoc_nemenyi_friedman
from scipy import stats

from ..attacks.suites import ATTACKS
from ..errors import InputError
from ..results.combined import worst_verdict
from ..results.result import share_interval
from .methods import HEADINGS, GroupMethods, Method, by_architecture
from .paper import model_name

_MIN_METHODS, _MIN_BLOCKS = 3, 2  # for Friedman's test
# Activations with a backward substitute.
_ADAPTIVE_FOR = ("drelu", "srelu", "relu6", "tent", "pact", "fitact", "rcr-af", "kwta", "bounded-relu")


def incomparable(methods: Iterable[Method], columns: Iterable[str]) -> set[tuple[str, str]]:
    """Return each (architecture, column) in which the methods cannot be ranked.

    They can be ranked if all of their runs have the column by the same attack with the same settings on the same
    number of test images; in the worst case, if all runs were attacked in the same way.
    """
    return {
        (architecture, column)
        for architecture, same in by_architecture(methods).items()
        for column in columns
        if (not _same_attacks(same) if column == "worst" else len(_conditions(same, column)) > 1)
    }


def attack_differences(methods: Iterable[Method]) -> str:
    """Return a sentence on the models whose methods were attacked differently, or ""."""
    different = [model_name(model) for model, same in by_architecture(methods).items() if not _same_attacks(same)]
    if not different:
        return ""
    return (
        f"{', '.join(different)}: the worst cases have no rank, since the methods, or the seeds of one, were not "
        "attacked in the same way on the same number of test images (see How the models were attacked)."
    )


def _conditions(methods: Sequence[Method], column: str) -> set[tuple[bool, int, frozenset[str]]]:
    """Return whether the runs have a column, their numbers of test images, and the attack's settings."""
    return {
        (
            column in run.combined.columns,
            run.combined.n_examples,
            frozenset(settings for attack, settings in run.combined.tried if attack == column),
        )
        for method in methods
        for run in method.runs
    }


def _same_attacks(methods: Sequence[Method]) -> bool:
    """Return whether all runs have the same attacks with the same settings on the same number of test images.

    Adaptive attacks count only between runs that they apply to. Attacks on other numbers of images count only between
    runs of one seed.
    """
    runs = [run for method in methods for run in method.runs]
    applicable = [run for run in runs if run.activation in _ADAPTIVE_FOR]
    elsewhere: dict[int, set[frozenset[str]]] = {}
    for run in runs:
        more = frozenset(str(one) for one in run.combined.tried_elsewhere if one[:2] not in run.combined.tried)
        elsewhere.setdefault(run.seed, set()).add(more)
    return not (
        len({run.combined.n_examples for run in runs}) > 1
        or len({frozenset(one for one in run.combined.tried if not _is_adaptive(one[0])) for run in runs}) > 1
        or len({frozenset(one for one in run.combined.tried if _is_adaptive(one[0])) for run in applicable}) > 1
        or any(len(different) > 1 for different in elsewhere.values())
    )


def _is_adaptive(attack: str) -> bool:
    return attack in ATTACKS and ATTACKS[attack].kind == "adaptive"


def scores(methods: GroupMethods, columns: Sequence[str]) -> tuple[pd.DataFrame, str]:
    """Return what the statistics compare, in percent: one row per model and column, one column per method.

    A method's name has its verdict if that is not sound. Methods that some model lacks are left out, and then rows that
    some method lacks or whose accuracies are not comparable.

    Returns:
        The accuracies, and sentences on which rows there are and what was left out.
    """
    models = {
        model: {methods.short_name(one): one for one in shown} for model, shown in methods.by_architecture.items()
    }
    without = {
        name: [model_name(model) for model in models if name not in models[model]]
        for name in dict.fromkeys(methods.short_name(one) for one in methods.shown)
    }
    names = [name for name, lacking in without.items() if not lacking]
    left_out = [f"{name} (not run for {', '.join(lacking)})" for name, lacking in without.items() if lacking]
    unlike = incomparable([models[model][name] for model in models for name in names], columns)
    rows: dict[tuple[str, str], list[float]] = {}
    for model, column in product(models, columns):
        means = {name: models[model][name].mean(column) for name in names}
        block = f"{model_name(model)} x {HEADINGS[column]}"
        if lacking := [name for name, mean in means.items() if mean is None]:
            whom = "any method" if len(lacking) == len(names) else ", ".join(lacking)
            left_out.append(f"{block} (not measured for {whom})")
        elif (model, column) in unlike:
            left_out.append(f"{block} (attacked differently)")
        else:
            rows[model, column] = [mean.mean for mean in means.values() if mean]
    remarks = f"Blocks: {', '.join(f'{model_name(model)} x {HEADINGS[column]}' for model, column in rows) or 'none'}."
    remarks += f" Left out: {'; '.join(left_out)}." if left_out else ""
    titles = [_with_verdict(name, [models[model][name] for model in models]) for name in names]
    return pd.DataFrame(list(rows.values()), index=list(rows), columns=titles, dtype=float), remarks


def _with_verdict(name: str, on_models: Iterable[Method]) -> str:
    verdict = worst_verdict(method.worst_verdict for method in on_models)
    return name if verdict == "sound" else f"{name} ({verdict})"


@dataclass(frozen=True)
class Comparison:
    """Comparison of several methods over the same blocks. A statistic that is undefined for the scores is NaN.

    Attributes:
        anova_f: F of the one-way ANOVA over the methods, which ignores the blocks; NaN if no method's scores vary.
        anova_p: Its p value.
        friedman_chi2: Friedman's statistic, corrected for ties; NaN if all methods tie in every block.
        friedman_p: Its p value by the chi-square distribution.
        f_f: Iman and Davenport's less conservative statistic; NaN if all blocks rank alike (its denominator is 0).
        f_f_p: Its p value.
        critical_difference: Nemenyi's: mean ranks further apart than this differ at the level ``alpha``.
        mean_ranks: By method, in the order of the columns; rank 1 is the highest accuracy, ties share their mean rank.
        nemenyi_p: p value of every pair of methods, one row and one column per method.
        n_blocks: Number of blocks.
        alpha: Level of the critical difference.
    """

    anova_f: float
    anova_p: float
    friedman_chi2: float
    friedman_p: float
    f_f: float
    f_f_p: float
    critical_difference: float
    mean_ranks: dict[str, float]
    nemenyi_p: pd.DataFrame
    n_blocks: int
    alpha: float


@dataclass(frozen=True)
class PairComparison:
    """Comparison of two methods on the same examples.

    Attributes:
        n_examples: Number of examples.
        only_first: Number of examples that only the first method classifies correctly.
        only_second: Number of examples that only the second method classifies correctly.
        p: p value of McNemar's exact test.
        difference: Accuracy of the first minus accuracy of the second, in percentage points.
        interval: Newcombe's 95 % interval of the difference, in percentage points.
    """

    n_examples: int
    only_first: int
    only_second: int
    p: float
    difference: float
    interval: tuple[float, float]


def compare_methods(scores: pd.DataFrame, *, alpha: float = 0.05) -> Comparison:
    """Compare methods by ANOVA, Friedman's test and Nemenyi's test, as the paper does for its tables.

    Args:
        scores: Accuracies in percent, one row per block (such as a model under an attack) and one column per method.
        alpha: Level of the critical difference.

    Raises:
        InputError: Fewer than three methods or two blocks, blocks that lack a method, or so few blocks that no mean
            ranks can be further apart than the critical difference.
    """
    n_blocks, n_methods = scores.shape
    if n_methods < _MIN_METHODS or n_blocks < _MIN_BLOCKS:
        raise InputError(
            f"{counted(n_methods, 'method')} over {counted(n_blocks, 'block')} cannot be compared. Friedman's test "
            f"needs at least {_MIN_METHODS} methods over {_MIN_BLOCKS} blocks."
        )
    if missing := int(scores.isna().any(axis=1).sum()):
        raise InputError(
            f"{missing} of {n_blocks} blocks lack the accuracy of a method. Each of the {n_methods} methods needs one "
            "in every block."
        )
    critical_difference = _critical_difference(n_blocks, n_methods, alpha)
    if critical_difference >= n_methods - 1:
        raise InputError(
            f"{n_blocks} blocks are too few. The critical difference of {n_methods} methods, "
            f"{critical_difference:.2f}, is not below {n_methods - 1}, the largest difference of mean ranks."
        )
    scores = scores.astype(float).round(9)  # means over seeds that differ only by rounding are ties
    anova_f, anova_p = _anova(scores)
    chi2, friedman_p = _friedman(scores)
    f_f, f_f_p = _iman_davenport(chi2, n_blocks, n_methods)
    return Comparison(
        anova_f=anova_f,
        anova_p=anova_p,
        friedman_chi2=chi2,
        friedman_p=friedman_p,
        f_f=f_f,
        f_f_p=f_f_p,
        critical_difference=critical_difference,
        mean_ranks=scores.rank(axis=1, ascending=False).mean().to_dict(),
        # The index is dropped because scikit-posthocs names it, and pandas before 3 cannot give one name to an index of
        # several levels.
        nemenyi_p=posthoc_nemenyi_friedman(scores.reset_index(drop=True)).rename_axis(index="method", columns=None),
        n_blocks=n_blocks,
        alpha=alpha,
    )


def counted(n: int, noun: str) -> str:
    """Return a number with its noun in the singular or the plural: "1 block", "2 blocks"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _anova(scores: pd.DataFrame) -> tuple[float, float]:
    if (scores.nunique() == 1).all():
        return math.nan, math.nan
    f, p = stats.f_oneway(*scores.to_numpy().T)
    return float(f), float(p)


def _friedman(scores: pd.DataFrame) -> tuple[float, float]:
    if (scores.nunique(axis=1) == 1).all():
        return math.nan, math.nan
    chi2, p = stats.friedmanchisquare(*scores.to_numpy().T)
    return float(chi2), float(p)


def _iman_davenport(chi2: float, n_blocks: int, n_methods: int) -> tuple[float, float]:
    largest = n_blocks * (n_methods - 1)  # chi2 if all blocks rank alike
    if math.isnan(chi2) or math.isclose(chi2, largest):
        return math.nan, math.nan
    f_f = (n_blocks - 1) * chi2 / (largest - chi2)
    return f_f, float(stats.f.sf(f_f, n_methods - 1, (n_methods - 1) * (n_blocks - 1)))


def _critical_difference(n_blocks: int, n_methods: int, alpha: float) -> float:
    q = stats.studentized_range.ppf(1 - alpha, n_methods, np.inf) / math.sqrt(2)
    return float(q * math.sqrt(n_methods * (n_methods + 1) / (6 * n_blocks)))


def compare_pair(first: np.ndarray, second: np.ndarray) -> PairComparison:
    """Compare two methods on the same examples by McNemar's exact test and Newcombe's 95 % interval of the difference.

    Args:
        first: 1 for each example that the first method classifies correctly (under attack), else 0, [N].
        second: The same for the second method, in the same order.

    Raises:
        InputError: No examples, different numbers of examples, or values other than 0 and 1.
    """
    first, second = np.asarray(first), np.asarray(second)
    if first.ndim != 1 or first.shape != second.shape or not first.size:
        raise InputError(
            f"Rows of {first.size} and {second.size} examples cannot be paired. Evaluate both methods on the same ones."
        )
    if not np.isin([first, second], (0, 1)).all():
        raise InputError("Rows of two methods have values other than 0 and 1. Give whether each example was correct.")
    table = np.array([[np.sum((first == i) & (second == j)) for j in (1, 0)] for i in (1, 0)])
    only_first, only_second = int(table[0, 1]), int(table[1, 0])
    discordant = only_first + only_second
    return PairComparison(
        n_examples=first.size,
        only_first=only_first,
        only_second=only_second,
        p=float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0,
        difference=100 * (only_first - only_second) / first.size,
        interval=_newcombe(table),
    )


def _newcombe(table: np.ndarray) -> tuple[float, float]:
    """Return the interval of method 10, in percentage points: Wilson's intervals combined by their correlation."""
    n = int(table.sum())
    counts = int(table[0].sum()), int(table[:, 0].sum())  # correct by the first method, by the second
    first, second = (count / n for count in counts)
    (first_low, first_high), (second_low, second_high) = (share_interval(count, n) for count in counts)
    phi = _correlation(table)

    def span(a: float, b: float) -> float:
        return math.sqrt(max(a**2 - 2 * phi * a * b + b**2, 0))

    difference = first - second
    low = difference - span(first - first_low, second_high - second)
    high = difference + span(first_high - first, second - second_low)
    return 100 * low, 100 * high


def _correlation(table: np.ndarray) -> float:
    """Return Newcombe's phi: n / 2 is subtracted from a positive numerator, down to 0; 0 if a margin is empty."""
    (a, b), (c, d) = table.tolist()
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    product = a * d - b * c
    if product > 0:
        product = max(product - (a + b + c + d) / 2, 0)
    return product / math.sqrt(margins) if margins else 0.0
