"""Generated images: .npz files of several GB as one array, of which only the images that are asked for are read."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..randomness import permutation
from .npz import StoredImages, open_npz

_SAMPLE = 64  # images that a digest looks at
ORDER = "a shuffle per class and pass"  # a state names it: reword it when `drawn` changes, and older runs are refused
_DRAWN = 2**32 - 1  # first part of a key, which no epoch and no pass over the real images reaches


class GeneratedImages:
    """Images and labels of one or more .npz files, one after another.

    Images are mapped into memory. A process keeps 5 bytes per image: 1 for its label (2 with more than 256 classes) and
    4 for the random order, so 250 MB for 50 million images. Forked workers share them with the training process.

    Args:
        images: uint8 [N, H, W, C] of every file.
        labels: Unsigned integers [N] of every file, below ``num_classes``.
        num_classes: Number of classes; there must be an image of each.

    Raises:
        InputError: A class without an image, or pixels of 0 and 1 only.

    Attributes:
        digest: sha256 over the number of images of every file and class and over a sample of the images, which a
            resumed run compares.
    """

    def __init__(self, images: Sequence[StoredImages], labels: Sequence[np.ndarray], num_classes: int):
        self._images = images
        self._firsts = np.cumsum([0, *map(len, images)])  # of every file, and the end
        self._labels = np.concatenate(labels)
        self._counts = np.bincount(self._labels, minlength=num_classes)
        if missing := np.flatnonzero(self._counts == 0).tolist():
            raise InputError(
                f"--generated has no images of {len(missing)} of {num_classes} classes ({str(missing[:5])[1:-1]}); "
                "give every part, so that the classes can be balanced"
            )
        by_class = np.argsort(self._labels, kind="stable").astype(np.min_scalar_type(len(self)))
        # Images of every class, in the order of its pass below, which is (seed, number of the pass).
        self._classes = np.split(by_class, np.cumsum(self._counts)[:-1])
        self._passes: dict[int, tuple[int, int]] = {}
        self.digest = self._digest()

    @classmethod
    def open(cls, paths: Sequence[Path], *, img_size: int, in_chans: int, num_classes: int) -> "GeneratedImages":
        """Open .npz files with ``image``, uint8 [N, H, W, C], and ``label``, integers [N]; nothing is unpacked.

        A compressed file is copied once, uncompressed, into its folder. Where several processes open the same files,
        one of them should do so first.

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
        parts = [open_npz(Path(path).expanduser(), (img_size, img_size, in_chans), num_classes) for path in paths]
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
        """Return which images are at positions of an endless random sequence, a function of the seed alone.

        Classes take turns, so that any stretch of the sequence has as many images of one as of another, or one more.
        Those of a class come in random order, none twice before all were there, then in another random order.

        Args:
            positions: int64 [n], from 0.
            seed: Integer >= 0.

        Returns:
            int64 [n], 0 to N - 1.
        """
        turn, place = np.divmod(positions, len(self._counts))
        # A random order of the classes, or a small batch would have neighbours in the alphabet only.
        label = permutation(len(self._counts), seed, _DRAWN)[place]
        number, rank = np.divmod(turn, self._counts[label])
        keys = zip(label.tolist(), number.tolist(), rank.tolist(), strict=True)
        return np.array([self._pass(label, seed, number)[rank] for label, number, rank in keys], dtype=np.int64)

    def _pass(self, label: int, seed: int, number: int) -> np.ndarray:
        """Return the images of a class in the order of a pass, valid until another pass of the class is asked for."""
        images = self._classes[label]
        if self._passes.get(label) != (seed, number):
            images.sort()  # from the order of any other pass; in place, since 50 million images take 200 MB
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
