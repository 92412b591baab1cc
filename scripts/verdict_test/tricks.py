"""Layers whose own gradient misleads attacks, each with what a hand-written attack differentiates instead."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from math import pi

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn


class Trick(nn.Module):
    """Layer that hides the gradient.

    Attributes:
        opened: Whether attacks get a useful gradient; the value stays the same. In training it always is.
        removed: Whether the layer computes a smooth stand-in, for attacks that transfer from such a model.
    """

    opened = removed = False

    def forward(self, x: Tensor) -> Tensor:
        if self.removed:
            return self.smooth(x)
        if not (self.opened or self.training):
            return self.hidden(x)
        smooth = self.smooth(x)
        with torch.no_grad():
            value = self.hidden(x)
        return smooth + (value - smooth).detach()

    def hidden(self, x: Tensor) -> Tensor:
        """Return the layer's output with its own gradient."""
        raise NotImplementedError

    def smooth(self, x: Tensor) -> Tensor:
        """Return an approximation with a useful gradient: the identity, unless a subclass has a better one."""
        return x


@contextmanager
def tricks_set(model: nn.Module, *, opened: bool = False, removed: bool = False) -> Iterator[None]:
    """Set the flags of all tricks of a model, and restore them afterwards."""
    tricks = [layer for layer in model.modules() if isinstance(layer, Trick)]
    before = [(layer.opened, layer.removed) for layer in tricks]
    try:
        for layer in tricks:
            layer.opened, layer.removed = opened, removed
        yield
    finally:
        for layer, flags in zip(tricks, before, strict=True):
            layer.opened, layer.removed = flags


class _Tampered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, tamper: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.tamper = tamper
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.tamper(gradient), None


class Tampered(Trick):
    """Identity whose backward pass returns something else than the derivative."""

    def __init__(self, tamper: Callable[[Tensor], Tensor]):
        super().__init__()
        self.tamper = tamper

    def hidden(self, x: Tensor) -> Tensor:
        return _Tampered.apply(x, self.tamper)


def half_nan(gradient: Tensor) -> Tensor:
    """Return NaN for every second pixel."""
    flat = gradient.flatten(1).clone()
    flat[:, ::2] = torch.nan
    return flat.view_as(gradient)


def constant(gradient: Tensor) -> Tensor:
    """Return ones."""
    return torch.ones_like(gradient)


def random(gradient: Tensor) -> Tensor:
    """Return normal noise."""
    return torch.randn_like(gradient)


def flipped(gradient: Tensor) -> Tensor:
    """Return the negative gradient."""
    return -gradient


def permuted(gradient: Tensor) -> Tensor:
    """Return the gradient with its pixels in reverse order."""
    return gradient.flatten(1).flip(1).view_as(gradient)


def few_pixels(gradient: Tensor) -> Tensor:
    """Return the gradient of 6 pixels, 0 for the others."""
    kept = torch.zeros_like(gradient).flatten(1)
    kept[:, 5::10] = 1
    return gradient * kept.view_as(gradient)


def smallest_pixels(gradient: Tensor) -> Tensor:
    """Return the half of the gradient that matters least, 0 for the others."""
    size = gradient.flatten(1).abs()
    return gradient * (size <= size.median(dim=1, keepdim=True).values).view_as(gradient)


class InfiniteSlope(Trick):
    """Adds 0 times a square root, whose derivative at 0 is infinite: NaN where a pixel is at most one half."""

    def hidden(self, x: Tensor) -> Tensor:
        return x + 0 * (x - 0.5).clamp(min=0).sqrt()


class Sinus(Trick):
    """Adds a small wave of high frequency: the derivative is right, and useless (shattered gradients)."""

    def hidden(self, x: Tensor) -> Tensor:
        return x + 0.01 * torch.sin(1000 * x)


class Sawtooth(Trick):
    """Subtracts a small sawtooth that is twice as steep as the identity: it falls everywhere but at its jumps."""

    def hidden(self, x: Tensor) -> Tensor:
        return x - 0.02 * torch.remainder(100 * x, 1)


class Steps(Trick):
    """Rounds to multiples of ``width``."""

    def __init__(self, width: float):
        super().__init__()
        self.width = width

    def hidden(self, x: Tensor) -> Tensor:
        return torch.round(x / self.width) * self.width


class Blind(Trick):
    """Identity that passes the gradient of every ``keep``-th feature only."""

    def __init__(self, keep: int):
        super().__init__()
        self.keep = keep

    def hidden(self, x: Tensor) -> Tensor:
        passed = torch.zeros(x[0].numel())
        passed[:: self.keep] = 1
        passed = passed.view(x[0].shape)
        return x * passed + x.detach() * (1 - passed)


class JPEG(Trick):
    """Writes and reads each 8x8 image as a block of a JPEG file."""

    def hidden(self, x: Tensor) -> Tensor:
        row = (x.detach().squeeze(1).permute(1, 0, 2).reshape(8, -1) * 255).round().byte()
        file = BytesIO()
        Image.fromarray(row.numpy()).save(file, "JPEG", quality=75)
        decoded = torch.from_numpy(np.asarray(Image.open(file)).copy()).float() / 255
        return decoded.view(8, -1, 8).permute(1, 0, 2).unsqueeze(1)


class SparseDCT(Trick):
    """Sets the coefficients of the cosine transform below a threshold to 0 and rounds the others."""

    def __init__(self):
        super().__init__()
        k, n = torch.arange(8.0).view(-1, 1), torch.arange(8.0)
        basis = torch.cos(pi * (2 * n + 1) * k / 16) / 2
        basis[0] /= 2**0.5
        self.register_buffer("basis", basis)

    def hidden(self, x: Tensor) -> Tensor:
        coefficients = self.basis @ x @ self.basis.T
        rounded = (coefficients / 0.3).round() * 0.3
        return self.basis.T @ rounded @ self.basis


class Thermometer(Trick):
    """Each pixel as 16 channels, one for each threshold that it exceeds (Buckman et al. 2018)."""

    def hidden(self, x: Tensor) -> Tensor:
        return (x > self.thresholds()).to(x.dtype)

    def smooth(self, x: Tensor) -> Tensor:
        return torch.sigmoid(20 * (x - self.thresholds()))

    @staticmethod
    def thresholds() -> Tensor:
        return torch.arange(16).view(-1, 1, 1) / 16


class OneHotLevels(Trick):
    """Each pixel as 8 channels, 1 for its level and 0 for the others (discretized input)."""

    def hidden(self, x: Tensor) -> Tensor:
        levels = (x * 7).round().long().clamp(0, 7).squeeze(1)
        return F.one_hot(levels, 8).permute(0, 3, 1, 2).to(x.dtype)

    def smooth(self, x: Tensor) -> Tensor:
        centers = torch.arange(8.0).view(-1, 1, 1) / 7
        return torch.softmax(-200 * (x - centers).square(), dim=1)


class Capped(Trick):
    """ReLU with a learnable cap, in nobody's library."""

    def __init__(self, units: int):
        super().__init__()
        self.cap = nn.Parameter(torch.full((units,), 10.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x) if self.training else super().forward(x)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.clamp(x, min=0.0), self.cap)

    def smooth(self, x: Tensor) -> Tensor:
        return x.clamp(min=0)


class WinnersTakeAll(Trick):
    """Keeps the ``winners`` largest units, the others are 0 (k-WTA, Xiao et al. 2020)."""

    def __init__(self, winners: int):
        super().__init__()
        self.winners = winners

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x) if self.training else super().forward(x)

    def hidden(self, x: Tensor) -> Tensor:
        return x * (x >= x.topk(self.winners, dim=1).values[:, -1:])

    def smooth(self, x: Tensor) -> Tensor:
        threshold = x.topk(self.winners, dim=1).values[:, -1:].detach()
        return x * torch.sigmoid(5 * (x - threshold))


class Sign(Trick):
    """Sign of the input: a binarized activation."""

    def hidden(self, x: Tensor) -> Tensor:
        return x.sign()

    def smooth(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class Jump(Trick):
    """ReLU that jumps by 2 (the jump activation of the self-study defences)."""

    def hidden(self, x: Tensor) -> Tensor:
        return x.clamp(min=0) + 2 * (x > 0.5)

    def smooth(self, x: Tensor) -> Tensor:
        return x.clamp(min=0) + 2 * torch.sigmoid(4 * (x - 0.5))


class Tent(nn.Module):
    """Tent activation (Rozsa and Boult 2019): 0 away from 0."""

    def forward(self, x: Tensor) -> Tensor:
        return (1.5 - x.abs()).clamp(min=0)


class Dropout(nn.Module):
    """Dropout that stays active at test time."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.share, training=True)


class Shift(nn.Module):
    """Moves every image by up to a pixel, at random."""

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1))
        crops = [padded[i : i + 1, :, top : top + 8, left : left + 8] for i, (top, left) in enumerate(_corners(len(x)))]
        return torch.cat(crops)


class Erase(nn.Module):
    """Erases a square of 3x3 pixels, at random."""

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.ones_like(x)
        for i, (top, left) in enumerate(torch.randint(0, 6, (len(x), 2)).tolist()):
            kept[i, :, top : top + 3, left : left + 3] = 0
        return x * kept


def _corners(count: int) -> list[list[int]]:
    return torch.randint(0, 3, (count, 2)).tolist()


class ActivationPruning(nn.Module):
    """Stochastic activation pruning (Dhillon et al. 2018): keeps units in proportion to their size, rescaled."""

    def forward(self, x: Tensor) -> Tensor:
        share = x.abs() / x.abs().sum(dim=1, keepdim=True).clamp(min=1e-9)
        kept = 1 - (1 - share) ** x.shape[1]
        return x * (torch.rand_like(x) < kept) / kept.clamp(min=1e-3)


class BatchStandardized(nn.Module):
    """Standardizes each unit over the batch: BatchNorm that was left in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + 1e-2).sqrt()


class BatchCentered(nn.Module):
    """Subtracts half of the mean of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5 * x.mean(dim=0, keepdim=True)


class Median(nn.Module):
    """Median of 3x3 pixels (feature squeezing, Xu et al. 2018)."""

    def forward(self, x: Tensor) -> Tensor:
        windows = F.unfold(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3)
        return windows.view(len(x), 9, 8, 8).median(dim=1, keepdim=True).values


class Blur(nn.Module):
    """Mean of 3x3 pixels (a self-study defence)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


class MeanSparse(nn.Module):
    """Moves units within a threshold of their mean to the mean (Amini et al. 2024)."""

    def __init__(self, mean: Tensor, threshold: Tensor):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("threshold", threshold)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where((x - self.mean).abs() < self.threshold, self.mean, x)
