"""The state a training goes on from: written beside the last one, renamed when whole, the last one deleted then.

A process killed at any moment leaves a whole state: a folder is complete exactly when it bears its final name.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .errors import InputError, one_line
from .runs import read_json


def save_state(accelerator: Accelerator, folder: Path, progress: dict[str, Any]) -> None:
    """Save model, optimiser, the random state of every process, and ``progress``, as ``folder/epoch-<n>``.

    Args:
        accelerator: Holds what was prepared; every process calls this.
        folder: The run's state folder.
        progress: JSON values that the caller goes on from; ``progress["epoch"]`` names the state.
    """
    beside = folder / ".writing"
    if accelerator.is_main_process:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(beside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (beside / "progress.json").write_text(json.dumps(progress))
        older = _states(folder)
        beside.replace(folder / f"epoch-{progress['epoch']:05d}")
        for state in older:
            shutil.rmtree(state)
    accelerator.wait_for_everyone()


def load_state(accelerator: Accelerator, folder: Path) -> dict[str, Any] | None:
    """Load the newest whole state into what the accelerator prepared; its progress, or None where there is no state.

    Raises:
        InputError: A state that does not fit the model, or is broken.
    """
    states = _states(folder)
    if not states:
        return None
    progress = read_json(states[-1] / "progress.json")
    try:
        accelerator.load_state(str(states[-1]))
    except Exception as error:  # each reader and each kind of damage has its own
        raise InputError(f"{states[-1]} does not fit this run ({one_line(error)}); delete it to start anew") from error
    return progress


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*"))
