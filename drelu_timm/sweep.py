"""`drelu-timm sweep`: a grid of trainings and evaluations, each in a run directory of its own.

    drelu-timm sweep paper-mnist-smoke --jobs 2
    drelu-timm sweep paper-cifar10 --dry-run
    drelu-timm sweep my-grid.toml --num-processes 4 --mixed-precision bf16
    drelu-timm sweep paper-cifar10 --cluster slurm --partition gpu --num-processes 4 --hours 12

`sweeps.grids` says what a grid is. Every cell is a `train` and its `evaluate`s, as processes of their own; what they
print lies in ``<cell>.log`` beside the run directory. Cells that are done are skipped, others go on where they were:
the same command again ends what was stopped, in whatever way.
"""

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from .command_line import duration
from .errors import InputError, one_line, unknown
from .files import locked
from .flags import SweepConfig
from .launches import Launch
from .sweeps.cells import Cell
from .sweeps.grids import Grid, read_grid
from .sweeps.jobs import Here, Place, threads_of_a_process
from .sweeps.scheduler import Scheduler

_PRECISIONS = ("no", "bf16")
_CLUSTERS = ("slurm", "local")
_HOURS = 24.0
_PLACEHOLDER = Path("FILE.npz")  # of generated images, for a plan without them


def main(config: SweepConfig) -> int:
    """Run the grid; return 1 if a cell failed, else 0."""
    return sweep(config)


def sweep(config: SweepConfig) -> int:
    """Run all cells of a grid that are not done.

    Returns:
        0, or 1 if a cell failed.

    Raises:
        InputError: A grid or flags that cannot be used, or a folder in which another sweep, or what one has begun,
            still runs.
        Preempted: SIGTERM came; what ran has saved its state.
    """
    _check(config)
    grid = read_grid(config.grid)
    output_dir = config.output_dir or Path("runs") / grid.name
    generated = config.generated or ((_PLACEHOLDER,) if config.dry_run else ())
    cells = grid.cells(output_dir, data_dir=config.data_dir, generated=generated)
    launch = Launch(
        config.num_processes, config.mixed_precision, not torch.cuda.is_available() and config.cluster != "slurm"
    )
    if config.dry_run:
        _show_plan(grid, cells, launch, config)
        return 0
    with _held(output_dir):
        queued = _refuse_running(cells, output_dir, config.cluster)
        cells.sort(key=lambda cell: cell.name not in queued)  # which may be why others are refused
        failed = Scheduler(grid.name, cells, _place(output_dir, config), launch).run()
    print(f"next: drelu-timm report {shlex.quote(str(output_dir))}")
    return 1 if failed else 0


def _check(config: SweepConfig) -> None:
    for flag, value in (("--jobs", config.jobs), ("--num-processes", config.num_processes), ("--hours", config.hours)):
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{flag} {value} is not possible; give a number above 0")
    if config.mixed_precision not in _PRECISIONS:
        raise unknown("--mixed-precision", config.mixed_precision, _PRECISIONS)
    if config.cluster not in ("", *_CLUSTERS):
        raise unknown("--cluster", config.cluster, _CLUSTERS)
    if config.cluster and config.jobs is not None:
        raise InputError(f"--jobs {config.jobs} is for this machine, not for --cluster; leave one of them out")
    if config.hours is not None and not config.cluster:
        raise InputError(f"--hours {config.hours:g} is for --cluster slurm; add that, or leave it out")
    if config.hours is not None and _minutes(config) < 1:
        raise InputError(f"--hours {config.hours:g} is no minute; give 0.02 or more")
    if config.partition and config.cluster != "slurm":
        raise InputError(f"--partition {config.partition} is for --cluster slurm; add that, or leave it out")
    if torch.cuda.is_available() and not config.cluster and config.num_processes > torch.cuda.device_count():
        raise InputError(f"--num-processes {config.num_processes}: this machine has {torch.cuda.device_count()} GPUs")


def _minutes(config: SweepConfig) -> int:
    """Limit of a job."""
    return round(60 * (_HOURS if config.hours is None else config.hours))


def _held(output_dir: Path) -> BinaryIO:
    """The folder's lock, for one sweep alone; what it begins does not inherit it."""
    path = output_dir / ".lock"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        return locked(path)
    except BlockingIOError as error:
        raise InputError(
            f"--output-dir {output_dir} is in use by another sweep; wait, or end it (fuser {path} names its process)"
        ) from error
    except OSError as error:
        raise InputError(f"--output-dir {output_dir} cannot be written to ({one_line(error)}); name another") from error


def _refuse_running(cells: Sequence[Cell], output_dir: Path, cluster: str) -> Collection[str]:
    """Refuse to begin what runs already, or waits in SLURM's queue; with ``--cluster slurm``, that is found again.

    Returns:
        Names of the cells in the queue.
    """
    folder = output_dir / "jobs"
    queued: Collection[str] = ()
    if folder.exists():
        from .sweeps.cluster import NUMBERS, in_queue

        queued = in_queue(folder)
        if queued and cluster != "slurm":
            raise InputError(
                f"--output-dir {output_dir} has SLURM jobs that have not ended, as far as can be seen here "
                f"({', '.join(queued)}); go on with --cluster slurm, or scancel them and delete {folder / NUMBERS}"
            )
    for cell in cells:
        if cell.name not in queued and cell.log.exists():
            try:
                locked(cell.log).close()
            except BlockingIOError as error:
                raise InputError(
                    f"--output-dir {output_dir}: cell {cell.name} still runs, left by a sweep that was killed; "
                    f"wait, or end it (fuser {cell.log} names its processes)"
                ) from error
    return queued


def _place(output_dir: Path, config: SweepConfig) -> Place:
    """Where cells run."""
    if not config.cluster:
        return Here(config.jobs or 1, config.num_processes)
    from .sweeps.cluster import Cluster

    return Cluster(
        config.cluster,
        output_dir / "jobs",
        partition=config.partition,
        minutes=_minutes(config),
        num_processes=config.num_processes,
    )


def _show_plan(grid: Grid, cells: Sequence[Cell], launch: Launch, config: SweepConfig) -> None:
    """Print every cell with its commands and what it costs."""
    from .sweeps.cost import Clock, cost  # what a sweep that runs has no need of

    print(f"{grid.name}: {grid.title}\n{grid.source}\n")
    jobs = config.jobs or 1
    clock = Clock(threads_of_a_process(jobs, config.num_processes))
    total = 0.0
    for cell in cells:
        state = _state(cell)
        if not state:
            bound = cost(cell, clock.model(cell.train))
            seconds = bound.forwards * clock.seconds(cell.train) / config.num_processes
            state = f"about {duration(seconds)} for {bound}"
            total += seconds
        print(f"{cell.name}: {state}")
        for command in cell.commands(launch):
            print(f"    {shlex.join(command)}")
    how = "in all jobs together" if config.cluster else f"with --jobs {jobs}"
    print(
        f"\n{len(cells)} cells, about {duration(total / jobs)} {how} for their passes at most: all epochs, and attacks "
        "on examples that all withstand; the start of processes, the data and the optimiser come on top. A forward "
        f"pass was timed on {clock.machine}"
    )
    if any(cell.train.generated == (_PLACEHOLDER,) for cell in cells) and not config.generated:
        print(f"{_PLACEHOLDER} stands for the generated images, which --generated has to name before it can run")


def _state(cell: Cell) -> str:
    """What there is of a cell that would not be run; "" for one that would."""
    try:
        return "done" if cell.is_done() else ""
    except InputError as error:
        return f"fails: {error}"
