"""Activations that a `_drelu` model can use in place of its D-ReLU, by name."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .drelu import CapLayer, DReLU, SReLU, along_channels, channel_dim_of


class PReLU(nn.PReLU):
    """ReLU with a learnable slope per channel below zero, for any channel dimension.

    Source: He et al. 2015, "Delving Deep into Rectifiers", https://arxiv.org/abs/1502.01852.

    Args:
        num_features: Number of slopes; 1 for one slope shared by all units.
        channel_dim: See `CapLayer`.
    """

    def __init__(self, num_features: int, *, channel_dim: int | None = None):
        super().__init__(num_features)
        self.channel_dim = channel_dim

    def forward(self, input: Tensor) -> Tensor:
        """Scale the negative values of ``input``; the shape is kept."""
        channel_dim = channel_dim_of(input, self.channel_dim)
        return F.prelu(input.movedim(channel_dim, 1), self.weight.to(input.dtype)).movedim(1, channel_dim)


class PSSiLU(nn.Module):
    """``x * (sigmoid(|alpha| * x) - |beta|) / (1 - |beta|)`` with learnable ``alpha`` and ``beta``; SiLU at the start.

    Each layer has its own alpha and beta; the authors share one pair in the whole model.

    Source: Dai et al. 2021, "Parameterizing Activation Functions for Adversarial Robustness",
    https://arxiv.org/abs/2110.05626.
    """

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([1.0]))
        self.beta = nn.Parameter(torch.tensor([1e-8]))  # the authors' start: at 0, |beta| has no gradient

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to every unit; the shape is kept."""
        alpha, beta = self.alpha.abs().to(x.dtype), self.beta.abs().to(x.dtype)
        return x * (torch.sigmoid(alpha * x) - beta) / (1 - beta)


class PACT(DReLU):
    """``max(0, min(m, x))`` with one learnable cap ``m`` per layer: a D-ReLU whose units share their cap.

    The paper has the gradient at ``x == m`` go to ``m``; here it goes to ``x``, as in `DReLU`. Its quantization of the
    output is left out, its L2 penalty on ``m`` is `caps.cap_penalty`, and its initial cap is 10.

    Source: Choi et al. 2018, "PACT: Parameterized Clipping Activation for Quantized Neural Networks",
    https://arxiv.org/abs/1805.06085.

    Args:
        cap: Initial cap, in units of the pre-activation.
    """

    def __init__(self, cap: float = 10.0):
        super().__init__(1, cap)


class Tent(CapLayer):
    """``max(0, m - |x|)`` with a learnable size ``m`` per neuron, or per channel of 4-D input.

    The paper limits the sizes by weight decay; here `caps.cap_penalty` does. The sharing per channel is ours.

    Source: Rozsa and Boult 2019, "Improved Adversarial Robustness by Reducing Open Space Risk via Tent Activations",
    https://arxiv.org/abs/1908.02435.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the tent to every unit; the shape is kept."""
        return tent(x, self.cap, self.channel_dim)


def tent(x: Tensor, cap: Tensor, channel_dim: int | None) -> Tensor:
    """Return ``max(0, cap - |x|)`` for sizes [C] or [1]."""
    return (along_channels(cap, x, channel_dim).to(x.dtype) - x.abs()).relu()


class FitReLU(CapLayer):
    """``max(0, x * sigmoid(20 * (m - x)))`` with a learnable bound ``m``: a ReLU that returns to 0 above ``m``.

    The bound is per channel of 4-D input, where the paper has one per position. The slope of 20 is from the
    implementation in https://github.com/hamidmousavi0/reliable-relu-toolbox. The paper learns the bounds after the
    weights, with an L2 penalty; here both are learned together, and `caps.cap_penalty` is the penalty.

    Source: Ghavami et al. 2022, "FitAct: Error Resilient Deep Neural Networks via Fine-Grained Post-Trainable
    Activation Functions", https://arxiv.org/abs/2112.13544.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the bounded ReLU to every unit; the shape is kept."""
        return fitrelu(x, self.cap, self.channel_dim)


def fitrelu(x: Tensor, cap: Tensor, channel_dim: int | None) -> Tensor:
    """Return ``max(0, x * sigmoid(20 * (cap - x)))`` for bounds [C] or [1]."""
    return (x * torch.sigmoid(20 * (along_channels(cap, x, channel_dim).to(x.dtype) - x))).relu()


class RCRAF(nn.Module):
    """``min(gamma, ln(1 + exp(alpha * x)) / alpha)``: a softplus, which tends to ReLU as alpha grows, clipped at gamma.

    The paper compares alpha of 1, 10 and 20 and names two clipping parameters; that gamma bounds the output is our
    reading, as is the default alpha.

    Source: Yu et al. 2025, "RCR-AF: Enhancing Model Generalization via Rademacher Complexity Reduction Activation
    Function", https://arxiv.org/abs/2507.22446.

    Args:
        gamma: Upper bound of the output.
        alpha: Sharpness.
    """

    def __init__(self, gamma: float = 100.0, alpha: float = 10.0):
        super().__init__()
        self.gamma, self.alpha = float(gamma), float(alpha)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to every unit; the shape is kept."""
        return F.softplus(x, self.alpha).clamp(max=self.gamma)


class KWTA(nn.Module):
    """k-winners-take-all: keep the largest values of each example over all units of the layer, and set others to 0.

    Winners keep their gradient, and the losers, which have none, switch at a jump. As in the authors' code, values
    equal to the smallest winner win too.

    Source: Xiao et al. 2020, "Enhancing Adversarial Defense by k-Winners-Take-All", https://arxiv.org/abs/1905.10510.

    Args:
        ratio: Share of winners, at least one unit. The paper uses 0.1 and 0.2 most.
    """

    def __init__(self, ratio: float = 0.1):
        super().__init__()
        self.ratio = ratio

    def forward(self, x: Tensor) -> Tensor:
        """Keep the winners of ``x`` [B, ...]; the shape is kept."""
        return winners(x, self.ratio)


def winners(x: Tensor, ratio: float) -> Tensor:
    """Return ``x`` [B, ...] with all but a share of each example's largest values set to 0."""
    flat = x.flatten(1)
    smallest = flat.topk(max(int(ratio * flat.shape[1]), 1), dim=1).values[:, -1]
    return x.masked_fill(x < smallest.view([-1] + [1] * (x.ndim - 1)), 0.0)


# One node each in a traced graph: they read the rank of the input, which is not known there.
for _name in ("channel_dim_of", "tent", "fitrelu", "winners"):
    torch.fx.wrap(_name)


# From the number of channels, the cap and the channel dimension to a module.
_MAKERS: dict[str, Callable[[int, float, int | None], nn.Module]] = {
    "drelu": lambda num_features, cap, channel_dim: DReLU(num_features, cap, channel_dim=channel_dim),
    "srelu": lambda num_features, cap, channel_dim: SReLU(cap),
    "prelu": lambda num_features, cap, channel_dim: PReLU(num_features, channel_dim=channel_dim),
    "relu": lambda num_features, cap, channel_dim: nn.ReLU(),
    "relu6": lambda num_features, cap, channel_dim: nn.ReLU6(),
    "silu": lambda num_features, cap, channel_dim: nn.SiLU(),
    "gelu": lambda num_features, cap, channel_dim: nn.GELU(),
    "pssilu": lambda num_features, cap, channel_dim: PSSiLU(),
    # S-ReLU under its older name: Zantedeschi et al. 2017, https://arxiv.org/abs/1707.06728.
    "bounded-relu": lambda num_features, cap, channel_dim: SReLU(cap),
    "pact": lambda num_features, cap, channel_dim: PACT(cap),
    "tent": lambda num_features, cap, channel_dim: Tent(num_features, cap, channel_dim=channel_dim),
    "fitact": lambda num_features, cap, channel_dim: FitReLU(num_features, cap, channel_dim=channel_dim),
    "rcr-af": lambda num_features, cap, channel_dim: RCRAF(cap),
    "kwta": lambda num_features, cap, channel_dim: KWTA(),
}
ACTIVATIONS = tuple(_MAKERS)


def make_activation(activation: str, num_features: int, cap: float, channel_dim: int | None = None) -> nn.Module:
    """Create the activation module for a name in `ACTIVATIONS`.

    Args:
        activation: The name.
        num_features: Number of caps, sizes or bounds of D-ReLU, Tent and FitReLU, of slopes of PReLU.
        cap: Initial value of learned caps, sizes and bounds; fixed cap of S-ReLU and RCR-AF.
        channel_dim: See `CapLayer`.
    """
    return _MAKERS[activation](num_features, cap, channel_dim)
