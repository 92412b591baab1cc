"""How the processes of a launch share an evaluation: whoever is done takes the next batch."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from ..launch import PATIENCE, launched_on_cpu

Batch = TypeVar("Batch")
Value = TypeVar("Value")


def launched() -> PartialState:
    """This process among those of its launch, which it joins on the first call; its device."""
    return PartialState(cpu=launched_on_cpu(), timeout=PATIENCE)


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
        self._state = launched()
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

    def others(self, value: Value) -> list[Value]:
        """Return what the other processes give; all of them call this, and wait for each other."""
        if self.count == 1:
            return []
        values = gather_object([value])
        return values[: self.index] + values[self.index + 1 :]

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            self._state.wait_for_everyone()
