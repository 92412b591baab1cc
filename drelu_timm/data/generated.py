"""Generated images: .npz files of several GB, mapped into memory where they are stored."""

import hashlib
import math
import mmap
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError, one_line
from ..files import atomic_file, write_text
from ..randomness import permutation

_MEMBERS = _IMAGES, _LABELS = "image.npy", "label.npy"
_CHUNK = 2**20  # bytes that are copied at a time
_SAMPLE = 64  # images in a digest
ORDER = "a shuffle per class and pass"  # stored in checkpoints: change it with `drawn`, and older runs are refused
_DRAWN = 2**32 - 1  # first part of a key, larger than any epoch and any pass over the real images


class GeneratedImages:
    """Images and labels of one or more .npz files, one after another.

    Images are mapped into memory. A process keeps 5 bytes per image: 1 for its label (2 with more than 256 classes) and
    4 for the random order, so 250 MB for 50 million images. Forked workers share them with the training process.

    Args:
        images: uint8 [N, H, W, C] of every file.
        labels: Unsigned integers [N] of every file, below ``num_classes``.
        num_classes: Number of classes; there must be an image of each.

    Raises:
        InputError: A class without images, or pixels of 0 and 1 only.

    Attributes:
        digest: SHA-256 over the number of images of every file and class and over a sample of the images, which is
            compared when a run resumes.
    """

    def __init__(self, images: Sequence["StoredImages"], labels: Sequence[np.ndarray], num_classes: int):
        self._images = images
        self._firsts = np.cumsum([0, *map(len, images)])  # first image of every file, and the total
        self._labels = np.concatenate(labels)
        self._counts = np.bincount(self._labels, minlength=num_classes)
        if missing := np.flatnonzero(self._counts == 0).tolist():
            raise InputError(
                f"--generated has no images of {len(missing)} of {num_classes} classes ({str(missing[:5])[1:-1]}). "
                "Give every part, so that the classes can be balanced."
            )
        by_class = np.argsort(self._labels, kind="stable").astype(np.min_scalar_type(len(self)))
        # Images of every class, in the order of the pass (seed, number) that `_passes` states for the class.
        self._classes = np.split(by_class, np.cumsum(self._counts)[:-1])
        self._passes: dict[int, tuple[int, int]] = {}
        self.digest = self._digest()

    @classmethod
    def open(cls, paths: Sequence[Path], *, img_size: int, in_chans: int, num_classes: int) -> "GeneratedImages":
        """Open .npz files with ``image``, uint8 [N, H, W, C], and ``label``, integers [N].

        A file is compared with its checksums once, and a compressed one copied once, uncompressed, into its folder.
        If several processes open the same files, one of them should do so first.

        Args:
            paths: One or more files.
            img_size: Height and width that the images must have, in pixels.
            in_chans: Channels that the images must have: 1 or 3.
            num_classes: Number of classes.

        Raises:
            InputError: A file that is missing, is not a zip, is cut short, or has other keys, types, shapes or labels;
                a class without images.
        """
        if not paths:
            raise InputError("--generated has no value. Give one or more .npz files with image and label.")
        parts = [_open_npz(Path(path).expanduser(), (img_size, img_size, in_chans), num_classes) for path in paths]
        images, labels = zip(*parts, strict=True)
        return cls(images, labels, num_classes)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def read(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Read images, in the order of ``index``.

        Args:
            index: int64 [n], 0 to N - 1.

        Returns:
            uint8 images [n, C, H, W] and int64 labels [n].
        """
        height, width, channels = self._images[0].shape[1:]
        images = np.empty((len(index), channels, height, width), dtype=np.uint8)
        part = np.searchsorted(self._firsts, index, side="right") - 1
        for number in np.unique(part):
            mine = part == number
            images[mine] = self._images[number].read(index[mine] - self._firsts[number]).transpose(0, 3, 1, 2)
        return torch.from_numpy(images), torch.from_numpy(self._labels[index].astype(np.int64))

    def drawn(self, positions: np.ndarray, seed: int) -> np.ndarray:
        """Return the images at positions of an endless random sequence, which is a function of the seed only.

        Classes alternate, so any stretch of the sequence has equally many images of every class, up to one. The images
        of a class come in random order, each once per pass, and every pass has another order.

        Args:
            positions: int64 [n], from 0.
            seed: Integer >= 0.

        Returns:
            int64 [n], 0 to N - 1.
        """
        turn, place = np.divmod(positions, len(self._counts))
        # A random order of the classes: otherwise a small batch would have only classes with neighboring numbers.
        label = permutation(len(self._counts), seed, _DRAWN)[place]
        number, rank = np.divmod(turn, self._counts[label])
        keys = zip(label.tolist(), number.tolist(), rank.tolist(), strict=True)
        return np.array([self._pass(label, seed, number)[rank] for label, number, rank in keys], dtype=np.int64)

    def _pass(self, label: int, seed: int, number: int) -> np.ndarray:
        """Return the images of a class in the order of a pass, valid until the next pass of the class is requested."""
        images = self._classes[label]
        if self._passes.get(label) != (seed, number):
            images.sort()  # undo the previous order; in place, because 50 million images take 200 MB
            images[:] = images[permutation(len(images), seed, _DRAWN, label, number)]
            self._passes[label] = seed, number
        return images

    def _digest(self) -> str:
        digest = hashlib.sha256()
        images, labels = self.read(np.linspace(0, len(self) - 1, _SAMPLE).astype(np.int64))
        if images.max() <= 1:
            raise InputError(
                f"--generated has pixels from {images.min()} to {images.max()}, as floats in [0, 1] become in uint8. "
                "They must be from 0 to 255: multiply by 255 before the conversion."
            )
        for array in (self._firsts, self._counts, images.numpy(), labels.numpy()):
            digest.update(array.tobytes())
        return digest.hexdigest()


class StoredImages:
    """Images that are stored uncompressed in a file, such as one of `numpy.savez`, and mapped into memory.

    The kernel reads a page of the file when it is first accessed and drops it when memory is short. Such pages count as
    resident memory of each process, but not as its anonymous memory, and processes share them.

    Args:
        path: File.
        offset: Position of the first byte of the images in the file.
        shape: [N, H, W, C]; values are uint8.
    """

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...]):
        self.path, self.offset, self.shape = path, offset, shape
        with path.open("rb") as file:
            # Not `np.memmap`, which hides the size of the file and is pickled as a copy of its content.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._map.madvise(mmap.MADV_RANDOM)  # otherwise the kernel reads 128 kB from the disk for every image
        self._images = np.frombuffer(self._map, np.uint8, math.prod(shape), offset).reshape(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """Pickle the position in the file: another process maps the file itself."""
        return StoredImages, (self.path, self.offset, self.shape)

    def read(self, index: np.ndarray) -> np.ndarray:
        """Return copies of the images, uint8 [n, H, W, C], at ``index``, integers [n].

        Raises:
            InputError: The file has become shorter.
        """
        if self._map.size() < len(self._map):  # SIGBUS would kill a process that accesses pages past the end
            raise InputError(f"--generated {self.path} was changed while it was read. Restore it and resume.")
        return np.take(self._images, index, axis=0)  # faster than `[index]`


def _open_npz(path: Path, image_shape: tuple[int, int, int], num_classes: int) -> tuple[StoredImages, np.ndarray]:
    """Map the images of a .npz file and read its labels; compressed images are copied first.

    Args:
        path: File with ``image``, uint8 [N, H, W, C], and ``label``, integers [N].
        image_shape: (H, W, C) that the images must have.
        num_classes: Number of classes.

    Returns:
        Images, uint8 [N, H, W, C], and labels [N], in the smallest type that fits.

    Raises:
        InputError: As `GeneratedImages.open`.
    """
    if not path.is_file():
        raise InputError(f"--generated {path} is not a file. Give .npz files with image and label, every part of them.")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_headers(path, archive, image_shape)
            labels = _labels(path, archive, num_classes)
            stored = archive.getinfo(_IMAGES).compress_type == zipfile.ZIP_STORED
            mapped = path if stored else _stored_copy(archive, path)
        with zipfile.ZipFile(mapped) as archive:
            _verify(archive, mapped)
            return _stored_images(archive), labels
    except InputError:
        raise
    # RuntimeError: an encrypted member.
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"--generated {path} is not a complete .npz ({one_line(error)}). Copy or download it again."
        ) from error


class _Header(NamedTuple):
    """Header of a .npy file: shape and type of its array, and the bytes of the header itself."""

    shape: tuple[int, ...]
    dtype: np.dtype
    n_bytes: int


def _check_headers(path: Path, archive: zipfile.ZipFile, image_shape: tuple[int, int, int]) -> None:
    """Refuse other keys, types and shapes than images and their labels."""
    names = archive.namelist()
    if missing := [name for name in _MEMBERS if name not in names]:
        raise InputError(
            f"--generated {path} has no {' and no '.join(missing)} (it has {', '.join(names[:10]) or 'nothing'}). Give "
            "a .npz with image and label."
        )
    images, labels = (_header(archive, name) for name in _MEMBERS)
    if images.dtype != np.uint8 or images.shape[1:] != image_shape:
        raise InputError(
            f"--generated {path} has images of {images.dtype} {list(images.shape)}. They must be uint8 "
            f"[N, {', '.join(map(str, image_shape))}], like --dataset: resize them or give other files."
        )
    if not np.issubdtype(labels.dtype, np.integer) or len(labels.shape) != 1:
        raise InputError(
            f"--generated {path} has labels of {labels.dtype} {list(labels.shape)}. They must be int64 [N]."
        )
    if images.shape[0] != labels.shape[0] or not images.shape[0]:
        raise InputError(
            f"--generated {path} has {images.shape[0]} images and {labels.shape[0]} labels. The numbers must be equal "
            "and at least 1."
        )


def _header(archive: zipfile.ZipFile, name: str) -> _Header:
    """Read the header of a member, compressed or not.

    Raises:
        ValueError: A member that is not an array in C order, or is cut short.
    """
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        if version not in _READ_HEADER:
            raise ValueError(f"{name} has format {version}")
        shape, fortran_order, dtype = _READ_HEADER[version](file)
        n_bytes = file.tell()
    if fortran_order and len(shape) > 1:
        raise ValueError(f"{name} is in Fortran order")
    file_bytes = archive.getinfo(name).file_size
    if not dtype.hasobject and n_bytes + dtype.itemsize * math.prod(shape) != file_bytes:
        raise ValueError(f"{name} has {file_bytes} bytes, but its header states another size")
    return _Header(shape, dtype, n_bytes)


_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _labels(path: Path, archive: zipfile.ZipFile, num_classes: int) -> np.ndarray:
    """Read the labels [N] in the smallest type that fits; labels outside the classes are refused."""
    with archive.open(_LABELS) as file:
        labels = np.lib.format.read_array(file)
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(
            f"--generated {path} has labels from {labels.min()} to {labels.max()}. They must be from 0 to "
            f"{num_classes - 1}: give images of the classes of --dataset."
        )
    return labels.astype(np.min_scalar_type(num_classes - 1))


def _verify(archive: zipfile.ZipFile, path: Path) -> None:
    """Compare the content of a file with its checksums, once: a hidden file next to it notes that this was done.

    Mapped pages are not checked when they are read, so a damaged file would be trained on.

    Raises:
        zipfile.BadZipFile: They differ.
    """
    note, stat = path.with_name(f".{path.name}.verified"), path.stat()
    state = f"{stat.st_size} bytes, changed at {stat.st_mtime_ns} ns\n"
    with suppress(OSError, ValueError):
        if note.read_text(encoding="utf-8") == state:
            return
    members = [archive.getinfo(name) for name in _MEMBERS]
    total = sum(member.file_size for member in members)
    with tqdm(total=total, desc=f"verify {path.name}", unit="B", unit_scale=True, delay=2) as progress:
        for member in members:
            with archive.open(member) as file:
                while block := file.read(_CHUNK):
                    progress.update(len(block))
    with suppress(OSError):  # a folder that is not writable: then it is verified every time
        write_text(note, state)


def _stored_images(archive: zipfile.ZipFile) -> StoredImages:
    """Map images that are not compressed."""
    path, header, start = Path(str(archive.filename)), _header(archive, _IMAGES), archive.getinfo(_IMAGES).header_offset
    with path.open("rb") as file:
        # The local header, whose length zipfile does not expose: 30 bytes, then a name and an extra field, whose
        # lengths are the last 4 of them (4.3.7 of https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT).
        file.seek(start)
        name_bytes, extra_bytes = struct.unpack("<26xHH", file.read(30))
    return StoredImages(path, start + 30 + name_bytes + extra_bytes + header.n_bytes, header.shape)


def _stored_copy(archive: zipfile.ZipFile, path: Path) -> Path:
    """Return an uncompressed copy of a compressed file; it is written unless its folder has one with the same content.

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
        raise InputError(f"{what}, for which the disk has no space. Free some, or save it with numpy.savez.")
    tqdm.write(f"{what}: writing it once", file=sys.stderr)
    try:
        with atomic_file(copy) as temporary:
            _copy_members(archive, members, temporary)
    except OSError as error:
        raise InputError(f"{what}, which cannot be written ({one_line(error)}). Save it with numpy.savez.") from error
    return copy


def _is_copy(copy: Path, members: Sequence[zipfile.ZipInfo]) -> bool:
    """Return whether a file has these members, by their checksums."""
    try:
        with zipfile.ZipFile(copy) as archive:
            found = [archive.getinfo(member.filename) for member in members]
    except (OSError, LookupError, zipfile.BadZipFile):
        return False
    return [(each.CRC, each.file_size) for each in found] == [(each.CRC, each.file_size) for each in members]


def _copy_members(archive: zipfile.ZipFile, members: Sequence[zipfile.ZipInfo], path: Path) -> None:
    """Write members into a zip without compression; reading them verifies their checksums."""
    total = sum(member.file_size for member in members)
    with zipfile.ZipFile(path, "w") as target, tqdm(total=total, desc="convert", unit="B", unit_scale=True) as progress:
        for member in members:
            with archive.open(member) as source, target.open(member.filename, "w", force_zip64=True) as sink:
                while block := source.read(_CHUNK):
                    sink.write(block)
                    progress.update(len(block))
