"""Generated images: .npz files of several GB as one virtual array, of which only what is asked for is read."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..randomness import permuted
from .npz import StoredArray, open_npz

_SAMPLE = 64  # images that a digest looks at


class GeneratedImages:
    """Images and labels of one or more .npz files, one after another.

    Labels are kept as stretches of one class, so that files sorted by class, as EDM's are, take no memory to speak of,
    and unsorted ones some 30 bytes an image.

    Args:
        images: uint8 [N, H, W, C] of every file.
        labels: Integers [N] of every file, below ``num_classes``.
        num_classes: Number of classes; there must be an image of each.

    Raises:
        InputError: Labels outside the classes, a class without an image, or pixels of 0 and 1 only.

    Attributes:
        digest: sha256 over the number of images of every file and class, and over a sample of the images: what a
            resumed run compares.
    """

    def __init__(self, images: Sequence[StoredArray], labels: Sequence[StoredArray], num_classes: int):
        self._images = images
        self._firsts = np.cumsum([0, *map(len, images)])  # of every file, and the end
        stretches = [_stretches(each, num_classes) for each in labels]
        pairs = zip(self._firsts[:-1], stretches, strict=True)
        self._starts = np.concatenate([first + starts for first, (starts, _) in pairs])
        self._labels = np.concatenate([values for _, values in stretches])
        lengths = np.diff(self._starts, append=len(self))
        # Ordered by class, stretches follow each other without gaps: image r of class c lies at _class_firsts[c] + r.
        order = np.argsort(self._labels, kind="stable")
        self._begins = np.cumsum(lengths[order]) - lengths[order]
        self._shifts = self._starts[order] - self._begins
        self._counts = np.bincount(self._labels, weights=lengths, minlength=num_classes).astype(np.int64)
        self._class_firsts = np.cumsum(self._counts) - self._counts
        if missing := np.flatnonzero(self._counts == 0).tolist():
            raise InputError(
                f"--generated has no images of {len(missing)} of {num_classes} classes ({str(missing[:5])[1:-1]}); "
                "give every part, so that the classes can be balanced"
            )
        self.digest = self._digest()

    @classmethod
    def open(cls, paths: Sequence[Path], *, img_size: int, in_chans: int, num_classes: int) -> "GeneratedImages":
        """Open .npz files with ``image``, uint8 [N, H, W, C], and ``label``, integers [N]; nothing is unpacked.

        A compressed one is converted beside itself, once. Where several processes open the same files, one of them
        should come first.

        Args:
            paths: One or more files, or the parts of one.
            img_size: Height and width that the images must have, in pixels.
            in_chans: Channels that they must have: 1 or 3.
            num_classes: Number of classes.

        Raises:
            InputError: A file that is missing, no zip, cut short, or holds other keys, types, shapes or labels; a class
                without an image.
        """
        if not paths:
            raise InputError("--generated names no file; give one or more .npz files with image and label")
        parts = [open_npz(Path(path).expanduser(), (img_size, img_size, in_chans)) for path in paths]
        return cls([images for images, _ in parts], [labels for _, labels in parts], num_classes)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def read(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Read images, in the order of ``index``.

        Args:
            index: int64 [n], 0 to N - 1.

        Returns:
            uint8 images [n, C, H, W] and int64 labels [n].
        """
        images = np.empty((len(index), *self._images[0].shape[1:]), dtype=np.uint8)
        part = np.searchsorted(self._firsts, index, side="right") - 1
        for number in np.unique(part):
            images[part == number] = self._images[number].rows(index[part == number] - self._firsts[number])
        labels = self._labels[np.searchsorted(self._starts, index, side="right") - 1]
        # By NumPy: the same copy by torch takes several times as long for uint8.
        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), torch.from_numpy(labels)

    def drawn(self, positions: np.ndarray, seed: int) -> np.ndarray:
        """Which images lie at positions of an endless random sequence that is a function of the seed alone.

        Classes take turns, so that any stretch of the sequence has as many images of one as of another, or one more.
        Those of a class come in random order, none twice before all were there, then in another random order.

        Args:
            positions: int64 [n], from 0.
            seed: Integer >= 0.

        Returns:
            int64 [n], 0 to N - 1.
        """
        turn, place = np.divmod(positions, len(self._counts))
        label = permuted(place, len(self._counts), seed)  # or a small batch would have neighbours in the alphabet only
        cycle, rank = np.divmod(turn, self._counts[label])
        place = self._class_firsts[label] + permuted(rank, self._counts[label], seed, label, cycle)
        return place + self._shifts[np.searchsorted(self._begins, place, side="right") - 1]

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


def _stretches(labels: StoredArray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Where stretches of one class begin, and which class: int64 [R] each.

    Raises:
        InputError: Labels outside the classes.
    """
    starts, values = [], []
    start, last = 0, -1
    for chunk in labels.chunks():
        if chunk.min() < 0 or chunk.max() >= num_classes:
            raise InputError(
                f"--generated {labels.path} has labels from {chunk.min()} to {chunk.max()}; allowed are 0 to "
                f"{num_classes - 1}: give images of the classes of --dataset"
            )
        changes = np.flatnonzero(np.diff(chunk, prepend=last))
        starts.append(start + changes)
        values.append(chunk[changes].astype(np.int64))
        start, last = start + len(chunk), chunk[-1]
    return np.concatenate(starts), np.concatenate(values)
