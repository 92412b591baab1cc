"""Augmentation of training images as functions of random bits that the caller draws."""

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_transform
from torch import Tensor

from ..errors import InputError, one_line
from ..randomness import uniform

BITS = 6  # random uint64 per image: crop (2), flip, Cutout (2), RandAugment
# Checked here, because timm ignores what it does not know.
_CONFIG = re.compile(r"rand(-([mn]\d+|mmax\d+|inc\d|(p|mstd)\d+(\.\d+)?|t(weights|3a|3aw)))*")


@dataclass(frozen=True)
class Augmentation:
    """Settings of the augmentation, which is applied in the order RandAugment, crop, flip, Cutout, CutMix.

    Attributes:
        crop_padding: Zero padding of the random crop, in pixels; 0 for no crop.
        flip: Whether each image is mirrored with probability 1/2.
        cutout: Side of the square around a random pixel of each image that is set to zero, in pixels; 0 for none.
            DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017,
            https://arxiv.org/abs/1708.04552.
        cutmix: Probability that a batch is mixed: a box of each image, and the same share of its label, come from
            another image. Yun et al., "CutMix", ICCV 2019, https://arxiv.org/abs/1905.04899, with alpha = 1.
        rand_augment: timm's name of a RandAugment, such as "rand-m9-n2-mstd0.5"; empty for none. Cubuk et al.,
            "RandAugment", NeurIPS 2020, https://arxiv.org/abs/1909.13719.

    Raises:
        InputError: A value that is not allowed.
    """

    crop_padding: int = 0
    flip: bool = False
    cutout: int = 0
    cutmix: float = 0.0
    rand_augment: str = ""

    def __post_init__(self):
        if self.cutout < 0:
            raise InputError(f"--cutout {self.cutout} is negative. Use the side in pixels, or 0 for none.")
        if not 0 <= self.cutmix <= 1:
            raise InputError(f"--cutmix {self.cutmix} is not a probability. Use a number from 0 (none) to 1.")
        if self.rand_augment:
            _check_rand_augment(self.rand_augment)


def augment(images: Tensor, augmentation: Augmentation, bits: np.ndarray) -> Tensor:
    """Apply all augmentations except CutMix, to each image independently.

    Args:
        images: uint8 [B, C, H, W].
        augmentation: Settings.
        bits: Random uint64 [`BITS`, B].

    Returns:
        uint8 [B, C, H, W].
    """
    if augmentation.rand_augment:
        images = rand_augment(images, augmentation.rand_augment, bits[5])
    if padding := augmentation.crop_padding:
        top, left = _below(2 * padding + 1, bits[:2], images)
        images = crop(images, top, left, padding=padding)
    if augmentation.flip:
        images = flip(images, _below(2, bits[2], images))
    if augmentation.cutout:
        row, column = (_below(side, bits[3 + axis], images) for axis, side in enumerate(images.shape[2:]))
        images = cutout(images, row, column, side=augmentation.cutout)
    return images


def _below(count: int, bits: np.ndarray, images: Tensor) -> Tensor:
    """Return random integers from 0 to ``count - 1``, int64, on the device of the images."""
    return torch.from_numpy((bits % np.uint64(count)).astype(np.int64)).to(images.device)


def crop(images: Tensor, top: Tensor, left: Tensor, *, padding: int) -> Tensor:
    """Pad images with zeros and crop each to its previous size, at its own position.

    Args:
        images: [B, C, H, W] of any type.
        top: int64 [B], first row of the crop, 0 to ``2 * padding``.
        left: int64 [B], first column of the crop, 0 to ``2 * padding``.
        padding: Width of the zeros, in pixels.

    Returns:
        [B, C, H, W].
    """
    count, channels, height, width = images.shape
    padded = F.pad(images, [padding] * 4)
    # Rows are windows of one flat array: on a CPU this is many times faster than indexing by top and left.
    planes = torch.arange(count * channels, device=images.device).view(count, channels, 1)
    rows = planes * padded.shape[2] + top.view(-1, 1, 1) + torch.arange(height, device=images.device)
    starts = rows * padded.shape[3] + left.view(-1, 1, 1)
    return padded.flatten().unfold(0, width, 1).index_select(0, starts.flatten()).view_as(images)


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror some of the images horizontally.

    Args:
        images: [B, C, H, W] of any type.
        mirrored: int64 [B], 1 for an image that is mirrored, else 0.

    Returns:
        [B, C, H, W].
    """
    both = torch.cat([images, images.flip(3)])
    return both.index_select(0, torch.arange(len(images), device=images.device) + len(images) * mirrored)


def cutout(images: Tensor, row: Tensor, column: Tensor, *, side: int) -> Tensor:
    """Set a square around a pixel of each image to zero; the square may extend beyond the image.

    Args:
        images: [B, C, H, W] of any type.
        row: int64 [B], 0 to H - 1.
        column: int64 [B], 0 to W - 1.
        side: In pixels.

    Returns:
        [B, C, H, W].
    """
    height, width = images.shape[2:]
    rows, columns = _stretch(row, side, height), _stretch(column, side, width)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def _stretch(center: Tensor, length: int, size: int) -> Tensor:
    """Return which of ``range(size)`` are in an interval around each center, bool [B, size]."""
    steps = torch.arange(size, device=center.device) - (center[:, None] - length // 2)
    return (steps >= 0) & (steps < length)


Box = tuple[slice, slice]  # rows and columns


def cutmix_box(bits: np.ndarray, height: int, width: int, *, probability: float) -> Box:
    """Draw the box of a batch, cut off at the border of the images; with 1 - ``probability`` it is empty.

    Args:
        bits: Random uint64 [4].
        height: Height of the images, in pixels.
        width: Width of the images, in pixels.
        probability: Probability of a box, 0 to 1.
    """
    drawn, area, row, column = uniform(bits)
    if drawn >= probability:
        return slice(0, 0), slice(0, 0)

    def stretch(center: float, size: int) -> slice:
        length = int(size * area**0.5)
        start = int(center * size) - length // 2
        return slice(max(start, 0), min(start + length, size))

    return stretch(row, height), stretch(column, width)


def cutmix(images: Tensor, labels: Tensor, others: Tensor, other_labels: Tensor, box: Box) -> tuple[Tensor, Tensor]:
    """Replace the box in images by the same box of other images, and the same share of the labels.

    Args:
        images: [B, C, H, W] of any type.
        labels: float32 [B, K]; rows are distributions.
        others: As ``images``.
        other_labels: As ``labels``.
        box: Rows and columns that come from the others.

    Returns:
        Images and labels of the same shapes.
    """
    inside = torch.zeros(images.shape[2:], dtype=torch.bool, device=images.device)
    inside[box] = True
    return torch.where(inside, others, images), labels.lerp(other_labels, inside.float().mean().item())


def rand_augment(images: Tensor, config: str, seeds: np.ndarray) -> Tensor:
    """Apply timm's RandAugment to each image with its own seed; empty areas become gray.

    Args:
        images: uint8 [B, C, H, W], gray or RGB.
        config: timm's name of the RandAugment, such as "rand-m9-n2-mstd0.5".
        seeds: uint64 [B].

    Returns:
        uint8 [B, C, H, W].
    """
    _, in_chans, height, width = images.shape
    transform = _rand_augment(config, in_chans=in_chans, img_size=min(height, width))
    augmented = np.empty((len(images), height, width, in_chans), dtype=np.uint8)
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    with _global_generators_kept():
        for image, result, seed in zip(pixels, augmented, seeds.tolist(), strict=True):
            random.seed(seed)
            np.random.seed(seed >> 32)  # noqa: NPY002  (timm draws from both and accepts no generator)
            transformed = transform(Image.fromarray(image[:, :, 0] if in_chans == 1 else image))
            result[:] = np.asarray(transformed).reshape(height, width, in_chans)
    return torch.from_numpy(np.ascontiguousarray(augmented.transpose(0, 3, 1, 2))).to(images.device)


@contextmanager
def _global_generators_kept() -> Iterator[None]:
    """Restore the states of `random` and `np.random` at the end."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _rand_augment(config: str, *, in_chans: int, img_size: int) -> RandAugment:
    """Return timm's transform for images of this size, with its Posterize fixed."""
    gray = 128 if in_chans == 1 else (128, 128, 128)
    # As in timm's own transforms, images are shifted by up to 45 % of their side.
    transform = rand_augment_transform(config, {"img_mean": gray, "translate_const": int(0.45 * img_size)})
    for operation in transform.ops:
        if operation.name.startswith("Posterize"):
            operation.level_fn = partial(_posterize_bits, operation.level_fn)
    return transform


def _check_rand_augment(config: str) -> None:
    """Refuse a RandAugment that timm does not know or cannot apply."""
    try:
        if not _CONFIG.fullmatch(config):
            raise ValueError("the form is rand-mM-nN-pP-mstdS-mmaxM-incI-tT, in any order")
        rand_augment(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), config, np.zeros(1, dtype=np.uint64))
    except ValueError as error:
        raise InputError(
            f"--rand-augment {config!r} is not a RandAugment of timm ({one_line(error)}). Example: rand-m9-n2-mstd0.5."
        ) from error


def _posterize_bits(level_fn: Callable[..., tuple[int]], *arguments: Any) -> tuple[int]:
    """Return at least 1 bit: at one end of its scale timm uses 0 bits, which new versions of Pillow refuse."""
    return (max(1, *level_fn(*arguments)),)
