"""Images of a .npz file, mapped into memory where they are stored, and its labels."""

import math
import mmap
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ..errors import InputError, one_line
from ..files import atomic_file

_MEMBERS = _IMAGES, _LABELS = "image.npy", "label.npy"
_CHUNK = 2**20  # bytes that are copied at a time


class StoredImages:
    """Images that are stored uncompressed in a file, such as one of `numpy.savez`, and mapped into memory.

    The kernel reads a page of the file when it is first touched and drops it where memory is short. Such pages are part
    of the resident memory of a process, but not of its anonymous memory, and processes share them.

    Args:
        path: File.
        offset: Place of the first byte of the images in the file.
        shape: [N, H, W, C]; values are uint8.
    """

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...]):
        self.path, self.offset, self.shape = path, offset, shape
        with path.open("rb") as file:
            # Not `np.memmap`, which hides the size of the file and is pickled as a copy of its content.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._map.madvise(mmap.MADV_RANDOM)  # or the kernel reads 128 kB from the disk for every image
        self._images = np.frombuffer(self._map, np.uint8, math.prod(shape), offset).reshape(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """Pickle the place in the file: another process maps it itself."""
        return StoredImages, (self.path, self.offset, self.shape)

    def read(self, index: np.ndarray) -> np.ndarray:
        """Return copies of the images, uint8 [n, H, W, C], at ``index``, integers [n].

        Raises:
            InputError: The file has become shorter.
        """
        if self._map.size() < len(self._map):  # SIGBUS would kill a process that touches pages past the end
            raise InputError(f"--generated {self.path} was changed while it was read; restore it and resume")
        return np.take(self._images, index, axis=0)  # faster than `[index]`


class _Header(NamedTuple):
    """Header of a .npy file: shape and type of its array, and the bytes of the header itself."""

    shape: tuple[int, ...]
    dtype: np.dtype
    n_bytes: int


def open_npz(path: Path, image_shape: tuple[int, int, int], num_classes: int) -> tuple[StoredImages, np.ndarray]:
    """Map the images of a .npz file and read its labels; of a file with compressed images a copy is mapped.

    Args:
        path: File with ``image``, uint8 [N, H, W, C], and ``label``, integers [N].
        image_shape: (H, W, C) that the images must have.
        num_classes: Number of classes.

    Returns:
        Images, uint8 [N, H, W, C], and labels [N], in the smallest type that holds them.

    Raises:
        InputError: A file that is missing, not a zip file or cut short, or that holds other keys, types, shapes or
            labels.
    """
    if not path.is_file():
        raise InputError(f"--generated {path} is no file; give .npz files with image and label, every part of them")
    try:
        with zipfile.ZipFile(path) as archive:
            _check(path, archive, image_shape)
            labels = _labels(path, archive, num_classes)
            if archive.getinfo(_IMAGES).compress_type == zipfile.ZIP_STORED:
                return _stored_images(archive), labels
            copy = _stored_copy(archive, path)
        with zipfile.ZipFile(copy) as archive:
            return _stored_images(archive), labels
    except InputError:
        raise
    # RuntimeError where a member is encrypted.
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"--generated {path} is no whole .npz ({one_line(error)}); copy or download it again"
        ) from error


def _check(path: Path, archive: zipfile.ZipFile, image_shape: tuple[int, int, int]) -> None:
    """Check by the headers that a file has images of this shape and labels for them.

    Raises:
        InputError: It has others.
    """
    names = archive.namelist()
    if missing := [name for name in _MEMBERS if name not in names]:
        raise InputError(
            f"--generated {path} lacks {' and '.join(missing)} (it holds {', '.join(names[:10]) or 'nothing'}); give a "
            ".npz with image and label"
        )
    images, labels = (_header(archive, name) for name in _MEMBERS)
    if images.dtype != np.uint8 or images.shape[1:] != image_shape:
        raise InputError(
            f"--generated {path} has images of {images.dtype} {list(images.shape)}; they must be uint8 "
            f"[N, {', '.join(map(str, image_shape))}], as those of --dataset: resize them or give other files"
        )
    if not np.issubdtype(labels.dtype, np.integer) or len(labels.shape) != 1:
        raise InputError(
            f"--generated {path} has labels of {labels.dtype} {list(labels.shape)}; they must be int64 [N]"
        )
    if images.shape[0] != labels.shape[0] or not images.shape[0]:
        raise InputError(
            f"--generated {path} has {images.shape[0]} images and {labels.shape[0]} labels; there must be as many of "
            "one as of the other, and at least one"
        )


def _header(archive: zipfile.ZipFile, name: str) -> _Header:
    """Read the header of a member, compressed or not.

    Raises:
        ValueError: A member that is no array in C order, or is cut short.
    """
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        if version not in _READ_HEADER:
            raise ValueError(f"{name} is of format {version}")
        shape, fortran_order, dtype = _READ_HEADER[version](file)
        n_bytes = file.tell()
    if fortran_order and len(shape) > 1:
        raise ValueError(f"{name} is in Fortran order")
    file_bytes = archive.getinfo(name).file_size
    if not dtype.hasobject and n_bytes + dtype.itemsize * math.prod(shape) != file_bytes:
        raise ValueError(f"{name} has {file_bytes} bytes, which is not what its header says")
    return _Header(shape, dtype, n_bytes)


_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _labels(path: Path, archive: zipfile.ZipFile, num_classes: int) -> np.ndarray:
    """Read the labels [N] in the smallest type that holds them.

    Raises:
        InputError: Labels outside the classes.
    """
    with archive.open(_LABELS) as file:
        labels = np.lib.format.read_array(file)
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(
            f"--generated {path} has labels from {labels.min()} to {labels.max()}; allowed are 0 to {num_classes - 1}: "
            "give images of the classes of --dataset"
        )
    return labels.astype(np.min_scalar_type(num_classes - 1))


def _stored_images(archive: zipfile.ZipFile) -> StoredImages:
    """Map images that are not compressed."""
    path, header, start = Path(str(archive.filename)), _header(archive, _IMAGES), archive.getinfo(_IMAGES).header_offset
    with path.open("rb") as file:
        # The local header, whose length zipfile keeps to itself: 30 bytes, the last 4 of them the lengths of the name
        # and of what follows it (4.3.7 of https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT).
        file.seek(start)
        name_bytes, extra_bytes = struct.unpack("<26xHH", file.read(30))
    return StoredImages(path, start + 30 + name_bytes + extra_bytes + header.n_bytes, header.shape)


def _stored_copy(archive: zipfile.ZipFile, path: Path) -> Path:
    """Return an uncompressed copy of a compressed file, made unless there is one of the same content in its folder.

    Raises:
        InputError: It cannot be written.
    """
    copy = path.with_suffix(".stored.npz")
    members = [archive.getinfo(name) for name in _MEMBERS]
    if _is_copy(copy, members):
        return copy
    size = sum(member.file_size for member in members)
    what = f"--generated {path} is compressed and needs an uncompressed copy, {copy} of {size / 1e9:.1f} GB"
    if size > shutil.disk_usage(path.parent).free:
        raise InputError(f"{what}, for which the disk has no space; make some, or save it by numpy.savez")
    tqdm.write(f"{what}: writing it once", file=sys.stderr)
    try:
        with atomic_file(copy) as beside:
            _copy_members(archive, members, beside)
    except OSError as error:
        raise InputError(f"{what}, which cannot be written ({one_line(error)}); save it by numpy.savez") from error
    return copy


def _is_copy(copy: Path, members: Sequence[zipfile.ZipInfo]) -> bool:
    """Whether a file holds these members, by their checksums."""
    try:
        with zipfile.ZipFile(copy) as archive:
            held = [archive.getinfo(member.filename) for member in members]
    except (OSError, LookupError, zipfile.BadZipFile):
        return False
    return [(each.CRC, each.file_size) for each in held] == [(each.CRC, each.file_size) for each in members]


def _copy_members(archive: zipfile.ZipFile, members: Sequence[zipfile.ZipInfo], path: Path) -> None:
    """Write members into a zip that does not compress; reading them checks them."""
    total = sum(member.file_size for member in members)
    with zipfile.ZipFile(path, "w") as target, tqdm(total=total, desc="convert", unit="B", unit_scale=True) as progress:
        for member in members:
            with archive.open(member) as source, target.open(member.filename, "w", force_zip64=True) as sink:
                while block := source.read(_CHUNK):
                    sink.write(block)
                    progress.update(len(block))
