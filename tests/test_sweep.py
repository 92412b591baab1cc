"""Sweeps: cells in order and at once, what is skipped, fails or is killed, and that all ends as if left alone."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from launching import kill_with_workers, log, weights

from drelu_timm import jobs
from drelu_timm import sweep as sweeping
from drelu_timm.cells import Cell, Launch
from drelu_timm.errors import InputError
from drelu_timm.evaluate import EvaluateConfig
from drelu_timm.grids import read_grid
from drelu_timm.jobs import CellJob, Here
from drelu_timm.preemption import Preempted
from drelu_timm.scheduler import Scheduler
from drelu_timm.sweep import SweepConfig, main, sweep
from drelu_timm.train import TrainConfig

GRID = """
title = "three small nets"
source = "a test"
[train]
dataset = "digits"
model = "dense_drelu"
n_train = 256
batch_size = 32
epochs = 2
steps = 2
width = 16
[[evaluate]]
n_examples = 20
[[method]]
name = "natural"
activation = "relu"
[[method]]
name = "at"
activation = "relu"
objective = "at"
init_from = "natural"
[[method]]
name = "drelu"
cap_weight = 0.1
"""


@pytest.fixture
def grid(tmp_path) -> Path:
    path = tmp_path / "g.toml"
    path.write_text(GRID)
    return path


def stubs(path: Path, programs: dict[str, str], starts: dict[str, str] | None = None) -> list[Cell]:
    """Cells that run a small program each in the place of train and evaluate."""

    class Stub(Cell):
        def commands(self, launch: Launch) -> list[list[str]]:
            return [["python", "-c", programs[self.name]]]

    train = TrainConfig(model="dense_drelu", dataset="digits", resume=True)
    return [Stub(name, replace(train, output_dir=path / name), (), (starts or {}).get(name)) for name in programs]


def run(cells: list[Cell], jobs: int = 1) -> bool:
    return Scheduler("stubs", cells, Here(jobs, 1), Launch()).run()


def stamp(path: Path, name: str, seconds: float = 0) -> str:
    """A program that notes when it began and when it ended."""
    note = f"open({str(path)!r}, 'a').write(f'{{time.monotonic()}} {name} %s\\n')"
    return f"import time; {note % 'begins'}; time.sleep({seconds}); {note % 'ends'}"


def test_a_cell_waits_for_the_one_that_it_begins_with(tmp_path):
    notes = tmp_path / "notes"
    programs = {"b": stamp(notes, "b"), "a": stamp(notes, "a", 0.5), "c": stamp(notes, "c")}
    assert not run(stubs(tmp_path / "x", programs, {"b": "a"}), jobs=2)
    order = [line.split()[1:] for line in notes.read_text().splitlines()]
    assert order.index(["a", "ends"]) < order.index(["b", "begins"])
    assert order.index(["c", "begins"]) < order.index(["a", "ends"])  # beside it


def test_no_more_cells_at_once_than_jobs(tmp_path):
    notes = tmp_path / "notes"
    run(stubs(tmp_path / "x", {name: stamp(notes, name, 0.2) for name in "abc"}))
    assert [line.split()[2] for line in notes.read_text().splitlines()] == ["begins", "ends"] * 3


def test_a_failed_cell_stops_only_those_that_begin_with_it(tmp_path, capsys):
    fails = (
        "import sys; print('half way'); print('error: the disk is full', file=sys.stderr); print('bye'); sys.exit(2)"
    )
    programs = {"a": fails, "b": "", "c": "", "d": "import os; os.kill(os.getpid(), 9)", "e": "1 / 0"}
    assert run(stubs(tmp_path, programs, {"b": "a"}))
    text = re.sub(r" in [\d.]+ s", "", capsys.readouterr().out)
    assert f"failed a: the disk is full (log: {tmp_path / 'a.log'})" in text
    assert "failed b: not run, since a failed, which it begins with" in text
    assert "done   c: no accuracies" in text
    assert "failed d: ended by SIGKILL" in text
    assert "failed e: ZeroDivisionError: division by zero" in text


def test_logs_are_added_to_and_only_the_last_error_is_told(tmp_path, capsys):
    run(stubs(tmp_path, {"a": "print('error: the first'); raise SystemExit(1)"}))
    run(stubs(tmp_path, {"a": "raise SystemExit(3)"}))
    assert "the first" in (tmp_path / "a.log").read_text()
    assert "exit code 3" in capsys.readouterr().out.splitlines()[-1]


def test_threads_are_shared_out_unless_they_are_given(monkeypatch, tmp_path):
    program = "import os; print('threads', os.environ['OMP_NUM_THREADS'])"
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run(stubs(tmp_path, {"a": program}), jobs=3)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run(stubs(tmp_path, {"b": program}), jobs=3)
    assert "threads 4" in (tmp_path / "a.log").read_text() and "threads 7" in (tmp_path / "b.log").read_text()


def test_every_job_has_gpus_of_its_own(monkeypatch):
    monkeypatch.setattr(jobs.torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    visible = [jobs._environment(slot, 3, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert visible == ["4,5", "6,7", "4,5"]


@pytest.mark.parametrize("how", ["sigterm", "interrupt"])
def test_what_stops_a_sweep_reaches_its_cells(tmp_path, monkeypatch, how):
    saved, began = tmp_path / "saved", tmp_path / "began"
    program = (
        f"import pathlib, signal, sys, time\n"
        f"def save(*_):\n    pathlib.Path({str(saved)!r}).touch(); sys.exit(75)\n"
        f"signal.signal(signal.SIGTERM, save)\npathlib.Path({str(began)!r}).touch()\ntime.sleep(60)"
    )
    sleep = time.sleep

    def stop_when_begun(seconds: float) -> None:
        sleep(seconds)
        if began.exists() and how == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
        elif began.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr("drelu_timm.scheduler.time.sleep", stop_when_begun)
    with pytest.raises(Preempted if how == "sigterm" else KeyboardInterrupt):
        run(stubs(tmp_path, {"a": program, "b": program}))
    assert saved.exists() and not (tmp_path / "b.log").exists()


def test_a_training_never_hears_the_signal_by_which_submitit_ends_a_job(tmp_path):
    program = "import os, signal; os.kill(os.getpid(), signal.SIGUSR2); print('still here')"
    assert CellJob([["python", "-c", program]], tmp_path / "log")() == ""
    assert "still here" in (tmp_path / "log").read_text()


def test_a_preempted_job_saves_before_it_is_put_back(tmp_path):
    submitit = pytest.importorskip("submitit.helpers")
    program = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nprint('up', flush=True)"
    )
    job = CellJob(
        [["python", "-c", program + "\ntime.sleep(60)"], ["python", "-c", "print('not this')"]], tmp_path / "log"
    )
    again = []

    def preempt(*_) -> None:
        again.append(job.checkpoint())

    before = signal.signal(signal.SIGALRM, preempt)
    try:
        signal.alarm(2)
        job()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert isinstance(again[0], submitit.DelayedSubmission)
    assert again[0].function == CellJob(job.commands, job.log)
    assert "not this" not in (tmp_path / "log").read_text().split("\n", 1)[1]


def test_two_sweeps_in_one_folder(tmp_path, grid):
    with sweeping._held(tmp_path / "x"), pytest.raises(InputError, match="is in use by another sweep") as caught:
        sweep(SweepConfig(str(grid), output_dir=tmp_path / "x"))
    assert "\n" not in str(caught.value) and f"fuser {tmp_path / 'x' / '.lock'}" in str(caught.value)


def test_what_a_killed_sweep_has_left_keeps_the_folder_locked(tmp_path):
    with sweeping._held(tmp_path) as lock:
        job = CellJob([["python", "-c", "input()"]], tmp_path / "log", (lock,))
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=job.keep_open)
    try:
        with pytest.raises(InputError, match="what a killed one has left running"), sweeping._held(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()
    with sweeping._held(tmp_path):
        pass


def test_an_output_folder_that_cannot_be_one(grid):
    with pytest.raises(InputError, match=r"--output-dir .*g\.toml/x cannot be written to \(.+\); name another"):
        sweep(SweepConfig(str(grid), output_dir=grid / "x"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"jobs": 0}, "--jobs 0 is not possible; give a number above 0"),
        ({"num_processes": 0}, "--num-processes 0 is not possible; give a number above 0"),
        ({"mixed_precision": "fp16"}, "--mixed-precision 'fp16' is unknown; did you mean bf16"),
        ({"cluster": "slrum"}, "--cluster 'slrum' is unknown; did you mean slurm"),
        ({"partition": "gpu"}, "--partition gpu is for --cluster slurm; add that, or leave it out"),
    ],
)
def test_flags_that_cannot_be_used(tmp_path, grid, flags, message):
    with pytest.raises(InputError, match=re.escape(message)):
        sweep(SweepConfig(str(grid), output_dir=tmp_path / "x", **flags))
    assert not (tmp_path / "x").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, grid, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(grid), "--dry-run", "--jobs", "2"]) == 0
    text = capsys.readouterr().out
    assert "g: three small nets\na test\n" in text
    assert re.search(r"^drelu: at most .+ s, [\d,]+ forward passes to train, [\d,]+ to evaluate$", text, re.MULTILINE)
    assert "    python -m drelu_timm evaluate runs/g/drelu --n-examples 20" in text
    assert re.search(r"3 cells, at most .+ with --jobs 2: all epochs, and attacks on examples that all withstand", text)
    assert [path.name for path in tmp_path.iterdir()] == ["g.toml"]


def no_process(*_) -> str:
    raise AssertionError("a process was started")


def evaluated_cell(run: Path, **changes) -> Cell:
    """The cell whose run is the fixture's."""
    train = TrainConfig(
        "dense_drelu",
        "digits",
        output_dir=run,
        resume=True,
        **{"epochs": 5, "cap": 20.0, "width": 16, "eps": "0.1"} | changes,
    )
    evaluations = (
        EvaluateConfig(str(run), suite="standard", n_examples=60),
        EvaluateConfig(str(run), suite="quick", n_examples=20, eps="0.2,0.1,0"),
    )
    return Cell(run.name, train, evaluations)


def test_done_cells_start_no_process(evaluated, monkeypatch, capsys):
    monkeypatch.setattr(CellJob, "__call__", no_process)
    assert not run([evaluated_cell(evaluated)])
    assert re.search(r"done   digits before: clean \d.+ %, worst case .+ % at eps 0.1, \w+", capsys.readouterr().out)


def test_a_cell_of_other_settings_fails_with_the_message_of_train(evaluated, monkeypatch, capsys):
    monkeypatch.setattr(CellJob, "__call__", no_process)
    assert run([evaluated_cell(evaluated, epochs=6)])
    assert f"--resume of {evaluated} with other settings: epochs (5 before, 6 now)" in capsys.readouterr().out


def test_an_evaluation_of_other_settings_is_not_there(evaluated):
    cell = evaluated_cell(evaluated)
    more = replace(
        cell, evaluations=(*cell.evaluations, EvaluateConfig(str(evaluated), suite="standard", n_examples=61))
    )
    assert cell.is_done() and not more.is_done()
    assert more.doing() == "evaluates: standard"


def test_what_a_cell_does_is_read_from_its_files(tmp_path):
    cell = evaluated_cell(tmp_path / "x")
    assert cell.doing() == "trains: epoch 1 of 5"
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "log.jsonl").write_text("{}\n{}\n")
    assert cell.doing() == "trains: epoch 3 of 5"


def test_time_left_is_that_of_the_cells_that_ended():
    from drelu_timm.progress import Ended, Progress, Running

    cell = evaluated_cell(Path("x"))
    progress = Progress({"a": cell, "b": cell})
    assert progress.seconds_left(1) is None
    progress.ended = {
        "c": Ended(cell, "", 10),
        "d": Ended(cell, "", 30),
        "e": Ended(cell, "", None),
        "f": Ended(cell, "no", 1),
    }
    progress.running = {"g": Running(cell, Future(), time.monotonic() - 5)}
    assert progress.seconds_left(1) == pytest.approx(2 * 20 + 15, abs=1)
    assert progress.seconds_left(2) == pytest.approx((2 * 20 + 15) / 2, abs=1)


class FakeQueue:
    """submitit's executor for SLURM, which is not here."""

    def __init__(self, **options):
        self.parameters: dict = {}

    def update_parameters(self, **parameters) -> None:
        self.parameters |= parameters

    def submit(self, job: CellJob):
        return SimpleNamespace(job_id="123", job=job, parameters=dict(self.parameters))


def test_a_job_that_is_still_in_the_queue_is_not_submitted_again(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    from drelu_timm.cluster import Cluster

    in_queue = SimpleNamespace(done=lambda: False)
    monkeypatch.setattr(submitit, "AutoExecutor", FakeQueue)
    monkeypatch.setattr(submitit, "SlurmJob", lambda folder, job_id: in_queue if job_id == "123" else None)

    def queue():
        return Cluster("slurm", tmp_path, partition="gpu", hours=1.5, num_processes=2)

    job = CellJob([["python", "-c", ""]], tmp_path / "log")
    first = queue().submit("a", job)
    assert (first.parameters["timeout_min"], first.parameters["slurm_partition"]) == (90, "gpu")
    assert (first.parameters["gpus_per_node"], first.parameters["name"]) == (2, "a")
    assert queue().submit("a", job) is in_queue
    in_queue.done = lambda: True
    assert queue().submit("a", job).job == job


def test_a_machine_without_slurm(tmp_path, grid, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=r"^--cluster slurm cannot be used here \(.+\)$"):
        sweep(SweepConfig(str(grid), output_dir=tmp_path / "x", cluster="slurm"))


# Real trainings, in processes of their own


def swept(grid: Path, output_dir: Path, *flags: str) -> subprocess.Popen:
    program = "import sys; from drelu_timm.sweep import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, str(grid), "--output-dir", str(output_dir), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def result(run: Path) -> tuple[dict, str]:
    """What an evaluation says, and its rows, but for times, and what names the folder."""
    (path,) = run.glob("results/*.json")
    content = json.loads(path.read_text())
    named = ("seconds", "attack_seconds", "command", "run", "adversarial_sha256")
    return {key: value for key, value in content.items() if key not in named}, path.with_suffix(".csv").read_text()


def test_a_training_and_its_evaluation_by_their_commands(tmp_path, grid, capsys):
    grid.write_text(GRID[: GRID.index('[[method]]\nname = "at"')])
    assert main([str(grid), "--output-dir", str(tmp_path / "x")]) == 0
    text = capsys.readouterr().out
    assert re.search(r"begins natural\ndone   natural in \d+ s: clean \d.+ %, worst case .+ % at eps 0.1, \w+\n", text)
    assert text.endswith(f"next: drelu-timm report {tmp_path / 'x'}\n")
    (cell,) = read_grid(str(grid)).cells(tmp_path / "x", data_dir=Path("data"))
    assert cell.is_done() and len(log(cell.path)) == 2


@pytest.mark.slow
def test_a_sweep_that_is_killed_ends_as_one_left_alone(tmp_path, grid):
    alone = swept(grid, tmp_path / "alone", "--jobs", "2")
    assert alone.wait(600) == 0
    for moment in (
        lambda: (tmp_path / "x" / "natural" / "log.jsonl").exists(),
        lambda: (tmp_path / "x" / "at").exists(),
    ):
        process = swept(grid, tmp_path / "x", "--jobs", "2")
        while not moment():
            time.sleep(0.01)
        kill_with_workers(process.pid)
        process.communicate()
    stopped = swept(grid, tmp_path / "x", "--jobs", "2")
    time.sleep(12)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=120)
    last = swept(grid, tmp_path / "x", "--jobs", "2")
    text, _ = last.communicate(timeout=600)
    assert last.returncode == 0, text
    for name in ("natural", "at", "drelu"):
        one, other = weights(tmp_path / "alone" / name), weights(tmp_path / "x" / name)
        assert all(one[key].equal(other[key]) for key in one)
        assert result(tmp_path / "alone" / name) == result(tmp_path / "x" / name)


@pytest.mark.slow
def test_the_same_through_submitit(tmp_path, grid, capsys):
    pytest.importorskip("submitit")
    grid.write_text(GRID.replace("cap_weight = 0.1", "cap_weight = 0.1\nbatch_size = 10000"))  # one fails
    assert main([str(grid), "--output-dir", str(tmp_path / "x"), "--cluster", "local", "--hours", "0.5"]) == 1
    text = capsys.readouterr().out
    assert re.search("done   natural in", text) and re.search("done   at in", text)
    assert re.search(r"failed drelu in \d+ s: .*10000", text)
    assert {*json.loads((tmp_path / "x" / "jobs" / "jobs.json").read_text())} == {"natural", "at", "drelu"}
    assert not psutil.Process().children(recursive=True)
