"""The figures of every epoch: a line of log.jsonl each and, if asked for, Accelerate's trackers."""

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..files import write_text


class TrainLog:
    """Writes from the main process.

    Args:
        accelerator: With the trackers that were asked for.
        folder: The run directory.
        keep: Epochs that were logged and saved; later lines, of epochs that will come again, are dropped.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, *, keep: int):
        self._accelerator, self._path = accelerator, folder / "log.jsonl"
        if accelerator.is_main_process and self._path.exists():
            lines = self._path.read_text().splitlines()
            write_text(self._path, "".join(line + "\n" for line in lines[:keep]))
        accelerator.init_trackers("drelu-timm")

    def write(self, entry: dict[str, Any]) -> None:
        """Add an epoch's figures; nested ones go to the trackers as ``held_out/clean``."""
        if self._accelerator.is_main_process:
            with self._path.open("a") as log:
                log.write(json.dumps(entry) + "\n")
        self._accelerator.log(_flat(entry), step=entry["epoch"])

    def close(self) -> None:
        """Write out what the trackers hold back."""
        for tracker in self._accelerator.trackers:  # not end_training, which ends the processes' group as well
            tracker.finish()


def _flat(entry: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in entry.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
