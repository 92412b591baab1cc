"""Folders, tars and zips as one kind of tree of named files; archives are read in place."""

import os
import posixpath
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError, one_line


class Tree(NamedTuple):
    """The files and folders in a folder, tar or zip.

    Attributes:
        path: The folder or archive, or a folder in an archive.
        names: Relative paths with "/" between the parts, each once; the path of a folder ends with "/".
        read: Returns the bytes of a file, given its name; threads may call it.
    """

    path: Path
    names: list[str]
    read: Callable[[str], bytes]


@contextmanager
def open_tree(path: Path) -> Iterator[Tree]:
    """Open a folder, a tar (by its suffix) or a zip. Links are followed; names are sorted, but for those of a zip.

    Raises:
        InputError: The path cannot be read: permission denied, an archive that is cut short or of another format, a
            folder that contains a link to itself, or a tar with a link to a file that it does not contain.
    """
    with ExitStack() as stack:
        kind = "folder" if path.is_dir() else "tar" if path.suffix.lower() == ".tar" else "zip"
        try:
            tree = _OPENED[kind](path, stack)
        # RuntimeError: links in a tar that lead to each other.
        except (OSError, RuntimeError, tarfile.TarError, zipfile.BadZipFile) as error:
            raise InputError(
                f"--data-dir: {path} cannot be read as a {kind} ({one_line(error)}). Make it readable or replace it."
            ) from error
        yield tree


def below(tree: Tree, folder: str) -> Tree:
    """Return the part of a tree that is in one of its folders; ``folder`` is "" or ends with "/"."""
    names = [name.removeprefix(folder) for name in tree.names if name.startswith(folder) and name != folder]
    return Tree(tree.path / folder, names, lambda name: tree.read(folder + name))


def _folder(path: Path, _stack: ExitStack) -> Tree:
    return Tree(path, sorted(_names_below(path, ())), lambda name: (path / name).read_bytes())


def _names_below(path: Path, parents: tuple[Path, ...]) -> Iterator[str]:
    real = path.resolve()
    if real in parents:  # os.walk would list the same files until the system gives up, 40 times in all
        raise InputError(f"--data-dir: {path} is a link to a folder that contains it. Remove the link.")
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir():
                yield f"{entry.name}/"
                yield from (f"{entry.name}/{name}" for name in _names_below(Path(entry.path), (*parents, real)))
            else:
                yield entry.name


def _tar(path: Path, stack: ExitStack) -> Tree:
    # Not `tarfile.open`, which takes compressed tars: to read a file of such a tar, all that precedes it is unpacked.
    tar = stack.enter_context(tarfile.TarFile(path))
    members = {}  # by name: unpacking, too, would leave the last of several members of one name
    for member in tar:
        # Absolute paths and "./" are how the tar was made, and not folders in it.
        name = posixpath.normpath("/" + member.name).lstrip("/") + "/" * member.isdir()
        if member.isreg() or member.isdir() or _leads_to_a_file(tar, member, path):
            members[name] = member
    members.pop("/", None)
    # tarfile takes a tar that is cut short between two files, or in a header, for one that ends there.
    with path.open("rb") as file:
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no mark of its end after {len(members):,} files and folders")
    lock = threading.Lock()  # the files of a tar share one position

    def read(name: str) -> bytes:
        with lock, tar.extractfile(members[name]) as file:  # pyright: ignore[reportOptionalContextManager]
            return file.read()

    return Tree(path, sorted(members), read)


def _leads_to_a_file(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> bool:
    """Return whether a member is a link to a file, False for what is not a link, such as a device."""
    if not (member.issym() or member.islnk()):
        return False
    try:
        leads = tar.extractfile(member) is not None
    except KeyError:
        leads = False
    if not leads:
        raise InputError(
            f"--data-dir: {member.name} in {path} is a link to {member.linkname}, which is not a file in the tar. "
            "Pack it again with tar --dereference."
        )
    return True


def _zip(path: Path, stack: ExitStack) -> Tree:
    archive = stack.enter_context(zipfile.ZipFile(path))
    return Tree(path, list(dict.fromkeys(archive.namelist())), archive.read)


_OPENED = {"folder": _folder, "tar": _tar, "zip": _zip}
