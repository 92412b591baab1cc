"""What a training writes into its run directory: the state it resumes from, the best model so far, and the log.

A state is a folder that gets its final name once it is complete and on disk; the previous state is deleted after that.
A process killed at any moment, or a lost machine, therefore leaves a complete state.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import inf, isnan
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import InputError, one_line
from ..files import put_in_place, read_json, write_json, write_text
from ..models.weights import save_folder
from .distributed import is_sharded, together
from .update import Update

_AVERAGE = "average.safetensors"


@dataclass
class Progress:
    """How far a training is, as far as neither weights nor optimizer hold it.

    Attributes:
        epoch: Finished epochs.
        step: Finished steps of the current epoch.
        best: Best held-out figure so far; higher is better.
        best_epoch: Epoch with that figure, from 1; 0 before the first.
        rates: Learning rates at the start of the epoch, of the optimizer's groups; the last one is for the caps.
        sums: Sums of the loss and its parts over the steps of the epoch.
        seconds: Duration of these steps.
        waited: Seconds of them spent on waiting for data.
    """

    epoch: int = 0
    step: int = 0
    best: float = -inf
    best_epoch: int = 0
    rates: list[float] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    waited: float = 0.0


class States:
    """The states of a training, of which the newest complete one is kept.

    Args:
        update: Holds the model, the optimizer, the schedule and the average of the weights.
        output_dir: The run directory.
        data: What identifies the training data; it must be the same when the run is resumed.
    """

    def __init__(self, update: Update, output_dir: Path, data: dict[str, Any]):
        self._update, self._accelerator, self._output_dir = update, update.accelerator, output_dir
        self._folder = output_dir / "state"
        self._identity = {
            **data,
            "mixed_precision": self._accelerator.mixed_precision,
            "sharding": "FSDP" if is_sharded(self._accelerator) else "none",
        }
        # These may change when a run is resumed: the updates stay the same up to rounding.
        self._arrangement = {
            "num_processes": self._accelerator.num_processes,
            "grad_accum_steps": update.config.grad_accum_steps,
            "compile": update.config.compile,
        }

    def save(self, progress: Progress) -> None:
        """Save a state; every process calls this.

        Raises:
            InputError: The disk is full, or the state cannot be written for another reason; the last one is kept.
        """
        scheduler, main = self._update.scheduler, self._accelerator.is_main_process
        content = {
            **asdict(progress),
            **self._identity,
            **self._arrangement,
            "scheduler": scheduler.state_dict() if scheduler else None,
        }
        partial, average = self._folder / ".writing", self._update.average

        def prepare() -> None:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)

        def write() -> None:
            self._accelerator.save_state(str(partial))
            if main and average is not None:
                averaged = {name: tensor.cpu().contiguous() for name, tensor in average.state_dict().items()}
                save_file(averaged, partial / _AVERAGE)
            if main:
                write_json(partial / "progress.json", content)

        def replace() -> None:
            if main:
                older = _complete(self._folder)
                put_in_place(partial, self._folder / f"epoch-{progress.epoch:05d}-step-{progress.step:07d}")
                for state in older:
                    shutil.rmtree(state)

        try:
            for action in (prepare, write, replace):
                _write_together(self._accelerator, self._folder, action)
        except InputError:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def load(self) -> Progress:
        """Load the newest complete state, if any, into model, optimizer, schedule, average and random generators.

        Raises:
            InputError: The state is broken, or belongs to other data or another precision.
        """
        content = read_progress(self._output_dir)
        if content is None:
            return Progress()
        for key, now in self._identity.items():
            before = content.get(key)  # None in a state that was written before the key was recorded
            if before != now:
                raise InputError(
                    f"--resume of {self._output_dir} with other {key.replace('_', ' ')} ({before} before, {now} now). "
                    "Use what the run was started with, or another --output-dir."
                )
        self._report_arrangement(content)
        state = _complete(self._folder)[-1]
        try:
            self._accelerator.load_state(str(state))
            if self._update.average is not None:
                self._update.average.load_state_dict(load_file(state / _AVERAGE))
        except Exception as error:  # each reader and each kind of damage raises another type
            raise InputError(
                f"{state} does not fit this run ({one_line(error)}). Delete it to start from scratch."
            ) from error
        if self._update.scheduler:
            self._update.scheduler.load_state_dict(content["scheduler"])
        return Progress(**{name: content[name] for name in Progress.__dataclass_fields__})

    def _report_arrangement(self, before: dict[str, Any]) -> None:
        names = {"num_processes": "processes", "grad_accum_steps": "--grad-accum-steps", "compile": "--compile"}
        changed = [
            f"{names[key]} {now} ({before[key]} before)"
            for key, now in self._arrangement.items()
            if before.get(key, now) != now
        ]
        if changed:
            self._accelerator.print(
                f"{self._output_dir} resumes with {' and '.join(changed)}: batches and updates are the same up to "
                "rounding, except for BatchNorm's statistics, which each forward pass takes of its own part of a batch"
            )


def read_progress(output_dir: Path) -> dict[str, Any] | None:
    """Return what the newest complete state in a run directory records of its progress; None without a state."""
    states = _complete(output_dir / "state")
    return read_json(states[-1] / "progress.json") if states else None


def _complete(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*"))


class Models:
    """The model folders of a training: ``last``, and the best epoch's, which becomes ``model`` at the end.

    Args:
        update: Holds the model and its average; the average is what is kept if there is one.
        output_dir: The run directory.
    """

    def __init__(self, update: Update, output_dir: Path):
        self._update, self._accelerator, self._output_dir = update, update.accelerator, output_dir

    def keep_if_best(self, progress: Progress, figure: float) -> None:
        """Keep the model, and record it in ``progress``, if its held-out figure is the best so far; higher is better.

        A first figure that is NaN counts as the lowest.
        """
        figure = -inf if isnan(figure) else figure
        if progress.best_epoch and figure <= progress.best:
            return
        progress.best, progress.best_epoch = figure, progress.epoch
        self._save(self._best(progress.epoch))

    def delete_superseded(self, progress: Progress) -> None:
        """Delete the models of earlier best epochs, once a state that names the new one is saved."""
        if self._accelerator.is_main_process:
            for folder in self._output_dir.glob("state/best-*"):
                if folder != self._best(progress.best_epoch):
                    shutil.rmtree(folder)

    def finish(self, progress: Progress) -> None:
        """Write ``last``, and rename the best epoch's model to ``model``, by which a finished training is recognized.

        Raises:
            InputError: The best epoch's model was deleted.
        """
        self._save(self._output_dir / "last")
        best = self._best(progress.best_epoch)
        if not best.is_dir():
            raise InputError(f"{best} is missing. Delete {self._output_dir} to train from scratch.")
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            best.replace(self._output_dir / "model")
        self._accelerator.wait_for_everyone()

    def _best(self, epoch: int) -> Path:
        return self._output_dir / "state" / f"best-{epoch:05d}"

    def _save(self, folder: Path) -> None:
        """Write a model folder, over what a killed process has left there."""
        model: Any = self._update.bare if self._update.average is None else self._update.average
        # In every process, since each has only a part of the weights under FSDP.
        whole: dict[str, Any] = self._accelerator.get_state_dict(model)

        def write() -> None:
            if self._accelerator.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
                weights = {name.removeprefix("model."): w for name, w in whole.items() if name.startswith("model.")}
                save_folder(model.model, folder, weights=weights)

        _write_together(self._accelerator, folder, write)


def _write_together(accelerator: Accelerator, path: Path, action: Callable[[], None]) -> None:
    try:
        together(accelerator, action)
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError is what torch.save raises
        raise InputError(
            f"{path} cannot be written ({one_line(error)}). Make room; --resume then continues from the last state."
        ) from error


class Log:
    """The figures of every epoch: one line of log.jsonl each, and Accelerate's trackers if there are any.

    Args:
        accelerator: With the trackers that were asked for; its main process writes.
        output_dir: The run directory.
        keep: Epochs that the state contains; later lines are dropped, since their epochs are trained again.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, *, keep: int):
        self._accelerator, self._path = accelerator, output_dir / "log.jsonl"
        if accelerator.is_main_process and self._path.exists():
            lines = self._path.read_text().splitlines()
            write_text(self._path, "".join(line + "\n" for line in lines[:keep]))
        accelerator.init_trackers("drelu-timm")

    def write(self, entry: dict[str, Any]) -> None:
        """Add an epoch's figures; the trackers get nested ones as ``held_out/clean``."""
        if self._accelerator.is_main_process:
            with self._path.open("a") as log:
                log.write(json.dumps(entry) + "\n")
        self._accelerator.log(_flat(entry), step=entry["epoch"])

    def close(self) -> None:
        """Let the trackers write what they have buffered."""
        for tracker in self._accelerator.trackers:  # end_training would also end the process group
            tracker.finish()


def _flat(entry: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in entry.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
