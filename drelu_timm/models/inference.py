"""A model in use: normalization as its first layer, attack mode, memory format and device."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError

TimmModel = Any  # an nn.Module with timm's attributes, which pyright would take for tensors


class Normalize(nn.Module):
    """``(images - mean) / std`` per channel, from [B, C, H, W] to the same shape."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalize images [B, C, H, W].

        Raises:
            InputError: Images with another number of channels, which would be broadcast silently.
        """
        return _normalize(images, self.mean, self.std)


def _normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    if images.shape[1] != mean.shape[1]:
        raise InputError(f"images have {images.shape[1]} channels, but the model takes {mean.shape[1]}.")
    return (images - mean) / std


torch.fx.wrap("_normalize")  # one node in a traced graph, where the shape of images is not known


def normalized(
    model: TimmModel, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> nn.Sequential:
    """Return a model for [0, 1] images, ``Sequential(normalize=..., model=model)``, as RobustBench expects it.

    Args:
        model: A timm model for normalized images.
        mean: One value per channel. By default the value in ``model.pretrained_cfg``, averaged over its channels if the
            model has another number of channels.
        std: As ``mean``.
    """
    cfg = model.pretrained_cfg
    in_chans = channels_of(model)
    mean = tuple(mean) if mean is not None else _spread(cfg["mean"], in_chans)
    std = tuple(std) if std is not None else _spread(cfg["std"], in_chans)
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), model=model))


def channels_of(model: TimmModel) -> int:
    """Return the number of channels of the images that a timm model takes."""
    args = getattr(model, "_model_args", {})
    return args.get("in_chans") or getattr(model, "in_chans", None) or model.pretrained_cfg["input_size"][0]


def _spread(values: Sequence[float], count: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == count else (sum(values) / len(values),) * count


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model into eval mode without weight gradients; on exit, restore every module's mode and every flag.

    In eval mode an attack neither uses nor updates the batch statistics of BatchNorm, and dropout is off. Weight
    gradients, which attacks do not use, cost about a quarter of an attack's time.
    """
    # The result of torch.jit.freeze has no `training`.
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        _set_mode(model, training=False)
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield model
    finally:
        for module, training in modes:
            if module.training != training:
                _set_mode(module, training=training)  # reverts what an overridden `train` did, such as LoRA's merging
        for module, training in modes:
            module.training = training
        for parameter in trainable:
            parameter.requires_grad_(True)


def _set_mode(model: nn.Module, *, training: bool) -> None:
    try:
        model.train() if training else model.eval()  # both, because a model may override only one
    except NotImplementedError:  # a module from torch.export, whose mode is fixed; other modules may be next to it
        for module in model.modules():
            module.training = training


@contextmanager
def channels_last(model: nn.Module) -> Iterator[nn.Module]:
    """Put the convolution weights of a CPU model into the channels-last format; on exit, restore them.

    A small CNN's forward pass takes a half to a third of the time with it, a resnet18's a tenth less.
    """
    weights = [weight for weight in model.parameters() if weight.ndim == 4 and not weight.is_cuda]
    before = [weight.data for weight in weights]
    try:
        for weight in weights:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        yield model
    finally:
        for weight, data in zip(weights, before, strict=True):
            weight.data = data


def device_of(model: nn.Module, otherwise: torch.device | str = "cpu") -> torch.device:
    """Return the device of a model's first parameter or buffer; ``otherwise`` for a model that has none."""
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device(otherwise))
