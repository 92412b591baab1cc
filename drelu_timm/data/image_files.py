"""Image files: found in a folder, tar or zip with one folder per class, and decoded into one uint8 tensor."""

import io
import os
import posixpath
import re
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError, one_line

_MODES = {1: "L", 3: "RGB"}
_CHUNK = 256  # images per task of a thread, so many that the overhead of a task does not matter


class Tree(NamedTuple):
    """Files and folders in a folder, tar or zip. Archives are read in place.

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
    """Open a folder, a tar (by its suffix) or a zip. Links are followed; names are sorted, except in a zip.

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
    # Not `tarfile.open`, which accepts compressed tars: reading a file of such a tar unpacks everything before it.
    tar = stack.enter_context(tarfile.TarFile(path))
    members = {}  # by name: as when a tar is unpacked, the last of several members of one name counts
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
            raise tarfile.ReadError(f"no end mark after {len(members):,} files and folders")
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


class Size(NamedTuple):
    """Size that images are decoded to: ``in_chans`` 1 (gray) or 3 (RGB), ``img_size`` pixels per side."""

    in_chans: int
    img_size: int


@dataclass(frozen=True)
class ImageFiles:
    """Image files with one label each.

    Attributes:
        tree: Folder, tar or zip that contains them.
        names: [N], in the tree.
        labels: [N], below ``len(classes)``.
        classes: Names of the classes.
        ignored: Number of the other files in the tree, by the reason why they are not read.
    """

    tree: Tree
    names: Sequence[str]
    labels: Sequence[int]
    classes: tuple[str, ...]
    ignored: Counter[str]

    def __str__(self) -> str:
        """``1,234 images in 10 classes (data/train), 3 files ignored (2 .txt, 1 hidden)``."""
        found = f"{len(self.names):,} images in {len(self.classes)} classes ({self.tree.path})"
        number = self.ignored.total()
        files = "file" if number == 1 else "files"
        return found + (f", {number:,} {files} ignored ({listed(self.ignored)})" if number else "")

    def open(self, index: int) -> Image.Image:
        """Decode an image with 8 bits per channel, rotated by its EXIF orientation.

        Of several frames or pages the first is decoded.

        Raises:
            InputError: The file is cut short, is of another kind, or has pixels whose range is not known.
        """
        what = f"--data-dir: {self.names[index]} in {self.tree.path}"
        try:
            image = Image.open(io.BytesIO(self.tree.read(self.names[index])))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
        # Pillow, tarfile and zipfile raise some ten unrelated classes for a broken file.
        except Exception as error:
            raise InputError(f"{what} is not a complete image ({one_line(error)}). Replace it.") from error
        if image.mode in _EIGHT_BIT:
            # Pillow converts LAB to RGB only.
            return image.convert("RGB") if image.mode == "LAB" else image
        maximum = _maximum(image)
        if maximum is None:
            raise InputError(
                f"{what} has pixels of Pillow's mode {image.mode!r} in a file of format {image.format}, whose range is "
                "not known. Save it with 8 bits per channel, or as PNG with 16."
            )
        return Image.fromarray(np.rint(np.asarray(image) * (255 / maximum)).astype(np.uint8))


def listed(counts: Counter[str]) -> str:
    """Format counts for the middle of a line: the five highest, as in ``2 .txt, 1 hidden``."""
    return ", ".join(f"{n:,} {what}" for what, n in counts.most_common(5)) + (", ..." if len(counts) > 5 else "")


# The conversion to RGB or gray drops alpha and keeps the colors under transparent pixels, as in timm and torchvision.
# All other modes are 16-bit gray or refused, because `Image.convert` would clip them at 255.
_EIGHT_BIT = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"))


def _maximum(image: Any) -> int | None:
    """Return the value of white in a 16-bit gray image; None if its mode and format do not determine it."""
    if image.format == "TIFF" and image.mode.startswith("I;16"):
        if image.tag_v2.get(262) == 0:  # PhotometricInterpretation: white is 0, which Pillow inverts in 8 bits only
            return None
        return 2 ** image.tag_v2[258][0] - 1  # BitsPerSample: 12 bits are stored in 16 without being scaled
    # Pillow scales JPEG 2000 of less than 16 bits, and PGM of any maximum, to 16 bits. "I" are PNG in older versions,
    # and PGM; in a TIFF it may be 32-bit or signed.
    known = {"PNG": ("I", "I;16", "I;16B"), "PPM": ("I",), "JPEG2000": ("I;16",)}
    return 2**16 - 1 if image.mode in known.get(image.format, ()) else None


def natural(name: str) -> tuple[Any, str]:
    """Return the key of timm's natural order, in which 2 comes before 10; it also orders names that differ in case."""
    # timm's `natural_key` takes "²" for a number, which int() refuses.
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())], name


@cache
def formats() -> dict[str, str]:
    """Return Pillow's format of every file extension that it decodes, such as ``".jpg": "JPEG"``, in lower case."""
    Image.init()
    known = Image.registered_extensions().items()
    # Pillow identifies these without decoding them; a video or an array next to the images would stop everything.
    identified_only = ("BUFR", "GRIB", "HDF5", "MPEG")
    return {suffix: name for suffix, name in known if name in Image.OPEN and name not in identified_only}


def why_ignored(name: str) -> str | None:
    """Return why a file is not read: ``hidden``, or its extension; None for an image."""
    if name.startswith((".", "__MACOSX/")) or "/." in name or "/__MACOSX/" in name:
        return "hidden"
    suffix = posixpath.splitext(name)[1].lower()
    return None if suffix in formats() else suffix or "without extension"


def images_by_class(tree: Tree) -> ImageFiles:
    """Find the images of a tree. Their label is the top folder that contains them, as in torchvision's `ImageFolder`.

    Images are in the order of ``tree.names``, classes in timm's natural order. All extensions that Pillow decodes are
    read. Hidden files and folders (their name starts with "." or is ``__MACOSX``), other files, and images outside of
    folders are ignored and counted.

    Raises:
        InputError: No images in folders, or a folder without one.
    """
    found: dict[str, int] = {}  # number of images by class
    ignored: Counter[str] = Counter()
    names = []
    for name in tree.names:
        top, slash, _ = normalize("NFC", name).partition("/")  # macOS stores "é" as two characters
        why = why_ignored(name)
        if slash and why != "hidden":
            found.setdefault(top, 0)
        if name.endswith("/"):
            continue
        if why is None and slash:
            found[top] += 1
            names.append(name)
        else:
            ignored[why or "outside the class folders"] += 1
    others = f"ignored files: {listed(ignored) or 'none'}"
    if not names:
        raise InputError(
            f"--data-dir: {tree.path} has no readable images in folders ({others}). Put one folder per class there."
        )
    if empty := sorted((name for name, count in found.items() if not count), key=natural):
        raise InputError(
            f"--data-dir: {tree.path} has folders without a readable image ({', '.join(empty[:5])}; {others}). "
            "Remove these folders or put images there."
        )
    classes = tuple(sorted(found, key=natural))
    label_of = {name: label for label, name in enumerate(classes)}
    return ImageFiles(
        tree, names, [label_of[normalize("NFC", name).partition("/")[0]] for name in names], classes, ignored
    )


def decode(open_image: Callable[[int], Image.Image], places: np.ndarray, size: Size, *, threads: int = 1) -> Tensor:
    """Decode image i into row ``places[i]`` of a uint8 tensor [N, C, H, W]. After two seconds a progress bar appears.

    Args:
        open_image: Returns image i; called once per image, from ``threads`` threads.
        places: [N], a permutation.
        size: Size to which images are converted, center-cropped and resized.
        threads: More than one is faster for large images only. Pillow releases the interpreter lock to decode and
            resize, but below 64 pixels per side passing the lock on costs more than that saves.

    Raises:
        InputError: The images do not fit into the available memory.
    """
    count, (in_chans, img_size) = len(places), size
    needed, available = count * in_chans * img_size**2, psutil.virtual_memory().available
    if needed > available:
        raise InputError(
            f"--img-size {img_size}: {count} images take {needed / 1e9:.1f} GB in every process, and "
            f"{available / 1e9:.1f} GB of memory are available. Use a smaller --img-size or fewer images."
        )
    decoded = np.empty((count, in_chans, img_size, img_size), dtype=np.uint8)

    def decode_chunk(start: int) -> int:
        stop = min(start + _CHUNK, count)
        for index in range(start, stop):
            image = _fitted(open_image(index), size)
            decoded[places[index]] = np.asarray(image).reshape(img_size, img_size, in_chans).transpose(2, 0, 1)
        return stop - start

    with ThreadPoolExecutor(threads) as pool, tqdm(total=count, desc="decode", unit=" images", delay=2) as progress:
        for done in pool.map(decode_chunk, range(0, count, _CHUNK)):
            progress.update(done)
    return torch.from_numpy(decoded)


def _fitted(image: Image.Image, size: Size) -> Image.Image:
    """Convert an image to a mode and size; an image that is not square is cropped to its central square."""
    side = (size.img_size, size.img_size)
    image = image.convert(_MODES[size.in_chans])
    return image if image.size == side else ImageOps.fit(image, side, Image.Resampling.BICUBIC)
