"""What an evaluation has measured so far, on disk as it comes in: the state that a stopped one goes on from.

A folder with a file of JSON lines a process. A file begins with a line on what is measured (`identity`); every other
line holds what one stage (an attack, the clean pass) measured on one example. Lines are only ever appended, a batch in
one write, so whatever stops a process leaves whole lines and at most one that is cut, which is measured again.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .runs import write_text

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
        self.folder = folder
        if folder is None:
            return
        self.path = folder / f"process-{process}.jsonl"
        for path in sorted(folder.glob("process-*.jsonl")):
            self._read(path, identity or {})
        if not (self.path.exists() and _drop_cut_line(self.path)):
            _guarded(self.path, lambda: write_text(self.path, json.dumps({"identity": dict(identity or {})}) + "\n"))

    def append(self, stage: str, rows: StageRows) -> None:
        """Keep what a stage measured on some examples, on disk before this returns.

        Raises:
            InputError: A full disk, or another reason why the file cannot be written; what it held is kept.
        """
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
        for line in lines[1:]:
            row = _parsed(path, line)
            self.stages[row.pop("stage")][row.pop("example")] = row


def model_digest(model: nn.Module) -> str:
    """sha256 over a model's structure as printed, and the name, type, shape and values of everything in its state."""
    state = model.state_dict()
    about = [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in state.items()]
    return digest(state.values(), repr(model) + json.dumps(about))


def digest(tensors: Iterable[Tensor], text: str = "") -> str:
    """sha256 over a text and the values of tensors."""
    sha256 = hashlib.sha256(text.encode())
    for tensor in tensors:
        sha256.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()


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
