"""Checks of the images and labels that are evaluated; each error is one line."""

import torch
from torch import Tensor

from ..errors import InputError


def checked(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the images [N, C, H, W] and labels [N] as plain tensors, the labels as int64 on the CPU.

    The labels are a copy; the images share the memory of those given, and nothing writes into them.

    Raises:
        InputError: No tensors, images that are not in [0, 1], or labels that are no classes.
    """
    for name, given in {"images": images, "labels": labels}.items():
        if not isinstance(given, Tensor):
            raise InputError(f"{name} are {type(given).__name__}; give a torch.Tensor, as torch.from_numpy makes one")
        if given.layout != torch.strided or given.is_meta:
            raise InputError(f"{name} are a tensor of {given.layout} on {given.device}; give a dense one with values")
    images, labels = (given.detach().as_subclass(Tensor) for given in (images, labels))
    _check_images(images)
    if len(images) == 0 or labels.shape != images.shape[:1]:
        raise InputError(f"{len(images)} images and labels of shape {list(labels.shape)}; give one label an image")
    low, high = images.aminmax()
    if images.is_floating_point() and not 0 <= low <= high <= 1:  # NaN fails too
        raise InputError(
            f"images lie in [{low:.4g}, {high:.4g}]; give them in [0, 1], normalisation belongs into the model"
        )
    if images.dtype == torch.uint8 and 0 < high <= 1:
        raise InputError("images are uint8 from 0 to 1; give uint8 from 0 to 255, or floats in [0, 1]")
    if labels.dtype == torch.bool or labels.is_complex():
        raise InputError(f"labels are {labels.dtype}; give integers from 0 to classes - 1")
    indices = labels.to("cpu", torch.int64, copy=True)  # torch has no minimum of uint16
    if labels.is_floating_point() or indices.min() < 0:
        raise InputError(f"labels are {labels.dtype} from {labels.min()}; give integers from 0 to classes - 1")
    return images, indices


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or not (images.is_floating_point() or images.dtype == torch.uint8):
        raise InputError(
            f"images are {images.dtype} {list(images.shape)}; give [N, C, H, W], floats in [0, 1] or uint8"
        )
    if len(images) and not images.numel():
        raise InputError(f"images of shape {list(images.shape)} have no pixels; give [N, C, H, W]")


def check_labels(labels: Tensor, num_classes: int, *, called: str = "the model") -> None:
    """Check that a model has an output for every label [N].

    Raises:
        InputError: It has not.
    """
    if labels.max() >= num_classes:
        raise InputError(
            f"the labels go up to {labels.max()} but {called} has {num_classes} outputs; "
            "give the dataset that the model was trained on"
        )


def channels_hint(shape: torch.Size) -> str:
    """What to do about images of a shape [N, C, H, W] that looks like [N, H, W, C]; empty for others."""
    if shape[3] not in (1, 3) or shape[1] in (1, 3):
        return ""
    return f"images {list(shape)} look like [N, H, W, C]; if they are, give images.permute(0, 3, 1, 2)"
