"""Training on digits, by the command and by the function: learning, resuming, several processes, errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drelu_timm.__main__ import main
from drelu_timm.errors import InputError
from drelu_timm.runs import Run
from drelu_timm.train import TrainConfig, train
from drelu_timm.train_config import PRESETS

SMALL = {"n_train": 256, "batch_size": 32, "epochs": 2, "steps": 2, "width": 16}


def config(path: Path, **settings) -> TrainConfig:
    return TrainConfig(**{"model": "dense_drelu", "dataset": "digits", "output_dir": path, **SMALL, **settings})


def log(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model" / "model.safetensors")


def flags(settings: TrainConfig) -> list[str]:
    names = ("model", "dataset", "output_dir", "n_train", "batch_size", "epochs", "steps", "width", "objective")
    return [part for name in names for part in (f"--{name}", str(getattr(settings, name)))]


def launch(*arguments: str, processes: int = 1) -> subprocess.Popen:
    # On a machine without GPUs `accelerate launch` starts a single process, whatever it is told.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "drelu_timm", *arguments]
    # As many threads as here, where weights are compared to the bit: sums depend on it.
    threads = torch.get_num_threads() if processes == 1 else 1
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("objective", ["natural", "at", "trades"])
def test_every_objective_learns_and_logs(tmp_path, objective):
    settings = config(tmp_path / "run", objective=objective, n_train=None, epochs=4, cap_weight=1e-3, eps="0.03")
    run = Run.open(train(settings))

    entries = log(run.path)
    assert [entry["epoch"] for entry in entries] == [1, 2, 3, 4]
    assert entries[-1]["held_out"]["clean"] > 0.85
    assert entries[-1]["train"]["loss"] < entries[0]["train"]["loss"]
    assert entries[-1]["caps"]["mean"] < entries[0]["caps"]["mean"] < 100
    assert sum(entries[-1]["units"].values()) == pytest.approx(1)
    assert run.config["train"]["objective"] == objective
    assert run.config["train"]["eps"] == "0.03"
    assert torch.__version__.startswith(run.config["versions"]["torch"])
    assert run.load_model()(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_robust_objectives_are_more_robust_than_natural_training(tmp_path):
    settings = config(tmp_path / "natural", n_train=None, epochs=8, eps="0.1", steps=5)
    train(settings)
    train(replace(settings, output_dir=tmp_path / "trades", objective="trades"))
    natural, robust = (log(tmp_path / name)[-1]["held_out"] for name in ("natural", "trades"))
    assert robust["pgd"] > natural["pgd"] + 0.1


def test_controls_differ_in_the_activation_only(tmp_path):
    keys = {}
    for activation in ("relu", "drelu"):
        train(config(tmp_path / activation, activation=activation))
        keys[activation] = weights(tmp_path / activation)
    assert {key for key in keys["drelu"] if not key.endswith(".cap")} == set(keys["relu"])


@pytest.mark.parametrize("model", ["dense", "shallow_cnn", "resnet10t", "vit_tiny_patch16_224"])
def test_plain_timm_models_train_too(tmp_path, model):
    settings = config(tmp_path, model=model, width=None, dataset="digits", epochs=1, n_train=96)
    if model == "vit_tiny_patch16_224":
        settings = replace(settings, img_size=16)
    run = Run.open(train(settings))
    size = run.config["img_size"]
    assert run.load_model()(torch.rand(2, 1, size, size)).shape == (2, 10)


def test_caps_have_their_own_learning_rate(tmp_path):
    train(config(tmp_path / "slow", cap_lr=1e-3, cap_weight=0.1))
    train(config(tmp_path / "fast", cap_lr=1.0, cap_weight=0.1))
    steps = 2 * len(range(0, int(256 * 0.9) - 31, 32))
    assert log(tmp_path / "slow")[-1]["caps"]["mean"] == pytest.approx(100 - 1e-3 * steps, abs=1e-3)
    assert log(tmp_path / "fast")[-1]["caps"]["mean"] == pytest.approx(100 - 1.0 * steps, rel=0.02)


def test_init_from_a_run(tmp_path):
    train(config(tmp_path / "first"))
    train(config(tmp_path / "second", init_from=tmp_path / "first", objective="at", lr=1e-9, cap_lr=1e-9, epochs=1))
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)


def test_resume_after_the_end_changes_nothing(tmp_path):
    train(config(tmp_path))
    before = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    train(config(tmp_path, resume=True))
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_resume_starts_anew_where_there_is_nothing(tmp_path):
    train(config(tmp_path / "new", resume=True))
    assert len(log(tmp_path / "new")) == 2


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, schedule):
    whole = config(tmp_path / "whole", objective="at", epochs=40, steps=5)
    killed = replace(whole, output_dir=tmp_path / "killed", resume=True)
    train(replace(whole, schedule=schedule))

    process = launch("train", *flags(killed), "--schedule", schedule, "--resume")
    while not list((tmp_path / "killed").glob("state/epoch-*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "model").exists()

    train(replace(killed, schedule=schedule))
    expected, actual = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(expected[key], actual[key]) for key in expected)
    assert [entry["epoch"] for entry in log(tmp_path / "killed")] == list(range(1, 41))


@pytest.mark.parametrize("objective", ["natural", "trades"])
def test_two_processes_train_like_one(tmp_path, objective):
    one = config(tmp_path / "one", objective=objective)
    two = replace(one, output_dir=tmp_path / "two")
    train(one)
    process = launch("train", *flags(two), processes=2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    expected, actual = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(expected[key], actual[key], atol=1e-5) for key in expected)
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a["train"]["loss"] == pytest.approx(b["train"]["loss"], rel=1e-4)
        assert a["held_out"] == pytest.approx(b["held_out"], rel=1e-3)


def test_presets_set_what_the_paper_says_and_flags_win(tmp_path, capsys):
    arguments = ["--dataset", "digits", "--model", "dense_drelu", "--n-train", "256", "--output_dir", str(tmp_path)]
    assert main(["train", *arguments, "--preset", "paper-drelu", "--epochs", "1", "--cap-weight", "0.1"]) == 0
    settings = Run.open(tmp_path).config["train"]
    assert {key: settings[key] for key in ("optimizer", "lr", "cap_lr", "schedule", "patience")} == {
        "optimizer": "adam",
        "lr": 1e-3,
        "cap_lr": 1e-3,
        "schedule": "plateau",
        "patience": 10,
    }
    assert settings["epochs"] == 1
    assert PRESETS["paper-drelu"]["epochs"] == 2000
    assert "next: drelu-timm evaluate" in capsys.readouterr().out


BAD = [
    ({"model": "resnet5_drelu"}, "--model 'resnet5_drelu' is unknown; did you mean resnet"),
    ({"dataset": "minst"}, "--dataset 'minst' is unknown; did you mean mnist?"),
    ({"objective": "trade"}, "--objective 'trade' is unknown; did you mean trades?"),
    ({"schedule": "cosin"}, "--schedule 'cosin' is unknown; did you mean cosine?"),
    ({"activation": "drelu6"}, "activation 'drelu6' is unknown; did you mean relu6 or drelu"),
    ({"norm": "L0"}, "--norm 'L0' is unknown; allowed: L2, Linf"),
    ({"eps": "eight"}, "--eps 'eight' is no radius; give a number >= 0 such as 8/255 or 0.1"),
    ({"epochs": 0}, "--epochs 0 must be above 0"),
    ({"lr": -1.0}, "--lr -1.0 must be above 0"),
    ({"cap_weight": float("nan")}, "--cap-weight nan must be a number >= 0"),
    ({"preset": "paper-at"}, "--preset paper-at goes on from natural training; give that run by --init-from RUN"),
    ({"model": "dense", "activation": "relu"}, "--activation, --width belongs to *_drelu models"),
    ({"optimizer": "adamm"}, "--optimizer 'adamm' is no optimiser of timm"),
    ({"batch_size": 512}, "512"),
    ({"init_from": Path("nowhere")}, "nowhere is no run directory"),
    ({"dataset": "folder", "data_dir": Path("nowhere"), "img_size": 8}, "nowhere"),
    ({"model": "inception_v3_drelu"}, "cannot run on 8x8 images"),
]


@pytest.mark.filterwarnings("default::drelu_timm.errors.DReLUWarning")
@pytest.mark.parametrize(("settings", "text"), BAD, ids=[" ".join(map(str, settings)) for settings, _ in BAD])
def test_bad_input_is_one_line_before_any_work(tmp_path, settings, text):
    with pytest.raises(InputError) as error:
        train(config(tmp_path / "run", **settings))
    assert text in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_directory_in_use_is_left_alone(tmp_path):
    train(config(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="is in use; add --resume to go on, or name another folder"):
        train(config(tmp_path))
    with pytest.raises(InputError, match=r"with other settings: lr \(0.001 before, 0.01 now\)"):
        train(config(tmp_path, resume=True, lr=0.01))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "progress.json"])
def test_a_state_cut_short_is_named_and_left_alone(tmp_path, file):
    train(config(tmp_path))
    shutil.rmtree(tmp_path / "model")  # as if the run had been killed before its end
    (state,) = (tmp_path / "state").iterdir()
    (state / file).write_bytes((state / file).read_bytes()[:50])
    with pytest.raises(InputError, match=rf"{state}.*(delete it to start anew|make it anew)") as error:
        train(config(tmp_path, resume=True))
    assert "\n" not in str(error.value)
    assert (state / file).stat().st_size == 50


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        train(config(tmp_path))


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_state(tmp_path):
    train(config(tmp_path / "good"))
    with pytest.raises(InputError, match=r"the loss is (nan|inf) in epoch 1, step \d+; lower --lr"):
        train(config(tmp_path / "bad", lr=1e30))
    assert not (tmp_path / "bad" / "model").exists()
    with pytest.raises(InputError, match="has no trained model yet"):
        Run.open(tmp_path / "bad").load_model()


def test_the_command_line_prints_errors_in_one_line(capsys):
    assert main(["train", "--model", "dense_drelu", "--dataset", "minst"]) == 2
    assert capsys.readouterr().err == "error: --dataset 'minst' is unknown; did you mean mnist?\n"
    assert main(["trian"]) == 2
    assert "did you mean train" in capsys.readouterr().err
    assert main([]) == 0
    assert "usage: drelu-timm VERB" in capsys.readouterr().out
