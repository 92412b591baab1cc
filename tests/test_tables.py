"""Tables: means, ranks, names, the chosen cap weight, the paper's numbers, and formats."""

import json

import pytest
from synthetic_runs import ATTACKS, RELU, write_json, write_result, write_run

from drelu_timm.report import csv, latex, markdown_table
from drelu_timm.reports.evaluated_runs import read_evaluated_runs
from drelu_timm.reports.methods import average, choose_cap_weights, methods_of
from drelu_timm.reports.statistics import scores
from drelu_timm.reports.tables import Table, against_paper, all_rows, paper_table, square_tables


@pytest.fixture
def add(tmp_path):
    """Add a run with a result; ``result`` are fields of the result, the others flags and the held-out accuracy."""
    count = 0

    def add_run(result=None, **train):
        nonlocal count
        count += 1
        run = write_run(tmp_path / f"run{count}", **train)
        write_result(run, **(result or {}))
        return run

    return add_run


@pytest.fixture
def groups(tmp_path):
    return lambda: [methods_of(group, runs) for group, runs in read_evaluated_runs([tmp_path]).groups().items()]


def cells(table: Table, *columns: str) -> list[tuple[str, ...]]:
    return [tuple(row) for row in table.cells[list(columns)].itertuples(index=False)]


# Lines


def test_mean_and_deviation_over_seeds(add, groups):
    for seed, worst in enumerate((0.7, 0.8, 0.9)):
        add({"worst": worst}, seed=seed)
    (line,) = groups()[0].all
    mean = line.mean("worst")
    assert mean is not None
    assert (mean.mean, mean.std, mean.n_seeds, len(mean.sources)) == (pytest.approx(80), pytest.approx(10), 3, 3)


def test_one_seed_has_no_deviation_and_a_missing_attack_no_mean(add, groups):
    add()
    (line,) = groups()[0].all
    assert line.mean("clean").std is None
    assert line.mean("autoattack") is None
    assert line.mean("white-box").mean == pytest.approx(
        100 * ATTACKS["apgd-dlr"]
    )  # without cw-l2, a minimum-norm attack
    assert line.mean("cw-l2").mean == pytest.approx(30)  # at its L2 budget


@pytest.mark.parametrize(
    ("verdicts", "text"),
    [
        (["sound", "sound"], "sound"),
        (["masked", "sound", "masked"], "masked 2 of 3"),
        (["undecided", "sound"], "undecided 1 of 2"),
    ],
)
def test_the_worst_verdict_of_several_seeds(add, groups, verdicts, text):
    for seed, verdict in enumerate(verdicts):
        add({"verdict": verdict}, seed=seed)
    line = groups()[0].all[0]
    assert (line.verdict, line.worst_verdict) == (text, text.split()[0])


def test_different_settings_are_different_rows_with_their_settings_in_the_name(add, groups):
    for seed in range(2):
        add(seed=seed)
    add(cap_lr=0.001, epochs=270)
    (lines,) = groups()
    assert [one.training for one in lines.all] == ["D-ReLU-0.1", "D-ReLU-0.1, cap_lr 0.001, epochs 270"]
    assert lines.remarks == ["Dense: D-ReLU has cap_lr 0.1, epochs 10."]


def test_settings_with_equal_numbers_of_runs_are_all_in_names(add, groups):
    add(**RELU)
    add(**RELU, start={"epochs": 5})
    (lines,) = groups()
    assert [one.training for one in lines.all] == ["natural, init_from none", "natural, init_from a run"]


def test_a_flag_that_a_version_lacks_is_not_known(add, groups):
    add(seed=0)
    run = add(seed=1)
    config = json.loads((run / "config.json").read_text())
    del config["train"]["cap_lr"]
    write_json(run / "config.json", config)
    assert [one.training for one in groups()[0].all] == ["D-ReLU-0.1, cap_lr 0.1", "D-ReLU-0.1, cap_lr not known"]


def test_precision_and_starts_of_starts_are_in_names(add, groups):
    for seed, launch in ((0, "no"), (1, "no"), (2, "bf16")):
        run = add(seed=seed)
        config = json.loads((run / "config.json").read_text())
        write_json(run / "config.json", config | {"launch": {"mixed_precision": launch}})
    for seed in range(2):
        add(seed=seed, start={}, **RELU)
    run = add(seed=0, start={}, **RELU)
    config = json.loads((run / "config.json").read_text())
    config["init_from"]["init_from"] = {"train": config["train"] | {"epochs": 5}}
    write_json(run / "config.json", config)
    assert [one.training for one in groups()[0].all] == [
        *("natural", "natural, init_from init_from a run"),
        *("D-ReLU-0.1", "D-ReLU-0.1, mixed_precision bf16"),
    ]


def test_settings_that_differ_in_the_seventh_digit_have_two_names(add, groups):
    for weight in (0.1, 0.1000000001):
        add(cap_weight=weight)
        add(objective="at", cap_lr=weight)
    names = [one.training for one in groups()[0].all]
    assert len(set(names)) == len(names) == 4


def test_whole_numbers_are_numbers(add, groups):
    add(seed=0, beta=6)
    add(seed=1, beta=6.0)
    assert len(groups()[0].all) == 1


def test_many_settings_get_a_number_and_a_sentence(add, groups):
    add(seed=0)
    add(seed=1)
    add(cap_lr=0.001, epochs=270, eps="0.2", cap=5.0)
    (lines,) = groups()
    assert lines.all[1].training == "D-ReLU-0.1, settings 2"
    assert "Dense: D-ReLU, settings 2 has eps 0.2, cap_lr 0.001, epochs 270, cap 5." in lines.remarks


# The cap weight


def test_the_cap_weight_with_the_highest_held_out_accuracy_is_shown(add, groups):
    for cap_weight, held_outs in ((0.01, (0.2, 0.9)), (0.1, (0.6, 0.7)), (1.0, (0.1, 0.3))):
        for seed, held_out in enumerate(held_outs):
            add({"worst": 1 - held_out}, cap_weight=cap_weight, held_out=held_out, seed=seed)
    add(**RELU)
    (lines,) = groups()
    assert [one.training for one in lines.shown] == ["natural", "D-ReLU-0.1"]
    (remark,) = lines.remarks
    assert remark.endswith("held-out training images: Dense D-ReLU-0.1 (of 0.01, 0.1, 1; 65.00 %, 2 seeds).")
    table = paper_table(lines)
    assert remark in table.caption and "Other cap weights and placements are in the table of all rows." in table.caption
    assert list(all_rows(lines).cells["Training"]) == ["natural", "D-ReLU-0.01", "D-ReLU-0.1", "D-ReLU-1"]


def test_of_equal_cap_weights_the_smaller_is_shown(add, tmp_path):
    for cap_weight in (1.0, 0.01, 0.1):
        add(cap_weight=cap_weight, held_out=0.5 if cap_weight < 1 else 0.4)
    averages, _ = average(read_evaluated_runs([tmp_path]).found)
    shown, _ = choose_cap_weights(averages)
    assert [one.training for one in shown] == ["D-ReLU-0.01"]


def test_a_cap_weight_with_fewer_seeds_is_not_chosen(add, groups):
    for seed in range(3):
        add(cap_weight=0.1, held_out=0.6, seed=seed)
    add(cap_weight=1.0, held_out=0.61)
    for seed in range(3):
        add(cap_weight=5.0, held_out=None, seed=seed)
    (lines,) = groups()
    assert [one.training for one in lines.shown] == ["D-ReLU-0.1"]
    said = "D-ReLU-0.1 (of 0.1; 60.00 %, 3 seeds; fewer seeds with a log: 1, 5)."
    assert lines.remarks[0].endswith(said)


def test_a_masked_choice_is_reported(add, groups):
    add(cap_weight=0.01, held_out=0.1)
    add({"verdict": "masked"}, cap_weight=0.1, held_out=0.9)
    remark = groups()[0].remarks[-1]
    assert remark.startswith("Masked among these: Dense D-ReLU-0.1. The attack on held-out images is misled")


def test_without_logs_all_cap_weights_are_shown(add, groups):
    for cap_weight in (0.01, 0.1):
        add(cap_weight=cap_weight, held_out=None)
    (lines,) = groups()
    assert len(lines.shown) == 2
    assert lines.remarks == ["Dense D-ReLU: no run has a log, so all cap weights are shown."]


def test_square_and_scores_name_several_shown_cap_weights(add, groups):
    for dataset in ("cifar10", "cifar100"):
        for cap_weight in (0.01, 0.1) if dataset == "cifar10" else (0.1, 1.0):
            add({"eps": "0.01"}, dataset=dataset, cap_weight=cap_weight, held_out=None)
    (table,) = square_tables(groups())
    assert list(table.cells["Training"]) == ["D-ReLU-0.01", "D-ReLU-0.1", "D-ReLU-1"]
    assert list(scores(groups()[0], ["clean"])[0].columns) == ["D-ReLU-0.01", "D-ReLU-0.1"]


def test_other_placements_are_in_the_table_of_all_rows_only(add, groups):
    add()
    add(placement="stem")
    (lines,) = groups()
    assert [one.training for one in lines.shown] == ["D-ReLU-0.1"]
    assert [one.training for one in lines.all] == ["D-ReLU-0.1", "D-ReLU (stem)-0.1"]


# The paper's layout


def test_layout_and_ranks_within_a_model(add, groups):
    add({"worst": 0.1, "verdict": "masked"}, seed=0)
    add({"worst": 0.2, "verdict": "masked"}, seed=1)
    add({"accuracy": {**ATTACKS, "pgd": 0.95}, "worst": 0.8}, objective="at", **RELU)
    add({"worst": 0.5, "n_examples": 30}, model="shallow_cnn_drelu")
    (lines,) = groups()
    table = paper_table(lines)
    assert (table.name, table.title) == ("table-1-mnist-linf-eps-0.1", "Table 1: MNIST, Linf, eps 0.1")
    assert list(table.cells.columns) == [
        *("Model", "Training", "Clean", "Worst case", "Verdict", "FGSM", "PGD", "APGD_CE", "APGD_DLR", "CW_L2"),
        *("Test images", "Seeds"),
    ]
    assert cells(table, "Model", "Training", "PGD", "Worst case", "Verdict", "Test images", "Seeds") == [
        ("Dense", "AT", "95.00 (1)", "80.00 (1)", "sound", "20", "1 of 2"),
        ("Dense", "D-ReLU-0.1", "90.00 ± 0.00 (2)", "≤ 15.00 ± 7.07 (2)", "masked", "20", "2"),
        ("Shallow CNN", "D-ReLU-0.1", "90.00 (1)", "50.00 (1)", "sound", "30", "1 of 2"),
    ]
    assert cells(table, "FGSM")[:2] == [("93.00 (1)",), ("93.00 ± 0.00 (1)",)]  # ties share the rank
    assert "at an L2 distance of 2.8 " in table.caption and "bound of 18" in table.caption
    assert list(table.values["pgd rank"]) == [1, 2, 1]


def test_a_verdict_on_fewer_images_is_in_the_row(add, groups):
    run = add({"n_examples": 1000})
    write_result(run, suite="all", n_examples=500, worst=0.05, verdict="masked")
    add({"n_examples": 1000}, seed=1)
    (lines,) = groups()
    assert lines.all[0].worst_verdict == "masked"
    assert cells(paper_table(lines), "Verdict") == [("masked 1 of 2 (on 500 images)",)]


def test_numbers_of_test_images_are_a_range(add, groups):
    for seed, n_examples in enumerate((20, 1000, 50)):
        add({"n_examples": n_examples}, seed=seed)
    assert cells(paper_table(groups()[0]), "Test images") == [("20 to 1000",)]


def test_worst_cases_of_different_attacks_have_no_rank(add, groups):
    adaptive = {**ATTACKS, "bpda": 0.5}
    add({"accuracy": adaptive, "worst": 0.5}, seed=0)
    add({"accuracy": {"apgd-ce": 0.8, "bpda": 0.5}}, seed=1)
    add({"accuracy": ATTACKS}, objective="at", **RELU)  # adaptive attacks do not apply
    (lines,) = groups()
    table = paper_table(lines)
    assert cells(table, "Worst case") == [("80.00",), ("50.00 ± 0.00",)]
    said = (
        "Dense: the worst cases have no rank, since the methods, or the seeds of one, were not attacked in the same way"
    )
    assert said in table.caption and said in all_rows(lines).caption
    (square,) = square_tables([lines])
    assert cells(square, "MNIST Square", "MNIST Worst case")[0] == ("85.00", "80.00")
    assert said in square.caption


def test_an_attack_on_fewer_images_removes_the_ranks(add, groups):
    stronger = {"accuracy": {"pgd": 0.6}, "settings": {"pgd": {"steps": 100}}}
    write_result(add(objective="at", **RELU), suite="adaptive", n_examples=10, **stronger)
    add(objective="trades", **RELU)
    table = paper_table(groups()[0])
    assert cells(table, "PGD", "Worst case") == [("90.00 (1)", "60.00"), ("90.00 (1)", "80.00")]
    assert "Dense: the worst cases have no rank" in table.caption


def test_worst_cases_of_different_settings_have_no_rank(add, groups):
    path = add() / "results" / "paper-Linf-0.1.json"
    content = json.loads(path.read_text())
    content["settings"]["pgd"] = {"steps": 100}
    write_json(path, content)
    add(objective="at", **RELU)
    caption = paper_table(groups()[0]).caption
    assert "Dense: the worst cases have no rank" in caption


def test_a_column_of_different_settings_has_no_rank_and_is_not_a_block(add, groups):
    path = add() / "results" / "paper-Linf-0.1.json"
    content = json.loads(path.read_text())
    content["settings"]["pgd"] = {"steps": 100}
    write_json(path, content)
    for train in ({"objective": "at"}, {"objective": "trades"}):
        add(**train, **RELU)
        add(**train, model="shallow_cnn_drelu", **RELU)
    add(model="shallow_cnn_drelu")
    (lines,) = groups()
    table = paper_table(lines)
    assert cells(table, "FGSM", "PGD")[0] == ("93.00 (1)", "90.00")
    assert cells(table, "FGSM", "PGD")[-1] == ("93.00 (1)", "90.00 (1)")
    assert "under the same settings on the same number of test images: Dense x PGD. CW_L2" in table.caption
    frame, said = scores(lines, ["clean", "pgd", "worst"])
    of_shallow_cnn = [("shallow_cnn", column) for column in ("clean", "pgd", "worst")]
    assert list(frame.index) == [("dense", "clean"), *of_shallow_cnn]
    assert said.endswith("Left out: Dense x PGD (attacked differently); Dense x Worst case (attacked differently).")


def test_rows_on_different_numbers_of_images_have_no_rank(add, groups):
    add({"n_examples": 30})
    add(objective="at", **RELU)
    (lines,) = groups()
    table = paper_table(lines)
    assert cells(table, "Clean", "PGD", "Worst case") == [("95.00", "90.00", "80.00")] * 2
    assert "Dense: the worst cases have no rank" in table.caption
    assert "Dense x Clean, Dense x FGSM" in table.caption
    assert scores(lines, ["clean", "worst"])[0].empty


def test_a_column_that_some_seeds_lack_has_no_rank(add, groups):
    add(seed=0)
    add({"accuracy": {"fgsm": 0.93}}, seed=1)
    add(objective="at", **RELU)
    table = paper_table(groups()[0])
    assert cells(table, "FGSM", "PGD") == [("93.00 (1)", "90.00"), ("93.00 ± 0.00 (1)", "90.00 [n = 1]")]


def test_a_worst_case_with_missing_rows_is_a_bound(add, groups):
    run = add()
    write_result(run, suite="quick", rows=False)
    assert "≤: an upper bound, because the verdict is not sound or rows" in paper_table(groups()[0]).caption
    assert cells(paper_table(groups()[0]), "Worst case") == [("≤ 80.00 (1)",)]
    assert r"$\le$ 80.00 (1)" in latex(paper_table(groups()[0]))
    assert list(all_rows(groups()[0]).values["worst at most"]) == [True]


def test_an_attack_that_some_seeds_lack_has_its_n(add, groups):
    add({"accuracy": {**ATTACKS, "autoattack": 0.8}}, seed=0)
    add(seed=1)
    assert cells(paper_table(groups()[0]), "AutoAttack") == [("80.00 [n = 1]",)]


@pytest.mark.parametrize(
    ("train", "result", "title", "sentence"),
    [
        ({"dataset": "digits"}, {}, "Digits, Linf, eps 0.1", None),
        ({"dataset": "cifar10"}, {"eps": "8/255"}, "CIFAR-10, Linf, eps 8/255", "are at Linf, eps 0.01."),
        (
            {"dataset": "cifar100", "generated_fraction": 0.7},
            {"eps": "0.01"},
            "Table 7: CIFAR-100, Linf, eps 0.01, with generated images",
            None,
        ),
    ],
)
def test_number_of_the_table(add, groups, train, result, title, sentence):
    add(result, **train)
    table = paper_table(groups()[0])
    assert table.title == title
    assert ("The paper's numbers" in table.caption) == (sentence is not None)
    assert sentence is None or sentence in table.caption


def test_square_over_the_datasets(add, groups):
    add({"eps": "0.01", "accuracy": {"square": 0.4}, "worst": 0.3}, dataset="cifar10", cap_weight=1.0)
    add({"eps": "0.01", "accuracy": {"square": 0.2}, "worst": 0.1}, dataset="cifar100", cap_weight=10.0)
    add({"eps": "0.01", "accuracy": {"square": 0.5}, "worst": 0.1}, dataset="cifar100", objective="at", **RELU)
    add({"eps": "0.01"})
    add({"eps": "0.02", "accuracy": {"pgd": 0.4}}, dataset="cifar10")
    square, mnist = square_tables(groups())
    assert square.title == "Table 5: Square, Linf, eps 0.01" and mnist.title == "Square: MNIST, Linf, eps 0.01"
    assert cells(square, "Model", "Training", "CIFAR-10 Square", "CIFAR-100 Square", "CIFAR-100 Worst case") == [
        ("Dense", "D-ReLU", "40.00 (1)", "20.00 (2)", "10.00 (1)"),
        ("Dense", "AT", "–", "50.00 (1)", "10.00 (1)"),
    ]
    assert "CIFAR-100, Dense: D-ReLU is D-ReLU-10." in square.caption


# Compared with the paper


def test_comparison_with_the_paper(add, groups):
    add({"accuracy": {"pgd": 0.8}, "worst": 0.7}, objective="at", **RELU)
    (lines,) = groups()
    table = against_paper(lines)
    assert table is not None
    assert cells(table, "Table", "Model", "Training", "Attack", "Ours", "Paper", "Difference", "Our worst case") == [
        ("1", "Dense", "AT", "Clean", "95.00", "98.10 (1)", "-3.10", "70.00"),
        ("1", "Dense", "AT", "PGD", "80.00", "87.70 (4)", "-7.70", "70.00"),
    ]
    assert cells(table, "Test images") == [("20",)] * 2
    assert "uncertain by 21.9 points (20 images), at 95 %." in table.caption


def test_incomparable_numbers_have_no_difference(add, groups):
    add({"accuracy": {"cw-l2": 0.9}}, objective="at", **RELU)
    table = against_paper(groups()[0])
    assert table is not None
    assert cells(table, "Attack", "Difference") == [("Clean", "-3.10"), ("CW_L2", "–")]


@pytest.mark.parametrize("threat_model", [{"norm": "L2"}, {"eps": "0.3"}])
def test_other_threat_models_are_not_compared_with_the_paper(add, groups, threat_model):
    add(threat_model, objective="at", **RELU)
    (lines,) = groups()
    assert against_paper(lines) is None
    assert paper_table(lines).title == str(lines.group)


def test_the_papers_cap_weight_has_precedence(add, groups):
    add({"accuracy": {}, "rows": False}, cap_weight=1.0, held_out=0.9)
    stands_in = against_paper(groups()[0])
    assert stands_in is not None
    assert cells(stands_in, "Training") == [("D-ReLU-1 (paper: D-ReLU-100)",)]
    add({"accuracy": {}, "rows": False}, cap_weight=100.0, held_out=0.1)
    table = against_paper(groups()[0])
    assert table is not None
    assert cells(table, "Training", "Paper") == [("D-ReLU-100", "97.77 (3)")]


def test_trades_with_generated_images_is_the_papers_beta_5(add, groups):
    add({"eps": "0.01"}, dataset="cifar10", generated_fraction=0.7, objective="trades", beta=5.0, **RELU)
    table = against_paper(groups()[0])
    assert table is not None
    assert set(table.cells["Table"]) == {"6", "9"}


def test_nothing_to_compare(add, groups):
    add(dataset="digits")
    assert against_paper(groups()[0]) is None


# For the statistics, and the formats


def test_scores_leave_out_what_some_method_lacks(add, groups):
    for model in ("dense_drelu", "shallow_cnn_drelu"):
        add(model=model)
        add({"accuracy": {"pgd": 0.5}}, model=model, objective="at", **RELU)
    add(**RELU)
    frame, said = scores(groups()[0], ["clean", "pgd", "fgsm"])
    assert list(frame.columns) == ["AT", "D-ReLU"]
    assert said == (
        "Blocks: Dense x Clean, Dense x PGD, Shallow CNN x Clean, Shallow CNN x PGD. Left out: natural (not run for "
        "Shallow CNN); Dense x FGSM (not measured for AT); Shallow CNN x FGSM (not measured for AT)."
    )
    assert list(frame.index) == [(net, column) for net in ("dense", "shallow_cnn") for column in ("clean", "pgd")]


def test_scores_name_a_verdict_that_is_not_sound(add, groups):
    for model, verdict in (("dense_drelu", "masked"), ("shallow_cnn_drelu", "sound")):
        add({"verdict": verdict}, model=model)
        add({"verdict": "undecided"}, model=model, objective="trades", **RELU)
        add(model=model, objective="at", **RELU)
    frame, _ = scores(groups()[0], ["pgd"])
    assert list(frame.columns) == ["AT", "TRADES-6 (undecided)", "D-ReLU (masked)"]


def test_formats(add, groups):
    add(seed=0)
    add(cap_lr=0.5)
    table = paper_table(groups()[0])
    lines = markdown_table(table.cells).splitlines()
    assert lines[1] == "| " + " | ".join(["---"] * 12) + " |"
    assert lines[2].startswith("| Dense | D-ReLU-0.1, cap_lr 0.1 | 95.00 (1) | 80.00 (1) | sound |")
    text = latex(table)
    assert r"\toprule" in text and r"D-ReLU-0.1, cap\_lr 0.1" in text and r"mean $\pm$ standard" in text
    assert "\n\n" not in text and r"\label{tab:table-1-mnist-linf-eps-0.1}" in text
    heading, first, *_ = csv(table).splitlines()
    assert heading.startswith("net,training,clean,clean std,clean rank,clean seeds,fgsm")
    assert first.startswith('dense,"D-ReLU-0.1, cap_lr 0.1",95.0,,1.0,1,93.0')
