"""Sweeps: cells in order and at once, what is skipped, fails or is killed, and that all ends as if left alone."""

import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from launching import kill_with_workers, log, weights
from rich.console import Console
from safetensors.torch import save_file
from synthetic_runs import point, write_result, write_run, write_sweep

from drelu_timm import __main__
from drelu_timm.errors import InputError
from drelu_timm.evaluation.config import EvaluateConfig
from drelu_timm.files import held, locked
from drelu_timm.flags import SweepConfig, read
from drelu_timm.launch import Launch, Preempted
from drelu_timm.sweep import main, sweep
from drelu_timm.sweeps import jobs, scheduler
from drelu_timm.sweeps.cell import Cell
from drelu_timm.sweeps.grids import read_grid
from drelu_timm.sweeps.jobs import CellJob, LocalExecutor
from drelu_timm.sweeps.scheduler import Ended, Running, Scheduler, Screen
from drelu_timm.train import train
from drelu_timm.training.config import TrainConfig

GRID = """
title = "three small models"
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
    return Scheduler("stubs", cells, LocalExecutor(jobs, 1), Launch()).run()


def stamp(path: Path, name: str, until: str = "") -> str:
    """A program that notes when it begins and when it ends, which is not before a line is there."""
    note = f"notes.open('a').write('{name} %s\\n')"
    wait = f"time.sleep(0.1)\nwhile {until!r} not in notes.read_text(): time.sleep(0.01)"
    return "\n".join(
        ["import pathlib, time", f"notes = pathlib.Path({str(path)!r})", note % "begins", wait, note % "ends"]
    )


def test_a_cell_waits_for_the_one_that_it_begins_with(tmp_path):
    notes = tmp_path / "notes"
    programs = {
        "b": stamp(notes, "b"),
        "a": stamp(notes, "a", "c begins"),
        "c": stamp(notes, "c"),
    }  # a at the same time as c
    assert not run(stubs(tmp_path / "x", programs, {"b": "a"}), jobs=2)
    order = notes.read_text().splitlines()
    assert order.index("a ends") < order.index("b begins")


def test_no_more_cells_at_once_than_jobs(tmp_path):
    notes = tmp_path / "notes"
    run(stubs(tmp_path / "x", {name: stamp(notes, name) for name in "abc"}))
    assert [line.split()[1] for line in notes.read_text().splitlines()] == ["begins", "ends"] * 3


def test_a_failed_cell_stops_only_those_that_begin_with_it(tmp_path, capsys):
    fails = (
        "import sys; print('half way'); print('error: the disk is full', file=sys.stderr); print('bye'); sys.exit(2)"
    )
    programs = {"a": fails, "b": "", "c": "", "d": "import os; os.kill(os.getpid(), 9)", "e": "1 / 0"}
    assert run(stubs(tmp_path, programs, {"b": "a"}))
    text = re.sub(r" in [\d.]+ s", "", capsys.readouterr().out)
    assert f"failed a: the disk is full (log: {tmp_path / 'a.log'})" in text
    assert "failed b: not run, because a failed, whose weights it starts from" in text
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
    saved, started = tmp_path / "saved", tmp_path / "started"
    program = (
        f"import pathlib, signal, sys, time\n"
        f"def save(*_):\n    pathlib.Path({str(saved)!r}).touch(); sys.exit(75)\n"
        f"signal.signal(signal.SIGTERM, save)\npathlib.Path({str(started)!r}).touch()\ntime.sleep(60)"
    )
    sleep = time.sleep

    def stop_when_begun(seconds: float) -> None:
        sleep(seconds)
        if started.exists() and how == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
        elif started.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr("drelu_timm.sweeps.scheduler.time.sleep", stop_when_begun)
    with pytest.raises(Preempted if how == "sigterm" else KeyboardInterrupt):
        run(stubs(tmp_path, {"a": program, "b": program}))
    assert saved.exists() and not (tmp_path / "b.log").exists()
    locked(tmp_path / "a.log").close()  # no process of the cell is left that would hold it


def test_a_training_never_hears_the_signal_by_which_submitit_ends_a_job(tmp_path):
    program = "import os, signal; os.kill(os.getpid(), signal.SIGUSR2); print('still here')"
    assert CellJob([["python", "-c", program]], tmp_path / "log")() == ""
    assert "still here" in (tmp_path / "log").read_text()


def test_a_preempted_job_saves_before_it_is_put_back(tmp_path):
    submitit = pytest.importorskip("submitit.helpers")
    program = (
        "import os, signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "os.kill(os.getppid(), signal.SIGALRM)\nwhile True: signal.pause()"
    )
    job = CellJob([["python", "-c", program], ["python", "-c", "print('not this')"]], tmp_path / "log")
    again = []

    def preempt(*_) -> None:
        again.append(job.checkpoint())

    before = signal.signal(signal.SIGALRM, preempt)
    try:
        job()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert isinstance(again[0], submitit.DelayedSubmission)
    assert again[0].function == CellJob(job.commands, job.log)
    assert "not this" not in (tmp_path / "log").read_text().split("\n", 1)[1]


def test_a_terminal_s_ctrl_c_does_not_reach_a_training(tmp_path):
    CellJob([["python", "-c", "import os; print('group', os.getpgrp() - os.getpid())"]], tmp_path / "log")()
    assert "group 0" in (tmp_path / "log").read_text()  # its own, so that only `stop` ends it


def test_every_cell_is_stopped():
    class Stopping(CellJob):
        """Ends as soon as it is stopped, while the others are still being stopped."""

        def __call__(self, environment: Mapping[str, str] | None = None) -> str:
            while not self._stopped:
                time.sleep(0.001)
            return ""

        def stop(self) -> None:
            self._stopped = True
            time.sleep(0.05)

    executor, jobs = LocalExecutor(8, 1), [Stopping([], Path(str(number))) for number in range(8)]
    pending = [executor.submit("x", job) for job in jobs]
    threading.Thread(target=executor.stop, daemon=True).start()
    try:
        assert [job.result(60) for job in pending] == [""] * 8
    finally:
        for job in jobs:
            job.stop()


def test_two_sweeps_in_one_folder(tmp_path, grid):
    def hold(ready) -> None:
        with held(tmp_path / "x" / ".lock", "x"):
            ready.set()
            signal.pause()

    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    other = fork.Process(target=hold, args=(ready,))
    other.start()
    try:
        ready.wait()
        with pytest.raises(
            InputError, match=rf"x is in use by process {other.pid} on .+\. Wait until it ends"
        ) as caught:
            sweep(SweepConfig(str(grid), output_dir=tmp_path / "x"))
        assert "\n" not in str(caught.value)
    finally:
        other.kill()
        other.join()


def test_a_cell_that_a_killed_sweep_has_left_is_not_begun_twice(tmp_path, grid, monkeypatch):
    log_of = tmp_path / "x" / "natural.log"
    log_of.parent.mkdir()
    program = "import signal; print('up', flush=True); signal.pause()"
    job = CellJob([["python", "-c", program]], log_of)
    killed = multiprocessing.get_context("fork").Process(target=job)
    killed.start()
    while not log_of.exists() or "\nup\n" not in log_of.read_text():
        time.sleep(0.01)
    (left,) = psutil.Process(killed.pid).children()
    killed.kill()
    killed.join()
    try:
        with pytest.raises(InputError, match=r"cell natural of a sweep that was killed still runs") as caught:
            sweep(SweepConfig(str(grid), output_dir=tmp_path / "x"))
        assert "\n" not in str(caught.value) and f"fuser {log_of}" in str(caught.value)
        assert CellJob([["python", "-c", ""]], log_of)().startswith("it runs already. Wait, or end its processes")
    finally:
        left.kill()
        left.wait(10)
    assert CellJob([["python", "-c", ""]], log_of)() == ""


def test_an_output_folder_that_cannot_be_one(grid):
    with pytest.raises(InputError, match=r"--output-dir .*g\.toml/x' cannot be used \(.+\)\. Use another"):
        sweep(SweepConfig(str(grid), output_dir=grid / "x"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"jobs": 0}, "--jobs 0 is not possible. Use a number above 0."),
        ({"num_processes": 0}, "--num-processes 0 is not possible. Use a number above 0."),
        ({"mixed_precision": "fp16"}, "--mixed-precision 'fp16' is unknown; did you mean bf16"),
        ({"cluster": "slrum"}, "--cluster 'slrum' is unknown; did you mean slurm"),
        ({"partition": "gpu"}, "--partition gpu is for --cluster slurm. Add that, or leave it out."),
        ({"cluster": "slurm", "jobs": 1}, "--jobs 1 is for this machine. Leave out --jobs or --cluster."),
        ({"hours": 2.0}, "--hours 2 is for --cluster slurm. Add that, or leave it out."),
        ({"cluster": "slurm", "hours": 0.005}, "--hours 0.005 is less than one minute. Use at least 0.02."),
    ],
)
def test_flags_that_cannot_be_used(tmp_path, grid, flags, message):
    with pytest.raises(InputError, match=re.escape(message)):
        sweep(SweepConfig(str(grid), output_dir=tmp_path / "x", **flags))
    assert not (tmp_path / "x").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, grid, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(read("sweep", [str(grid), "--dry-run", "--jobs", "2"])) == 0
    text = capsys.readouterr().out
    assert "g: three small models\na test\n" in text
    assert re.search(r"^drelu: [\d,]+ forward passes to train, [\d,]+ to evaluate$", text, re.MULTILINE)
    assert "    python -m drelu_timm evaluate runs/g/drelu --n-examples 20" in text
    assert re.search(
        r"\n3 cells, at most [\d,]+ forward passes: if no training stops early and no attack succeeds", text
    )
    assert [path.name for path in tmp_path.iterdir()] == ["g.toml"]


def test_a_dry_run_needs_no_generated_images(tmp_path, grid, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid.write_text(GRID.replace("cap_weight = 0.1", "cap_weight = 0.1\ngenerated_fraction = 0.7"))
    said = "--generated has to name the generated images, here FILE.npz, before the sweep can run"
    assert main(read("sweep", [str(grid), "--dry-run"])) == 0
    text = capsys.readouterr().out
    assert text.count("--generated FILE.npz") == 1 and text.endswith(f"{said}\n")
    assert main(read("sweep", [str(grid), "--dry-run", "--generated", "edm.npz"])) == 0
    text = capsys.readouterr().out
    assert "--generated edm.npz" in text and said not in text
    with pytest.raises(InputError, match=r"--generated-fraction 0\.7 needs --generated"):
        sweep(SweepConfig(str(grid)))


def no_process(*_) -> str:
    raise AssertionError("a process was started")


def in_this_process(job: CellJob, environment: Mapping[str, str] | None = None) -> str:
    """A job's commands as their processes read them, without the seconds in which each imports torch."""
    return "failed" if any(__main__.main(words[3:]) for words in job.commands) else ""


def cell_of(run: Path, **changes) -> Cell:
    """A cell of one small training, an evaluation, and a sweep over radii."""
    settings = {"epochs": 1, "n_train": 256, "width": 16, "eps": "0.1"} | changes
    evaluations = (
        EvaluateConfig(str(run), suite="quick", n_examples=4),
        EvaluateConfig(str(run), suite="quick", n_examples=2, eps="0.2,0.1,0"),
    )
    return Cell(run.name, TrainConfig("dense_drelu", "digits", output_dir=run, resume=True, **settings), evaluations)


@pytest.fixture(scope="module")
def swept_cell(tmp_path_factory) -> Cell:
    """A cell that is done; not to be spoiled."""
    cell = cell_of(tmp_path_factory.mktemp("runs") / "digits")
    assert in_this_process(CellJob(cell.commands(Launch()), cell.log)) == ""
    return cell


def test_the_commands_of_a_cell_end_it_and_done_cells_start_no_process(swept_cell, monkeypatch, capsys):
    assert swept_cell.is_done() and len(log(swept_cell.path)) == 1
    assert len([*swept_cell.path.glob("results/*.json")]) == len([*swept_cell.path.glob("sweeps/*.json")]) == 1
    monkeypatch.setattr(CellJob, "__call__", no_process)
    assert not run([swept_cell])
    assert re.search(r"done   digits before: clean \d.+ %, worst case .+ % at eps 0.1, \w+", capsys.readouterr().out)


def test_a_cell_of_other_settings_fails_with_the_message_of_train(swept_cell, monkeypatch, capsys):
    monkeypatch.setattr(CellJob, "__call__", no_process)
    path = swept_cell.path
    assert run([cell_of(path, epochs=2)])
    assert f"--resume of {path} with other settings: epochs (1 before, 2 now)" in capsys.readouterr().out


@pytest.mark.parametrize("config", ["{}", '{"train": []}'])
def test_a_cell_with_a_damaged_config_fails_alone(tmp_path, capsys, config):
    run_of = {name: tmp_path / name for name in ("damaged", "fails-too")}
    for path in run_of.values():
        (path / "model").mkdir(parents=True)
        (path / "config.json").write_text(config)
    assert run([cell_of(path) for path in run_of.values()])
    out = capsys.readouterr().out
    assert all(f"failed {name}: {path / 'config.json'}" in out for name, path in run_of.items())


def test_a_cell_that_began_with_other_weights_than_its_start_has_now_is_not_done(tmp_path):
    settings = {"resume": True, "epochs": 1, "n_train": 256, "width": 16}
    natural = TrainConfig("dense_drelu", "digits", output_dir=tmp_path / "natural", **settings)
    at = replace(natural, output_dir=tmp_path / "at", init_from=tmp_path / "natural", objective="at", steps=1)
    for each in (natural, at):
        train(each)
    cell = Cell("at", at, (), "natural")
    assert cell.is_done()
    file = tmp_path / "natural" / "model" / "model.safetensors"
    save_file({name: value + 1 for name, value in weights(tmp_path / "natural").items()}, file)
    with pytest.raises(InputError, match=f"{tmp_path}/at: the weights of --init-from {tmp_path}/natural have") as error:
        cell.is_done()
    assert "\n" not in str(error.value)
    file.unlink()
    assert cell.is_done()


@pytest.mark.parametrize("changes", [{"n_examples": 5}, {"dataset": "mnist"}, {"seed": 1}])
def test_an_evaluation_of_other_settings_is_not_there(swept_cell, changes):
    other = replace(swept_cell.evaluations[0], **changes)
    more = replace(swept_cell, evaluations=(*swept_cell.evaluations, other))
    assert swept_cell.is_done() and not more.is_done()
    assert more.doing() == "evaluates: quick"


def idle(title: str = "a sweep", jobs: int = 1) -> Scheduler:
    """A scheduler without cells, to which a test adds them."""
    return Scheduler(title, [], LocalExecutor(jobs, 1), Launch())


def test_names_and_titles_are_not_markup(tmp_path, monkeypatch):
    cell = replace(cell_of(tmp_path / "x"), name="x[red]")
    shown = idle()
    shown.ended = {"x": Ended(cell, "no [bold]"), "y": Ended(cell)}
    shown.running = {"z": Running(cell, Future(), time.monotonic())}
    screen = Screen("a [blue] title", shown)
    monkeypatch.setattr(screen, "_console", console := Console(record=True, width=100, file=io.StringIO()))
    screen.started(cell)
    screen.summary()
    console.print(screen._live_table())
    text = console.export_text()
    assert text.count("x[red]") == 5 and "no [bold]" in text and "a [blue] title" in text


def test_what_a_cell_does_is_read_from_its_files(tmp_path):
    cell = cell_of(tmp_path / "x", epochs=5)
    assert cell.doing() == "trains: epoch 1 of 5"
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "log.jsonl").write_text("{}\n{}\n")
    assert cell.doing() == "trains: epoch 3 of 5"


@pytest.mark.parametrize("jobs", [1, 2])
def test_time_left_is_that_of_the_cells_that_ended(monkeypatch, jobs):
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(monotonic=lambda: 100.0))
    cell, shown = cell_of(Path("x")), idle(jobs=jobs)
    shown.waiting = {"a": cell, "b": cell}
    assert shown.seconds_left() is None
    shown.ended = {
        "c": Ended(cell, "", 10),
        "d": Ended(cell, "", 30),
        "e": Ended(cell, "", None),
        "f": Ended(cell, "no", 1),
    }
    shown.running = {"g": Running(cell, Future(), 95.0)}
    assert shown.seconds_left() == (2 * 20 + 15) / jobs


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
    from drelu_timm.sweeps.slurm import SlurmExecutor

    in_queue = SimpleNamespace(done=lambda: False)
    monkeypatch.setattr(submitit, "AutoExecutor", FakeQueue)
    monkeypatch.setattr(submitit, "SlurmJob", lambda folder, job_id: in_queue if job_id == "123" else None)

    def queue():
        return SlurmExecutor(tmp_path, partition="gpu", minutes=90, num_processes=2)

    job = CellJob([["python", "-c", ""]], tmp_path / "log")
    first = queue().submit("a", job)
    assert (first.parameters["timeout_min"], first.parameters["slurm_partition"]) == (90, "gpu")
    assert (first.parameters["gpus_per_node"], first.parameters["name"]) == (2, "a")
    assert queue().submit("a", job) is in_queue
    in_queue.done = lambda: True
    assert queue().submit("a", job).job == job


class Clock:
    """What the scheduler looks at: time passes only while it sleeps."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def limited_queue(tmp_path, monkeypatch):
    """Makes a cluster that takes so many jobs of 90 s of a user at once; when each was submitted."""
    submitit = pytest.importorskip("submitit")
    from drelu_timm.sweeps.slurm import SlurmExecutor

    clock = Clock()
    monkeypatch.setattr(scheduler, "time", clock)

    def make(limit: int) -> tuple[SlurmExecutor, list[float]]:
        tries: list[float] = []
        jobs: list[SimpleNamespace] = []

        class Limited(FakeQueue):
            def submit(self, job: CellJob):
                tries.append(clock.now)
                if sum(not job.done() for job in jobs) >= limit:
                    raise submitit.core.utils.FailedJobError(
                        "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed"
                    )
                ends = clock.now + 90
                done = SimpleNamespace(job_id="1", done=lambda: clock.now > ends, result=lambda: "")
                jobs.append(done)
                return done

        monkeypatch.setattr(submitit, "AutoExecutor", Limited)
        return SlurmExecutor(tmp_path / "jobs", partition="", minutes=90, num_processes=1), tries

    return make


def test_a_cell_that_the_cluster_refuses_waits_until_another_one_has_ended(tmp_path, limited_queue, capsys):
    cluster, tries = limited_queue(1)
    assert not Scheduler("stubs", stubs(tmp_path, dict.fromkeys("abc", "")), cluster, Launch()).run()
    text = capsys.readouterr().out
    assert re.findall(r"^(?:starts|waits|done)  +\w|^starts \w", text, re.MULTILINE) == [
        *("starts a", "waits  b", "done   a", "starts b", "done   b", "starts c", "done   c")
    ]
    assert "waits  b: it was refused (sbatch: error: QOSMaxSubmitJobPerUserLimit sbatch: error: Batch job" in text
    assert tries == pytest.approx([0, 0, 60, 120, 120, 180, 240], abs=1)  # not at every look


def test_a_cell_that_the_cluster_refuses_though_nothing_runs_has_failed(tmp_path, limited_queue, capsys):
    cluster, tries = limited_queue(0)
    assert Scheduler("stubs", stubs(tmp_path, dict.fromkeys("ab", "")), cluster, Launch()).run()
    text = capsys.readouterr().out
    for name in "ab":
        assert f"failed {name}: it was refused (sbatch: error: QOSMaxSubmitJobPerUserLimit sbatch: error: Batch" in text
    assert len(tries) == 2


def test_slurm_jobs_that_have_not_ended_are_not_begun_here(tmp_path, grid, monkeypatch):
    submitit = pytest.importorskip("submitit")
    jobs_folder = tmp_path / "x" / "jobs"
    jobs_folder.mkdir(parents=True)
    (jobs_folder / "jobs.json").write_text('{"natural": "123", "at": "124"}')
    monkeypatch.setattr(submitit, "SlurmJob", lambda folder, job_id: SimpleNamespace(done=lambda: job_id == "124"))
    with pytest.raises(InputError, match=r"has SLURM jobs that have not ended, .*\(natural\)\. .*jobs.json"):
        sweep(SweepConfig(str(grid), output_dir=tmp_path / "x"))
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"jobs"}


def test_a_machine_without_slurm(tmp_path, grid, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=r"^--cluster slurm cannot be used here \(.+\)$"):
        sweep(SweepConfig(str(grid), output_dir=tmp_path / "x", cluster="slurm"))


# Real trainings, in processes of their own


def swept(grid: Path, output_dir: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "drelu_timm", "sweep", str(grid), "--output-dir", str(output_dir), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def result(run: Path) -> tuple[dict, str]:
    """Return the result and rows of an evaluation, without times and without the name of the folder."""
    (path,) = run.glob("results/*.json")
    content = json.loads(path.read_text())
    named = ("seconds", "attack_seconds", "command", "git_revision", "run", "adversarial_sha256")
    return {key: value for key, value in content.items() if key not in named}, path.with_suffix(".csv").read_text()


@pytest.mark.slow
def test_a_training_and_its_evaluation_by_their_processes(tmp_path, grid, capsys):
    grid.write_text(GRID[: GRID.index('[[method]]\nname = "at"')])
    assert main(read("sweep", [str(grid), "--output-dir", str(tmp_path / "x")])) == 0
    text = capsys.readouterr().out
    assert re.search(r"starts natural\ndone   natural in \d+ s: clean \d.+ %, worst case .+ % at eps 0.1, \w+\n", text)
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
    while not (tmp_path / "x" / "natural" / "results").exists():
        time.sleep(0.01)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=120)
    last = swept(grid, tmp_path / "x", "--jobs", "2")
    text, _ = last.communicate(timeout=600)
    assert last.returncode == 0, text
    for name in ("natural", "at", "drelu"):
        one, other = weights(tmp_path / "alone" / name), weights(tmp_path / "x" / name)
        assert all(one[key].equal(other[key]) for key in one)
        assert result(tmp_path / "alone" / name) == result(tmp_path / "x" / name)


# What SLURM does, on one machine: sbatch starts a script as a job, srun runs a command in it.
SBATCH = """#!/usr/bin/env bash
script=$(<"$1")  # submitit renames the file as soon as this ends
SLURM_JOB_ID=$$ setsid bash -c "$script" >/dev/null 2>&1 &
echo "Submitted batch job $$"
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do if [[ $1 == --output || $1 == --error ]]; then shift; fi; shift; done
exec "$@"
"""


@pytest.fixture
def imitated_slurm(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    from drelu_timm.sweeps.slurm import SlurmExecutor

    monkeypatch.setattr(SlurmExecutor, "poll_every", 0.1)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": "#!/usr/bin/env bash\n"}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")


def test_a_job_is_submitted_to_slurm_and_gives_its_error(tmp_path, imitated_slurm, capsys):
    from drelu_timm.sweeps.slurm import SlurmExecutor

    cluster = SlurmExecutor(tmp_path / "x" / "jobs", partition="gpu", minutes=90, num_processes=2)
    cells = stubs(tmp_path / "x", {"a": "print('up'); print('error: the disk is full'); raise SystemExit(1)"})
    assert Scheduler("stubs", cells, cluster, Launch()).run()
    assert "failed a: the disk is full" in re.sub(r" in [\d.]+ s", "", capsys.readouterr().out)
    assert "\nup\n" in (tmp_path / "x" / "a.log").read_text()
    assert json.loads((tmp_path / "x" / "jobs" / "jobs.json").read_text()).keys() == {"a"}
    (script,) = [path.read_text() for path in tmp_path.glob("x/jobs/*_submission.sh")]
    assert {"--partition=gpu", "--gpus-per-node=2", "--time=90", "--job-name=a"} <= {*script.split()}
    assert "--signal=USR2@" in script  # in time to save and to be queued again


@pytest.mark.slow
def test_the_same_through_slurm(tmp_path, grid, imitated_slurm, capsys):
    grid.write_text(GRID.replace("cap_weight = 0.1", "cap_weight = 0.1\nbatch_size = 10000"))  # one fails
    flags = [str(grid), "--output-dir", str(tmp_path / "x"), "--cluster", "slurm", "--hours", "0.5"]
    assert main(read("sweep", flags)) == 1
    text = capsys.readouterr().out
    assert re.search("done   natural in", text) and re.search("done   at in", text)
    assert re.search(r"failed drelu in \d+ s: .*10000", text)


def test_a_cell_has_the_worst_verdict_of_all_its_evaluations(tmp_path, capsys):
    run = write_run(tmp_path / "a", dataset="digits")
    write_result(run, worst=0.8)
    write_sweep(run, [point(eps="0.1", worst=0.5, verdict="masked")])
    cell = Cell("a", TrainConfig("dense_drelu", "digits", output_dir=run), ())
    ended = Ended(cell, "", 1.0)
    shown = idle()
    shown.ended = {"a": ended}
    screen = Screen("a sweep", shown)
    screen.ended(ended)
    screen.summary()
    line, *table = capsys.readouterr().out.splitlines()
    assert line.endswith("at eps 0.1, masked")
    assert any("masked" in row for row in table) and not any("sound" in row for row in table)
