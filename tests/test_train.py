"""Training on digits, by the command and by the function: learning, objectives, several processes, errors."""

import json
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from launching import (
    SGD,
    Launched,
    assert_same_weights,
    config,
    image_folder,
    log,
    start_torchrun,
    train_by_processes,
    train_by_torchrun,
    weights,
)
from torch import nn

from drelu_timm.__main__ import main
from drelu_timm.data.readers import load_images
from drelu_timm.errors import DReLUWarning, InputError
from drelu_timm.runs import Run
from drelu_timm.train import train
from drelu_timm.training.config import TrainConfig, resolve
from drelu_timm.training.distributed import make_accelerator
from drelu_timm.training.model import create_model
from drelu_timm.training.presets import PRESETS
from drelu_timm.training.trainer import Trainer


@pytest.mark.parametrize("objective", ["natural", "at", "n-fgsm", "trades", "mart"])
def test_every_objective_learns_and_logs(tmp_path, objective):
    steps = 1 if objective == "n-fgsm" else 2
    settings = config(
        tmp_path / "run", objective=objective, n_train=None, epochs=4, cap_weight=1e-3, eps="0.03", steps=steps
    )
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
    margin = set() if objective == "natural" else {"margin", "hides_gradients"}
    assert entries[-1]["held_out"].keys() == {"loss", "clean", "pgd"} | margin
    assert not any(entry["held_out"].get("hides_gradients") for entry in entries), "an honest training has no alarm"
    assert 0 <= entries[-1]["waited_for_data"] <= 1
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


def test_a_variant_with_an_imagenet_stem_warns_of_small_images(tmp_path):
    with pytest.warns(DReLUWarning, match="resnet10t_drelu starts with an ImageNet stem, .* 8x8 images. Create"):
        train(config(tmp_path, model="resnet10t_drelu", epochs=1, n_train=64))


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


def test_generated_images_are_mixed_in_the_same_way_by_two_processes(tmp_path):
    data = image_folder(tmp_path / "images")
    images = np.random.default_rng(1).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "part1.npz", image=images[:30], label=np.repeat([0, 1], 15))
    np.savez_compressed(tmp_path / "part2.npz", image=images[30:], label=np.repeat([0, 1], 15))
    mixed = {"generated": (tmp_path / "part1.npz", tmp_path / "part2.npz"), "generated_fraction": 0.7}
    augmented = {"cutmix": 0.5, "cutout": 3, "ema_decay": 0.9}
    one = config(tmp_path / "one", objective="trades", workers=1, **augmented, **data, **mixed, **SGD)
    train(one)
    train_by_processes(replace(one, output_dir=tmp_path / "two", workers=0), 2)
    assert (tmp_path / "part2.stored.npz").exists()
    for folder in ("model", "last"):
        assert_same_weights(tmp_path / "one", tmp_path / "two", folder)


EVERYTHING = {"schedule": "onecycle", "ema_decay": 0.9, "awp_gamma": 0.01, "grad_accum_steps": 2}


@pytest.mark.parametrize(
    ("objective", "settings", "train_together"),
    [
        ("natural", {}, train_by_torchrun),
        ("trades", {}, train_by_processes),
        ("at", EVERYTHING, train_by_processes),
    ],
    ids=["natural", "trades", "at with everything"],
)
def test_two_processes_train_like_one(tmp_path, objective, settings, train_together):
    one = config(tmp_path / "one", objective=objective, **settings, **SGD)
    two = replace(one, output_dir=tmp_path / "two")
    train(one)
    train_together(two, 2)
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a["train"]["loss"] == pytest.approx(b["train"]["loss"], rel=1e-4)
        assert a["held_out"] == pytest.approx(b["held_out"], rel=1e-3)


def test_trades_with_batchnorm_runs_on_two_processes(tmp_path):
    one = config(tmp_path / "one", objective="trades", model="resnet10t_drelu", small_images=True)
    two = replace(one, output_dir=tmp_path / "two")
    train(one)
    train_by_processes(two, 2)
    losses = [log(tmp_path / name)[0]["train"]["loss"] for name in ("one", "two")]
    assert losses[0] != losses[1]  # statistics of 16 images each, not of 32
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_presets_set_the_papers_values_and_flags_win(tmp_path, capsys):
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
    assert PRESETS["paper-drelu"].settings["epochs"] == 2000
    printed = capsys.readouterr().out
    assert "--preset paper-drelu (Sooksatra and Rivas 2024" in printed
    assert "--optimizer adam --lr 0.001 --cap-lr 0.001 --schedule plateau --patience 10" in printed
    assert "next: drelu-timm evaluate" in printed


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_resolved_for_its_datasets(tmp_path, name):
    settings = PRESETS[name].settings
    files = {"generated": (tmp_path / "1m.npz",)} if "generated_fraction" in settings else {}
    for dataset in PRESETS[name].datasets:
        size = {"img_size": 8} if dataset == "folder" else {}
        given = TrainConfig("wide_resnet28_10", dataset, preset=name, init_from=tmp_path, **settings, **files, **size)
        assert resolve(given).preset == name


def test_a_preset_of_one_norm_needs_eps_for_the_other():
    settings = {"generated": (Path("1m.npz"),), "norm": "L2", "output_dir": Path("nowhere")}
    given = TrainConfig.from_preset("wang2023", model="wide_resnet28_10", dataset="cifar10", **settings)
    with pytest.raises(InputError, match="--norm L2 needs --eps: the default 8/255 is a radius for Linf"):
        resolve(given)
    assert str(resolve(replace(given, eps="0.5")).threat_model) == "L2, eps 0.5"


BAD = [
    ({"model": "resnet5_drelu"}, "--model 'resnet5_drelu' is unknown; did you mean resnet"),
    (
        {"model": "resnet18_drelu.a1_in1"},
        "--model 'resnet18_drelu.a1_in1' is unknown; did you mean resnet18_drelu.a1_in1k",
    ),
    ({"dataset": "minst"}, "--dataset 'minst' is unknown; did you mean mnist?"),
    ({"objective": "trade"}, "--objective 'trade' is unknown; did you mean trades?"),
    ({"schedule": "cosin"}, "--schedule 'cosin' is unknown; did you mean cosine?"),
    ({"activation": "drelu6"}, "activation 'drelu6' is unknown; did you mean relu6 or drelu"),
    ({"norm": "L0"}, "--norm 'L0' is unknown; allowed: L2, Linf"),
    ({"eps": "eight"}, "--eps 'eight' is not a radius. Use a number >= 0 such as 8/255 or 0.1"),
    ({"eps": "8", "objective": "at"}, "--eps 8 is larger than the pixel range"),
    ({"norm": "L2", "objective": "at"}, "--norm L2 needs --eps: the default 0.1 is a radius for Linf"),
    ({"epochs": 0}, "--epochs is 0. It must be a whole number above 0"),
    ({"lr": -1.0}, "--lr is -1.0. It must be a number above 0"),
    ({"lr": float("inf")}, "--lr is inf. It must be a number above 0"),
    ({"patience": 0}, "--patience is 0. It must be a whole number above 0"),
    ({"step_size": -1.0}, "--step-size is -1.0. It must be a number above 0"),
    ({"n_train": -5}, "--n-train is -5. It must be a whole number above 0"),
    ({"seed": 2**40}, "--seed is 1099511627776. It must be an integer from 0 to 4294967295"),
    ({"width": 0}, "width 0 is not a number of units"),
    ({"cap": 0.0}, "cap 0.0 is not a finite number above 0"),
    ({"cap_weight": 0.1, "activation": "relu"}, "--cap-weight 0.1 needs a model with D-ReLUs"),
    ({"optimizer": "adahessian"}, "--optimizer adahessian needs second derivatives"),
    (
        {"batch_size": 1, "model": "preact_resnet18", "width": None},
        "leaves one image per forward pass, too few for BatchNorm",
    ),
    ({"cap_weight": float("nan")}, "--cap-weight is nan. It must be a number >= 0"),
    ({"preset": "wang2023"}, "--preset wang2023 does not fit --dataset digits. It is for cifar10, cifar100"),
    ({"monitor": "acc"}, "--monitor 'acc' is unknown; allowed: certified, loss, margin, pgd"),
    ({"cap_penalty": "square"}, "--cap-penalty 'square' is unknown; did you mean squared?"),
    ({"cap_penalty": "effective", "placement": "all"}, "--cap-penalty effective"),
    ({"generated_fraction": 1.0}, "--generated-fraction is 1.0. It must be in [0, 1)"),
    ({"generated_fraction": 0.7}, "--generated-fraction 0.7 needs --generated FILE.npz [FILE.npz ...] as well"),
    ({"generated": (Path("a.npz"),)}, "--generated needs --generated-fraction F"),
    ({"generated": (Path("a.npz"),), "generated_fraction": 0.5}, "a.npz"),
    ({"ema_decay": 1.0}, "--ema-decay is 1.0. It must be in [0, 1)"),
    ({"cutmix": 2.0}, "--cutmix is 2.0. It must be a number from 0 to 1"),
    ({"cutmix": 0.5, "objective": "mart"}, "--objective mart needs one label per image"),
    ({"on_masking": "halt"}, "--on-masking 'halt' is unknown; allowed: stop, warn"),
    ({"monitor": "margin"}, "--monitor margin is measured for robust objectives only"),
    ({"objective": "n-fgsm", "steps": 3}, "--steps 3 does not fit --objective n-fgsm, which takes one step"),
    ({"seed": "x"}, "--seed is 'x'. It must be an integer from 0 to"),
    ({"seed": float("nan")}, "--seed is nan. It must be an integer from 0 to"),
    ({"model": None}, "--model is None. It must be text in quotes"),
    ({"resume": 1}, "--resume is 1. It must be true or false"),
    ({"generated": "a.npz"}, "--generated is 'a.npz'. It must be a list"),
    ({"output_dir": Path("a" * 300)}, "cannot be used ([Errno 36] File name too long"),
    ({"output_dir": Path("a\0b")}, "--output-dir is 'a\\x00b'. It must be a path in quotes"),
    ({"output_dir": Path(__file__) / "run"}, "cannot be used ([Errno 20] Not a directory"),
    ({"cutout": 9}, "--cutout 9 is larger than the images, which are 8 pixels wide"),
    ({"rand_augment": "rand-m11-n2"}, "--rand-augment rand-m11-n2: timm reduces magnitudes above m10"),
    ({"rand_augment": "rand-q9"}, "--rand-augment 'rand-q9'"),
    ({"grad_accum_steps": 3}, "--batch-size 32 is not a multiple of 3 (processes: 1, --grad-accum-steps: 3)"),
    ({"sync_bn": True}, "--sync-bn works on GPUs only. Leave it out."),
    ({"log_with": "tensorbored"}, "--log-with 'tensorbored' is unknown; did you mean tensorboard?"),
    ({"preset": "paper-at"}, "--preset paper-at continues natural training. Name that run with --init-from RUN."),
    ({"model": "dense", "activation": "relu"}, "--activation, --width can only be used with *_drelu models"),
    ({"optimizer": "adamm"}, "--optimizer 'adamm' is not an optimizer of timm"),
    ({"batch_size": 512}, "512"),
    ({"init_from": Path("nowhere")}, "nowhere is not a run directory"),
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
    with pytest.raises(InputError, match=r"is in use\. Add --resume to continue that run, or name another folder"):
        train(config(tmp_path))
    with pytest.raises(InputError, match=r"with other settings: lr \(0.001 before, 0.01 now\)"):
        train(config(tmp_path, resume=True, lr=0.01))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not empty and is not a run directory"):
        train(config(tmp_path))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(tmp_path):
    train(config(tmp_path / "good"))
    with pytest.raises(InputError, match=r"the loss is (nan|inf) in epoch 1, step \d+\. Lower --lr"):
        train(config(tmp_path / "bad", lr=1e30))
    named = json.loads((tmp_path / "bad" / "no-number.json").read_text())
    step = (named["epoch"] - 1) * 7 + named["step"] - 1
    batches = trainer(tmp_path / "same").batches
    assert named["real"] == batches.indices(*divmod(step, 7))["real"]
    assert len(named["real"]) == 32
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


def test_an_error_names_its_process_in_all_but_the_first_on_a_machine(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "5")
    for local_rank, prefix in ("0", ""), ("1", "process 5: "):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert main(["trian"]) == 2
        assert capsys.readouterr().err.startswith(f"{prefix}error: VERB 'trian' is unknown")


@pytest.mark.parametrize(
    "start", [partial(Launched, processes=2), pytest.param(start_torchrun, marks=pytest.mark.slow)]
)
def test_an_error_in_all_processes_is_printed_once_by_each(start):
    process = start("train", "--model", "dense_drelu", "--dataset", "minst")
    _, errors = process.communicate()
    assert process.returncode != 0
    printed = [line for line in errors.splitlines() if "'minst'" in line]
    message = "error: --dataset 'minst' is unknown; did you mean mnist?"
    assert printed and set(printed) <= {
        message,
        f"process 1: {message}",
    }  # a launcher ends the others after the first error
    assert len(set(printed)) == len(printed)


# Recipes


def trainer(path: Path, **settings) -> Trainer:
    resolved = resolve(config(path, **settings))
    data = load_images("digits", None, "train", img_size=resolved.img_size)[: resolved.n_train]
    torch.manual_seed(0)
    return Trainer(resolved, data, None, create_model(resolved, data), Accelerator())


ROBUST = {"objective": "trades", "optimizer": "sgd", "lr": 0.05, "awp_gamma": 0.01, "ema_decay": 0.9}


def step(one: Trainer) -> None:
    one.update(*one.batches.batch(0, one.progress.step), 0, one.progress.step)
    one.progress.step += 1


def test_accumulated_gradients_give_the_update_of_the_whole_batch(tmp_path):
    whole, parts = (trainer(tmp_path / str(n), grad_accum_steps=n, **ROBUST) for n in (1, 4))
    for _ in range(4):
        step(whole)
        step(parts)
    for expected, actual in zip(whole.update.bare.parameters(), parts.update.bare.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


def test_the_average_holds_weights_and_batch_statistics(tmp_path):
    one = trainer(tmp_path, model="resnet10t_drelu", small_images=True, objective="at", ema_decay=0.6)
    expected = {key: value.clone() for key, value in one.update.bare.state_dict().items()}
    for done in range(4):
        step(one)
        decay = min(0.6, 1 - (1 + done) ** (-2 / 3))  # timm's warm-up copies the first step
        for key, value in one.update.bare.state_dict().items():
            if value.is_floating_point():
                expected[key] = decay * expected[key] + (1 - decay) * value
            else:
                expected[key] = value.clone()
    assert 0.5 < decay <= 0.6
    actual = one.update.average.state_dict()
    assert any("running_mean" in key for key in expected)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, atol=1e-5, rtol=1e-4)


def test_the_averaged_model_is_measured_in_addition_to_the_raw_one_and_saved(tmp_path):
    train(config(tmp_path, ema_decay=0.99, epochs=1))
    (entry,) = log(tmp_path)
    assert entry["held_out_ema"].keys() == entry["held_out"].keys()
    assert entry["held_out_ema"]["loss"] > entry["held_out"]["loss"]  # after 7 steps it lags behind
    again = trainer(tmp_path / "again", ema_decay=0.99, epochs=1)
    for _ in range(again.batches.steps_per_epoch):
        step(again)
    expected = again.update.average.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in weights(tmp_path).items())


def test_the_best_epoch_and_the_last_are_kept(tmp_path):
    settings = config(tmp_path / "run", epochs=6, lr=0.03, monitor="pgd", objective="at", eps="0.1")
    train(settings)
    entries = log(tmp_path / "run")
    robust = [entry["held_out"]["pgd"] for entry in entries]
    best = robust.index(max(robust)) + 1
    assert best < 6, "the seed no longer shows a difference"
    assert [entry["best_epoch"] for entry in entries][-1] == best
    train(replace(settings, output_dir=tmp_path / "shorter", epochs=best))
    kept, expected = weights(tmp_path / "run"), weights(tmp_path / "shorter", "last")
    assert all(torch.equal(kept[key], expected[key]) for key in expected)
    last = weights(tmp_path / "run", "last")
    assert any(not torch.equal(kept[key], last[key]) for key in last)


@pytest.mark.parametrize("monitor", ["loss", "pgd"])
def test_patience_ends_a_training_that_no_longer_improves(tmp_path, monitor):
    train(config(tmp_path, epochs=9, lr=1e-20, cap_lr=1e-20, patience=2, monitor=monitor))
    assert len(log(tmp_path)) == 3


def test_robust_objectives_choose_by_robust_accuracy(tmp_path):
    assert resolve(config(tmp_path / "a")).monitor == "loss"
    assert resolve(config(tmp_path / "a", objective="mart")).monitor == "margin"


@pytest.mark.parametrize(("schedule", "first", "last"), [("constant", 1, 1), ("cosine", 1, 0), ("onecycle", 1 / 25, 0)])
def test_schedules_move_both_learning_rates(tmp_path, schedule, first, last):
    train(config(tmp_path, schedule=schedule, lr=1e-2, cap_lr=1.0, epochs=20, warmup=0.25))
    entries = log(tmp_path)
    assert [entry["cap_lr"] / entry["lr"] for entry in entries] == pytest.approx([100] * 20, rel=1e-3)
    assert entries[0]["lr"] == pytest.approx(1e-2 * first, rel=0.2) or schedule == "onecycle"
    assert entries[-1]["lr"] < 1e-2 * (last + 0.02)
    if schedule == "onecycle":
        rates = [entry["lr"] for entry in entries]
        assert 4 <= rates.index(max(rates)) <= 6


def test_weight_decay_leaves_out_norms_biases_and_caps(tmp_path):
    one = trainer(tmp_path, model="resnet10t_drelu", small_images=True, optimizer="sgd", weight_decay=0.1)
    for group in one.update.optimizer.param_groups:
        decayed = {parameter.ndim > 1 for parameter in group["params"]}
        assert decayed == {group["weight_decay"] > 0}
    assert all(group["nesterov"] for group in one.update.optimizer.param_groups)


@pytest.mark.filterwarnings("default::drelu_timm.errors.DReLUWarning")  # of one patch per image
def test_weight_decay_leaves_out_what_the_timm_model_names(tmp_path):
    settings = {"model": "vit_tiny_patch16_224_drelu", "img_size": 16, "weight_decay": 0.1}
    one = trainer(tmp_path, **settings)
    decay = {id(p): group["weight_decay"] for group in one.update.optimizer.param_groups for p in group["params"]}
    undecayed = {name for name, p in one.update.bare.named_parameters() if p.ndim > 1 and not decay[id(p)]}
    assert undecayed == {"model.pos_embed", "model.cls_token"}
    plain = trainer(tmp_path, **settings | {"weight_decay": 0.0})  # in the order of older states
    first, *_ = plain.update.optimizer.param_groups
    assert len(first["params"]) == sum(p.ndim > 1 for p in plain.update.bare.parameters())


def test_synchronized_batchnorm_keeps_the_activations_of_batchnormact2d(tmp_path):
    settings = {"model": "mobilenetv3_small_050", "width": None}
    plain, synchronized = (trainer(tmp_path, sync_bn=given, **settings).update.bare.eval() for given in (False, True))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in synchronized.modules())
    images = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(synchronized(images), plain(images))


def test_plateau_halves_after_five_epochs_that_are_not_lower(tmp_path):
    one = trainer(tmp_path, schedule="plateau")
    rates = []
    for loss in [1.0, *[0.99995] * 6]:
        one.update.scheduler.step(loss)
        rates.append(one.update.rates[0])
    assert rates == pytest.approx([1e-3] * 5 + [5e-4] * 2)


def test_onecycle_with_a_warmup_of_one_step(tmp_path):
    train(config(tmp_path, schedule="onecycle", epochs=10, n_train=145, batch_size=32))  # 40 steps, one of warm-up
    assert log(tmp_path)[-1]["steps"] == 40


def test_a_preset_from_python_is_the_one_of_the_command_line(tmp_path):
    config = TrainConfig.from_preset("paper-trades", model="dense_drelu", dataset="digits", epochs=3)
    assert (config.objective, config.schedule, config.epochs, config.preset) == ("trades", "plateau", 3, "paper-trades")
    with pytest.raises(InputError, match="--preset 'paper' is unknown; did you mean paper-"):
        TrainConfig.from_preset("paper", model="dense_drelu", dataset="digits")


def test_accelerate_accumulating_gradients_too_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(InputError, match=r"must be 1\. Use --grad-accum-steps instead"):
        train(config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("world_size", ["2", "x", "-1"])
def test_a_world_size_without_a_launcher_is_refused(tmp_path, monkeypatch, world_size):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(InputError, match=rf"WORLD_SIZE is {world_size}, but no launcher has set RANK, .*, or unset"):
        train(config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_processes_wait_a_day_for_each_other(tmp_path, monkeypatch):
    handlers = []

    def started(**options):
        handlers.extend(options["kwargs_handlers"])
        raise ValueError("that is enough")

    monkeypatch.setattr("drelu_timm.training.distributed.Accelerator", started)
    with pytest.raises(InputError, match="that is enough"):
        make_accelerator(config(tmp_path))
    assert [one.timeout for one in handlers if isinstance(one, InitProcessGroupKwargs)] == [timedelta(days=1)]


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "gelu", "prelu", "pssilu", "srelu", "drelu"])
def test_every_activation_trains_by_the_same_recipe(tmp_path, activation):
    train(config(tmp_path, activation=activation, objective="at", weight_decay=1e-3, n_train=None, lr=3e-3, eps="0.03"))
    assert log(tmp_path)[-1]["held_out"]["clean"] > 0.6
    assert Run.open(tmp_path).load_model()(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_bf16_trains_nearly_as_float32_does(tmp_path):
    settings = config(tmp_path / "float32", objective="at")
    train(settings)
    half = replace(settings, output_dir=tmp_path / "bf16")
    train_by_processes(half, environment={"ACCELERATE_MIXED_PRECISION": "bf16"})
    losses = [log(tmp_path / name)[-1]["train"]["loss"] for name in ("float32", "bf16")]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert {value.dtype for value in weights(tmp_path / "bf16").values()} == {torch.float32}


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_eager_one_does(tmp_path):
    settings = config(tmp_path / "eager", objective="trades", ema_decay=0.9)
    train(settings)
    train(replace(settings, output_dir=tmp_path / "compiled", compile=True))
    expected, actual = weights(tmp_path / "eager"), weights(tmp_path / "compiled")
    assert all(torch.allclose(expected[key], actual[key], atol=1e-4) for key in expected)


def test_trackers_get_every_figure(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config(tmp_path, log_with="tensorboard", cap_weight=1e-3))
    events = EventAccumulator(str(tmp_path / "drelu-timm")).Reload()
    assert {"held_out/clean", "caps/mean", "units/active", "train/loss"} <= set(events.Tags()["scalars"])
    values = [event.value for event in events.Scalars("held_out/clean")]
    assert values == pytest.approx([entry["held_out"]["clean"] for entry in log(tmp_path)])
