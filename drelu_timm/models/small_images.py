"""ImageNet models on images of some 32 pixels: a first convolution that keeps their size, or upsampling."""

import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DReLUWarning, InputError
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

    def __init_subclass__(cls):
        if Upsampled in cls.__bases__:  # not with another mixin on top, whose base upsamples already
            for name in ("forward", "forward_features", "forward_intermediates"):
                if hasattr(cls, name):
                    setattr(cls, name, _upsampling(getattr(cls, name)))

    def __prepare_scriptable__(self) -> Any:
        raise InputError(
            f"torch.jit.script cannot compile {type(self).__name__} with upsampling in front; "
            "use torch.jit.trace or torch.export.export"
        )


def _upsampling(method: Callable[..., Any]) -> Callable[..., Any]:
    """A model's method, which takes images [B, C, H, W] of any size."""

    @wraps(method)  # torch.fx goes by the arguments of the model's own
    def upsampling(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, _upsample(x, self.upsample.size), *args, **kwargs)

    return upsampling


def _upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if tuple(x.shape[-2:]) == size else F.interpolate(x, size, mode="bilinear")


torch.fx.wrap("_upsample")  # one node in a traced graph, where the shape of x is not known


def warn_of_small_images(
    model: TimmModel, first_convs: Sequence[str], made_for: Sequence[int], image_size: Sequence[int], stride: int = 1
) -> None:
    """Warn where a model for large images is to get some of at most 64 pixels a side.

    Args:
        model: A timm model.
        first_convs: Paths of its first convolutions.
        made_for: (H, W) that its architecture is made for.
        image_size: (H, W) of the images.
        stride: Largest stride of a first convolution that suits the images.
    """
    if max(image_size) <= SMALL_SIDE < min(made_for) and _stride(model, first_convs) > stride:
        height, width = image_size
        warnings.warn(
            f"{model.pretrained_cfg['architecture']} starts with an ImageNet stem, which leaves little of "
            f"{height}x{width} images; create it with small_images=True",
            DReLUWarning,
            stacklevel=2,
        )


def _stride(model: TimmModel, first_convs: Sequence[str]) -> int:
    """The largest stride of the first convolutions, and of those behind the ones that placement "stem" adds."""
    blocks = [model.get_submodule(name.removesuffix(".conv")) for name in first_convs]
    convs = [module for block in blocks for module in block.modules() if isinstance(module, nn.Conv2d)]
    return max((conv.stride[0] for conv in convs), default=1)
