"""Files that are written atomically and locked, with killed processes, power failures and second writers."""

import multiprocessing
import os
import re
import stat
import tempfile
from pathlib import Path

import pytest
import torch
from launching import Launched, become_a_colleague
from safetensors.torch import save_file

from drelu_timm.errors import InputError
from drelu_timm.files import atomic_file, atomic_folder, check_output_folder, held, locked, remove_leftovers
from drelu_timm.train import train
from drelu_timm.training.config import TrainConfig


@pytest.mark.parametrize("name", ["config.json", "rows.csv", "picture.png"])
def test_an_incomplete_file_has_no_known_suffix_and_is_hidden(tmp_path, name):
    with atomic_file(tmp_path / name) as temporary:
        temporary.touch()
        assert not list(tmp_path.glob(f"*{Path(name).suffix}"))
        assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_after(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, Path.replace

    def synced(file: int) -> None:
        events.append(os.fstat(file).st_ino)
        fsync(file)

    def renamed(path: Path, target: Path) -> Path:
        events.append("renamed")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    with atomic_file(tmp_path / "x") as temporary:
        temporary.write_text("whole")
    assert events == [(tmp_path / "x").stat().st_ino, "renamed", tmp_path.stat().st_ino]


@pytest.fixture
def umask_002():
    before = os.umask(0o002)
    yield
    os.umask(before)


def mode(path: Path) -> str:
    return oct(stat.S_IMODE(path.stat().st_mode))


@pytest.mark.usefixtures("umask_002")
def test_modes_follow_the_umask(tmp_path):
    tensors = {"weight": torch.zeros(2)}
    with atomic_file(tmp_path / "one.safetensors") as temporary:
        save_file(tensors, temporary)
    with atomic_folder(tmp_path / "model") as temporary:
        save_file(tensors, temporary / "model.safetensors")
    assert mode(tmp_path / "one.safetensors") == mode(tmp_path / "model" / "model.safetensors") == "0o664"
    assert mode(tmp_path / "model") == "0o775"


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / ".config.json.00000000.part").symlink_to(victim)
    with pytest.raises(FileExistsError), atomic_file(tmp_path / "config.json") as temporary:
        temporary.write_text("overwritten")
    assert victim.read_text() == "untouched"


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    for name in (".config.json.0a1b2c3d.part", ".other.json.0a1b2c3d.part", ".config.json.part", "config.json"):
        (tmp_path / name).touch()
    (tmp_path / ".KEY.0a1b2c3d.part").mkdir()
    (tmp_path / ".KEY.0a1b2c3d.part" / "hub").mkdir()
    remove_leftovers(tmp_path, "config.json")
    assert not (tmp_path / ".config.json.0a1b2c3d.part").exists()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".config.json.part", "config.json"]


def hold_and_count(lock: Path, counter: Path, start, refused) -> None:
    start.wait()
    try:
        with held(lock, f"--output-dir {lock.parent}"):
            with (lock.parent / "inside").open("x"):  # fails if another process is inside
                counter.open("a").write("+")
            (lock.parent / "inside").unlink()
    except InputError:
        refused.release()


def test_one_process_at_a_time_holds_a_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    refused, trials = context.Semaphore(0), 20
    for _ in range(trials):
        start = context.Barrier(2)
        arguments = (tmp_path / ".lock", tmp_path / "counter", start, refused)
        both = [context.Process(target=hold_and_count, args=arguments) for _ in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join()
            assert process.exitcode == 0
    held_or_refused = len((tmp_path / "counter").read_text()) + refused.get_value()
    assert held_or_refused == 2 * trials
    assert not (tmp_path / ".lock").exists()


def test_the_holder_of_a_lock_is_named(tmp_path):
    context = multiprocessing.get_context("fork")
    message = context.SimpleQueue()

    def second() -> None:
        try:
            with held(tmp_path / ".lock", "--output-dir runs/x"):
                message.put("held")
        except InputError as error:
            message.put(str(error))

    with held(tmp_path / ".lock", "--output-dir runs/x"):
        process = context.Process(target=second)
        process.start()
        refusal = message.get()
        process.join()
    expected = (
        rf"--output-dir runs/x is in use by process {os.getpid()} on \S+ \(.*\)\. Wait until it ends, or use another\."
    )
    assert re.fullmatch(expected, refusal)


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    context = multiprocessing.get_context("fork")
    inside = context.Event()

    def hold() -> None:
        with held(tmp_path / ".lock", "--output-dir runs/x"):
            inside.set()
            inside.wait(600)
            os.kill(os.getpid(), 9)

    process = context.Process(target=hold)
    process.start()
    process.join()
    assert process.exitcode == -9
    assert (tmp_path / ".lock").exists()
    with held(tmp_path / ".lock", "--output-dir runs/x"):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.usefixtures("umask_002")
def test_a_colleague_can_evaluate_a_run(monkeypatch):
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which is closed to other users
        monkeypatch.chdir(folder)
        Path(folder).chmod(0o775)
        run = train(TrainConfig("dense_drelu", "digits", output_dir=Path(folder) / "x", epochs=1, n_train=256, width=8))
        flags = ["evaluate", str(run), "--suite", "quick", "--n-examples", "4"]
        evaluated = Launched(*flags, environment={"HOME": folder}, before=become_a_colleague)
        assert evaluated.wait() == 0, evaluated.communicate()
        assert {path.stat().st_uid for path in (run / "results").iterdir()} == {65534}
        closed = [path for path in run.rglob("*") if path.is_file() and mode(path) != "0o664"]
        assert not closed


@pytest.mark.parametrize("lock", [lambda path: held(path, "--output-dir x"), locked])
def test_a_link_planted_as_a_lock_is_not_followed(tmp_path, lock):
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / ".lock").symlink_to(victim)
    with pytest.raises((InputError, OSError), match=r"[Tt]oo many levels"), lock(tmp_path / ".lock"):
        pass
    assert victim.read_text() == "untouched"


def test_a_lock_names_a_command_that_is_no_text(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["drelu-timm", "train", "runs/\udcff"])
    with held(tmp_path / ".lock", "--output-dir x"):
        assert r"runs/\udcff" in (tmp_path / ".lock").read_text()


def test_a_folder_of_others_is_refused(tmp_path):
    check_output_folder(tmp_path / "new", ["jobs"], "--output-dir")
    check_output_folder(tmp_path, ["jobs"], "--output-dir")
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"--output-dir .* has other files"):
        check_output_folder(tmp_path, ["jobs"], "--output-dir")
    (tmp_path / "jobs").mkdir()
    check_output_folder(tmp_path, ["jobs"], "--output-dir")
