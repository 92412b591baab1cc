"""What a training writes into its run directory: the state it resumes from, the best model so far, and the log.

A state is a folder that gets its final name once it is complete and on disk; the previous state is deleted after that.
A process killed at any moment, or a lost machine, therefore leaves a complete state. It contains the log as well, so
that log.jsonl is restored if it was cut or edited.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from math import inf, isnan
from pathlib import Path
from typing import Annotated, Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import InputError, one_line
from ..files import held, put_in_place, read_json, remove_leftovers, write_json, write_text
from ..models.weights import save_folder
from ..schema import Constraint, Whole, load
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
        log: Rows of log.jsonl, one per finished epoch; None in a state of an older version.
    """

    epoch: Whole = 0
    step: Whole = 0
    best: Annotated[Any, Constraint(lambda value: isinstance(value, float), "a number")] = -inf  # -inf is allowed
    best_epoch: Whole = 0
    rates: tuple[float, ...] = ()
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    waited: float = 0.0
    log: tuple[dict[str, Any], ...] | None = ()


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
            older = _complete(self._folder)
            put_in_place(partial, self._folder / f"epoch-{progress.epoch:05d}-step-{progress.step:07d}")
            for state in older:
                shutil.rmtree(state)

        try:
            write_in_main(self._accelerator, self._folder, prepare)
            write_together(self._accelerator, self._folder, write)
            write_in_main(self._accelerator, self._folder, replace)
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
        state = _complete(self._folder)[-1]
        progress = load(Progress, content, state / "progress.json")
        name = f"epoch-{progress.epoch:05d}-step-{progress.step:07d}"
        if state.name != name or (progress.log is not None and len(progress.log) != progress.epoch):
            raise InputError(
                f"{state / 'progress.json'} has epoch {progress.epoch}, step {progress.step} and "
                f"{len(progress.log or ())} log rows, which contradict each other or the folder's name. Delete "
                f"{state} to start from scratch."
            )
        for key, now in self._identity.items():
            before = content.get(key)  # None in a state that was written before the key was recorded
            if before != now:
                raise InputError(
                    f"--resume of {self._output_dir} with other {key.replace('_', ' ')} ({before} before, {now} now). "
                    "Use what the run was started with, or another --output-dir."
                )
        self._report_arrangement(content)
        try:
            self._accelerator.load_state(str(state))
            if self._update.average is not None:
                self._update.average.load_state_dict(load_file(state / _AVERAGE))
            if self._update.scheduler:
                self._update.scheduler.load_state_dict(content["scheduler"])
        except Exception as error:  # each reader and each kind of damage raises another type
            raise InputError(
                f"{state} does not fit this run ({one_line(error)}). Delete it to start from scratch."
            ) from error
        return progress

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
                "rounding, except for BatchNorm's statistics, which each forward pass takes from its part of a batch"
            )


def read_progress(output_dir: Path) -> dict[str, Any] | None:
    """Return the progress.json of the newest complete state in a run directory; None without a state.

    Raises:
        InputError: The file is not a JSON object, or lacks a field.
    """
    states = _complete(output_dir / "state")
    if not states:
        return None
    path = states[-1] / "progress.json"
    content = {"log": None, **read_json(path)}
    if missing := [each.name for each in fields(Progress) if each.name not in content]:
        raise InputError(f"{path} has no {', '.join(missing)}. Delete {states[-1]} to start from scratch.")
    return content


def _complete(folder: Path) -> list[Path]:
    return sorted(each for each in folder.glob("epoch-*") if re.fullmatch(r"epoch-\d+-step-\d+", each.name))


@contextmanager
def held_for_training(accelerator: Accelerator, output_dir: Path) -> Iterator[None]:
    """Hold a run directory for this launch, and delete what a killed training left unfinished in it.

    A run directory that is empty at the end is deleted, if it did not exist before.

    Raises:
        InputError: Another process holds it, or it cannot be written.
    """
    existed = output_dir.exists()
    with ExitStack() as stack:

        def hold() -> None:
            if not existed:
                stack.callback(_remove_empty, output_dir)
            stack.enter_context(held(output_dir / ".lock", f"--output-dir {output_dir}"))
            _remove_unfinished(output_dir)

        write_in_main(accelerator, output_dir, hold)
        yield


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _remove_unfinished(output_dir: Path) -> None:
    """Delete temporary files, states other than the newest, and best models that it does not name."""
    remove_leftovers(output_dir)
    for partial in output_dir.glob(".*.part"):  # of older versions
        partial.unlink()
    progress, states = read_progress(output_dir), _complete(output_dir / "state")
    kept = [states[-1].name, _best_name(progress["best_epoch"])] if progress else []
    for pattern in ("epoch-*", "best-*", ".writing", ".best-*"):
        for each in output_dir.glob(f"state/{pattern}"):
            if each.name not in kept:
                shutil.rmtree(each) if each.is_dir() else each.unlink()


def _best_name(epoch: Any) -> str:
    return f"best-{epoch:05}" if isinstance(epoch, int) else ""


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

        def delete() -> None:
            for folder in self._output_dir.glob("state/best-*"):
                if folder != self._best(progress.best_epoch):
                    shutil.rmtree(folder)

        write_in_main(self._accelerator, self._output_dir, delete)

    def finish(self, progress: Progress) -> None:
        """Write ``last``, and rename the best epoch's model to ``model``, by which a finished training is recognized.

        Raises:
            InputError: The best epoch's model was deleted.
        """
        self._save(self._output_dir / "last")
        best = self._best(progress.best_epoch)

        def rename() -> None:
            if not best.is_dir():
                raise InputError(f"{best} is missing. Delete {self._output_dir} to train from scratch.")
            best.replace(self._output_dir / "model")

        write_in_main(self._accelerator, self._output_dir, rename)

    def _best(self, epoch: int) -> Path:
        return self._output_dir / "state" / _best_name(epoch)

    def _save(self, folder: Path) -> None:
        """Write a model folder, over what a killed process has left there."""
        model: Any = self._update.bare if self._update.average is None else self._update.average
        # In every process, since each has only a part of the weights under FSDP.
        whole: dict[str, Any] = self._accelerator.get_state_dict(model)

        def write() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            weights = {name.removeprefix("model."): w for name, w in whole.items() if name.startswith("model.")}
            save_folder(model.model, folder, weights=weights)

        write_in_main(self._accelerator, folder, write)


def write_together(accelerator: Accelerator, path: Path, action: Callable[[], object]) -> None:
    """Call ``action``, which writes ``path``, in every process, and raise in all of them if it fails in one.

    Raises:
        InputError: The path cannot be written.
    """
    try:
        together(accelerator, action)
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError is what torch.save raises
        raise InputError(
            f"{path} cannot be written ({one_line(error)}). Make room; --resume then continues from the last state."
        ) from error


def write_in_main(accelerator: Accelerator, path: Path, action: Callable[[], object]) -> None:
    """Call `write_together` with an action for the main process alone; all processes wait for it."""
    write_together(accelerator, path, action if accelerator.is_main_process else lambda: None)


class Log:
    """The figures of every epoch: one line of log.jsonl each, and Accelerate's trackers if there are any.

    The file is made equal to the log in the state: later rows are dropped, since their epochs are trained again.

    Args:
        accelerator: With the trackers that were asked for; its main process writes.
        output_dir: The run directory.
        progress: From the state; gets the rows of log.jsonl if the state is of an older version and has none.

    Raises:
        InputError: The state has no log, and log.jsonl does not have a row for each of its epochs.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, progress: Progress):
        self._accelerator, self._path = accelerator, output_dir / "log.jsonl"
        if progress.log is None:
            progress.log = _read_rows(self._path, progress.epoch)
        text = "".join(json.dumps(row) + "\n" for row in progress.log)

        def restore() -> None:
            before = self._path.read_bytes() if self._path.exists() else b""
            if not before.startswith(text.encode()):
                print(f"{self._path} did not match the state, and is restored from it")
            if before != text.encode():
                write_text(self._path, text)

        write_in_main(accelerator, self._path, restore)
        accelerator.init_trackers("drelu-timm")

    def write(self, row: dict[str, Any]) -> None:
        """Add an epoch's figures, synced to disk; the trackers get nested ones as ``held_out/clean``."""

        def append() -> None:
            with self._path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
                log.flush()
                os.fsync(log.fileno())

        write_in_main(self._accelerator, self._path, append)
        self._accelerator.log(_flat(row), step=row["epoch"])

    def close(self) -> None:
        """Let the trackers write what they have buffered."""
        for tracker in self._accelerator.trackers:  # end_training would also end the process group
            tracker.finish()


def _read_rows(path: Path, epochs: int) -> tuple[dict[str, Any], ...]:
    """Read the rows of epochs that a state without a log contains."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}). Restore it.") from error
    rows = []
    for epoch in range(1, epochs + 1):
        try:
            rows.append(json.loads(lines[epoch - 1]))
            matches = rows[-1]["epoch"] == epoch
        except (IndexError, KeyError, TypeError, ValueError, RecursionError):
            matches = False
        if not matches:
            raise InputError(
                f"{path}, line {epoch}, is not the row of epoch {epoch}, which the state contains. Restore the file, "
                f"or delete {path.parent} to train from scratch."
            )
    return tuple(rows)


def _flat(entry: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in entry.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
