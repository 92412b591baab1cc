"""Decoded images in memory as uint8 tensors, and the split into training and held-out images."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..randomness import permutation


@dataclass(frozen=True)
class Images:
    """Decoded images with labels. Their order is fixed, and the first n are a fair sample for every n.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], from 0 to the number of classes - 1.
        classes: Names of the classes.
        title: Name of the dataset in tables.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    title: str

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> "Images":
        return replace(self, images=self.images[index], labels=self.labels[index])

    def to(self, device: torch.device | str) -> "Images":
        """Return a copy on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of every channel, in [0, 1] units."""
        counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in self.images.unbind(1)])
        shares = counts.double() / counts.sum(1, keepdim=True)
        values = torch.arange(256, dtype=torch.float64, device=shares.device) / 255
        mean = shares @ values
        std = (shares @ values.square() - mean.square()).sqrt()
        return tuple(mean.tolist()), tuple(std.tolist())


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [0, 1], of the same shape."""
    return images.float().div_(255)  # in place: a sixth of the time of allocating a second float tensor


def as_float(images: Tensor) -> Tensor:
    """Convert images to float32 in [0, 1], of the same shape, from floats in [0, 1] or uint8."""
    return images.float() if images.is_floating_point() else to_float(images)


def hold_out(images: Images, fraction: float, *, seed: int) -> tuple[Images, Images]:
    """Split a training set into a part for training and a held-out part for choices such as the best epoch.

    Of n images per class, round(fraction * n) random ones are held out. Both parts keep the order.

    Args:
        images: Training set.
        fraction: Share that is held out, above 0 and below 1.
        seed: Integer >= 0 that determines the split.

    Returns:
        The training part and the held-out part.

    Raises:
        InputError: A fraction outside (0, 1), or one that leaves a part empty.
    """
    if not 0 < fraction < 1:
        raise InputError(f"held-out fraction {fraction} is not allowed. Use a number above 0 and below 1.")
    labels = images.labels.cpu().numpy()
    order = permutation(len(labels), seed)
    order = order[np.argsort(labels[order], kind="stable")]  # class by class, each in random order
    counts = np.bincount(labels)
    rank = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)  # of an image within its class
    held = np.zeros(len(labels), dtype=bool)
    held[order] = rank < np.repeat(np.rint(fraction * counts), counts)
    if held.all() or not held.any():
        raise InputError(
            f"held-out fraction {fraction} of {len(labels)} images in {np.count_nonzero(counts)} classes leaves one "
            "part empty. Use a fraction closer to 0.5, or more images."
        )
    return images[torch.from_numpy(~held)], images[torch.from_numpy(held)]
