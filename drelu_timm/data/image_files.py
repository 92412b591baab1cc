"""Image files: found in folders, tars and zips with a folder a class, and decoded into one uint8 tensor."""

import io
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError, one_line

_MODES = {1: "L", 3: "RGB"}
_CHUNK = 256  # images a task: enough that the tasks' own cost does not show


class Size(NamedTuple):
    """The size that images are decoded to: ``in_chans`` 1 (grey) or 3 (RGB), ``img_size`` pixels a side."""

    in_chans: int
    img_size: int


@dataclass(frozen=True)
class ImageFiles:
    """Files with an image each.

    Attributes:
        path: The folder, tar or zip that holds them.
        names: [N], inside ``path``.
        labels: [N], below ``len(classes)``.
        classes: Name of every class.
        read: Gives the bytes of file i; threads may call it.
    """

    path: Path
    names: Sequence[str]
    labels: Sequence[int]
    classes: tuple[str, ...]
    read: Callable[[int], bytes]

    def open(self, index: int) -> Image.Image:
        """Decode an image.

        Raises:
            InputError: The file is no image, or not a whole one.
        """
        try:
            image = Image.open(io.BytesIO(self.read(index)))
            image.load()
        # Pillow, tarfile and zipfile raise some ten unrelated classes at a broken file.
        except Exception as error:
            what = f"{self.names[index]} in {self.path} is no whole image ({one_line(error)})"
            raise InputError(f"--data-dir: {what}; replace it") from error
        return image


def read_folder(path: Path) -> ImageFiles:
    """What timm's readers find in a folder or tar with a folder a class, ordered by class.

    Raises:
        InputError: No images, or a tar that is none or is cut short.
    """
    try:
        if path.is_file():
            # Left to itself, timm unpickles a file that it finds beside a large tar.
            reader = ReaderImageInTar(str(path), cache_tarinfo=False)
            classes, labels = reader.class_name_to_idx, reader.targets.tolist()
            lock = threading.Lock()  # the files of a tar share one position
        else:
            reader = ReaderImageFolder(str(path))
            classes, labels = reader.class_to_idx, [label for _, label in reader.samples]
            lock = nullcontext()
    except (OSError, RuntimeError, ValueError, AssertionError, tarfile.TarError) as error:
        what = f"{path} holds no readable images ({one_line(error)})"
        raise InputError(f"--data-dir: {what}; put a folder of images a class there") from error

    def read(index: int) -> bytes:
        with lock, reader[index][0] as file:  # pyright: ignore[reportOptionalContextManager]
            return file.read()

    names = [str(name) for name in reader.filenames()]
    return ImageFiles(path, names, labels, tuple(classes or ()), read)


class Tree(NamedTuple):
    """The files under a folder or in a zip: their names in it, and how to read one (threads may)."""

    path: Path
    names: list[str]
    read: Callable[[str], bytes]


@contextmanager
def open_tree(path: Path) -> Iterator[Tree]:
    """A folder, or the one folder in a zip, which is not unpacked.

    Raises:
        InputError: A zip that is none, is empty, or is cut short.
    """
    if path.is_dir():
        names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*"))
        yield Tree(path, names, lambda name: (path / name).read_bytes())
        return
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"--data-dir {path} is no whole zip ({one_line(error)}); download it again") from error
    with archive:
        top = "".join(archive.namelist()[:1]).partition("/")[0] + "/"
        names = [name.removeprefix(top) for name in archive.namelist()]
        yield Tree(path, names, lambda name: archive.read(top + name))


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
