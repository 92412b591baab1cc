"""Cells as jobs of a SLURM cluster, through submitit; its local executor is for trying.

What else a cluster wants, such as an account, sbatch takes from the environment: SBATCH_ACCOUNT, SBATCH_QOS, ...
"""

from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError

from ..errors import InputError, one_line
from ..files import read_json, write_json
from .jobs import CellJob, Pending, Refused

NUMBERS = "jobs.json"  # the number of each cell's job, by the cell's name
_CPUS_PER_GPU = 4
_REQUEUES = 1000  # after a time limit; a preempted job is put back without end


def in_queue(folder: Path) -> dict[str, Pending]:
    """SLURM's jobs that have not ended, or not as far as can be seen from here, by the names of their cells.

    Args:
        folder: A `Cluster`'s.
    """
    jobs = {name: submitit.SlurmJob(folder=folder, job_id=number) for name, number in _numbers(folder).items()}
    return {name: job for name, job in jobs.items() if not job.done()}


def _numbers(folder: Path) -> dict[str, str]:
    return read_json(folder / NUMBERS) if (folder / NUMBERS).exists() else {}


class Cluster:
    """Runs each cell in a job of its own; a cell whose job is still in the queue is not submitted again.

    Args:
        kind: "slurm" or "local".
        folder: Where submitit's files and the jobs' numbers go; on a disk that all machines see.
        partition: Of the cluster; "" for its default.
        minutes: Limit of a job, after which it goes on in another one.
        num_processes: GPUs a cell.

    Raises:
        InputError: This is no machine of a SLURM cluster.
    """

    capacity = float("inf")

    def __init__(self, kind: str, folder: Path, *, partition: str, minutes: int, num_processes: int):
        limit = {f"{kind}_max_num_timeout": _REQUEUES}
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=kind, **limit)
        except RuntimeError as error:
            raise InputError(f"--cluster {kind} cannot be used here ({one_line(error)})") from error
        self._executor.update_parameters(
            timeout_min=minutes, nodes=1, tasks_per_node=1, cpus_per_task=_CPUS_PER_GPU * num_processes
        )
        if kind == "slurm":
            self._executor.update_parameters(gpus_per_node=num_processes, slurm_partition=partition or None)
        self._is_slurm, self._folder = kind == "slurm", folder
        self._queued = in_queue(folder) if self._is_slurm else {}
        self._begun: list[Any] = []

    def submit(self, name: str, job: CellJob) -> Pending:
        """Submit a cell, or find its job again.

        Raises:
            Refused: sbatch said no: a limit on a user's jobs, a partition that is not there, ...
        """
        if name in self._queued:
            return self._queued.pop(name)
        self._executor.update_parameters(name=name)
        try:
            begun = self._executor.submit(CellJob(job.commands, job.log.resolve()))
        except FailedJobError as error:
            raise Refused(one_line(error)) from error
        if self._is_slurm:
            write_json(self._folder / NUMBERS, _numbers(self._folder) | {name: begun.job_id})
        self._begun.append(begun)
        return begun

    def stop(self) -> None:
        """Leave jobs in the queue of a cluster: the same sweep finds them again. Local ones end with it."""
        for begun in self._begun:
            if not self._is_slurm and not begun.done():
                begun.cancel()
