"""What a stopped training leaves, and that it resumes from there to the same end."""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from launching import (
    SGD,
    STEP,
    Launched,
    assert_same_weights,
    config,
    flags,
    held_at,
    image_folder,
    log,
    start_torchrun,
    train_by_processes,
    wait_for,
    weights,
)
from PIL import Image
from safetensors.torch import save_file

from drelu_timm.errors import InputError
from drelu_timm.launch import PREEMPTED_EXIT_CODE
from drelu_timm.runs import Run
from drelu_timm.train import train
from drelu_timm.training import state, update, validation
from drelu_timm.training.config import TrainConfig, resolve

# Everything that has a state: averaged weights, a schedule updated every step, momentum.
FULL = {
    "objective": "trades",
    "ema_decay": 0.9,
    "schedule": "onecycle",
    "optimizer": "sgd",
    "lr": 0.05,
    "awp_gamma": 0.01,
}
TIMES = ("images_per_second", "waited_for_data", "seconds")


def without_times(path: Path) -> list[dict]:
    return [{key: value for key, value in entry.items() if key not in TIMES} for entry in log(path)]


def states(path: Path) -> list[str]:
    return sorted(state.name for state in path.glob("state/epoch-*"))


def kill_at(settings: TrainConfig, function: str, call: int, processes: int = 1) -> list[str]:
    """Start a training and kill it at a call of a function; the states that it leaves."""
    path = settings.output_dir
    before, reached = states(path), path.with_name("reached")
    process = Launched("train", *flags(settings), processes=processes, environment=held_at(function, call, reached))
    wait_for(reached, process)
    process.kill()
    process.wait()
    reached.unlink()
    assert max(states(path), default="") >= max(before, default=""), "a complete state is gone"
    return states(path)


def assert_same_end(one: Path, other: Path, processes: int = 1) -> None:
    for folder in ("model", "last"):
        expected, actual = weights(one, folder), weights(other, folder)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[key], actual[key]) for key in expected)
    if processes == 1:
        assert without_times(one) == without_times(other)
        return
    for a, b in zip(without_times(one), without_times(other), strict=True):  # a state holds the processes' mean
        assert a.pop("train") == pytest.approx(b.pop("train"), rel=1e-5)
        assert a == b


def test_a_run_killed_within_epochs_ends_as_an_uninterrupted_one(tmp_path):
    whole = config(tmp_path / "whole", epochs=4, save_every=2, resume=True, **FULL)
    killed = replace(whole, output_dir=tmp_path / "killed")
    train(whole)
    steps = [f"epoch-00000-step-000000{step}" for step in range(8)]
    assert kill_at(killed, STEP, 5) == [steps[4]]
    assert kill_at(killed, "os:fsync", 5) == [steps[4]]  # while the next one is written
    assert kill_at(killed, "shutil:rmtree", 2) == [steps[4], steps[6]]  # before the old one is deleted
    train(killed)
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "processes"), [("dense_drelu", 1), ("shallow_cnn_drelu", 1), ("dense_drelu", 2)])
def test_twenty_kills(tmp_path, model, processes):
    whole = config(tmp_path / "whole", model=model, epochs=10, save_every=1, resume=True, **FULL)
    killed = replace(whole, output_dir=tmp_path / "killed")
    train_by_processes(whole, processes)
    chosen, seen = random.Random(0), set()
    for _ in range(20):
        function, calls = chosen.choice([(STEP, 4), ("os:fsync", 30), ("shutil:rmtree", 6)])
        seen.update(kill_at(killed, function, chosen.randint(1, calls), processes))
    assert len(seen) > 10
    train_by_processes(killed, processes)
    assert_same_end(tmp_path / "whole", tmp_path / "killed", processes)


def assert_stopped_by_sigterm(settings: TrainConfig, errors: str) -> None:
    """Check what a training leaves that got SIGTERM in its twelfth step, and that it resumes to the same end."""
    path, whole = settings.output_dir, settings.output_dir.with_name("whole")
    assert "SIGTERM arrived: saved after epoch 1, step 6" in errors
    assert states(path) == ["epoch-00001-step-0000006"] and not (path / "model").exists()
    processes = json.loads((path / "config.json").read_text())["launch"]["num_processes"]
    train_by_processes(settings, processes)
    train_by_processes(replace(settings, output_dir=whole), processes)
    assert_same_end(whole, path, processes)


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_exits_with_its_own_code(tmp_path, processes):
    stopped = config(tmp_path / "stopped", epochs=4, resume=True, **FULL)
    at_a_step = held_at(STEP, 12, tmp_path / "reached")
    process = Launched("train", *flags(stopped), processes=processes, environment=at_a_step)
    wait_for(tmp_path / "reached", process)
    process.terminate()
    _, errors = process.communicate()
    assert process.returncode == PREEMPTED_EXIT_CODE
    assert_stopped_by_sigterm(stopped, errors)


@pytest.mark.slow
def test_sigterm_to_a_launcher_saves(tmp_path):
    stopped = config(tmp_path / "stopped", epochs=4, resume=True, **FULL)
    at_a_step = held_at(STEP, 12, tmp_path / "reached")
    process = start_torchrun("train", *flags(stopped), program="held", environment=at_a_step)
    wait_for(tmp_path / "reached", process)
    process.terminate()
    _, errors = process.communicate()
    assert process.returncode
    assert_stopped_by_sigterm(stopped, errors)


def test_a_run_resumes_with_another_number_of_processes(tmp_path):
    whole = config(tmp_path / "whole", epochs=4, objective="at", ema_decay=0.9, **SGD)
    train(whole)
    first = replace(whole, output_dir=tmp_path / "changed", save_every=3, resume=True)
    kill_at(first, STEP, 5)
    assert "resumes with processes 2 (1 before)" in train_by_processes(first, 2)
    assert_same_weights(tmp_path / "whole", tmp_path / "changed")


def test_a_resumed_run_may_accumulate_gradients_over_other_parts(tmp_path, monkeypatch, capsys):
    whole = config(tmp_path / "whole", objective="at", **SGD)
    train(whole)
    settings = interrupted(tmp_path / "run", monkeypatch, objective="at", **SGD)
    train(replace(settings, grad_accum_steps=4))
    assert (
        "resumes with --grad-accum-steps 4 (1 before): batches and updates are the same up to"
        in capsys.readouterr().out
    )
    assert_same_weights(tmp_path / "whole", tmp_path / "run")
    resolve(replace(settings, compile=True))


def interrupted(path: Path, monkeypatch, after: int = 3, **settings) -> TrainConfig:
    """Train until some states are saved, then stop."""
    settings = config(path, save_every=1, resume=True, **settings)
    save_state, saved = Accelerator.save_state, []

    def stop(self, folder, **options):
        if len(saved) == after:
            raise KeyboardInterrupt
        saved.append(folder)
        return save_state(self, folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", stop)
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    return settings


def test_a_full_disk_leaves_the_old_state(tmp_path, monkeypatch):
    settings = interrupted(tmp_path / "run", monkeypatch)
    before = states(tmp_path / "run")

    def full(self, folder, **options):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", full)
        with pytest.raises(
            InputError, match=r"state cannot be written .*No space left.*--resume then continues"
        ) as error:
            train(settings)
    assert "\n" not in str(error.value)
    assert states(tmp_path / "run") == before
    assert not (tmp_path / "run" / "state" / ".writing").exists()
    train(settings)
    train(replace(settings, output_dir=tmp_path / "whole"))
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_a_file_that_may_not_grow_leaves_the_old_state(tmp_path, monkeypatch):
    settings = interrupted(tmp_path / "run", monkeypatch)
    before = states(tmp_path / "run")
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    process = Launched("train", *flags(settings), before=limit)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert re.search(r"error: \S+state cannot be written \(", errors)
    assert states(tmp_path / "run") == before


def test_a_full_disk_at_the_best_model_leaves_the_state(tmp_path, monkeypatch):
    settings = interrupted(tmp_path / "run", monkeypatch)

    def full(model, folder, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_folder", full)
        with pytest.raises(InputError, match=r"best-00001 cannot be written \(.*No space"):
            train(settings)
    assert len(states(tmp_path / "run")) == 1
    train(settings)


def test_an_older_state_is_deleted_once_the_new_one_is_on_disk(tmp_path, monkeypatch):
    synced, checked, fsync, rmtree = [], [], os.fsync, shutil.rmtree

    def noted(file: int) -> None:
        synced.append(os.fstat(file).st_ino)
        fsync(file)

    def deleted(path: Path, **options) -> None:
        if Path(path).name.startswith("epoch-"):
            newest = max(Path(path).parent.glob("epoch-*"))
            assert {each.stat().st_ino for each in (newest, *newest.iterdir())} <= {*synced}
            assert synced[-1] == newest.parent.stat().st_ino
            checked.append(path)
            synced.clear()
        rmtree(path, **options)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(shutil, "rmtree", deleted)
    train(config(tmp_path / "run", epochs=1, save_every=3))
    assert len(checked) == 3 and len(states(tmp_path / "run")) == 1


def test_the_state_is_safe_before_the_validation(tmp_path, monkeypatch):
    settings = config(tmp_path / "run", resume=True, epochs=1, ema_decay=0.9, objective="at")

    def stop(self, model):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(validation.Validation, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    assert states(tmp_path / "run") == ["epoch-00000-step-0000007"]
    train(settings)
    train(replace(settings, output_dir=tmp_path / "whole"))
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    settings = config(tmp_path / "run", resume=True, save_every=5)
    take_step = update.Update.__call__

    def poisoned(self, images, labels, epoch, step):
        losses = take_step(self, images, labels, epoch, step)
        if step == 6:
            next(self.bare.parameters()).data.fill_(float("nan"))
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(update.Update, "__call__", poisoned)
        with pytest.raises(
            InputError, match=r"the weights are not finite after the step in epoch 1, step 7\. Lower --lr"
        ):
            train(settings)
    assert states(tmp_path / "run") == ["epoch-00000-step-0000005"]
    train(settings)


def test_sigterm_to_all_processes_of_the_group_saves_with_workers_too(tmp_path):
    settings = config(tmp_path / "run", resume=True, workers=2)
    process = Launched("train", *flags(settings), environment=held_at(STEP, 3, tmp_path / "reached"))
    wait_for(tmp_path / "reached", process)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == PREEMPTED_EXIT_CODE, errors
    assert states(tmp_path / "run") == ["epoch-00000-step-0000004"]


def test_leftovers_of_a_process_killed_while_writing_the_config_are_ignored(tmp_path):
    (tmp_path / ".4711.config.json.part").write_text("{")
    train(config(tmp_path, resume=True, epochs=1))


def test_other_precision_is_refused(tmp_path, monkeypatch):
    settings = interrupted(tmp_path / "run", monkeypatch)
    process = Launched("train", *flags(settings), environment={"ACCELERATE_MIXED_PRECISION": "bf16"})
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "with other mixed precision (no before, bf16 now). Use what the run was started with" in errors


def another_start(run: Path) -> None:
    """Replace the weights of a run."""
    save_file({name: value + 1 for name, value in weights(run).items()}, run / "model" / "model.safetensors")


def test_a_start_with_other_weights_is_refused(tmp_path, monkeypatch):
    train(config(tmp_path / "start", epochs=1))
    settings = interrupted(tmp_path / "run", monkeypatch, init_from=tmp_path / "start")
    before = states(tmp_path / "run")
    another_start(tmp_path / "start")
    with pytest.raises(
        InputError,
        match=rf"--resume of {tmp_path}/run: the weights of --init-from {tmp_path}/start have .*\(sha256 \w+ before, ",
    ) as error:
        train(settings)
    assert "\n" not in str(error.value)
    assert states(tmp_path / "run") == before
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    del about["init_from_digest"]  # as in older runs, which did not record it
    (tmp_path / "run" / "config.json").write_text(json.dumps(about))
    train(settings)


def test_a_run_resumes_after_its_start_was_deleted(tmp_path, monkeypatch):
    train(config(tmp_path / "start", epochs=1))
    digest = Run.open(tmp_path / "start").model_digest
    settings = interrupted(tmp_path / "run", monkeypatch, init_from=tmp_path / "start")
    train(replace(settings, output_dir=tmp_path / "whole"))
    shutil.rmtree(tmp_path / "start")
    train(settings)
    assert_same_end(tmp_path / "whole", tmp_path / "run")
    assert Run.open(tmp_path / "run").config["init_from_digest"] == digest


def test_other_data_is_refused(tmp_path, monkeypatch):
    data = image_folder(tmp_path / "images")
    settings = interrupted(tmp_path / "run", monkeypatch, **data)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "images" / "train" / "a" / "0.png")
    with pytest.raises(
        InputError, match=r"with other data \(\w+ before, \w+ now\)\. Use what the run was started with"
    ):
        train(settings)


def test_another_order_of_generated_images_is_refused(tmp_path, monkeypatch):
    data = image_folder(tmp_path / "images")
    images = np.random.default_rng(1).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "generated.npz", image=images, label=np.repeat([0, 1], 15))
    mixed = {"generated": (tmp_path / "generated.npz",), "generated_fraction": 0.5}
    settings = interrupted(tmp_path / "run", monkeypatch, **data, **mixed)
    (state,) = (tmp_path / "run" / "state").glob("epoch-*")
    content = json.loads((state / "progress.json").read_text())
    del content["order_of_generated_images"]  # as in older runs, which did not record it
    (state / "progress.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"with other order of generated images \(None before, a shuffle per class"):
        train(settings)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "progress.json", "average.safetensors"])
def test_a_state_cut_short_is_named_and_left_alone(tmp_path, file):
    train(config(tmp_path, ema_decay=0.9))
    shutil.rmtree(tmp_path / "model")  # as if the run had been killed before its end
    (state,) = (tmp_path / "state").glob("epoch-*")
    (state / file).write_bytes((state / file).read_bytes()[:50])
    with pytest.raises(InputError, match=rf"{state}.*(Delete it to start from scratch|make it anew)") as error:
        train(config(tmp_path, ema_decay=0.9, resume=True))
    assert "\n" not in str(error.value)
    assert (state / file).stat().st_size == 50


def test_resume_after_the_end_changes_nothing(tmp_path):
    train(config(tmp_path))
    before = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    train(config(tmp_path, resume=True))
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_resume_starts_from_scratch_where_there_is_no_run(tmp_path):
    train(config(tmp_path / "new", resume=True))
    assert len(log(tmp_path / "new")) == 2
