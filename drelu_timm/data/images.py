"""A decoded set of images in memory, as uint8 tensors, and the part of it that choices are made on."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..randomness import permutation


@dataclass(frozen=True)
class Images:
    """A decoded set of images, always in the same order, of which the first n are a fair sample for any n.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], below the number of classes.
        classes: Name of every class.
        title: What tables call the set.
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
        """The same set on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of every channel, in [0, 1] units."""
        counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in self.images.unbind(1)])
        shares = counts.double() / counts.sum(1, keepdim=True)
        values = torch.arange(256, dtype=torch.float64, device=shares.device) / 255
        mean = shares @ values
        std = (shares @ values.square() - mean.square()).sqrt()
        return tuple(mean.tolist()), tuple(std.tolist())


def to_float(images: Tensor) -> Tensor:
    """Turn uint8 images into float32 in [0, 1]; the shape stays."""
    return images.float().div_(255)  # in place on the new floats: a sixth of the time of making others


def as_float(images: Tensor) -> Tensor:
    """Images as float32 in [0, 1], from floats in [0, 1] or from uint8; the shape stays."""
    return images.float() if images.is_floating_point() else to_float(images)


def hold_out(images: Images, fraction: float, *, seed: int) -> tuple[Images, Images]:
    """Split a training set into what is trained on and what choices are made on.

    Of a class with n images round(fraction * n) are held out, drawn at random; both parts keep the order.

    Args:
        images: The training set.
        fraction: Share that is held out, above 0 and below 1.
        seed: Integer >= 0; the same seed gives the same split.

    Returns:
        The training part and the held-out part.

    Raises:
        InputError: A fraction outside (0, 1), or one that leaves a part empty.
    """
    if not 0 < fraction < 1:
        raise InputError(f"held-out fraction {fraction} is not possible; give a number above 0 and below 1")
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
            "part empty; give a fraction nearer to 0.5, or more images"
        )
    return images[torch.from_numpy(~held)], images[torch.from_numpy(held)]
