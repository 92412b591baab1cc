"""What a stopped training leaves, and that it resumes from there to the same end."""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import time
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

from drelu_timm.data.batches import TrainingBatches
from drelu_timm.errors import InputError
from drelu_timm.files import held
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
    # Before the old one is deleted; the first two calls delete the unfinished one, and make room for the next.
    assert kill_at(killed, "shutil:rmtree", 3) == [steps[4], steps[6]]
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
    (tmp_path / ".config.json.0123abcd.part").write_text("{")
    train(config(tmp_path, resume=True, epochs=1))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "log.jsonl", "state", "model", "last"}


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
    with pytest.raises(
        InputError, match=rf"{state}.*(Delete it to start from scratch|Restore it or create it again)"
    ) as error:
        train(config(tmp_path, ema_decay=0.9, resume=True))
    assert "\n" not in str(error.value)
    assert (state / file).stat().st_size == 50


def test_leftovers_of_killed_trainings_are_deleted_and_nothing_else(tmp_path, monkeypatch):
    settings = interrupted(tmp_path / "run", monkeypatch, after=9)
    state = tmp_path / "run" / "state"
    (newest,) = state.glob("epoch-*")
    for name in (".writing", ".best-00001.0123abcd", ".best-00001.x7_a", "best-00009", "epoch-00000-step-0000001"):
        (state / name).mkdir(exist_ok=True)
    (state / "notes").write_text("not ours")
    train(replace(settings, save_every=0))
    assert newest.name == "epoch-00001-step-0000001"
    assert sorted(each.name for each in state.iterdir()) == ["epoch-00002-step-0000000", "notes"]
    train(replace(settings, output_dir=tmp_path / "whole"))
    assert_same_end(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("resume", [False, True])
def test_one_of_two_trainings_in_a_folder_is_refused(tmp_path, resume):
    """In 20 races, the weights belong to the seed in config.json, and the other training names the holder."""
    both = [config(tmp_path / f"alone{seed}", seed=seed, epochs=1, n_train=64) for seed in (0, 1)]
    for one in both:
        train(one)
    for trial in range(10):  # twice, see the parameter
        folder = tmp_path / str(trial)
        trainings = [Launched("train", *flags(replace(one, output_dir=folder, resume=resume))) for one in both]
        errors = [training.communicate()[1] for training in trainings]
        assert sorted(training.returncode for training in trainings) == [0, 2], errors
        refusal = errors[trainings[0].returncode == 0].splitlines()[-1]
        assert re.fullmatch(
            rf"error: (--output-dir {folder} is in use by process \d+ on \S+ \(.*\. Wait until it ends, .*"
            rf"|--output-dir {folder} is in use\. Add --resume.*|--resume of {folder} with other settings: seed .*)",
            refusal,
        )
        seed = json.loads((folder / "config.json").read_text())["train"]["seed"]
        assert_same_weights(tmp_path / f"alone{seed}", folder)
        assert not (folder / ".lock").exists()


def test_a_folder_in_use_is_refused_before_anything_is_written(tmp_path):
    with held(tmp_path / "run" / ".lock", "x"):
        process = Launched("train", *flags(config(tmp_path / "run", resume=True)))
        _, errors = process.communicate()
        assert process.returncode == 2
        assert f"--output-dir {tmp_path / 'run'} is in use by process {os.getpid()} on" in errors
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def emptied(log: Path) -> None:
    log.write_text("")


def cut(log: Path) -> None:
    log.write_bytes(log.read_bytes()[:-40])


def edited(log: Path) -> None:
    log.write_text(log.read_text().replace('"clean": 0.', '"clean": 0.9'))


def not_text(log: Path) -> None:
    log.write_bytes(b"\xff\xfe")


@pytest.mark.parametrize("damage", [emptied, cut, edited, not_text, Path.unlink])
def test_a_damaged_log_is_restored_from_the_state(tmp_path, monkeypatch, capsys, damage):
    settings = interrupted(tmp_path / "run", monkeypatch, after=9)
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    assert len(before.splitlines()) == 1
    damage(tmp_path / "run" / "log.jsonl")
    train(settings)
    assert "log.jsonl did not match the state, and is restored from it" in capsys.readouterr().out
    assert (tmp_path / "run" / "log.jsonl").read_bytes().startswith(before)
    assert [row["epoch"] for row in log(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("damage", [None, emptied, cut, not_text, Path.unlink])
def test_an_older_state_without_the_log_needs_a_row_for_each_of_its_epochs(tmp_path, monkeypatch, damage):
    settings = interrupted(tmp_path / "run", monkeypatch, after=9)
    (state,) = (tmp_path / "run" / "state").glob("epoch-*")
    content = json.loads((state / "progress.json").read_text())
    del content["log"]
    (state / "progress.json").write_text(json.dumps(content))
    if damage is not None:
        damage(tmp_path / "run" / "log.jsonl")
        with pytest.raises(InputError, match=r"run/log\.jsonl(, line 1, is not the row of epoch 1| cannot be read)"):
            train(settings)
        return
    train(settings)
    assert [row["epoch"] for row in log(tmp_path / "run")] == [1, 2]


BROKEN_PROGRESS = [
    ({"epoch": None}, r"epoch is None\. It must be a whole number"),
    ({"epoch": -1}, r"epoch is -1\. It must be a whole number"),
    ({"step": 1.5}, r"step is 1\.5\. It must be a whole number"),
    ({"best": "high"}, r"best is 'high'\. It must be a number"),
    ({"best_epoch": "1"}, r"best_epoch is '1'\. It must be a whole number"),
    ({"rates": 0.1}, r"rates is 0\.1\. It must be a list"),
    ({"sums": {"loss": "x"}}, r"sums\.loss is 'x'\. It must be a number"),
    ({"log": [1]}, r"log\[0\] is 1\. It must be a table"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN_PROGRESS, ids=[next(iter(each)) for each, _ in BROKEN_PROGRESS])
def test_a_malformed_progress_is_a_one_line_error(tmp_path, monkeypatch, changes, message):
    settings = interrupted(tmp_path / "run", monkeypatch)
    (state,) = (tmp_path / "run" / "state").glob("epoch-*")
    content = json.loads((state / "progress.json").read_text())
    (state / "progress.json").write_text(json.dumps({**content, **changes}))
    with pytest.raises(InputError, match=rf"{state}/progress\.json: {message}") as error:
        train(settings)
    assert "\n" not in str(error.value)
    for text in ("[]", "[" * 10_000, "", '{"epoch": 1}'):
        (state / "progress.json").write_text(text)
        with pytest.raises(
            InputError, match=rf"{state}/progress\.json (cannot be read|is not a JSON object|has no step)"
        ):
            train(settings)


@pytest.mark.parametrize("changes", [{"epoch": 10**9}, {"epoch": 1, "step": 10**9}, {"log": [{}] * 7}], ids=str)
def test_a_forged_progress_does_not_finish_a_training(tmp_path, monkeypatch, changes):
    settings = interrupted(tmp_path / "run", monkeypatch)
    (state,) = (tmp_path / "run" / "state").glob("epoch-*")
    content = json.loads((state / "progress.json").read_text())
    (state / "progress.json").write_text(json.dumps({**content, **changes}))
    with pytest.raises(InputError, match=r"progress\.json has epoch \d+, step \d+ and \d+ log rows, which contradict"):
        train(settings)
    assert not (tmp_path / "run" / "model").exists()


def test_a_killed_worker_is_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingBatches, "batch", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(
        InputError, match=r"^--workers 1: a process that .* \(DataLoader worker .*\)\. Free .*--workers 0\.$"
    ):
        train(config(tmp_path / "run", workers=1))


def test_a_full_shared_memory_is_a_one_line_error(tmp_path):
    """A worker may not write the 8,192 bytes of a batch, as where /dev/shm is full."""
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))
    process = Launched("train", *flags(config(tmp_path / "run", workers=1)), before=limit)
    _, errors = process.communicate()
    assert process.returncode == 2
    last = errors.splitlines()[-1]
    assert re.fullmatch(r"error: --workers 1: a process that .* \(.*unable to .*\)\. Free .*--workers 0\.", last)


def test_workers_are_at_most_one_per_core_and_per_batch(tmp_path, monkeypatch):
    started = []
    loader = TrainingBatches.loader

    def counted(self, *arguments, workers, **options):
        started.append(workers)
        return loader(self, *arguments, workers=0, **options)

    monkeypatch.setattr(TrainingBatches, "loader", counted)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(5))
    train(config(tmp_path / "cores", workers=1000, epochs=1))
    train(config(tmp_path / "batches", workers=1000, epochs=1, n_train=96))
    assert started == [5, 2]


def test_a_clock_that_stands_still_does_not_stop_training(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: 7.0)
    train(config(tmp_path))
    assert [row["seconds"] for row in log(tmp_path)] == [0, 0]


def test_resume_after_the_end_changes_nothing(tmp_path):
    train(config(tmp_path))
    before = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    train(config(tmp_path, resume=True))
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_resume_starts_from_scratch_where_there_is_no_run(tmp_path):
    train(config(tmp_path / "new", resume=True))
    assert len(log(tmp_path / "new")) == 2
