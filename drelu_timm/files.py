"""Files: read with checks, locked, and written atomically (readers see the old file or the new one)."""

import errno
import json
import os
import platform
import secrets
import shlex
import shutil
import stat
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from .errors import DReLUWarning, InputError, one_line
from .formatting import one_line_text


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: The file is missing, is cut short, or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read as JSON ({one_line(error)}). Restore it or create it again."
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object. Restore it or create it again.")
    return content


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: The file.
        what: Flag or argument whose value is the path, for the error.

    Raises:
        InputError: The file is missing or is not TOML.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # pyright: ignore[reportMissingImports]

    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{what} {path} cannot be read as TOML ({one_line(error)}). Correct it.") from error


def locked(path: Path, *, wait: bool = False) -> BinaryIO:
    """Open a file for appending and lock it until it is closed here and in every process that inherits it.

    Args:
        path: The file. It is never deleted, because another process may just have locked it.
        wait: Whether to wait until the lock is free.

    Raises:
        BlockingIOError: Another process has locked it, and ``wait`` is False.
        OSError: It cannot be written, or its disk has no locks.
    """
    import fcntl  # missing on Windows, where importing the package has to work

    file = open(path, "ab", opener=_without_links)  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        file.close()
        raise
    return file


@contextmanager
def held(lock: Path, what: str) -> Iterator[None]:
    """Hold a lock file, so that one process at a time writes what it protects; it is deleted at the end.

    The lock excludes other processes, not other threads of this one, and does nothing on Windows. Forked children do
    not inherit it, so a data-loading worker that outlives a killed training does not block the next one.

    Args:
        lock: Path of the lock file; its folder is made. It names the holder while the lock is held.
        what: Flag and value whose files are locked, for the error, such as "--output-dir runs/x".

    Raises:
        InputError: Another process holds the lock, or the file cannot be written.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = _lock(lock)
    except BlockingIOError as error:
        raise InputError(f"{what} is in use by {_holder(lock)}. Wait until it ends, or use another.") from error
    except OSError as error:
        raise InputError(f"{what} cannot be written to ({one_line(error)}). Use another.") from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # before it is released: see `_lock`
        file.close()


def _holder(lock: Path) -> str:
    """Return who holds a lock."""
    for _ in range(100):  # for a second: a holder locks the file before it can write its name into it
        with suppress(OSError):
            if name := lock.read_text(encoding="utf-8", errors="replace").strip():
                return one_line_text(name)[:300]
        time.sleep(0.01)
    return "another process"


def _lock(path: Path) -> TextIO:
    """Open and lock a file, and write into it who holds it.

    Raises:
        BlockingIOError: Another process holds it.
    """
    while True:
        # Words of the command may not be text in this locale.
        file = open(path, "a+", encoding="utf-8", errors="backslashreplace", opener=_without_links)  # noqa: SIM115
        try:
            _lock_for_process(file)
            # A holder deletes its file. If that happened between our open and our lock, the lock is on a
            # deleted file, which no other process can open.
            if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                file.truncate(0)
                command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
                file.write(f"process {os.getpid()} on {platform.node()} ({command})\n")
                file.flush()
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _without_links(path: str, flags: int) -> int:
    """Open a file, but not through a link that somebody planted under its name."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _lock_for_process(file: TextIO) -> None:
    if sys.platform == "win32":  # which has no such locks
        return
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError from error
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        warnings.warn(
            f"{file.name}: this disk has no locks ({error.strerror}). Do not start a second process on this folder.",
            DReLUWarning,
            stacklevel=2,
        )


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file that replaces ``path`` at the end: readers see the old file or the new one.

    The temporary file is next to ``path``, and is deleted if there is an error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    # O_EXCL: a link that somebody planted under this name is not followed. The umask gives the mode.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = stat.S_IMODE(temporary.stat().st_mode)
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors writes another file, with mode 0600
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the name ``path`` at the end, which must not exist or be an empty folder.

    The temporary folder is next to ``path``, and is deleted if there is an error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path) -> Path:
    """Return a new random name next to a path; `remove_leftovers` knows it, and it has the suffix of no other file."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def check_output_folder(folder: Path, ours: Iterable[str], flag: str) -> None:
    """Refuse a folder that has files of others and none of ours.

    Args:
        folder: Folder to write into; it need not exist.
        ours: Names of files and folders that an earlier call has written there.
        flag: Flag that names the folder, for the error.

    Raises:
        InputError: The folder cannot be used.
    """
    try:
        visible = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {str(folder)[:200]!r} cannot be used ({one_line(error)}). Use another.") from error
    if visible and not visible.intersection(ours):
        raise InputError(f"{flag} {folder} has other files. Use a new or an empty folder.")


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Delete the temporary files and folders of killed processes; the caller must hold the lock.

    Args:
        folder: Folder that they are in.
        name: Name of the file or folder that they were to become; by default any.
    """
    for leftover in folder.glob(f".{name}.{'[0-9a-f]' * 8}.part"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a complete file or folder after it has been synced to disk, so that it is complete after a power failure.

    Files in a folder get the modes that the umask gives.
    """
    if temporary.is_dir():
        for file in [path for path in temporary.rglob("*") if path.is_file()]:
            file.chmod(stat.S_IMODE(file.parent.stat().st_mode) & 0o666)
    for written in [*(temporary.rglob("*") if temporary.is_dir() else ()), temporary]:
        _to_disk(written)
    temporary.replace(path)
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
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON, atomically; paths are written as text."""
    write_text(path, json_text(content))


def json_text(content: Any) -> str:
    """Return the text that `write_json` writes."""
    return json.dumps(content, indent=2, default=str) + "\n"
