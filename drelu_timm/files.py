"""Files that are read with a check, locked, and written whole: readers see the old one or the new one, never a part."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import InputError, one_line


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: A file that is cut short or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); restore it or make it anew") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object; restore it or make it anew")
    return content


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: The file.
        what: The flag or argument that names it, for the error.

    Raises:
        InputError: A file that is missing or not TOML.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # pyright: ignore[reportMissingImports]

    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{what} {path} cannot be read as TOML ({one_line(error)}); fix it there") from error


def locked(path: Path, *, wait: bool = False) -> BinaryIO:
    """A file to add to, locked until it is closed here and by every process that was started with it.

    Args:
        path: Stays where it is afterwards: who deletes it could delete what another has just locked.
        wait: For whoever has locked it.

    Raises:
        BlockingIOError: It is locked already.
        OSError: It cannot be written, or its disk has no locks.
    """
    import fcntl  # which Windows lacks, where importing the package has to work

    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        file.close()
        raise
    return file


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to that becomes ``path`` afterwards: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{os.getpid()}.{path.name}.part")  # what a killed process leaves is no *.json
    try:
        yield beside
        put_in_place(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def put_in_place(beside: Path, path: Path) -> None:
    """Rename a whole file or folder, once it is on disk, so that it stays whole when the machine is lost.

    What it supersedes may be deleted afterwards.
    """
    for written in [*(beside.rglob("*") if beside.is_dir() else ()), beside]:
        _to_disk(written)
    beside.replace(path)
    _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError:
        if not path.is_dir():  # not every file system can do it for folders
            raise
    finally:
        os.close(opened)


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    with written_whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON, atomically; paths are written as text."""
    write_text(path, json_text(content))


def json_text(content: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(content, indent=2, default=str) + "\n"
