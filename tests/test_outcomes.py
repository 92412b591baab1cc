"""What is read of run directories, and what is left out of them and said."""

import json

import pytest
from synthetic_runs import ATTACKS, RELU, point, write_json, write_result, write_rows, write_run, write_sweep

from drelu_timm.errors import InputError
from drelu_timm.outcomes import read_outcomes


def evaluated_run(path, result=None, **train):
    run = write_run(path, **train)
    write_result(run, **(result or {}))
    return run


def test_a_run_of_train_and_evaluate(evaluated):
    outcomes = read_outcomes([evaluated])
    (outcome,) = outcomes.found
    assert (outcomes.broken, outcomes.notes) == ([], [])
    assert str(outcome.group) == "Digits, Linf, eps 0.1"
    assert (outcome.net, outcome.training, outcome.seed) == ("dense", f"D-ReLU-{outcome.cap_weight:g}", 0)
    result = json.loads((evaluated / "results" / "standard-Linf-0.1.json").read_text())
    assert outcome.at.worst == result["worst"] <= outcome.at.accuracy["autoattack"] <= outcome.at.accuracy["apgd-ce"]
    assert outcome.at.accuracy["apgd-ce"] == result["sequences"]["autoattack"]["apgd-ce"]
    assert [at.eps for at in outcome.curve] == ["0", "0.1", "0.2"]
    assert outcome.held_out is not None and 0 <= outcome.held_out <= 1
    assert "torch" in outcome.measured_with[0]
    survivors = outcome.survivors()
    assert survivors is not None and survivors.mean() == pytest.approx(result["worst"])


def test_runs_are_found_at_any_depth_but_not_inside_runs(tmp_path):
    evaluated_run(tmp_path / "a" / "b" / "x")
    evaluated_run(tmp_path / "a" / "y", seed=1)
    write_run(tmp_path / "a" / "y" / "copy", seed=2)
    write_json(tmp_path / "model" / "config.json", {"architecture": "dense"})
    (tmp_path / "model" / "model.safetensors").touch()
    outcomes = read_outcomes([tmp_path, tmp_path / "a"])
    assert sorted(outcome.run.name for outcome in outcomes.found) == ["x", "y"]
    assert not outcomes.broken


@pytest.mark.parametrize(
    ("train", "training"),
    [
        ({}, "D-ReLU-0.1"),
        (RELU, "natural"),
        ({**RELU, "objective": "at"}, "AT"),
        ({**RELU, "model": "dense", "activation": None, "objective": "trades", "beta": 1.0}, "TRADES-1"),
        ({"objective": "at", "cap_weight": 1e-7}, "AT + D-ReLU-1e-07"),
        ({"objective": "mart", "awp_gamma": 0.005}, "MART-6 + AWP + D-ReLU-0.1"),
        ({"placement": "stem", "cap_weight": 100.0}, "D-ReLU (stem)-100"),
        ({"cap_penalty": "effective"}, "D-ReLU (effective)-0.1"),
        ({"activation": "srelu"}, "S-ReLU"),
    ],
)
def test_names_of_trainings(tmp_path, train, training):
    evaluated_run(tmp_path / "x", **train)
    (outcome,) = read_outcomes([tmp_path]).found
    assert (outcome.net, outcome.training) == ("dense", training)


def test_a_default_that_is_spelt_out_is_the_same_setting(tmp_path):
    evaluated_run(tmp_path / "x")
    evaluated_run(tmp_path / "y", seed=1, placement="head", activation="drelu", data_dir="elsewhere")
    first, second = read_outcomes([tmp_path]).found
    assert first.settings == second.settings


def test_what_it_went_on_from_is_a_setting(tmp_path):
    for name, more in (("x", {}), ("y", {"start": {}}), ("z", {"start": {"epochs": 3}})):
        evaluated_run(tmp_path / name, **more)
    assert len({outcome.settings for outcome in read_outcomes([tmp_path]).found}) == 3


def test_groups_are_kept_apart(tmp_path):
    evaluated_run(tmp_path / "a")
    evaluated_run(tmp_path / "b", {"eps": "0.3"})
    evaluated_run(tmp_path / "c", dataset="cifar10", generated_fraction=0.7)
    run = evaluated_run(tmp_path / "d", {"eps": "8/255"}, dataset="cifar10")
    write_result(run, eps="0.01")
    groups = read_outcomes([tmp_path]).groups()
    assert sorted(map(str, groups)) == [
        "CIFAR-10, Linf, eps 0.01",
        "CIFAR-10, Linf, eps 0.1, with generated images",
        "CIFAR-10, Linf, eps 8/255",
        "MNIST, Linf, eps 0.1",
        "MNIST, Linf, eps 0.3",
    ]


def test_of_several_evaluations_the_lower_accuracies(tmp_path):
    run = write_run(tmp_path / "x")
    write_result(run, suite="paper", worst=0.8)
    write_result(run, suite="quick", accuracy={"apgd-ce": 0.5, "bpda": 0.4}, worst=0.4, verdict="masked")
    (outcome,) = read_outcomes([tmp_path]).found
    assert outcome.at.accuracy == {**ATTACKS, "apgd-ce": 0.5, "bpda": 0.4}
    assert (outcome.at.worst, outcome.at.verdict, outcome.at.cw_l2) == (0.4, "masked", 0.3)
    survivors = outcome.survivors()
    assert survivors is not None and survivors.sum() == 8


def test_an_evaluation_on_fewer_examples_is_left_out(tmp_path):
    run = write_run(tmp_path / "x")
    write_result(run, suite="paper")
    few = write_result(run, suite="quick", n_examples=10, worst=0.1)
    outcomes = read_outcomes([tmp_path])
    assert outcomes.found[0].at.worst == 0.8
    assert outcomes.notes == [f"{few} is left out: another evaluation of {run} has 20 examples"]


def test_the_same_run_twice_is_said(tmp_path):
    first, second = evaluated_run(tmp_path / "a"), evaluated_run(tmp_path / "b")
    outcomes = read_outcomes([tmp_path])
    assert [outcome.run for outcome in outcomes.found] == [first]
    assert outcomes.notes == [f"{second} is {first} once more (settings and seed); it is left out"]


def test_a_run_without_evaluation_is_said(tmp_path):
    run = write_run(tmp_path / "x")
    outcomes = read_outcomes([tmp_path])
    assert (outcomes.found, outcomes.broken) == ([], [])
    assert outcomes.notes == [f"{run} has no evaluation that could be read; drelu-timm evaluate {run} makes one"]


def test_held_out_is_of_the_epoch_that_was_kept_and_of_averaged_weights(tmp_path):
    run = evaluated_run(tmp_path / "x")
    epochs = [
        {"epoch": 1, "held_out": {"pgd": 0.3}, "held_out_ema": {"pgd": 0.4}, "best_epoch": 1},
        {"epoch": 2, "held_out": {"pgd": 0.6}, "held_out_ema": {"pgd": 0.2}, "best_epoch": 1},
    ]
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, epochs)))
    assert read_outcomes([tmp_path]).found[0].held_out == 0.4


def test_a_run_without_log_has_no_held_out_figure(tmp_path):
    evaluated_run(tmp_path / "x", held_out=None)
    assert read_outcomes([tmp_path]).found[0].held_out is None


# What is broken


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"worst": None}, "worst is None, not a share between 0 and 1"),
        ({"clean": 95.0}, "clean is 95.0, not a share between 0 and 1"),
        ({"accuracy": {"pgd": float("nan")}}, "pgd is nan, not a share between 0 and 1"),
        ({"accuracy": [0.5]}, "accuracy is [0.5], not one an attack"),
        ({"verdict": {"verdict": "fine"}}, "no verdict on gradient masking (sound, undecided, masked)"),
        ({"verdict": "sound"}, "lacks verdict: it is cut, or of another version"),
    ],
)
def test_results_that_cannot_be_used(tmp_path, change, message):
    path = write_result(write_run(tmp_path / "x"))
    write_json(path, json.loads(path.read_text()) | change)
    evaluated_run(tmp_path / "y", seed=1)
    outcomes = read_outcomes([tmp_path])
    (broken,) = outcomes.broken
    assert broken.startswith(str(path)) and message in broken
    assert [outcome.run.name for outcome in outcomes.found] == ["y"]


def test_a_result_file_cut_short_is_named(tmp_path):
    path = write_result(write_run(tmp_path / "x"))
    path.write_text(path.read_text()[:100])
    (broken,) = read_outcomes([tmp_path]).broken
    assert broken.startswith(f"{path} cannot be read as JSON")


def test_a_result_file_of_another_version_is_named(tmp_path):
    path = write_result(write_run(tmp_path / "x"))
    content = json.loads(path.read_text())
    del content["norm"], content["n_examples"]
    write_json(path, content)
    (broken,) = read_outcomes([tmp_path]).broken
    assert broken == f"{path} lacks norm, n_examples: it is cut, or of another version; make it anew"


@pytest.mark.parametrize("of_start", [False, True])
def test_a_config_of_another_version_is_named(tmp_path, of_start):
    run = evaluated_run(tmp_path / "x", start={})
    config = json.loads((run / "config.json").read_text())
    del (config["init_from"] if of_start else config)["train"]["cap_penalty"]
    write_json(run / "config.json", config)
    (broken,) = read_outcomes([tmp_path]).broken
    assert broken == f"{run / 'config.json'} lacks cap_penalty: it is cut, or of another version; make it anew"


@pytest.mark.parametrize("log", ["", '{"epoch": 1, "held', '{"epoch": 1}\n', "[1]\n"])
def test_a_log_cut_short_is_named(tmp_path, log):
    run = evaluated_run(tmp_path / "x")
    (run / "log.jsonl").write_text(log)
    (broken,) = read_outcomes([tmp_path]).broken
    assert broken.startswith(f"{run / 'log.jsonl'} is no whole log of a training (") and broken.endswith("train anew")


def test_a_sweep_cut_short_leaves_the_rest(tmp_path):
    run = evaluated_run(tmp_path / "x")
    path = write_sweep(run, [point(worst=0.5), {"eps": "0.2"}])
    outcomes = read_outcomes([tmp_path])
    assert outcomes.found[0].curve == ()
    (broken,) = outcomes.broken
    assert broken.startswith(f"{path} lacks clean, accuracy, worst, verdict, zero_gradient_share:")


def test_results_of_other_weights_are_named(tmp_path):
    run = evaluated_run(tmp_path / "x")
    (run / "model").mkdir()
    (run / "model" / "model.safetensors").write_bytes(b"changed")
    (broken,) = read_outcomes([tmp_path]).broken
    assert "was measured on other weights than" in broken and broken.endswith("delete it, evaluate anew")


@pytest.mark.parametrize("broken_by", [["", "pgd"], None])
def test_rows_cut_short_are_named(tmp_path, broken_by):
    run = evaluated_run(tmp_path / "x")
    path = run / "results" / "paper-Linf-0.1.csv"
    if broken_by is None:
        path.write_text("index,label\n" + "0,0\n" * 20)
    else:
        write_rows(path, broken_by)
    (outcome,) = read_outcomes([tmp_path]).found
    with pytest.raises(InputError, match=r"rows, or no column broken_by, for 20 test images: it is cut"):
        outcome.survivors()


def test_rows_may_be_left_out(tmp_path):
    evaluated_run(tmp_path / "x", {"rows": False})
    assert read_outcomes([tmp_path]).found[0].survivors() is None


def test_folders_that_hold_no_run(tmp_path):
    with pytest.raises(InputError, match="is no folder; give run directories, or folders that hold them"):
        read_outcomes([tmp_path / "missing"])
    with pytest.raises(InputError, match=r"no run in .*; make one: drelu-timm sweep, or train and evaluate"):
        read_outcomes([tmp_path])
