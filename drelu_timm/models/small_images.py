"""ImageNet models on images of some 32 pixels: a first convolution that keeps their size, or upsampling."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DReLUWarning
from .surgery import TimmModel, blank_image, mix_in, probing, replace

PROBE_SIDE = 32  # pixels: what a small-image stem has to cope with
SMALL_SIDE = 64  # pixels: up to here an ImageNet stem throws away most of an image


def adapt_to_small_images(model: TimmModel, first_convs: Sequence[str], input_size: Sequence[int]) -> None:
    """Give a model a first layer for small images.

    Where the model begins with one overlapping convolution of stride 2 (resnet, densenet, efficientnet, regnet, ...),
    that convolution becomes 3x3 with stride 1 and the pooling directly behind the stem goes. Where it begins
    otherwise (patches, several branches), or cannot take 32 pixels even so (inception), images are upsampled.

    Args:
        model: Built for ``input_size``.
        first_convs: Paths of its first convolutions.
        input_size: (C, H, W) that upsampling goes to.
    """
    if max(input_size[-2:]) <= SMALL_SIDE:
        return
    if len(first_convs) == 1 and _takes_small(model, first_convs[0], input_size[0]):
        return
    mix_in(model, Upsampled)
    model.upsample = nn.Upsample(size=tuple(input_size[-2:]), mode="bilinear")


def _takes_small(model: TimmModel, first_conv: str, in_chans: int) -> bool:
    """Change the stem if it can be changed; False, with the model as it was, if not."""
    conv = model.get_submodule(first_conv)
    if not _overlaps(conv, in_chans):
        return False
    pool = _stem_pool(model, first_conv)
    before = (conv.kernel_size, conv.stride, conv.padding, conv.weight)
    pool_before = model.get_submodule(pool) if pool else None
    if conv.stride[0] == 2:
        _shrink(conv)
        if pool:
            replace(model, pool, nn.Identity())
    try:
        with probing(model):
            model(blank_image(model, (in_chans, PROBE_SIDE, PROBE_SIDE)))
    except (RuntimeError, AssertionError):
        conv.kernel_size, conv.stride, conv.padding, conv.weight = before
        if pool and pool_before is not None:
            replace(model, pool, pool_before)
        return False
    return True


def _overlaps(conv: nn.Module, in_chans: int) -> bool:
    """Whether this is a convolution over the image itself with overlapping windows, so that its stride can be 1."""
    return isinstance(conv, nn.Conv2d) and conv.in_channels == in_chans and 2 >= conv.stride[0] < conv.kernel_size[0]


def _shrink(conv: nn.Conv2d) -> None:
    """Make a convolution 3x3 with stride 1: the middle of its kernel, scaled to keep a fresh layer's variance."""
    margin = (conv.kernel_size[0] - 3) // 2
    middle = conv.weight.detach()[:, :, margin : margin + 3, margin : margin + 3] * (conv.kernel_size[0] / 3)
    conv.weight = nn.Parameter(middle.clone())
    conv.kernel_size, conv.stride = (3, 3), (1, 1)
    conv.padding = (1, 1) if any(conv.padding) else (0, 0)


def _stem_pool(model: TimmModel, first_conv: str) -> str | None:
    """Path of the pooling directly behind the stem: the first after its convolution and not deeper in the tree."""
    behind = False
    for name, module in model.named_modules():
        behind = behind or name == first_conv
        if behind and name.count(".") <= first_conv.count(".") and _is_pool(module):
            return name
    return None


def _is_pool(module: nn.Module) -> bool:
    """Whether a module is a pooling, or a pooling followed by a blur."""
    leaves = [leaf for leaf in module.modules() if not list(leaf.children())]
    pools = any(isinstance(leaf, nn.MaxPool2d | nn.AvgPool2d) for leaf in leaves)
    return pools and not list(module.parameters())


class Upsampled:
    """A model that upsamples its images first; mixed into the model's own class."""

    upsample: nn.Upsample

    def _enlarge(self, x: Tensor) -> Tensor:
        return x if tuple(x.shape[-2:]) == self.upsample.size else self.upsample(x)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's forward on upsampled images [B, C, H, W]."""
        return super().forward(self._enlarge(x), *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's forward_features on upsampled images [B, C, H, W]."""
        return super().forward_features(self._enlarge(x), *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's forward_intermediates on upsampled images [B, C, H, W]."""
        return super().forward_intermediates(self._enlarge(x), *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


def warn_of_small_images(model: TimmModel, first_convs: Sequence[str], image_size: Sequence[int]) -> None:
    """Let a model made for large images warn, once, when it meets some of at most 64 pixels a side.

    Args:
        model: A timm model.
        first_convs: Paths of its first convolutions.
        image_size: (H, W) that it is made for.
    """
    convs = [module for module in map(model.get_submodule, first_convs) if isinstance(module, nn.Conv2d)]
    if min(image_size) > SMALL_SIDE and any(conv.stride[0] > 1 for conv in convs):
        model.register_forward_pre_hook(_warn_once)


def _warn_once(model: TimmModel, args: tuple[Tensor, ...]) -> None:
    if torch.compiler.is_compiling() or getattr(model, "_warned_of_small_images", False):
        return
    height, width = args[0].shape[-2:]
    if max(height, width) <= SMALL_SIDE:
        model._warned_of_small_images = True
        architecture = getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)
        warnings.warn(
            f"{architecture} begins with an ImageNet stem, which leaves little of {height}x{width} images; "
            "create it with small_images=True",
            DReLUWarning,
            stacklevel=2,
        )
