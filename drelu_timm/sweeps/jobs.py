"""The commands of a cell as one job, and the executor that runs such jobs on this machine.

submitit has a local executor too, but its jobs cannot be stopped so that they save their state: it ignores SIGTERM,
kills a job one second after it is cancelled, and leaves the processes of the job running.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, Protocol

import psutil
import torch

from ..files import locked

_END_OF_LOG = 20_000  # bytes of a log that are searched for what went wrong


@dataclass
class CellJob:
    """A callable that runs commands until one fails. It can be pickled, to run on another machine.

    Attributes:
        commands: Words of each command; "python" means the running interpreter.
        log: File that the output of the commands is appended to. It is locked while any of them runs, also after their
            sweep was killed, so that no cell runs twice at the same time.
    """

    commands: Sequence[Sequence[str]]
    log: Path
    _process: subprocess.Popen | None = field(default=None, init=False, repr=False)
    _stopped: bool = field(default=False, init=False, repr=False)

    def __call__(self, environment: Mapping[str, str] | None = None) -> str:
        """Run the commands with ``environment`` added to this process' own.

        Returns:
            "" if all succeeded, else the error of the one that failed.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            log = locked(self.log)
        except BlockingIOError:
            return f"it runs already. Wait, or end its processes (fuser {shlex.quote(str(self.log))} lists them)"
        try:
            with log:
                return next(filter(None, (self._run(command, log, environment or {}) for command in self.commands)), "")
        finally:
            self.stop()

    def stop(self) -> None:
        """Send SIGTERM to the running command, on which `train` saves its state, and start no other."""
        self._stopped = True
        if self._process is None or self._process.poll() is not None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            # accelerate's launcher does not always pass the signal on.
            launched = process.children() if "accelerate.commands.launch" in process.cmdline() else []
            for each in [*launched, process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.terminate()

    def checkpoint(self, *args: Any) -> Any:
        """Save the state and return the job to queue again: submitit calls this on preemption and at the time limit."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        if self._process is not None:
            # Popen.wait would deadlock: this is called by a signal handler, and the interrupted code may hold its lock.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(CellJob(self.commands, self.log))

    def _run(self, command: Sequence[str], log: BinaryIO, environment: Mapping[str, str]) -> str:
        if self._stopped:
            return "stopped"
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        start = self.log.stat().st_size
        with _blocked(signal.SIGUSR2):
            self._process = subprocess.Popen(
                [sys.executable if word == "python" else word for word in command],
                env={**os.environ, "TQDM_MININTERVAL": "60", **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # else Ctrl-C in a terminal kills the commands before `stop` lets them save
            )
        if self._stopped:  # by another thread, after the check above
            self.stop()
        code = self._process.wait()
        return self._error(start, code) if code else ""

    def _error(self, start: int, code: int) -> str:
        """Return the last error line that a command printed after byte ``start`` of the log, else its last line."""
        with self.log.open("rb") as log:
            log.seek(max(start, self.log.stat().st_size - _END_OF_LOG))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return (errors or [ended if code < 0 or not lines else lines[-1]])[-1]


@contextlib.contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    """Block a signal in the processes that are started here: SLURM sends submitit's to all of a job and ends them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})


class Pending(Protocol):
    """A submitted job: a `concurrent.futures.Future` or a job of submitit."""

    def done(self) -> bool:
        """Return whether it has ended."""
        ...

    def result(self) -> Any:
        """Return what it returned, or raise what it raised."""
        ...


class Refused(Exception):
    """An executor takes no more jobs for now. The message is its own, in one line."""


class Executor(Protocol):
    """Runs the jobs of cells."""

    @property
    def capacity(self) -> float:
        """Largest number of jobs at once."""
        ...

    @property
    def poll_every(self) -> float:
        """Time between two questions whether jobs have ended, in seconds."""
        ...

    def submit(self, name: str, job: CellJob) -> Pending:
        """Start the job of the cell ``name``.

        Raises:
            Refused: It was not started; it may be submitted again later.
        """
        ...

    def stop(self) -> None:
        """Stop the jobs that would not outlive this process."""
        ...


class LocalExecutor:
    """Runs jobs on this machine.

    Args:
        jobs: Largest number of jobs at once.
        num_processes: Processes per job, one GPU each. Jobs share GPUs only if there are too few.
    """

    poll_every = 0.2

    def __init__(self, jobs: int, num_processes: int):
        self.capacity = jobs
        self._pool = ThreadPoolExecutor(jobs)
        self._jobs: list[CellJob] = []
        self._environments: SimpleQueue[dict[str, str]] = SimpleQueue()  # the ones that no job uses
        for slot in range(jobs):
            self._environments.put(_environment(slot, jobs, num_processes))

    def submit(self, name: str, job: CellJob) -> Future[str]:
        """Start a job as soon as one of those before it has ended."""
        del name
        self._jobs.append(job)
        return self._pool.submit(self._run, job)

    def stop(self) -> None:
        """Stop all jobs, and wait until they have saved their state."""
        for job in self._jobs:
            job.stop()
        self._pool.shutdown()

    def _run(self, job: CellJob) -> str:
        environment = self._environments.get()
        try:
            return job(environment)
        finally:
            self._environments.put(environment)


def _environment(slot: int, jobs: int, num_processes: int) -> dict[str, str]:
    """Return the threads and GPUs of one of ``jobs`` jobs."""
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // (jobs * num_processes))
    environment = {"OMP_NUM_THREADS": str(threads)}
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        gpus = visible.split(",")
        first = slot % (len(gpus) // num_processes) * num_processes
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + num_processes])
    return environment
