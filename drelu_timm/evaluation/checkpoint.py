"""Checkpoint of a running evaluation: one file per stage and batch, from which a stopped evaluation resumes.

A file takes its name when it is complete and on disk, so a kill at any moment loses only the batches in progress.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError, one_line
from ..files import atomic_file

LAYOUT = 3  # of the files; layouts 1 and 2 were files of JSON lines
_COLUMN = "column "  # starts the name of a column's tensor


@dataclass(frozen=True)
class Measurement:
    """What a stage (an attack, the clean pass) measured on some examples, on the CPU.

    Attributes:
        examples: int64 [B], their positions among all examples, ascending.
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
        """Move the columns [B], on any device, and those of the images [B, C, H, W] that ``keep`` marks, to the CPU."""
        keep = torch.zeros_like(examples, dtype=torch.bool) if keep is None else keep
        columns = {name: column.detach().cpu().double() for name, column in columns.items()}
        kept = torch.empty(0) if images is None else images.detach()[keep.to(images.device)].cpu()
        return cls(examples, columns, examples[keep], kept)

    def __getitem__(self, mask: Tensor) -> "Measurement":
        """Return the examples that a mask [B] marks."""
        columns = {name: column[mask] for name, column in self.columns.items()}
        kept = torch.isin(self.kept, self.examples[mask])
        return Measurement(
            self.examples[mask], columns, self.kept[kept], None if self.images is None else self.images[kept]
        )


class Checkpoint:
    """Columns by stage over all examples, and images, in memory and in a folder.

    Args:
        count: Number of examples, N.
        folder: Where the files are; made when the first one is written. None keeps everything in memory only.
        identity: What decides the measurements, by name: a checkpoint is used only where all of it is equal.

    Raises:
        InputError: The folder holds a checkpoint of something else, or a file that cannot be read.
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
        """Which examples [N] a stage has measured."""
        return self._known[stage]

    def column(self, stage: str, field: str) -> Tensor:
        """A field of a stage, float64 [N]; NaN where it was not measured."""
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
        """Keep a measurement in memory; another process may have it on disk."""
        columns = self._columns[stage]
        for name, values in measurement.columns.items():
            columns.setdefault(name, self.column(stage, name))[measurement.examples] = values
        self._known[stage][measurement.examples] = True
        if len(measurement.kept):
            self._with_images[stage].append(measurement)

    def images(self, stages: Mapping[int, str], shape: torch.Size) -> Tensor:
        """Return the images that were kept of examples, float32 [M, C, H, W].

        Args:
            stages: The stage that kept it, by example, in the order of the images.
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
        # An example is in one file of a stage, so the first of them names it.
        return self._folder / f"{stage.replace('/', '_')}-{int(measurement.examples[0]):07d}.safetensors"

    def _write(self, stage: str, measurement: Measurement) -> None:
        path = self._path(stage, measurement)
        tensors = {f"{_COLUMN}{name}": column for name, column in measurement.columns.items()}
        tensors |= {"examples": measurement.examples, "kept": measurement.kept, "images": measurement.images}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
        try:
            with atomic_file(path) as beside:
                save_file(tensors, beside, metadata={"stage": stage, "identity": json.dumps(self._identity)})
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} cannot be written ({one_line(error)}). What was measured is kept: make room and run the same "
                "command again."
            ) from error

    def _read(self, path: Path) -> tuple[str, Measurement]:
        with _reading(path), safe_open(path, "pt") as file:
            metadata, names = file.metadata(), file.keys()
            stage, identity = metadata["stage"], json.loads(metadata["identity"])
            columns = {name.removeprefix(_COLUMN): file.get_tensor(name) for name in names if name.startswith(_COLUMN)}
            measurement = Measurement(file.get_tensor("examples"), columns, file.get_tensor("kept"), None)
        now = json.loads(json.dumps(self._identity))  # tuples are lists in JSON
        differing = [
            f"{name} ({identity.get(name)} before, {now[name]} now)" for name in now if identity.get(name) != now[name]
        ]
        if differing:
            raise InputError(
                f"{path.parent} was started with another {', another '.join(differing)}. Give what it was started "
                "with, or delete it to evaluate from scratch."
            )
        return stage, measurement


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({one_line(error)}). Delete it: what it held is measured again."
        ) from error
