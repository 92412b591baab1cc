"""The commands of a cell, run one after the other as processes of their own: here, some cells at once, or in a job."""

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
    """A callable that runs commands until one fails; it can be sent to another machine.

    Attributes:
        commands: "python" stands for this one.
        log: File that everything they print is added to. It is locked as long as any of them runs, be it one that
            a killed sweep has left: no cell is begun twice at once.
    """

    commands: Sequence[Sequence[str]]
    log: Path
    _process: subprocess.Popen | None = field(default=None, init=False, repr=False)
    _stopped: bool = field(default=False, init=False, repr=False)

    def __call__(self, environment: Mapping[str, str] | None = None) -> str:
        """Run them; "" when all are done, else what the failed one said last."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            log = locked(self.log)
        except BlockingIOError:
            return f"runs already; wait, or end it (fuser {self.log} names its processes)"
        try:
            with log:
                return next(filter(None, (self._run(command, log, environment or {}) for command in self.commands)), "")
        finally:
            self.stop()

    def stop(self) -> None:
        """Send SIGTERM to what runs, on which `train` saves its state, and start nothing more."""
        self._stopped = True
        if self._process is None or self._process.poll() is not None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            # A launcher does not always pass it on.
            launched = process.children() if "accelerate.commands.launch" in process.cmdline() else []
            for each in [*launched, process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.terminate()

    def checkpoint(self, *args: Any) -> Any:
        """What submitit calls when a job is preempted or at its limit: save, and go on by the same commands later."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        if self._process is not None:
            with contextlib.suppress(ChildProcessError):  # not Popen.wait, whose lock the interrupted one may hold
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(CellJob(self.commands, self.log))

    def _run(self, command: Sequence[str], log: BinaryIO, environment: Mapping[str, str]) -> str:
        if self._stopped:
            return "stopped"
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        begun = self.log.stat().st_size
        with _blocked(signal.SIGUSR2):
            self._process = subprocess.Popen(
                [sys.executable if word == "python" else word for word in command],
                env={**os.environ, "TQDM_MININTERVAL": "60", **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C goes to its whole group; `stop` says it so that they save
            )
        if self._stopped:  # between the two
            self.stop()
        code = self._process.wait()
        return self._last_words(begun, code) if code else ""

    def _last_words(self, begun: int, code: int) -> str:
        """Our own error line if there is one, else the last line of the log."""
        with self.log.open("rb") as log:
            log.seek(max(begun, self.log.stat().st_size - _END_OF_LOG))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return (errors or [ended if code < 0 or not lines else lines[-1]])[-1]


@contextlib.contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    """What is started here never hears of a signal: submitit's comes to all processes of a job, and would end them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})


class Pending(Protocol):
    """What is known of a job that was begun: as of `concurrent.futures.Future`, and of submitit's jobs."""

    def done(self) -> bool:
        """Whether it has ended."""
        ...

    def result(self) -> Any:
        """What it returned; raises what it raised."""
        ...


class Refused(Exception):
    """A place takes no more cells, for now at least; the message is its own, in one line."""


class Place(Protocol):
    """Where cells run."""

    @property
    def capacity(self) -> float:
        """Cells at once."""
        ...

    def submit(self, name: str, job: CellJob) -> Pending:
        """Begin a cell; ``name`` is its name.

        Raises:
            Refused: It was not begun, and may be tried again.
        """
        ...

    def stop(self) -> None:
        """End what runs where nobody else will."""
        ...


class Here:
    """Runs cells on this machine.

    Args:
        jobs: Cells at once.
        num_processes: Processes a cell; each job gets so many GPUs of its own where there are enough.
    """

    def __init__(self, jobs: int, num_processes: int):
        self.capacity = jobs
        self._pool = ThreadPoolExecutor(jobs)
        self._running: list[CellJob] = []
        self._slots: SimpleQueue[dict[str, str]] = SimpleQueue()
        for slot in range(jobs):
            self._slots.put(_environment(slot, jobs, num_processes))

    def submit(self, name: str, job: CellJob) -> Future[str]:
        """Begin a cell; ``name`` is its name."""
        del name
        self._running.append(job)
        return self._pool.submit(self._run, job)

    def stop(self) -> None:
        """Stop all cells, and wait until they have saved their state."""
        for job in [*self._running]:  # a copy, as threads take out what ends
            job.stop()
        self._pool.shutdown()

    def _run(self, job: CellJob) -> str:
        slot = self._slots.get()
        try:
            return job(slot)
        finally:
            self._slots.put(slot)
            self._running.remove(job)


def threads_of_a_process(jobs: int, num_processes: int) -> int:
    """How many threads a process of a cell computes with, where OMP_NUM_THREADS does not say it."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // (jobs * num_processes)))


def _environment(slot: int, jobs: int, num_processes: int) -> dict[str, str]:
    """Threads and GPUs of the cells that run in a slot."""
    environment = {"OMP_NUM_THREADS": str(threads_of_a_process(jobs, num_processes))}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    if torch.cuda.is_available():
        gpus = visible.split(",")
        first = slot % (len(gpus) // num_processes) * num_processes
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + num_processes])
    return environment
