"""Normalisation as a model's first layer, so that the model takes images in [0, 1]."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError
from .surgery import TimmModel


class Normalize(nn.Module):
    """``(images - mean) / std`` a channel, [B, C, H, W] to the same."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalise images [B, C, H, W].

        Raises:
            InputError: Images with another number of channels, which would broadcast without a word.
        """
        return _normalize(images, self.mean, self.std)


def _normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    if images.shape[1] != mean.shape[1]:
        raise InputError(f"images have {images.shape[1]} channels, the model takes {mean.shape[1]}")
    return (images - mean) / std


torch.fx.wrap("_normalize")  # one node in a traced graph, where the shape of images is not known


def normalized(
    model: TimmModel, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> nn.Sequential:
    """A model for [0, 1] images: ``Sequential(normalize=..., model=model)``, as RobustBench wants it.

    Args:
        model: A timm model for normalised images.
        mean: One value a channel; by default that of ``model.pretrained_cfg``, averaged over its channels where the
            model has another number of them.
        std: Likewise.
    """
    cfg = model.pretrained_cfg
    in_chans = channels_of(model)
    mean = tuple(mean) if mean is not None else _spread(cfg["mean"], in_chans)
    std = tuple(std) if std is not None else _spread(cfg["std"], in_chans)
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), model=model))


def channels_of(model: TimmModel) -> int:
    """How many channels the images of a built model have."""
    args = getattr(model, "_model_args", {})
    return args.get("in_chans") or getattr(model, "in_chans", None) or model.pretrained_cfg["input_size"][0]


def _spread(values: Sequence[float], count: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == count else (sum(values) / len(values),) * count
