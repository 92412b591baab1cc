"""Training batches, each a function of (seed, epoch, step) alone."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Images, to_float
from .errors import InputError
from .randomness import permutation, random_bits


class TrainingBatches:
    """Shuffled and augmented batches, each a function of (seed, epoch, step) alone.

    So any number of processes sees the same batches, each its own part of them, and a resumed training goes on with
    the batch that it would have had. Images that do not fill a last batch are left out, other ones in every epoch.

    Args:
        images: The training set, on any device; batches are made there.
        batch_size: Images in a batch, of all processes together.
        seed: Integer >= 0.
        crop_padding: Width of the zeros around an image, out of which it is cropped again at random, in pixels.
        flip: Whether each image is mirrored with probability 1/2.

    Attributes:
        steps_per_epoch: Number of batches in an epoch.

    Raises:
        InputError: Fewer images than a batch has, or a value that is not allowed.
    """

    def __init__(self, images: Images, *, batch_size: int, seed: int, crop_padding: int = 0, flip: bool = False):
        if not 1 <= batch_size <= len(images):
            raise InputError(
                f"--batch-size {batch_size} is not possible with {len(images)} training images; give 1 to {len(images)}"
            )
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.crop_padding = crop_padding
        self.flip = flip
        self.steps_per_epoch = len(images) // batch_size
        self._epoch, self._order = 0, permutation(len(images), seed, 0)

    def batch(self, epoch: int, step: int, process_index: int = 0, num_processes: int = 1) -> tuple[Tensor, Tensor]:
        """A process's part of a batch: float32 images [B / num_processes, C, H, W] in [0, 1], and their labels.

        Args:
            epoch: From 0.
            step: From 0 to ``steps_per_epoch - 1``.
            process_index: From 0 to ``num_processes - 1``; the parts lie in the batch in this order.
            num_processes: Must divide the batch size.

        Raises:
            InputError: A batch size that the number of processes does not divide.
        """
        if self.batch_size % num_processes:
            raise InputError(
                f"--batch-size {self.batch_size} (of all processes together) cannot be shared by {num_processes} "
                f"processes; give a multiple of {num_processes}"
            )
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch of {self.steps_per_epoch} steps")
        share = self.batch_size // num_processes
        part = slice(process_index * share, (process_index + 1) * share)
        index = self._epoch_order(epoch)[step * self.batch_size :][part]
        batch = self.images[torch.from_numpy(index).to(self.images.labels.device)]
        return to_float(self._augment(batch.images, epoch, step, part)), batch.labels

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """The order of an epoch; the last one is kept, since making it can take longer than a batch."""
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(len(self.images), self.seed, epoch)
        return self._order

    def _augment(self, images: Tensor, epoch: int, step: int, part: slice) -> Tensor:
        """Augment a part of a batch; drawn on the CPU for the whole of it, so that device and part do not matter."""
        bits = random_bits(3 * self.batch_size, self.seed, epoch, step).reshape(3, -1)[:, part]
        if self.crop_padding:
            offsets = (bits[:2] % np.uint64(2 * self.crop_padding + 1)).astype(np.int64)
            top, left = torch.from_numpy(offsets).to(images.device)
            images = crop(images, top, left, padding=self.crop_padding)
        if self.flip:
            mirrored = torch.from_numpy(bits[2] % np.uint64(2) == 1).to(images.device)
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        return images


def crop(images: Tensor, top: Tensor, left: Tensor, *, padding: int) -> Tensor:
    """Pad images with zeros, and crop each to its old size at its own place.

    Args:
        images: [B, C, H, W] of any type.
        top: int64 [B], first row of the crop, 0 to ``2 * padding``.
        left: int64 [B], first column of the crop, 0 to ``2 * padding``.
        padding: Width of the zeros, in pixels.

    Returns:
        [B, C, H, W].
    """
    height, width = images.shape[2:]
    crops = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view: [B, C, tops, lefts, H, W]
    return crops[torch.arange(len(images), device=images.device), :, top, left]
