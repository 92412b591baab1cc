"""Image files: found in a tree with a folder per class, and decoded into one uint8 tensor."""

import io
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError, one_line
from .trees import Tree

_MODES = {1: "L", 3: "RGB"}
_CHUNK = 256  # images a task: enough that the tasks' own cost does not show


class Size(NamedTuple):
    """The size that images are decoded to: ``in_chans`` 1 (grey) or 3 (RGB), ``img_size`` pixels a side."""

    in_chans: int
    img_size: int


@dataclass(frozen=True)
class ImageFiles:
    """Image files with a label each.

    Attributes:
        tree: The folder, tar or zip that holds them.
        names: [N], in the tree.
        labels: [N], below ``len(classes)``.
        classes: Name of every class.
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
        """Decode an image with 8 bits per channel, turned upright as its EXIF orientation says.

        Of several frames or pages the first is decoded.

        Raises:
            InputError: The file is not an image, is cut short, or has pixels whose range is not known.
        """
        what = f"--data-dir: {self.names[index]} in {self.tree.path}"
        try:
            image = Image.open(io.BytesIO(self.tree.read(self.names[index])))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
        # Pillow, tarfile and zipfile raise some ten unrelated classes at a broken file.
        except Exception as error:
            raise InputError(f"{what} is not a whole image ({one_line(error)}); replace it") from error
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


# Alpha is dropped by the conversion to RGB or grey, which keeps the colours under transparent pixels, as timm and
# torchvision do. All but these are either 16-bit grey or refused: `Image.convert` would clip them at 255.
_EIGHT_BIT = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"))


def _maximum(image: Any) -> int | None:
    """Return the value of white in a 16-bit grey image; None where its mode and format do not determine it."""
    if image.format == "TIFF" and image.mode.startswith("I;16"):
        if image.tag_v2.get(262) == 0:  # PhotometricInterpretation: white is 0, which Pillow inverts in 8 bits only
            return None
        return 2 ** image.tag_v2[258][0] - 1  # BitsPerSample: 12 bits are stored in 16 without being scaled
    # Pillow scales JPEG 2000 of less than 16 bits, and PGM of any maximum, to 16 bits. "I" are PNG in older versions,
    # and PGM; in a TIFF it may be 32-bit or signed.
    known = {"PNG": ("I", "I;16", "I;16B"), "PPM": ("I",), "JPEG2000": ("I;16",)}
    return 2**16 - 1 if image.mode in known.get(image.format, ()) else None


def natural(name: str) -> tuple[Any, str]:
    """Key of timm's natural order, in which 2 comes before 10; names that differ in case only keep one order, too."""
    # timm's `natural_key` takes "²" for a number, which int() refuses.
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())], name


@cache
def formats() -> dict[str, str]:
    """Pillow's format of every file extension that it decodes, such as ``".jpg": "JPEG"``; all lower case."""
    Image.init()
    known = Image.registered_extensions().items()
    # Those that Pillow only identifies would stop everything where a video or an array lies next to the images.
    return {suffix: name for suffix, name in known if name in Image.OPEN and name not in _IDENTIFIED_ONLY}


_IDENTIFIED_ONLY = ("BUFR", "GRIB", "HDF5", "MPEG")


def why_ignored(name: str) -> str | None:
    """Return why a file is not read: ``hidden``, or its extension; None for an image."""
    if name.startswith((".", "__MACOSX/")) or "/." in name or "/__MACOSX/" in name:
        return "hidden"
    suffix = posixpath.splitext(name)[1].lower()
    return None if suffix in formats() else suffix or "without extension"


def images_by_class(tree: Tree) -> ImageFiles:
    """Find the images of a tree, labelled by the top folder that holds them, as by torchvision's `ImageFolder`.

    Images are in the order of ``tree.names``, classes in timm's natural order. Read are the extensions that Pillow
    decodes. Files and folders that are hidden (their name starts with "." or is ``__MACOSX``), other files, and images
    in no folder are ignored and counted.

    Raises:
        InputError: No images in folders, or a folder without one.
    """
    found: dict[str, int] = {}  # number of images by class
    ignored: Counter[str] = Counter()
    names = []
    for name in tree.names:
        top, slash, _ = name.partition("/")
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
    if not names:
        raise InputError(
            f"--data-dir: {tree.path} has no readable images in folders (ignored files: {listed(ignored) or 'none'}). "
            "Put a folder of images per class there."
        )
    if empty := sorted((name for name, count in found.items() if not count), key=natural):
        raise InputError(
            f"--data-dir: {tree.path} has folders without a readable image ({', '.join(empty[:5])}; "
            f"ignored files: {listed(ignored) or 'none'}). Remove these folders or put images there."
        )
    classes = tuple(sorted(found, key=natural))
    label_of = {name: label for label, name in enumerate(classes)}
    return ImageFiles(tree, names, [label_of[name.partition("/")[0]] for name in names], classes, ignored)


def decode(open_image: Callable[[int], Image.Image], places: np.ndarray, size: Size, *, threads: int = 1) -> Tensor:
    """Decode image i into row ``places[i]`` of a uint8 tensor [N, C, H, W], with a progress bar after two seconds.

    Args:
        open_image: Gives image i; called once an image, from several threads where ``threads`` says so.
        places: [N], a permutation.
        size: What images are converted, cropped to a centred square, and resized to.
        threads: More than one pays for large images only: Pillow decodes and resizes without the interpreter lock,
            but below 64 pixels a side that saves less than handing the lock over costs.

    Raises:
        InputError: More images than the available memory can hold.
    """
    count, (in_chans, img_size) = len(places), size
    _check_memory(count, size)
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
    """The image in the mode and size asked for, cropped to a centred square first where it is none."""
    side = (size.img_size, size.img_size)
    image = image.convert(_MODES[size.in_chans])
    return image if image.size == side else ImageOps.fit(image, side, Image.Resampling.BICUBIC)


def _check_memory(count: int, size: Size) -> None:
    needed, available = count * size.in_chans * size.img_size**2, psutil.virtual_memory().available
    if needed > available:
        raise InputError(
            f"--img-size {size.img_size} makes {count} images take {needed / 1e9:.1f} GB in every process, and "
            f"{available / 1e9:.1f} GB of memory are available; give a smaller --img-size or fewer images"
        )
