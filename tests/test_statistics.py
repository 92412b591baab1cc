"""Statistics compared with published examples, and their errors."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from drelu_timm.errors import InputError
from drelu_timm.reports import paper
from drelu_timm.reports.statistics import compare_methods, compare_pair

# AUC of C4.5 with four sets of parameters on 14 data sets: Demšar 2006, Table 6.
DEMSAR = [
    [0.763, 0.768, 0.771, 0.798],
    [0.599, 0.591, 0.590, 0.569],
    [0.954, 0.971, 0.968, 0.967],
    [0.628, 0.661, 0.654, 0.657],
    [0.882, 0.888, 0.886, 0.898],
    [0.936, 0.931, 0.916, 0.931],
    [0.661, 0.668, 0.609, 0.685],
    [0.583, 0.583, 0.563, 0.625],
    [0.775, 0.838, 0.866, 0.875],
    [1.000, 1.000, 1.000, 1.000],
    [0.940, 0.962, 0.965, 0.962],
    [0.619, 0.666, 0.614, 0.669],
    [0.972, 0.981, 0.9751, 0.975],
    [0.957, 0.978, 0.946, 0.970],
]
METHODS = ["C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf"]


def scores(values, methods=None):
    return pd.DataFrame(values, columns=methods or list("abcdefgh")[: len(values[0])])


def test_the_papers_table_2():
    table = pd.read_csv(Path(paper.__file__).with_name("paper_tables.csv"), comment="#").query("table == 2")
    method = table["training"].str.replace(r"D-ReLU.*", "D-ReLU", regex=True)
    found = compare_methods(
        table.assign(method=method).pivot(index=["model", "attack"], columns="method", values="accuracy_percent")
    )
    assert found.n_blocks == 36
    assert f"{found.anova_f:.2f} {found.friedman_chi2:.2f} {found.f_f:.2f}" == "17.40 39.43 20.13"
    assert f"{found.critical_difference:.2f}" == "0.78"
    assert found.anova_p == pytest.approx(stats.f.sf(17.3973, 3, 140), rel=1e-3)
    assert found.friedman_p == pytest.approx(stats.chi2.sf(39.4333, 3), rel=1e-3)
    assert found.f_f_p == pytest.approx(stats.f.sf(20.1288, 3, 105), rel=1e-3)
    assert min(found.mean_ranks, key=lambda name: found.mean_ranks[name]) == "D-ReLU"


def test_demsars_example():
    found = compare_methods(scores(DEMSAR, METHODS), alpha=0.10)
    assert {name: round(rank, 3) for name, rank in found.mean_ranks.items()} == {
        "C4.5": 3.143,
        "C4.5+m": 2.0,
        "C4.5+cf": 2.893,
        "C4.5+m+cf": 1.964,
    }
    # He gives 9.28 and 3.69 without the correction for ties, which scipy makes: it divides by 1 - ties / (N k (k^2-1)).
    ties = sum(count**3 - count for row in DEMSAR for count in np.unique(row, return_counts=True)[1])
    correction = 1 - ties / (14 * 4 * 15)
    assert found.friedman_chi2 * correction == pytest.approx(9.28, abs=0.01)
    assert found.critical_difference == pytest.approx(1.12, abs=0.005)
    assert compare_methods(scores(DEMSAR, METHODS)).critical_difference == pytest.approx(1.25, abs=0.005)
    uncorrected = 13 * 9.28 / (14 * 3 - 9.28)
    assert uncorrected == pytest.approx(3.69, abs=0.005)
    assert found.f_f == pytest.approx(13 * found.friedman_chi2 / (14 * 3 - found.friedman_chi2))


def test_nemenyi_and_the_critical_difference_agree():
    found = compare_methods(scores(DEMSAR, METHODS), alpha=0.10)
    for first in METHODS:
        for second in METHODS:
            apart = abs(found.mean_ranks[first] - found.mean_ranks[second])
            assert (found.nemenyi_p.loc[first, second] < found.alpha) == (apart > found.critical_difference)
    assert list(found.nemenyi_p.index) == list(found.nemenyi_p.columns) == METHODS
    assert found.nemenyi_p.loc["C4.5", "C4.5+m+cf"] < 0.10 < found.nemenyi_p.loc["C4.5", "C4.5+cf"]


def test_anova_ignores_the_order_of_blocks():
    values = [[60, 71, 51], [62, 75, 48], [58, 73, 54], [64, 70, 50]]
    f, p = stats.f_oneway(*np.transpose(values))
    found = compare_methods(scores(values))
    shuffled = compare_methods(scores([[60, 70, 54], [62, 71, 50], [58, 75, 51], [64, 73, 48]]))
    assert found.anova_f == pytest.approx(f) and found.anova_p == pytest.approx(p)
    assert shuffled.anova_f == pytest.approx(f)


def test_means_that_differ_only_by_rounding_are_ties():
    assert 0.1 + 0.2 != 0.3
    found = compare_methods(scores([[0.1 + 0.2, 0.3, 0.1], [0.3, 0.1 + 0.2, 0.4]] * 2))
    assert found.mean_ranks == {"a": 2.0, "b": 2.0, "c": 2.0}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("values", "defined"),
    [
        ([[90, 90, 90]] * 3, []),  # all columns are equal
        ([[90, 90, 90], [80, 80, 80], [70, 70, 70]], ["anova_f"]),  # all tie in every block
        ([[90, 80, 70]] * 3, ["friedman_chi2"]),  # no column spreads, all blocks rank alike
        ([[90, 80, 70], [80, 70, 60], [70, 60, 50]], ["anova_f", "friedman_chi2"]),
        ([[90, 80, 70], [80, 60, 70], [70, 60, 50]], ["anova_f", "friedman_chi2", "f_f"]),
    ],
)
def test_undefined_statistics_are_nan(values, defined):
    found = compare_methods(scores(values))
    statistics = {"anova_f": "anova_p", "friedman_chi2": "friedman_p", "f_f": "f_f_p"}
    for statistic, p in statistics.items():
        assert math.isfinite(getattr(found, statistic)) == math.isfinite(getattr(found, p)) == (statistic in defined)
    assert found.critical_difference > 0
    assert sum(found.mean_ranks.values()) == pytest.approx(6)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([[1.0, 2.0]] * 9, "2 methods over 9 blocks cannot be compared\\. .* at least 3 methods over 2 blocks"),
        ([[1.0, 2.0, 3.0]], "3 methods over 1 block cannot be compared"),
        ([[1.0, 2.0, 3.0]] * 2, "2 blocks are too few. The critical difference of 3 methods, 2.34, is not below 2, "),
        ([list(range(6))] * 2, "2 blocks are too few. The critical difference of 6 methods, 5.33, is not below 5, "),
        ([[1.0, 2.0, math.nan], [1.0, 2.0, 3.0]], "1 of 2 blocks lack the accuracy of a method. Each of the 3 methods"),
    ],
)
def test_too_few_scores_are_refused(values, said):
    with pytest.raises(InputError, match=said):
        compare_methods(scores(values))


def rows(both, only_first, only_second, neither):
    first = np.repeat([1, 1, 0, 0], [both, only_first, only_second, neither])
    return first, np.repeat([1, 0, 1, 0], [both, only_first, only_second, neither])


def test_a_pair_compared_with_a_published_table():
    # Airway hyper-responsiveness of 21 children before and after stem cell transplantation: Fagerland, Lydersen and
    # Laake 2014, "Recommended tests and confidence intervals for paired binomial proportions", Statistics in Medicine
    # 33, https://doi.org/10.1002/sim.6148: exact conditional p 0.070, Newcombe's interval -0.507 to -0.026.
    found = compare_pair(*rows(1, 1, 7, 12))
    assert (found.n_examples, found.only_first, found.only_second) == (21, 1, 7)
    assert found.p == pytest.approx(2 * (1 + 8) / 2**8)
    assert found.difference == pytest.approx(-100 * 6 / 21)
    assert found.interval == pytest.approx((-50.7, -2.6), abs=0.05)


def test_a_pair_the_other_way_round_is_its_mirror_image():
    one, other = compare_pair(*rows(700, 60, 20, 220)), compare_pair(*rows(700, 20, 60, 220))
    assert one.difference == 4.0 == -other.difference
    assert one.interval == pytest.approx([-end for end in reversed(other.interval)])
    assert one.p == other.p < 0.05
    assert one.interval[0] > 0  # in agreement with the test


@pytest.mark.parametrize("table", [(9, 0, 0, 0), (0, 0, 0, 9), (0, 9, 0, 0), (5, 0, 0, 4)])
def test_intervals_at_the_edge(table):
    found = compare_pair(*rows(*table))
    low, high = found.interval
    assert -100 <= low <= found.difference <= high <= 100 + 1e-9
    assert low < high
    assert found.p == pytest.approx(2 * 0.5**9 if table[1] else 1)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ([1, 0], [1, 0, 1], "Rows of 2 and 3 examples cannot be paired. Evaluate both methods on the same ones"),
        ([], [], "Rows of 0 and 0 examples"),
        ([1, 2], [1, 0], "values other than 0 and 1"),
        ([1, math.nan], [1, 0], "values other than 0 and 1"),
    ],
)
def test_rows_that_cannot_be_paired(first, second, said):
    with pytest.raises(InputError, match=said):
        compare_pair(first, second)
