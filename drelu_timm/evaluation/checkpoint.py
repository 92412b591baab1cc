"""Checkpoint of a running evaluation, from which a stopped one resumes, and the processes that share the work.

There is one file per stage (an attack, a probe, the clean pass) and batch. It takes its name when it is complete and on
disk, so a kill at any moment loses only the batches in progress.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError, one_line
from ..files import atomic_file, remove_leftovers
from ..hashing import digest
from ..launch import PATIENCE, launched_on_cpu

LAYOUT = 4  # of the files; 3 had no sha256, 1 and 2 were files of JSON lines
_COLUMN = "column "  # starts the name of a column's tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Measurement:
    """Result of a stage on some examples, on the CPU.

    Attributes:
        examples: int64 [B], positions among all examples, ascending.
        columns: float64 [B], by field.
        kept: int64 [K], the examples among them whose images are kept.
        images: float32 [K, C, H, W]; None where they are only on disk.
    """

    examples: Tensor
    columns: dict[str, Tensor]
    kept: Tensor
    images: Tensor | None

    @classmethod
    def of(
        cls, examples: Tensor, columns: Mapping[str, Tensor], images: Tensor | None = None, keep: Tensor | None = None
    ) -> "Measurement":
        """Move columns [B] from any device to the CPU, and the images [B, C, H, W] that ``keep`` marks."""
        keep = torch.zeros_like(examples, dtype=torch.bool) if keep is None else keep
        columns = {name: column.detach().cpu().double() for name, column in columns.items()}
        kept = torch.empty(0) if images is None else images.detach()[keep.to(images.device)].cpu()
        return cls(examples, columns, examples[keep], kept)

    def check(self, count: int) -> None:
        """Check the shapes and types of a measurement that was read, of some of ``count`` examples.

        Raises:
            ValueError: They are not what `Checkpoint` writes.
        """
        examples, kept, images = self.examples, self.kept, self.images
        for name, index, within in (("examples", examples, torch.arange(count)), ("kept", kept, examples)):
            if index.dtype != torch.int64 or index.ndim != 1 or (index.diff() <= 0).any():
                raise ValueError(f"{name} are not ascending integers")
            if not torch.isin(index, within).all():
                raise ValueError(f"{name} are not all in the evaluation")
        if not len(examples) or any(len(one) != len(examples) or one.ndim != 1 for one in self.columns.values()):
            raise ValueError("its columns have not one value per example")
        if images is None or len(kept) != (len(images) if images.ndim == 4 else 0):
            raise ValueError("it has not one image per kept example")

    def __getitem__(self, mask: Tensor) -> "Measurement":
        """Return the examples that a mask [B] marks."""
        columns = {name: column[mask] for name, column in self.columns.items()}
        kept = torch.isin(self.kept, self.examples[mask])
        images = None if self.images is None else self.images[kept]
        return Measurement(self.examples[mask], columns, self.kept[kept], images)


class Checkpoint:
    """Columns by stage over all examples, and images, in memory and in a folder.

    Args:
        count: Number of examples, N.
        folder: Folder of the files, created with the first one. None keeps everything in memory.
        identity: What decides the measurements, by name: a checkpoint resumes only an evaluation with an equal one.

    Raises:
        InputError: The folder holds a checkpoint of another evaluation, or a file that cannot be read.
    """

    def __init__(self, count: int, folder: Path | None = None, identity: Mapping[str, Any] | None = None):
        self._count, self._folder = count, folder
        self._identity = {"layout": LAYOUT, **(identity or {})}
        self._columns: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self._known: dict[str, Tensor] = defaultdict(lambda: torch.zeros(count, dtype=torch.bool))
        self._with_images: dict[str, list[Measurement]] = defaultdict(list)
        if folder is None:
            return
        if any(folder.glob("process-*.jsonl")):
            raise InputError(f"{folder} was started by an earlier version. Delete it to evaluate from scratch.")
        for path in sorted(folder.glob("*.safetensors")):
            self.merge(*self._read(path))

    def known(self, stage: str) -> Tensor:
        """Return which examples [N] a stage has measured."""
        return self._known[stage]

    def column(self, stage: str, field: str) -> Tensor:
        """Return a field of a stage, float64 [N]; NaN where it was not measured."""
        unknown = torch.full((self._count,), torch.nan, dtype=torch.float64)
        return self._columns[stage].get(field, unknown)

    def add(self, stage: str, measurement: Measurement) -> None:
        """Keep a measurement, on disk before this returns.

        Raises:
            InputError: The file cannot be written, for example because the disk is full.
        """
        if self._folder is not None:
            self._write(stage, measurement)
            measurement = replace(measurement, images=None)
        self.merge(stage, measurement)

    def merge(self, stage: str, measurement: Measurement) -> None:
        """Keep a measurement in memory; another process may have written it."""
        columns = self._columns[stage]
        for name, values in measurement.columns.items():
            columns.setdefault(name, self.column(stage, name))[measurement.examples] = values
        self._known[stage][measurement.examples] = True
        if len(measurement.kept):
            self._with_images[stage].append(measurement)

    def images(self, stages: Mapping[int, str], shape: torch.Size) -> Tensor:
        """Return kept images, float32 [M, C, H, W].

        Args:
            stages: By example, in the order of the images, the stage that kept its image.
            shape: [C, H, W].

        Raises:
            InputError: A file that is missing or cannot be read.
        """
        images = torch.empty(len(stages), *shape)
        places = {key: place for place, key in enumerate(stages.items())}
        for stage in dict.fromkeys(stages.values()):
            for measurement in self._with_images[stage]:
                found = [places.get((example, stage)) for example in measurement.kept.tolist()]
                if any(place is not None for place in found):
                    for place, image in zip(found, self._images_of(stage, measurement), strict=True):
                        if place is not None:
                            images[place] = image
        return images

    def _images_of(self, stage: str, measurement: Measurement) -> Tensor:
        if measurement.images is not None:
            return measurement.images
        path = self._path(stage, measurement)
        with _reading(path), safe_open(path, "pt") as file:
            return file.get_tensor("images")

    def _path(self, stage: str, measurement: Measurement) -> Path:
        assert self._folder is not None
        # An example is in one file of a stage only, so the first example identifies the file.
        return self._folder / f"{stage.replace('/', '_')}-{int(measurement.examples[0]):07d}.safetensors"

    def _write(self, stage: str, measurement: Measurement) -> None:
        path = self._path(stage, measurement)
        tensors = {f"{_COLUMN}{name}": column for name, column in measurement.columns.items()}
        tensors |= {"examples": measurement.examples, "kept": measurement.kept, "images": measurement.images}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
        metadata = {"stage": stage, "identity": json.dumps(self._identity), "sha256": _digest(stage, tensors)}
        try:
            with atomic_file(path) as temporary:
                save_file(tensors, temporary, metadata=metadata)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} cannot be written ({one_line(error)}). What was measured is kept: make room and run the same "
                "command again."
            ) from error

    def _read(self, path: Path) -> tuple[str, Measurement]:
        with _reading(path), safe_open(path, "pt") as file:
            metadata = file.metadata()
            stage, before = metadata["stage"], dict(json.loads(metadata["identity"]))
        now = json.loads(json.dumps(self._identity))  # tuples are lists in JSON
        differing = [
            f"{name} ({before.get(name)} before, {now[name]} now)" for name in now if before.get(name) != now[name]
        ]
        if differing:
            raise InputError(
                f"{path.parent} was started with another {', another '.join(differing)}. Use the earlier value, or "
                "delete the folder to evaluate from scratch."
            )
        with _reading(path), safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if metadata["sha256"] != _digest(stage, tensors):
                raise ValueError("its content is not what was written, by its sha256")
            columns = {name.removeprefix(_COLUMN): one for name, one in tensors.items() if name.startswith(_COLUMN)}
            measurement = Measurement(tensors["examples"], columns, tensors["kept"], tensors["images"])
            measurement.check(self._count)
        return stage, replace(measurement, images=None)


def _digest(stage: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a sha256 over a stage and its tensors; safetensors has no checksum."""
    return digest([tensors[name] for name in sorted(tensors)], json.dumps([stage, *sorted(tensors)]))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}). Delete it to measure it again.") from error


def launched() -> PartialState:
    """Return this process's place in its launch, and its device; the first call joins the launch."""
    return PartialState(cpu=launched_on_cpu(), timeout=PATIENCE)


class Processes:
    """The processes of a launch that share an evaluation.

    A process claims a batch by creating a file, which only one process can do; a fast process claims more batches.

    Args:
        folder: On a disk that all processes see; the claims are in it meanwhile. None for this process alone.
    """

    def __init__(self, folder: Path | None = None):
        self.index, self.count = 0, 1
        if folder is None:
            return
        self._state = launched()
        self.index, self.count = self._state.process_index, self._state.num_processes
        self._claims = folder / "claims"
        if self.index == 0:  # of processes that were killed
            shutil.rmtree(self._claims, ignore_errors=True)
            remove_leftovers(folder)
        self.wait()

    def claimed(self, stage: str, batches: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """Yield every batch of a stage, and whether this process has to measure it."""
        for number, batch in enumerate(batches):
            yield batch, self.count == 1 or self._claim(f"{stage.replace('/', '_')}-{number}")

    def _claim(self, name: str) -> bool:
        self._claims.mkdir(parents=True, exist_ok=True)
        try:
            (self._claims / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def others(self, value: T) -> list[T]:
        """Return the values of the other processes; each of them must call this, and waits for the others."""
        if self.count == 1:
            return []
        values = gather_object([value])
        return values[: self.index] + values[self.index + 1 :]

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self.count > 1:
            self._state.wait_for_everyone()
