"""D-ReLU, a ReLU with a learnable cap for every neuron, and S-ReLU, the same with a fixed one.

Source: Sooksatra and Rivas, "Dynamic-Max-Value ReLU Functions for Adversarially Robust Machine Learning Models",
Mathematics 2024, 12(22), 3551, https://doi.org/10.3390/math12223551.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class DReLU(nn.Module):
    """``DReLU(x) = max(0, min(m, x))`` with one learnable cap ``m`` a neuron, or a channel on 4-D input.

    A cap below zero gives output 0, as the formula says. Its gradient is then taken as if the cap stood at 0: the
    formula's own gradient is zero there, so that a unit whose cap an optimiser step once carried below zero could
    never come back. For caps above zero the gradient is the formula's; at ``x == m`` it goes to ``x``.

    Args:
        num_features: Number of caps; 1 shares one cap among all units.
        cap: Initial value of every cap, in units of the pre-activation (the paper: 100).
        channel_dim: Dimension the caps lie along. By default 1 for 4-D input [B, C, H, W], else the last, as in
            [B, C] and [B, N, C]; -1 for [B, H, W, C].

    Shape:
        Input and output are the same: [B, C], [B, N, C], [B, C, H, W], or whatever ``channel_dim`` says.
    """

    def __init__(self, num_features: int, cap: float = 100.0, *, channel_dim: int | None = None):
        super().__init__()
        self.channel_dim = channel_dim
        self.cap = nn.Parameter(torch.full((num_features,), float(cap)))

    def forward(self, x: Tensor) -> Tensor:
        """Cap ``x`` from below at 0 and from above at the unit's own cap."""
        # Value max(m, 0), gradient 1 to m everywhere: this is what brings a negative cap back.
        cap = self.cap + (self.cap.clamp(min=0) - self.cap).detach()
        # In x's dtype, or a float32 cap would promote bf16 activations to float32 under autocast.
        cap = along_channels(cap, x, self.channel_dim).to(x.dtype)
        return torch.where(x > cap, cap, x.relu())

    def extra_repr(self) -> str:
        """Number of caps and, where it is not the default, their dimension."""
        channel_dim = "" if self.channel_dim is None else f", channel_dim={self.channel_dim}"
        return f"{self.cap.numel()}{channel_dim}"


class SReLU(nn.Module):
    """``SReLU(x) = max(0, min(m, x))`` with one fixed cap ``m`` (eq. of section 3 of the paper).

    Args:
        cap: The cap, in units of the pre-activation.
    """

    def __init__(self, cap: float = 100.0):
        super().__init__()
        self.cap = float(cap)

    def forward(self, x: Tensor) -> Tensor:
        """Cap ``x`` from below at 0 and from above at the cap; the shape stays."""
        return x.clamp(min=0.0).clamp(max=max(self.cap, 0.0))

    def extra_repr(self) -> str:
        """The cap."""
        return f"cap={self.cap}"


def along_channels(values: Tensor, x: Tensor, channel_dim: int | None) -> Tensor:
    """Reshape [C] values so that they broadcast along the channel dimension of ``x``."""
    if channel_dim is None:
        channel_dim = 1 if x.ndim == 4 else -1
    shape = [1] * x.ndim
    shape[channel_dim] = values.numel()
    return values.view(shape)


def drelu_layers(model: nn.Module) -> Iterator[DReLU]:
    """Every D-ReLU of a model, each once."""
    return (module for module in model.modules() if isinstance(module, DReLU))


def cap_penalty(model: nn.Module) -> Tensor:
    """Sum of the squared caps over all D-ReLUs of a model (the second term of the paper's eq. 1), a scalar >= 0."""
    penalties = [layer.cap.square().sum() for layer in drelu_layers(model)]
    return torch.stack(penalties).sum() if penalties else torch.zeros(())


def cap_statistics(model: nn.Module) -> dict[str, float]:
    """Mean, smallest and largest cap of a model; empty without a D-ReLU."""
    caps = [layer.cap.detach().flatten() for layer in drelu_layers(model)]
    if not caps:
        return {}
    values = torch.cat(caps).float()
    return {"mean": values.mean().item(), "min": values.min().item(), "max": values.max().item()}


@torch.no_grad()
def unit_shares(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Share of D-ReLU units, over images [B, C, H, W], that stand at 0, between 0 and their cap, or above it.

    Only the units between pass a gradient on. Empty without a D-ReLU.
    """
    counts: list[Tensor] = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, DReLU)
        (x,) = inputs
        cap = along_channels(layer.cap.clamp(min=0), x, layer.channel_dim).to(x.dtype)
        zero, capped = x <= 0, x > cap
        counts.append(torch.stack([zero.sum(), (~zero & ~capped).sum(), (capped & ~zero).sum()]))

    hooks = [layer.register_forward_pre_hook(count) for layer in drelu_layers(model)]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not counts:
        return {}
    total = torch.stack(counts).sum(0).cpu().double()
    return dict(zip(("zero", "active", "capped"), (total / total.sum()).tolist(), strict=True))
