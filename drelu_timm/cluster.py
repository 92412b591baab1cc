"""Cells as jobs of a SLURM cluster, through submitit; its local executor is for trying.

What else a cluster wants, such as an account, sbatch takes from the environment: SBATCH_ACCOUNT, SBATCH_QOS, ...
"""

from pathlib import Path
from typing import Any

import submitit

from .errors import InputError, one_line
from .jobs import CellJob, Pending
from .runs import read_json, write_json

_CPUS_PER_GPU = 4
_REQUEUES = 1000  # after a time limit; a preempted job is put back without end


class Cluster:
    """Runs each cell in a job of its own; a cell whose job is still in the queue is not submitted again.

    Args:
        kind: "slurm" or "local".
        folder: Where submitit's files and the jobs' numbers go; on a disk that all machines see.
        partition: Of the cluster; "" for its default.
        hours: Limit of a job, after which it goes on in another one.
        num_processes: GPUs a cell.

    Raises:
        InputError: This is no machine of a SLURM cluster.
    """

    capacity = float("inf")

    def __init__(self, kind: str, folder: Path, *, partition: str, hours: float, num_processes: int):
        limit = {f"{kind}_max_num_timeout": _REQUEUES}
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=kind, **limit)
        except RuntimeError as error:
            raise InputError(f"--cluster {kind} cannot be used here ({one_line(error)})") from error
        self._executor.update_parameters(
            timeout_min=round(60 * hours), nodes=1, tasks_per_node=1, cpus_per_task=_CPUS_PER_GPU * num_processes
        )
        if kind == "slurm":
            self._executor.update_parameters(gpus_per_node=num_processes, slurm_partition=partition or None)
        self._is_slurm, self._folder, self._numbers = kind == "slurm", folder, folder / "jobs.json"
        self._begun: list[Any] = []

    def submit(self, name: str, job: CellJob) -> Pending:
        """Submit a cell, or find its job again."""
        numbers = read_json(self._numbers) if self._numbers.exists() else {}
        if self._is_slurm and name in numbers:
            before = submitit.SlurmJob(folder=self._folder, job_id=numbers[name])
            if not before.done():
                return before
        self._executor.update_parameters(name=name)
        begun = self._executor.submit(CellJob(job.commands, job.log.resolve()))
        write_json(self._numbers, numbers | {name: begun.job_id})
        self._begun.append(begun)
        return begun

    def stop(self) -> None:
        """Leave jobs in the queue of a cluster: the same sweep finds them again. Local ones end with it."""
        for begun in self._begun:
            if not self._is_slurm and not begun.done():
                begun.cancel()
