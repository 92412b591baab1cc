"""Jobs of a SLURM cluster, through submitit.

sbatch takes what else a cluster needs, such as an account, from the environment: SBATCH_ACCOUNT, SBATCH_QOS, ...
"""

from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError

from ..errors import InputError, one_line
from ..files import read_json, write_json
from .jobs import CellJob, Pending, Refused

JOB_IDS = "jobs.json"  # SLURM's number of each cell's job, by the name of the cell
_CPUS_PER_GPU = 4
_TIMEOUTS = 1000  # after so many time limits a cell is not queued again; preemptions are not counted


def queued_jobs(folder: Path) -> dict[str, Pending]:
    """Return SLURM's jobs that have not ended, as far as this machine can see, by the names of their cells.

    Args:
        folder: Folder of a `SlurmExecutor`.
    """
    jobs = {name: submitit.SlurmJob(folder=folder, job_id=job_id) for name, job_id in _job_ids(folder).items()}
    return {name: job for name, job in jobs.items() if not job.done()}


def _job_ids(folder: Path) -> dict[str, str]:
    return read_json(folder / JOB_IDS) if (folder / JOB_IDS).exists() else {}


class SlurmExecutor:
    """Runs each cell as a SLURM job. A job that is preempted or reaches its time limit is queued again.

    Args:
        folder: Folder for submitit's files and the job numbers, on a disk that all machines of the cluster see.
        partition: Partition of the cluster; "" for its default.
        minutes: Time limit of a job.
        num_processes: Processes per cell, one GPU each.

    Raises:
        InputError: This machine does not belong to a SLURM cluster.
    """

    capacity = float("inf")
    poll_every = 5.0  # each time submitit asks the shared disk for the result of every job

    def __init__(self, folder: Path, *, partition: str, minutes: int, num_processes: int):
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=_TIMEOUTS)
        except RuntimeError as error:
            raise InputError(f"--cluster slurm cannot be used here ({one_line(error)})") from error
        self._executor.update_parameters(
            timeout_min=minutes,
            nodes=1,
            tasks_per_node=1,
            cpus_per_task=_CPUS_PER_GPU * num_processes,
            gpus_per_node=num_processes,
            slurm_partition=partition or None,
        )
        self._folder = folder
        self._queued = queued_jobs(folder)

    def submit(self, name: str, job: CellJob) -> Pending:
        """Submit a cell. If a previous sweep submitted it and its job has not ended, return that job.

        Raises:
            Refused: sbatch refused it, because of a limit on a user's jobs, an unknown partition, ...
        """
        if name in self._queued:
            return self._queued.pop(name)
        self._executor.update_parameters(name=name)
        try:
            submitted = self._executor.submit(CellJob(job.commands, job.log.resolve()))
        except FailedJobError as error:
            raise Refused(one_line(error)) from error
        write_json(self._folder / JOB_IDS, _job_ids(self._folder) | {name: submitted.job_id})
        return submitted

    def stop(self) -> None:
        """Leave the jobs in the queue, where the same sweep finds them again."""
