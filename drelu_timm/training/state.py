"""The state a training goes on from: written beside the last one, renamed when whole, the last one deleted then.

A process killed at any moment leaves a whole state, as does a lost machine: a folder is complete, and on disk, exactly
when it bears its final name.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import InputError, one_line
from ..files import put_in_place, read_json, write_json

_AVERAGE = "average.safetensors"


def save_state(accelerator: Accelerator, folder: Path, progress: dict[str, Any], average: nn.Module | None) -> None:
    """Save what the accelerator holds (model, optimiser, random states), the average of the weights, and ``progress``.

    Args:
        accelerator: Holds what was prepared; every process calls this.
        folder: The run's state folder.
        progress: JSON values that the caller goes on from; its ``epoch`` and ``step`` name the state.
        average: The model with averaged weights, if there is one.

    Raises:
        InputError: The disk is full, or the state cannot be written for another reason; the last one is kept.
    """
    beside = folder / ".writing"

    def prepare() -> None:
        if accelerator.is_main_process:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)

    def write() -> None:
        accelerator.save_state(str(beside))
        if accelerator.is_main_process:
            if average is not None:
                weights = {name: tensor.cpu().contiguous() for name, tensor in average.state_dict().items()}
                save_file(weights, beside / _AVERAGE)
            write_json(beside / "progress.json", progress)

    def supersede() -> None:
        if accelerator.is_main_process:
            older = _states(folder)
            put_in_place(beside, folder / f"epoch-{progress['epoch']:05d}-step-{progress['step']:07d}")
            for state in older:
                shutil.rmtree(state)

    try:
        for action in (prepare, write, supersede):
            write_together(accelerator, folder, action)
    except InputError:
        if accelerator.is_main_process:
            shutil.rmtree(beside, ignore_errors=True)
        raise


def write_together(accelerator: Accelerator, path: Path, action: Callable[[], None]) -> None:
    """Write something in every process, or in the main one; all wait for each other.

    Raises:
        InputError: It failed in one of them: the disk is full, or ``path`` cannot be written for another reason.
    """
    try:
        _together(accelerator, action)
    except (OSError, SafetensorError, RuntimeError) as error:  # the last one is torch.save's
        raise InputError(
            f"{path} could not be written ({one_line(error)}); make room, then --resume goes on from the last state"
        ) from error


def _together(accelerator: Accelerator, action: Callable[[], None]) -> None:
    """Do something in every process; an error in one is an error in all, or the others would wait for it for ever."""
    error = None
    try:
        action()
    except Exception as raised:
        error = raised
    failed = accelerator.reduce(torch.tensor(float(error is not None), device=accelerator.device), "sum")
    if error is not None:
        raise error
    if failed:
        raise OSError("another process failed")


def read_progress(folder: Path) -> dict[str, Any] | None:
    """What the newest whole state says of how far the training was; None where there is no state."""
    states = _states(folder)
    return read_json(states[-1] / "progress.json") if states else None


def load_state(accelerator: Accelerator, folder: Path, average: nn.Module | None) -> None:
    """Load the newest whole state into what the accelerator holds, and into the model with averaged weights.

    Raises:
        InputError: A state that does not fit the model, or is broken.
    """
    state = _states(folder)[-1]
    try:
        accelerator.load_state(str(state))
        if average is not None:
            average.load_state_dict(load_file(state / _AVERAGE))
    except Exception as error:  # each reader and each kind of damage has its own
        raise InputError(f"{state} does not fit this run ({one_line(error)}); delete it to start anew") from error


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*"))
