"""The paper's numbers: against facts of its text, and under the names of this package."""

import pytest

from drelu_timm.reports.paper import EPS, MODELS, paper_order, paper_scores, pgd_and_weaker, read_paper, table_number
from drelu_timm.reports.statistics import compare_methods


@pytest.mark.parametrize(
    ("table", "dataset", "model", "training", "column", "accuracy", "rank"),
    [
        (1, "mnist", "dense", "AT", "clean", 98.10, 1),
        (1, "mnist", "dense", "D-ReLU-100", "apgd-ce", 96.93, 1),
        (1, "mnist", "shallow_cnn", "D-ReLU-0.1", "cw-l2", 16.60, 1),
        (2, "cifar10", "dense", "D-ReLU-1e-07", "pgd", 23.87, 4),
        (2, "cifar10", "resnet50", "D-ReLU-10000", "clean", 78.87, 1),
        (2, "cifar10", "inception_v3", "TRADES-6", "apgd-dlr", 56.03, 3),
        (5, "tiny_imagenet", "mobilenetv2_100", "D-ReLU", "square", 18.33, 3),
    ],
)
def test_printed_numbers(table, dataset, model, training, column, accuracy, rank):
    paper = read_paper()
    (line,) = paper[
        (paper["table"] == table)
        & (paper["dataset"] == dataset)
        & (paper["model"] == model)
        & (paper["training"] == training)
        & (paper["column"] == column)
    ].itertuples()
    assert (line.accuracy, line.rank) == (accuracy, rank)


def test_all_nine_tables_are_there_and_every_name_is_known():
    paper = read_paper()
    assert paper["table"].value_counts().to_dict() == {
        1: 48, 2: 144, 3: 144, 4: 144, 5: 108, 6: 72, 7: 72, 8: 72, 9: 72,
    }  # fmt: skip
    assert not paper.isna().any().any()
    assert set(paper["model"]) == set(MODELS)
    assert set(paper["method"]) == {"AT", "TRADES-1", "TRADES-5", "TRADES-6", "D-ReLU"}


def test_balancers_are_written_as_outcomes_write_them():
    ours = {f"D-ReLU-{10.0**power:g}" for power in range(-9, 9)}
    balancers = set(read_paper()["training"]) - {"AT", "TRADES-1", "TRADES-5", "TRADES-6", "D-ReLU"}
    assert balancers <= ours


@pytest.mark.parametrize(
    ("dataset", "generated", "square", "number"),
    [
        ("mnist", False, False, 1),
        ("cifar10", False, False, 2),
        ("cifar100", False, False, 3),
        ("tiny_imagenet", False, False, 4),
        ("cifar10", False, True, 5),
        ("cifar10", True, False, 6),
        ("tiny_imagenet", True, False, 8),
        ("cifar100", True, True, 9),
        ("mnist", False, True, None),
        ("mnist", True, False, None),
        ("digits", False, False, None),
    ],
)
def test_number_of_a_table(dataset, generated, square, number):
    eps = EPS.get(dataset, "0.1")
    assert table_number(dataset, norm="Linf", eps=eps, generated=generated, square=square) == number
    assert table_number(dataset, norm="Linf", eps="0.3", generated=generated, square=square) is None
    assert table_number(dataset, norm="L2", eps=eps, generated=generated, square=square) is None


def test_statistics_of_its_table_2():
    """The paper prints 17.4, 39.43, 20.12, and a critical difference of 0.656, which does not follow."""
    comparison = compare_methods(paper_scores(2))
    assert (comparison.n_blocks, len(comparison.mean_ranks)) == (36, 4)
    assert comparison.anova_f == pytest.approx(17.40, abs=0.005)
    assert comparison.friedman_chi2 == pytest.approx(39.43, abs=0.005)
    assert comparison.f_f == pytest.approx(20.13, abs=0.005)
    assert comparison.critical_difference == pytest.approx(0.78, abs=0.005)


@pytest.mark.parametrize(("attack", "drelu", "others"), [("square", (33, 36), (3, 54)), ("fgsm", (24, 38), (1, 78))])
def test_weaker_attacks_beat_pgd_on_its_nets_with_drelu(attack, drelu, others):
    rows = pgd_and_weaker(attack)
    beaten, of_drelu = rows["weaker"] < rows["pgd"], rows["method"] == "D-ReLU"
    assert (beaten[of_drelu].sum(), of_drelu.sum()) == drelu
    assert (beaten[~of_drelu].sum(), (~of_drelu).sum()) == others
    (large,) = rows[of_drelu & (rows["model"] == "resnet50") & (rows["dataset"] == "cifar10") & ~rows["generated"]][
        "pgd"
    ]
    assert large == 78.73


def test_order_of_rows():
    rows = [("inception_v3", "AT"), ("dense", "D-ReLU"), ("dense", "AT + D-ReLU"), ("vgg", "AT"), ("dense", "natural")]
    rows += [("dense", f"TRADES-{beta}") for beta in ("10", "6", "0.5", "1")] + [("dense", "AT")]
    assert sorted(rows, key=lambda row: paper_order(*row)) == [
        ("dense", "natural"),
        ("dense", "AT"),
        ("dense", "TRADES-0.5"),
        ("dense", "TRADES-1"),
        ("dense", "TRADES-6"),
        ("dense", "TRADES-10"),
        ("dense", "D-ReLU"),
        ("dense", "AT + D-ReLU"),
        ("inception_v3", "AT"),
        ("vgg", "AT"),
    ]
