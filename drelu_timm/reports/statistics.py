"""Whether methods differ by more than chance: several over many blocks, or two on the same examples.

Sources: Demšar 2006, "Statistical Comparisons of Classifiers over Multiple Data Sets", JMLR 7,
https://www.jmlr.org/papers/v7/demsar06a.html (Friedman, Iman and Davenport's F_F, Nemenyi, the critical difference);
McNemar 1947, "Note on the sampling error of the difference between correlated proportions or percentages",
Psychometrika 12, https://doi.org/10.1007/BF02295996; Newcombe 1998, "Improved confidence intervals for the difference
between binomial proportions based on paired data", Statistics in Medicine 17, method 10,
https://doi.org/10.1002/(SICI)1097-0258(19981130)17:22<2635::AID-SIM954>3.0.CO;2-C.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scikit_posthocs import posthoc_nemenyi_friedman
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from ..errors import InputError

_METHODS, _BLOCKS = 3, 2  # that Friedman's test needs


@dataclass(frozen=True)
class Comparison:
    """Several methods over the same blocks; a statistic that is not defined for the scores is nan, and so is its p.

    Attributes:
        anova_f: Of the one-way ANOVA over the methods, which takes no notice of the blocks; not defined where no
            method's scores spread.
        anova_p: Its p.
        friedman_chi2: Friedman's statistic, corrected for ties; not defined where all methods tie in every block.
        friedman_p: Its p, by the chi-square distribution.
        f_f: Iman and Davenport's, which is less conservative; not defined where all blocks rank alike, as its
            denominator is 0 then.
        f_f_p: Its p.
        critical_difference: Nemenyi's: mean ranks further apart than this differ at the level ``alpha``.
        mean_ranks: By method, in the order of the columns; rank 1 is the highest accuracy, ties share their mean rank.
        nemenyi_p: Of every pair of methods, a row and a column each.
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
    """Two methods on the same examples.

    Attributes:
        n_examples: Number of examples.
        only_first: Examples that the first method alone classifies right.
        only_second: Likewise.
        p: Of McNemar's exact test.
        difference: Accuracy of the first less that of the second, in percentage points.
        interval: Newcombe's confidence interval of it at the confidence 1 - ``alpha``, in percentage points.
    """

    n_examples: int
    only_first: int
    only_second: int
    p: float
    difference: float
    interval: tuple[float, float]


def compare_methods(scores: pd.DataFrame, *, alpha: float = 0.05) -> Comparison:
    """ANOVA, Friedman and Nemenyi, as the paper has them for its tables.

    Args:
        scores: A row a block (such as a net under an attack), a column a method; accuracies in percent.
        alpha: Level of the critical difference.

    Raises:
        InputError: Fewer than three methods or two blocks, blocks that some method lacks, or so few blocks that no
            mean ranks can lie further apart than the critical difference.
    """
    n_blocks, n_methods = scores.shape
    if n_methods < _METHODS or n_blocks < _BLOCKS:
        raise InputError(
            f"{n_methods} methods over {n_blocks} block{'s' * (n_blocks != 1)} cannot be compared; Friedman's test "
            f"needs at least {_METHODS} methods over {_BLOCKS} blocks"
        )
    if missing := int(scores.isna().any(axis=1).sum()):
        raise InputError(
            f"{missing} of {n_blocks} blocks lack a method's accuracy; each of the {n_methods} methods needs one in "
            "every block"
        )
    critical_difference = _critical_difference(n_blocks, n_methods, alpha)
    if critical_difference >= n_methods - 1:
        raise InputError(
            f"{n_blocks} blocks are too few: the critical difference of {n_methods} methods, "
            f"{critical_difference:.2f}, is not below {n_methods - 1}, the largest that mean ranks can have"
        )
    scores = scores.astype(float).round(9)  # means over seeds that are equal but for rounding are ties
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
        # Without its index: pandas before 3 cannot give one name to that of several levels, as scikit-posthocs wants.
        nemenyi_p=posthoc_nemenyi_friedman(scores.reset_index(drop=True)).rename_axis(index="method", columns=None),
        n_blocks=n_blocks,
        alpha=alpha,
    )


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
    largest = n_blocks * (n_methods - 1)  # chi2 of blocks that all rank alike
    if math.isnan(chi2) or math.isclose(chi2, largest):
        return math.nan, math.nan
    f_f = (n_blocks - 1) * chi2 / (largest - chi2)
    return f_f, float(stats.f.sf(f_f, n_methods - 1, (n_methods - 1) * (n_blocks - 1)))


def _critical_difference(n_blocks: int, n_methods: int, alpha: float) -> float:
    q = stats.studentized_range.ppf(1 - alpha, n_methods, np.inf) / math.sqrt(2)
    return float(q * math.sqrt(n_methods * (n_methods + 1) / (6 * n_blocks)))


def compare_pair(first: np.ndarray, second: np.ndarray, *, alpha: float = 0.05) -> PairComparison:
    """McNemar's exact test, and how far two accuracies on the same examples lie apart.

    Args:
        first: Whether the first method classifies each example right (under attack), 0 or 1, [N].
        second: Likewise the second, on the same examples in the same order.
        alpha: 1 less the confidence.

    Raises:
        InputError: No examples, not the same number of them, or something else than 0 and 1.
    """
    first, second = np.asarray(first), np.asarray(second)
    if first.ndim != 1 or first.shape != second.shape or not first.size:
        raise InputError(
            f"rows of {first.size} and {second.size} examples cannot be paired; evaluate both methods on the same ones"
        )
    if not np.isin([first, second], (0, 1)).all():
        raise InputError("rows of two methods hold something else than 0 and 1; give whether each example was right")
    table = np.array([[np.sum((first == i) & (second == j)) for j in (1, 0)] for i in (1, 0)])
    return PairComparison(
        n_examples=first.size,
        only_first=int(table[0, 1]),
        only_second=int(table[1, 0]),
        p=float(mcnemar(table, exact=True).pvalue),  # pyright: ignore[reportAttributeAccessIssue]
        difference=100 * float(table[0, 1] - table[1, 0]) / first.size,
        interval=_newcombe(table, alpha),
    )


def _newcombe(table: np.ndarray, alpha: float) -> tuple[float, float]:
    """Method 10: Wilson's intervals of the two shares, put together by their correlation; in percentage points."""
    n = int(table.sum())
    counts = int(table[0].sum()), int(table[:, 0].sum())  # right by the first method, by the second
    (first, below, above), (second, second_below, second_above) = (_wilson(count, n, alpha) for count in counts)
    phi = _correlation(table)

    def span(a: float, b: float) -> float:
        return math.sqrt(max(a**2 - 2 * phi * a * b + b**2, 0))

    difference = first - second
    low = difference - span(first - below, second_above - second)
    high = difference + span(above - first, second - second_below)
    return 100 * low, 100 * high


def _wilson(count: int, n: int, alpha: float) -> tuple[float, float, float]:
    """A share and the ends of its interval."""
    low, high = np.asarray(proportion_confint(count, n, alpha, method="wilson"), dtype=float).tolist()
    return count / n, low, high


def _correlation(table: np.ndarray) -> float:
    """Newcombe's phi: a positive one is taken less n / 2, down to 0; 0 where a margin is empty."""
    (a, b), (c, d) = table.tolist()
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    product = a * d - b * c
    if product > 0:
        product = max(product - (a + b + c + d) / 2, 0)
    return product / math.sqrt(margins) if margins else 0.0
