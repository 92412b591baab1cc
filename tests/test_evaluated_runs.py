"""Run directories: what is read, and what is left out and reported."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from synthetic_runs import (
    ATTACKS,
    RELU,
    examples,
    point,
    write_columns,
    write_json,
    write_result,
    write_rows,
    write_run,
    write_sweep,
)

from drelu_timm.errors import InputError
from drelu_timm.reports.evaluated_runs import read_evaluated_runs
from drelu_timm.reports.methods import methods_of
from drelu_timm.reports.sections import attacks, opening, origin, trainings
from drelu_timm.reports.tables import against_paper, all_rows, paper_table, square_tables


def evaluated_run(path, result=None, **train):
    run = write_run(path, **train)
    write_result(run, **(result or {}))
    return run


def test_a_run_of_train_and_evaluate(evaluated):
    runs = read_evaluated_runs([evaluated])
    (run,) = runs.found
    assert runs.broken == []
    (note,) = runs.notes  # the sweep, on 20 images
    assert "counts only by its verdict and the images that fooled the model" in note
    assert str(run.group) == "Digits, Linf, eps 0.1"
    assert (run.architecture, run.training, run.seed) == ("dense", f"D-ReLU-{run.cap_weight:g}", 0)
    result = json.loads((evaluated / "results" / "standard-Linf-0.1.json").read_text())
    assert (
        run.combined.worst == result["worst"] <= run.combined.accuracy["autoattack"] <= run.combined.accuracy["apgd-ce"]
    )
    assert run.combined.accuracy["apgd-ce"] == result["sequences"]["autoattack"]["apgd-ce"]
    assert [at.eps for at in run.curve] == ["0", "0.1", "0.2"]
    assert run.held_out is not None and 0 <= run.held_out <= 1
    assert "torch" in run.combined.results[0].measured_with
    survivors = run.survivors()
    assert survivors is not None and survivors.mean() == pytest.approx(result["worst"])


def test_runs_are_found_at_any_depth_but_not_inside_runs(tmp_path):
    evaluated_run(tmp_path / "a" / "b" / "x")
    evaluated_run(tmp_path / "a" / "y", seed=1)
    write_run(tmp_path / "a" / "y" / "copy", seed=2)
    write_json(tmp_path / "model" / "config.json", {"architecture": "dense"})
    (tmp_path / "model" / "model.safetensors").touch()
    runs = read_evaluated_runs([tmp_path, tmp_path / "a"])
    assert sorted(run.path.name for run in runs.found) == ["x", "y"]
    assert not runs.broken


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
    (run,) = read_evaluated_runs([tmp_path]).found
    assert (run.architecture, run.training) == ("dense", training)


def test_a_pretrained_tag_is_not_part_of_the_architecture(tmp_path):
    for model in ("resnet50_drelu.a1_in1k", "resnet50.a1_in1k"):
        evaluated_run(tmp_path / model, model=model, **({} if "drelu" in model else RELU))
    found = read_evaluated_runs([tmp_path]).found
    assert [(run.architecture, run.training) for run in found] == [
        ("resnet50", "natural"),
        ("resnet50", "D-ReLU-0.1"),
    ]
    assert found[1].settings["placement"] == "head"


def test_other_generated_images_are_another_setting(tmp_path):
    for name, digest in (("x", "a" * 64), ("y", "b" * 64), ("z", "a" * 64)):
        flags = {"dataset": "cifar10", "generated_fraction": 0.7, "seed": int(name == "z")}
        evaluated_run(tmp_path / name, digest=digest, generated=[f"{name}.npz"], **flags)
    x, y, z = read_evaluated_runs([tmp_path]).found
    assert x.settings_key == z.settings_key != y.settings_key


def test_eps_has_one_spelling(tmp_path):
    for seed, eps in enumerate(("0.10", "0.1", "1/10")):
        evaluated_run(tmp_path / str(seed), {"eps": eps}, seed=seed, eps=eps)
    for seed, eps in enumerate(("8/255", "0.03137254901960784")):
        evaluated_run(tmp_path / f"levels{seed}", {"eps": eps}, seed=seed)
    evaluated_run(tmp_path / "large", {"eps": "0.01"})
    groups = read_evaluated_runs([tmp_path]).groups()
    assert [(group.eps, len(found)) for group, found in groups.items()] == [("0.01", 1), ("8/255", 2), ("0.1", 3)]
    assert len({run.settings_key for run in groups[next(group for group in groups if group.eps == "0.1")]}) == 1


def test_an_explicit_default_is_the_same_setting(tmp_path):
    evaluated_run(tmp_path / "x")
    evaluated_run(tmp_path / "y", seed=1, placement="head", activation="drelu", data_dir="elsewhere")
    first, second = read_evaluated_runs([tmp_path]).found
    assert first.settings_key == second.settings_key


def test_the_start_is_a_setting(tmp_path):
    for name, more in (("x", {}), ("y", {"start": {}}), ("z", {"start": {"epochs": 3}})):
        evaluated_run(tmp_path / name, **more)
    assert len({run.settings_key for run in read_evaluated_runs([tmp_path]).found}) == 3


def add_to_config(run, **fields):
    config = json.loads((run / "config.json").read_text())
    write_json(run / "config.json", config | fields)


def test_generated_images_of_a_start_count(tmp_path):
    with_images = {"dataset": "cifar10", "generated_fraction": 0.7}
    evaluated_run(tmp_path / "x", dataset="cifar10", start=with_images)
    twice = evaluated_run(tmp_path / "y", dataset="cifar10", start={"dataset": "cifar10"})
    config = json.loads((twice / "config.json").read_text())
    first = {"train": config["train"] | with_images}
    add_to_config(twice, init_from={**config["init_from"], "init_from": first})
    evaluated_run(tmp_path / "z", dataset="cifar10", start={"dataset": "cifar10"})
    x, y, z = read_evaluated_runs([tmp_path]).found
    assert [one.group.generated for one in (x, y, z)] == [True, True, False]
    assert len({one.settings_key for one in (x, y, z)}) == 3


def test_other_precision_is_another_setting(tmp_path):
    for seed, launch in ((0, {"mixed_precision": "bf16"}), (0, {"mixed_precision": "no"}), (1, None)):
        run = evaluated_run(tmp_path / f"{seed}{launch and launch['mixed_precision']}", seed=seed)
        if launch is not None:
            add_to_config(run, launch=launch)
    runs = read_evaluated_runs([tmp_path])
    bf16, no, not_said = runs.found
    assert bf16.settings_key != no.settings_key == not_said.settings_key and runs.notes == []


def test_groups_are_kept_apart(tmp_path):
    evaluated_run(tmp_path / "a")
    evaluated_run(tmp_path / "b", {"eps": "0.3"})
    evaluated_run(tmp_path / "c", dataset="cifar10", generated_fraction=0.7)
    run = evaluated_run(tmp_path / "d", {"eps": "8/255"}, dataset="cifar10")
    write_result(run, eps="0.01")
    groups = read_evaluated_runs([tmp_path]).groups()
    assert sorted(map(str, groups)) == [
        "CIFAR-10, Linf, eps 0.01",
        "CIFAR-10, Linf, eps 0.1, with generated images",
        "CIFAR-10, Linf, eps 8/255",
        "MNIST, Linf, eps 0.1",
        "MNIST, Linf, eps 0.3",
    ]


def test_several_evaluations_give_the_lower_accuracies(tmp_path):
    run = write_run(tmp_path / "x")
    write_result(run, suite="paper", worst=0.8)
    write_result(run, suite="quick", accuracy={"apgd-ce": 0.5, "bpda": 0.4}, worst=0.4, verdict="masked")
    (run,) = read_evaluated_runs([tmp_path]).found
    assert run.combined.accuracy == {**ATTACKS, "apgd-ce": 0.5, "bpda": 0.4}
    assert (run.combined.worst, run.verdict, run.combined.cw_l2) == (0.4, "masked", 0.3)
    survivors = run.survivors()
    assert survivors is not None and survivors.sum() == 8


def test_broken_images_of_different_evaluations_are_united(tmp_path):
    run = write_run(tmp_path / "x")
    write_result(run, suite="paper", worst=0.5)
    other = write_result(run, suite="quick", worst=0.5)
    write_rows(other.with_suffix(".csv"), ["pgd"] * 10 + [""] * 10)
    (run,) = read_evaluated_runs([tmp_path]).found
    assert (run.combined.worst, run.combined.at_most) == (0, False)
    other.with_suffix(".csv").unlink()
    (run,) = read_evaluated_runs([tmp_path]).found
    assert (run.combined.worst, run.combined.at_most) == (0.5, True)


def test_an_evaluation_with_unreadable_rows_is_left_out(tmp_path):
    run = write_run(tmp_path / "x")
    write_result(run, suite="paper", worst=0.5)
    write_result(run, suite="quick").with_suffix(".csv").write_text("index\n")
    runs = read_evaluated_runs([tmp_path])
    assert runs.found[0].combined.worst == 0.5 and "has 0 rows" in runs.broken[0]


def test_carlini_wagner_without_a_median_has_an_accuracy(tmp_path):
    run = write_run(tmp_path / "x")
    write_result(run, suite="standard", accuracy={**ATTACKS, "noise": 0.9}, cw_l2=None)
    path = write_result(run, suite="paper")
    write_json(
        path, json.loads(path.read_text()) | {"cw_l2": {"accuracy_at_budget": 1.0, "budget": 2.8, "median_l2": None}}
    )
    (run,) = read_evaluated_runs([tmp_path]).found
    assert (run.combined.cw_l2, run.combined.cw_budget, run.sources("cw-l2")) == (1.0, 2.8, (path,))


def test_a_masked_verdict_on_fewer_examples_counts(tmp_path):
    run = write_run(tmp_path / "x")
    write_result(run, suite="quick", n_examples=1000)
    few = write_result(run, suite="all", n_examples=500, worst=0.05, verdict="masked")
    runs = read_evaluated_runs([tmp_path])
    (run,) = runs.found
    assert (run.combined.points[0].verdict.verdict, run.verdict, run.combined.verdict_images) == (
        "sound",
        "masked",
        500,
    )
    assert f"{few} counts only by its verdict and the images that fooled the model: worst case 5.00 %" in runs.notes[0]
    assert run.combined.worst == pytest.approx(
        0.325
    )  # 800 of 1000 examples stayed robust; this evaluation fooled the model on 475 of these


def test_a_sweep_on_the_same_number_of_images_counts_as_an_evaluation(tmp_path):
    run = evaluated_run(tmp_path / "x", {"worst": 0.5})
    path = write_sweep(run, [point(eps="1/10", accuracy={"bpda": 0.4}, worst=0.4)], n_examples=20)
    write_columns(path.with_suffix(".csv"), {**examples(20), "worst": ["0.1"] * 12 + ["0.2"] * 4 + [""] * 4})
    (run,) = read_evaluated_runs([tmp_path]).found
    assert (run.combined.accuracy["bpda"], run.combined.accuracy["pgd"]) == (0.4, ATTACKS["pgd"])
    assert (run.combined.worst, run.combined.at_most) == (0, False)  # each breaks the images that the other leaves
    assert run.sources("worst") == (run.path / "results" / "paper-Linf-0.1.json", path)


def test_a_sweep_on_other_images_is_in_another_group(tmp_path):
    run = evaluated_run(tmp_path / "x")
    path = write_sweep(run, [point(worst=0, verdict="masked")], n_examples=20)
    write_json(path, json.loads(path.read_text()) | {"dataset_title": "MNIST (JPEG copy)"})
    (run,) = read_evaluated_runs([tmp_path]).found
    assert (run.verdict, run.combined.worst, run.curve) == ("sound", 0.8, ())


def test_the_sweep_on_the_most_examples_is_drawn(tmp_path):
    run = evaluated_run(tmp_path / "x")
    few = write_sweep(run, [point(eps=eps, worst=0.5) for eps in ("0.2", "0.3", "0.4")], suite="paper")
    most = write_sweep(run, [point(eps="0.2", worst=0.4)], n_examples=1000)
    runs = read_evaluated_runs([tmp_path])
    assert runs.found[0].sweep.path == most
    assert runs.notes == [f"{few} is not drawn: {most.name} of {run} has more examples or more eps."]


def test_results_of_different_weights_are_refused(tmp_path):
    run = evaluated_run(tmp_path / "x")
    write_result(run, suite="quick", model_digest="1" * 64)
    runs = read_evaluated_runs([tmp_path])
    assert runs.found == []
    assert runs.broken == [f"{run} has evaluations of different weights. Delete the older ones."]


def test_the_verdict_of_a_sweep_at_the_eps_counts(tmp_path):
    run = evaluated_run(tmp_path / "x")
    write_sweep(run, [point(eps="0.10", worst=0.5, verdict="undecided"), point(eps="0.2", worst=0, verdict="masked")])
    (run,) = read_evaluated_runs([tmp_path]).found
    assert (run.verdict, run.combined.verdict_images) == ("undecided", 10)


def test_an_evaluation_on_fewer_examples_counts_only_by_its_images(tmp_path):
    run = write_run(tmp_path / "x")
    write_result(run, suite="paper")
    few = write_result(run, suite="quick", n_examples=10, worst=0.1)
    runs = read_evaluated_runs([tmp_path])
    assert runs.found[0].combined.worst == pytest.approx((1 + 6) / 20)
    assert runs.notes == [
        f"{few} counts only by its verdict and the images that fooled the model: worst case 10.00 % of 10 "
        f"examples, sound; another evaluation of {run} has 20 examples."
    ]


def test_a_repeated_run_is_noted(tmp_path):
    first, second = evaluated_run(tmp_path / "a"), evaluated_run(tmp_path / "b")
    runs = read_evaluated_runs([tmp_path])
    assert [run.path for run in runs.found] == [first]
    assert runs.notes == [f"{second} is left out: it has the same settings and seed as {first}."]


def test_a_run_without_evaluation_is_noted(tmp_path):
    run = write_run(tmp_path / "x")
    runs = read_evaluated_runs([tmp_path])
    assert (runs.found, runs.broken) == ([], [])
    assert runs.notes == [f"{run} has no evaluation that could be read. Run drelu-timm evaluate {run}."]


def test_a_run_with_other_evaluations_only_is_noted(tmp_path):
    swept, last = write_run(tmp_path / "swept"), write_run(tmp_path / "last", seed=1)
    write_sweep(swept, [point(worst=0.5)])
    (last / "last" / "results").mkdir(parents=True)
    (last / "last" / "results" / "paper-Linf-0.1.json").write_text("{}")
    of_last, of_swept = read_evaluated_runs([tmp_path]).notes
    assert of_swept.startswith(
        f"{swept} has a sweep over eps, but tables need an evaluation at one eps. Run drelu-timm"
    )
    assert of_last.startswith(f"{last} has evaluations of the last epoch's weights only (last/results), not of the")


def test_held_out_accuracy_is_that_of_the_kept_epoch_and_averaged_weights(tmp_path):
    run = evaluated_run(tmp_path / "x")
    epochs = [
        {"epoch": 1, "held_out": {"pgd": 0.3}, "held_out_ema": {"pgd": 0.4}, "best_epoch": 1},
        {"epoch": 2, "held_out": {"pgd": 0.6}, "held_out_ema": {"pgd": 0.2}, "best_epoch": 1},
    ]
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, epochs)))
    assert read_evaluated_runs([tmp_path]).found[0].held_out == 0.4


def test_a_run_without_log_has_no_held_out_accuracy(tmp_path):
    evaluated_run(tmp_path / "x", held_out=None)
    assert read_evaluated_runs([tmp_path]).found[0].held_out is None


# What is broken


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"worst": None}, "worst is None. It must be a number from 0 to 1."),
        ({"clean": 95.0}, "clean is 95.0. It must be a number from 0 to 1."),
        ({"accuracy": {"pgd": float("nan")}}, "accuracy.pgd is nan. It must be a number from 0 to 1."),
        ({"accuracy": [0.5]}, "accuracy is [0.5]. It must be a table of names and values."),
        (
            {"verdict": {"verdict": "fine", "evidence": [], "numbers": {}}},
            "verdict.verdict is 'fine'. It must be one of sound, undecided, masked.",
        ),
        ({"verdict": "sound"}, "verdict is 'sound'. It must be a table of names and values."),
        ({"worst": 0.96}, "has a worst case above another of its accuracies. Evaluate again."),
        ({"accuracy": {"pgd": 0.5}}, "has a worst case above another of its accuracies. Evaluate again."),
        ({"accuracy": {"masking": 0.9}}, "names an attack 'masking', which no suite has. Evaluate again."),
        ({"accuracy": {"pgd std": 0.9}}, "names an attack 'pgd std', which no suite has. Evaluate again."),
    ],
)
def test_unusable_results_are_named(tmp_path, change, message):
    path = write_result(write_run(tmp_path / "x"))
    write_json(path, json.loads(path.read_text()) | change)
    evaluated_run(tmp_path / "y", seed=1)
    runs = read_evaluated_runs([tmp_path])
    (broken,) = runs.broken
    assert broken.startswith(str(path)) and message in broken
    assert [run.path.name for run in runs.found] == ["y"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_examples": None}, "n_examples is None. It must be a whole number above 0."),
        ({"n_examples": "20"}, "n_examples is '20'. It must be a whole number above 0."),
        ({"dataset_title": None}, "dataset_title is None. It must be text in quotes, not empty."),
        ({"norm": "L1"}, "norm is 'L1'. It must be one of Linf, L2."),
        ({"eps": None}, "eps is None. It must be text in quotes or a list."),
        ({"eps": "0.1x"}, "eps is '0.1x'. It must be a radius in quotes"),
        ({"zero_gradient_share": None}, "zero_gradient_share is None. It must be a number from 0 to 1."),
        ({"cw_l2": 5}, "cw_l2 is 5. It must be a table of names and values."),
        (
            {"cw_l2": {"accuracy_at_budget": "x", "budget": 1, "median_l2": 1}},
            "cw_l2.accuracy_at_budget is 'x'. It must be a number from 0 to 1.",
        ),
        ({"sequences": []}, "sequences is []. It must be a table of names and values."),
        ({"sequences": {"apgd": [1]}}, "sequences.apgd is [1]. It must be a table of names and values."),
        ({"settings": None}, "settings is None. It must be a table of names and values."),
        ({"settings": {"pgd": 3}}, "settings.pgd is 3. It must be a table of names and values."),
        ({"versions": 3}, "versions is 3. It must be a table of names and values."),
        (
            {"verdict": {"verdict": [], "evidence": [], "numbers": {}}},
            "verdict.verdict is []. It must be text in quotes.",
        ),
    ],
)
def test_results_with_something_else_in_a_field(tmp_path, change, message):
    path = write_result(write_run(tmp_path / "x"))
    write_json(path, json.loads(path.read_text()) | change)
    runs = read_evaluated_runs([tmp_path])
    assert runs.found == [] and len(runs.broken) == 1
    assert runs.broken[0].startswith(f"{path}: {message}")


@pytest.mark.parametrize("curve", [[], None, {}, "x", [point(eps="bad", worst=0.5)]])
def test_sweeps_with_something_else_in_a_field(tmp_path, curve):
    path = write_sweep(evaluated_run(tmp_path / "x"), [point(worst=0.5)])
    write_json(path, json.loads(path.read_text()) | {"curve": curve})
    runs = read_evaluated_runs([tmp_path])
    assert len(runs.found) == 1 and runs.broken[0].startswith(f"{path}: ")


def test_a_sweep_whose_eps_are_not_those_of_its_curve_is_named(tmp_path):
    path = write_sweep(evaluated_run(tmp_path / "x"), [point(eps="0.2", worst=0.5)])
    write_json(path, json.loads(path.read_text()) | {"eps": ["0.3"]})
    assert read_evaluated_runs([tmp_path]).broken == [f"{path}: eps and curve have different radii. Evaluate again."]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"objective": "fat"}, "train.objective is 'fat'. It must be one of natural, at, trades, mart, n-fgsm, ibp."),
        ({"beta": None}, "train.beta is None. It must be a number."),
        ({"model": 5}, "train.model is 5. It must be text in quotes, not empty."),
        ({"seed": "0"}, "train.seed is '0'. It must be a whole number, 0 or above."),
        ({"cap_weight": None}, "train.cap_weight is None. It must be a number."),
        ({"eps": "0.1x"}, "train.eps is '0.1x'. It must be a radius"),
    ],
)
def test_flags_with_something_else_in_a_field(tmp_path, flags, message):
    run = evaluated_run(tmp_path / "x", **flags)
    runs = read_evaluated_runs([tmp_path])
    assert runs.found == [] and runs.broken[0].startswith(f"{run / 'config.json'}: {message}")


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ("bf16", "launch is 'bf16'. It must be a table of names and values."),
        ({"mixed_precision": 16}, "launch.mixed_precision is 16. It must be text in quotes, not empty."),
    ],
)
def test_a_launch_with_something_else_in_a_field(tmp_path, launch, message):
    run = evaluated_run(tmp_path / "x")
    add_to_config(run, launch=launch)
    runs = read_evaluated_runs([tmp_path])
    assert runs.found == [] and runs.broken[0].startswith(f"{run / 'config.json'}: {message}")


def test_a_result_file_cut_short_is_named(tmp_path):
    path = write_result(write_run(tmp_path / "x"))
    path.write_text(path.read_text()[:100])
    (broken,) = read_evaluated_runs([tmp_path]).broken
    assert broken.startswith(f"{path} cannot be read as JSON")


def test_a_result_file_of_another_version_is_named(tmp_path):
    path = write_result(write_run(tmp_path / "x"))
    content = json.loads(path.read_text())
    del content["norm"], content["n_examples"]
    write_json(path, content)
    (broken,) = read_evaluated_runs([tmp_path]).broken
    assert broken == f"{path} has no norm, n_examples. The file is cut or of another version; create it again."


@pytest.mark.parametrize("of_start", [False, True])
def test_a_config_of_another_version_is_named(tmp_path, of_start):
    run = evaluated_run(tmp_path / "x", start={})
    config = json.loads((run / "config.json").read_text())
    del (config["init_from"] if of_start else config)["train"]["cap_penalty"]
    write_json(run / "config.json", config)
    (broken,) = read_evaluated_runs([tmp_path]).broken
    where = f"{run / 'config.json'}: train"
    assert broken == f"{where} has no cap_penalty. The file is cut or of another version; create it again."


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("", ": best_epoch of the last line is None, not an epoch of the log."),
        ('{"epoch": 1, "held', ":1 is not JSON (Unterminated string"),
        ('{"epoch": 1}\n', ":1 has no held_out."),
        ("[1]\n", ":1 is [1]."),
        ('{"epoch": 1, "held_out": {"pgd": 0.5}}\n', ": best_epoch of the last line is None"),
        ('{"epoch": 1, "held_out": {"pgd": 0.5}, "best_epoch": 3}\n', ": best_epoch of the last line is 3"),
        ('{"epoch": 1, "held_out": {"pgd": 0.5}}\n{"epoch": 2, "held_out": {"pgd": "x"}}\n', ":2: held_out.pgd is 'x'"),
        ('{"epoch": 1, "held_out": {"pgd": 1.5}, "best_epoch": 1}\n', ":1: held_out.pgd is 1.5"),
        ("[" * 100_000, ":1 is not JSON ("),
        ("\ud800", " cannot be read ("),
    ],
)
def test_a_broken_log_is_named_with_line_and_field(tmp_path, log, message):
    run = evaluated_run(tmp_path / "x")
    (run / "log.jsonl").write_bytes(log.encode("utf-8", "surrogatepass"))
    (broken,) = read_evaluated_runs([tmp_path]).broken
    assert broken.startswith(f"{run / 'log.jsonl'}{message}") and "\n" not in broken


def _mutations(content: bytes, random: Random) -> Iterator[bytes]:
    """Yield broken variants of a file: cut, empty, flipped, binary, and JSON with other types, keys and numbers."""
    yield from (b"", content[: len(content) // 2], b"\xff\xfe\x00", b"[" * 50_000, b"null", b"{}", b"[]", b"\n\n")
    for _ in range(5):
        where = random.randrange(len(content))
        yield content[:where] + bytes([random.randrange(256)]) + content[where + 1 :]
    text = content.decode()
    values = list(re.finditer(r"(?<=: )[^,{}\[\]\n]+|(?<=,)[^,\n]+", text))
    for found in random.sample(values, min(4, len(values))):
        for value in ("null", "[]", "{}", "-1", "1e999", "NaN", '"x"', "true", "10" * 30):
            yield (text[: found.start()] + value + text[found.end() :]).encode()


@pytest.mark.parametrize(
    "name", ["config.json", "log.jsonl", "results/paper-Linf-0.1.json", "results/paper-Linf-0.1.csv"]
)
def test_a_mutated_file_is_a_one_line_error_or_a_correct_table(tmp_path, name):
    """No exception but InputError, and no table with numbers that are not accuracies."""
    evaluated_run(tmp_path / "a", start={})
    run = evaluated_run(tmp_path / "x", objective="at", **RELU)
    content = (run / name).read_bytes()
    for mutation in _mutations(content, Random(name)):
        (run / name).write_bytes(mutation)
        runs = read_evaluated_runs([tmp_path])
        for group, of_group in runs.groups().items():
            methods = methods_of(group, of_group)
            cells = all_rows(methods).cells
            paper_table(methods), square_tables([methods]), against_paper(methods)
            trainings([methods]), attacks([methods]), opening(runs, [methods]), origin(runs, [methods], [])
            numbers = re.findall(r"[-\d.]+(?= |$)", " ".join(cells["Worst case"]))
            assert all(0 <= float(number) <= 100 for number in numbers)
            assert all(one.survivors() is not None for one in of_group)
        assert all("\n" not in line for line in (*runs.broken, *runs.notes)), mutation[:50]


def test_a_sweep_cut_short_leaves_the_rest(tmp_path):
    run = evaluated_run(tmp_path / "x")
    path = write_sweep(run, [point(worst=0.5), {"eps": "0.2"}])
    runs = read_evaluated_runs([tmp_path])
    assert runs.found[0].curve == ()
    (broken,) = runs.broken
    assert broken.startswith(
        f"{path}: curve[1] has no settings, clean, accuracy, worst, zero_gradient_share, cw_l2, verdict, seconds."
    )


def test_results_of_other_weights_are_named(tmp_path):
    run = evaluated_run(tmp_path / "x")
    (run / "model").mkdir()
    (run / "model" / "model.safetensors").write_bytes(b"changed")
    (broken,) = read_evaluated_runs([tmp_path]).broken
    assert "was measured on other weights than" in broken and broken.endswith(". Delete it and evaluate again.")


def edit_json(path, **fields):
    write_json(path, json.loads(path.read_text()) | fields)


@pytest.fixture
def forged(tmp_path, evaluated):
    """Copy of a run of evaluate, and its result with the files next to it."""
    run = tmp_path / "run"
    shutil.copytree(evaluated, run, ignore=shutil.ignore_patterns("export", "sweeps"))
    return run / "results" / "standard-Linf-0.1.json"


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (lambda path, content: edit_json(path, seed=content["seed"] + 1), "its settings changed after the evaluation"),
        (lambda path, content: edit_json(path, hardware="8 x H200"), "its content changed after the evaluation"),
        (lambda path, content: edit_json(path, worst=content["worst"] / 2), "has another worst case than the rows"),
        (
            lambda path, content: edit_json(path, accuracy=content["accuracy"] | {"autoattack": content["clean"]}),
            "accuracy",
        ),
        (
            lambda path, content: edit_json(path, verdict=content["verdict"] | {"verdict": "masked"}),
            "is masked, but its numbers give",
        ),
        (
            lambda path, _: path.with_suffix(".csv").write_text(
                path.with_suffix(".csv").read_text().replace(",apgd-ce,", ",,", 1)
            ),
            "has another worst case than the rows",
        ),
        (lambda path, _: path.with_suffix(".adversarial.safetensors").write_bytes(b"x"), "by its sha256"),
    ],
)
def test_a_forged_result_is_broken_and_not_reported(forged, forge, message):
    assert len(read_evaluated_runs([forged.parents[1]]).found) == 1
    forge(forged, json.loads(forged.read_text()))
    runs = read_evaluated_runs([forged.parents[1]])
    assert runs.found == []
    assert message in runs.broken[0] and "\n" not in runs.broken[0]


@pytest.mark.parametrize("broken_by", [["", "pgd"], None])
def test_rows_cut_short_are_named(tmp_path, broken_by):
    run = evaluated_run(tmp_path / "x")
    path = run / "results" / "paper-Linf-0.1.csv"
    if broken_by is None:
        path.write_text("index,label\n" + "0,0\n" * 20)
    else:
        write_rows(path, broken_by)
    (broken,) = read_evaluated_runs([tmp_path]).broken
    assert broken.startswith(f"{path} has") and "rows, or no column broken_by, for 20 test images" in broken


def test_rows_that_contradict_the_result_are_named(tmp_path):
    rows = evaluated_run(tmp_path / "x") / "results" / "paper-Linf-0.1.csv"
    write_rows(rows, [""] * 20)
    (broken,) = read_evaluated_runs([tmp_path]).broken
    assert "paper-Linf-0.1.json has another worst case than the rows next to it" in broken
    write_columns(rows, {**examples(20), "index": range(20, 0, -1), "broken_by": [""] * 16 + ["pgd"] * 4})
    (broken,) = read_evaluated_runs([tmp_path]).broken
    assert "paper-Linf-0.1.csv does not list the test images in order" in broken


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    evaluated_run(tmp_path / "x")
    closed = evaluated_run(tmp_path / "y", seed=1)
    is_file = Path.is_file

    def refuse(path: Path) -> bool:
        if path.parent == closed:
            raise PermissionError(13, "Permission denied")
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)  # root may read everything
    runs = read_evaluated_runs([tmp_path])
    assert [run.path.name for run in runs.found] == ["x"]
    assert runs.broken == [f"{closed} cannot be read ([Errno 13] Permission denied)."]


def test_rows_that_are_not_text_are_named(tmp_path):
    run = evaluated_run(tmp_path / "x")
    (run / "results" / "paper-Linf-0.1.csv").write_bytes(b"\xff\xfe\x00broken_by\n\x80")
    (broken,) = read_evaluated_runs([tmp_path]).broken
    assert "paper-Linf-0.1.csv cannot be read as CSV (" in broken


def test_rows_may_be_left_out(tmp_path):
    evaluated_run(tmp_path / "x", {"rows": False})
    assert read_evaluated_runs([tmp_path]).found[0].survivors() is None


def test_folders_without_a_run(tmp_path):
    with pytest.raises(InputError, match="is not a folder\\. Give run directories, or folders that contain them"):
        read_evaluated_runs([tmp_path / "missing"])
    with pytest.raises(InputError, match=r"No run in .*\. Make one with drelu-timm sweep, or with train and evaluate"):
        read_evaluated_runs([tmp_path])
