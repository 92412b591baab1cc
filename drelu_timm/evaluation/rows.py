"""What an evaluation has measured so far, on disk as it comes in: the state that a stopped one goes on from.

A folder with a file of JSON lines a process. A file begins with a line on what is measured (`identity`); every other
line holds what one stage (an attack, the clean pass) measured on one example. Lines are only ever appended, a batch in
one write, so whatever stops a process leaves whole lines and at most one that is cut, which is measured again. The
image that broke an example first lies beside them, see `write_images`, and was there before its line.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..files import write_text
from .adversarial import read_images, write_images

LAYOUT = 2  # of the folder; the first one kept no images

Fields = dict[str, float]  # what a stage measures on an example
StageRows = dict[int, Fields]


class Rows:
    """Fields by stage and example, read from a folder and appended to it.

    Args:
        folder: Made where it is not there; None keeps the rows in memory only.
        identity: What is measured, by name: strings and numbers, equal whenever the rows may be used again.
        process: Number of the process that appends.

    Raises:
        InputError: Rows of something else in the folder, or a file that is no such file.
    """

    def __init__(self, folder: Path | None = None, identity: Mapping[str, Any] | None = None, process: int = 0):
        self.stages: dict[str, StageRows] = defaultdict(dict)
        self.folder, self.process = folder, process
        self._images: dict[int, Tensor] = {}  # where there is no folder
        if folder is None:
            return
        self.path = folder / f"process-{process}.jsonl"
        identity = {"layout": LAYOUT, **(identity or {})}
        for path in sorted(folder.glob("process-*.jsonl")):
            self._read(path, identity)
        if not (self.path.exists() and _drop_cut_line(self.path)):
            _guarded(self.path, lambda: write_text(self.path, json.dumps({"identity": identity}) + "\n"))

    def append(self, stage: str, rows: StageRows, images: Mapping[int, Tensor] | None = None) -> None:
        """Keep what a stage measured on some examples, on disk before this returns.

        Args:
            stage: Name of what was measured.
            rows: By example.
            images: Of some of these examples, float32 [C, H, W] on the CPU; an example has one.

        Raises:
            InputError: A full disk, or another reason why a file cannot be written; what it held is kept.
        """
        if images:
            self._write_images(images)
            rows = rows | {example: rows[example] | {"process": self.process} for example in images}
        self.merge(stage, rows)
        if self.folder is None:
            return
        lines = [json.dumps({"stage": stage, "example": example, **fields}) for example, fields in rows.items()]
        _guarded(self.path, lambda: _append(self.path, "".join(line + "\n" for line in lines)))

    def merge(self, stage: str, rows: StageRows) -> None:
        """Keep rows in memory that another process has on disk."""
        self.stages[stage].update(rows)

    def column(self, stage: str, field: str, count: int) -> Tensor:
        """A field of a stage over ``count`` examples, float64 [count]; NaN where it was not measured."""
        values = torch.full((count,), float("nan"), dtype=torch.float64)
        for example, fields in self.stages[stage].items():
            values[example] = fields[field]
        return values

    def images(self, stages: Mapping[int, str], shape: torch.Size) -> Tensor:
        """The images that stages gave of examples, float32 [M, C, H, W].

        Args:
            stages: By example, in the order that is asked for.
            shape: [C, H, W].

        Raises:
            InputError: Images that are not on disk any more.
        """
        images = torch.empty(len(stages), *shape)
        places: dict[int, dict[int, Tensor]] = defaultdict(dict)  # by process and example
        for (example, stage), image in zip(stages.items(), images, strict=True):
            places[int(self.stages[stage][example]["process"])][example] = image
        for process, of_it in places.items():
            self._read_images(process, of_it)
        return images

    def _write_images(self, images: Mapping[int, Tensor]) -> None:
        if self.folder is None:
            self._images.update(images)
        else:
            path = self._image_file(self.process)
            _guarded(path, lambda: write_images(path, images))

    def _read_images(self, process: int, images: Mapping[int, Tensor]) -> None:
        if self.folder is None:
            for example, image in images.items():
                image.copy_(self._images[example])
        else:
            read_images(self._image_file(process), images)

    def _image_file(self, process: int) -> Path:
        assert self.folder is not None
        return self.folder / f"process-{process}.images"

    def _read(self, path: Path, identity: Mapping[str, Any]) -> None:
        lines = path.read_text().split("\n")[:-1]  # what follows the last line break is a cut line
        if not lines:
            return
        before = _parsed(path, lines[0]).get("identity", {})
        now = json.loads(json.dumps(dict(identity)))  # as JSON gives it back
        differing = [
            f"{name} ({before.get(name)} before, {now[name]} now)" for name in now if before.get(name) != now[name]
        ]
        if differing:
            raise InputError(
                f"{path.parent} was begun with another {', another '.join(differing)}; "
                "give what it was begun with, or delete it to evaluate anew"
            )
        rows = [_parsed(path, line) for line in lines[1:]]
        if any("process" in row for row in rows) and not path.with_suffix(".images").exists():
            raise InputError(f"{path} lacks its images, {path.stem}.images; delete {path.parent} to evaluate anew")
        for row in rows:
            self.stages[row.pop("stage")][row.pop("example")] = row


def _parsed(path: Path, line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:
        raise InputError(f"{path} holds a line that is no JSON ({line[:40]!r}); delete the file") from None


def _drop_cut_line(path: Path) -> int:
    """Cut a file behind its last whole line; how many bytes are left."""
    whole = path.read_bytes().rfind(b"\n") + 1
    os.truncate(path, whole)
    return whole


def _append(path: Path, text: str) -> None:
    with path.open("ab", buffering=0) as file:
        left = memoryview(text.encode())
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())


def _guarded(path: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); what is there is kept: make room and run the same "
            "command again"
        ) from error
