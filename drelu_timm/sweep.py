"""`drelu-timm sweep`: a grid of trainings and evaluations, each in a separate run directory.

    drelu-timm sweep paper-mnist-smoke --jobs 2
    drelu-timm sweep paper-cifar10 --dry-run
    drelu-timm sweep my-grid.toml --num-processes 4 --mixed-precision bf16
    drelu-timm sweep paper-cifar10 --cluster slurm --partition gpu --num-processes 4 --hours 12

`sweeps.grids` defines grids. Every cell is a `train` and its `evaluate`s, each in a separate process; their output is
in ``<cell>.log`` next to the run directory. Cells that are done are skipped, others resume: the same command again
completes a sweep that was stopped, however it was stopped.
"""

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from .errors import InputError, unknown
from .files import check_output_folder, held, locked, remove_leftovers, write_json
from .flags import SweepConfig
from .launch import Launch
from .reports.evaluated_runs import CELLS
from .sweeps.cell import Cell
from .sweeps.grids import Grid, read_grid
from .sweeps.jobs import Executor, LocalExecutor
from .sweeps.scheduler import Scheduler

_PRECISIONS = ("no", "bf16")
_CLUSTERS = ("slurm",)
_HOURS = 24.0
_PLACEHOLDER = Path("FILE.npz")  # for generated images, in a dry run without them


def main(config: SweepConfig) -> int:
    """Run the grid; return 1 if a cell failed, else 0."""
    return sweep(config)


def sweep(config: SweepConfig) -> int:
    """Run all cells of a grid that are not done.

    Returns:
        0, or 1 if a cell failed.

    Raises:
        InputError: A grid or flags that cannot be used, or a folder in which another sweep, or a cell of a killed
            sweep, still runs.
        Preempted: SIGTERM came; the running cells have saved their state.
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
        _show_plan(grid, cells, launch)
        if not config.generated and any(cell.train.generated for cell in cells):
            print(f"--generated has to name the generated images, here {_PLACEHOLDER}, before the sweep can run")
        return 0
    names = {name for cell in cells for name in (cell.path.name, cell.log.name)}
    check_output_folder(output_dir, {CELLS, "jobs", *names}, "--output-dir")
    with held(output_dir / ".lock", f"--output-dir {output_dir}"):
        for folder in (output_dir, output_dir / "jobs"):
            remove_leftovers(folder)
        queued = _refuse_running(cells, output_dir, config.cluster)
        # For `report`, which names the cells that are missing.
        write_json(output_dir / CELLS, {"cells": {cell.name: len(cell.evaluations) for cell in cells}})
        cells.sort(key=lambda cell: cell.name not in queued)  # queued jobs may be the reason why others are refused
        failed = Scheduler(grid.name, cells, _executor(output_dir, config), launch).run()
    print(f"next: drelu-timm report {shlex.quote(str(output_dir))}")
    return 1 if failed else 0


def _check(config: SweepConfig) -> None:
    for flag, value in (("--jobs", config.jobs), ("--num-processes", config.num_processes), ("--hours", config.hours)):
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{flag} {value} is not possible. Use a number above 0.")
    if config.mixed_precision not in _PRECISIONS:
        raise unknown("--mixed-precision", config.mixed_precision, _PRECISIONS)
    if config.cluster not in ("", *_CLUSTERS):
        raise unknown("--cluster", config.cluster, _CLUSTERS)
    if config.cluster and config.jobs is not None:
        raise InputError(f"--jobs {config.jobs} is for this machine. Leave out --jobs or --cluster.")
    if config.hours is not None and not config.cluster:
        raise InputError(f"--hours {config.hours:g} is for --cluster slurm. Add that, or leave it out.")
    if config.hours is not None and _minutes(config) < 1:
        raise InputError(f"--hours {config.hours:g} is less than one minute. Use at least 0.02.")
    if config.partition and config.cluster != "slurm":
        raise InputError(f"--partition {config.partition} is for --cluster slurm. Add that, or leave it out.")
    if torch.cuda.is_available() and not config.cluster and config.num_processes > torch.cuda.device_count():
        raise InputError(f"--num-processes {config.num_processes}: this machine has {torch.cuda.device_count()} GPUs")


def _minutes(config: SweepConfig) -> int:
    """Return the time limit of a job."""
    return round(60 * (_HOURS if config.hours is None else config.hours))


def _refuse_running(cells: Sequence[Cell], output_dir: Path, cluster: str) -> Collection[str]:
    """Refuse to start cells that run already, or that have jobs in SLURM's queue unless this sweep uses SLURM too.

    Returns:
        Names of the cells that have jobs in the queue.
    """
    folder = output_dir / "jobs"
    queued: Collection[str] = ()
    if folder.exists():
        from .sweeps.slurm import JOB_IDS, queued_jobs

        queued = queued_jobs(folder)
        if queued and not cluster:
            raise InputError(
                f"--output-dir {output_dir} has SLURM jobs that have not ended, as far as can be seen here "
                f"({', '.join(queued)}). Continue with --cluster slurm, or scancel them and delete {folder / JOB_IDS}."
            )
    for cell in cells:
        if cell.name not in queued and cell.log.exists():
            try:
                locked(cell.log).close()
            except BlockingIOError as error:
                raise InputError(
                    f"--output-dir {output_dir}: cell {cell.name} of a sweep that was killed still runs. "
                    f"Wait, or end it (fuser {shlex.quote(str(cell.log))} lists its processes)."
                ) from error
    return queued


def _executor(output_dir: Path, config: SweepConfig) -> Executor:
    """Return what runs the cells."""
    if not config.cluster:
        return LocalExecutor(config.jobs or 1, config.num_processes)
    from .sweeps.slurm import SlurmExecutor  # needs submitit, which sweeps on this machine do not

    return SlurmExecutor(
        output_dir / "jobs",
        partition=config.partition,
        minutes=_minutes(config),
        num_processes=config.num_processes,
    )


def _show_plan(grid: Grid, cells: Sequence[Cell], launch: Launch) -> None:
    """Print every cell with its cost and its commands."""
    print(f"{grid.name}: {grid.title}\n{grid.source}\n")
    total = 0
    for cell in cells:
        state = _state(cell)
        if not state:
            training, evaluation = cell.training_cost(), cell.evaluation_cost()
            total += evaluation + (training or 0)
            state = f"{_in_words(training)} forward passes to train, {_in_words(evaluation)} to evaluate"
        print(f"{cell.name}: {state}")
        for command in cell.commands(launch):
            print(f"    {shlex.join(command)}")
    print(
        f"\n{len(cells)} cells, at most {_in_words(total)} forward passes: if no training stops early and no attack "
        "succeeds. A pass evaluates one image; a gradient counts as three."
    )


def _in_words(count: int | None) -> str:
    """Return a number for the eye: 12,345 or 1.2 million."""
    if count is None:  # what only reading the images tells
        return "an unknown number of"
    for unit, name in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count:,}"


def _state(cell: Cell) -> str:
    """Return why a cell would not be run; "" if it would."""
    try:
        return "done" if cell.is_done() else ""
    except InputError as error:
        return f"fails: {error}"
