"""How processes are launched, and how those of a launch share an evaluation: whoever is done takes the next batch."""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from .errors import InputError

Batch = TypeVar("Batch")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Launch:
    """How a training or an evaluation is started.

    Attributes:
        num_processes: Processes that share it, a GPU each where there are GPUs.
        mixed_precision: "no" or "bf16".
        on_cpu: Whether there are no GPUs, which accelerate has to be told.
    """

    num_processes: int = 1
    mixed_precision: str = "no"
    on_cpu: bool = False

    @property
    def flags(self) -> list[str]:
        """The flags of ``accelerate launch``; none where the command can be started without it."""
        if (self.num_processes, self.mixed_precision) == (1, "no"):
            return []
        # Without GPUs accelerate starts a single process, unless it is told --multi_gpu.
        where = ["--multi_gpu"] if self.num_processes > 1 else ["--cpu"] if self.on_cpu else []
        return ["--num_processes", str(self.num_processes), *where, "--mixed_precision", self.mixed_precision]


def launched_on_cpu() -> bool:
    """Whether several processes were launched on a machine without a GPU, which Accelerate has to be told.

    Otherwise each of them takes itself for the only one.

    Raises:
        InputError: ``accelerate launch`` was asked for several processes and started one, as it does without a GPU.
    """
    if torch.cuda.is_available():
        return False
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and "ACCELERATE_USE_CPU" in os.environ:
        raise InputError(
            "accelerate launch --num_processes starts one process only on a machine without GPUs; "
            "add --multi_gpu, which starts all of them there too"
        )
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


class Processes:
    """The processes that work on one evaluation.

    Batches are claimed by files, each made in one step that only one process can succeed in: whoever is quick gets
    more of them.

    Args:
        folder: On a disk that all processes see; claims lie there meanwhile. None for this process alone.
    """

    def __init__(self, folder: Path | None = None):
        self.index, self.count = 0, 1
        if folder is None:
            return
        self._state = PartialState(cpu=launched_on_cpu())
        self.index, self.count = self._state.process_index, self._state.num_processes
        self._claims = folder / "claims"
        if self.index == 0:
            shutil.rmtree(self._claims, ignore_errors=True)  # of processes that were killed
        self.wait()

    def claimed(self, stage: str, batches: Sequence[Batch]) -> Iterator[tuple[Batch, bool]]:
        """Every batch of a stage, and whether it is for this process to work on."""
        for number, batch in enumerate(batches):
            yield batch, self.count == 1 or self._claim(f"{stage.replace('/', '_')}-{number}")

    def _claim(self, name: str) -> bool:
        self._claims.mkdir(parents=True, exist_ok=True)
        try:
            (self._claims / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def gather(self, entries: dict[int, Value]) -> dict[int, Value]:
        """The entries of every process; all processes call this, and wait for each other."""
        return entries if self.count == 1 else dict(gather_object(list(entries.items())))

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            self._state.wait_for_everyone()
