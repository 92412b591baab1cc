"""Activations that a `_drelu` model can use in place of its D-ReLU, by name."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .drelu import DReLU, SReLU, channel_dim_of


class PReLU(nn.PReLU):
    """ReLU with a learnable slope per channel below zero, for any channel dimension.

    Source: He et al. 2015, "Delving Deep into Rectifiers", https://arxiv.org/abs/1502.01852.

    Args:
        num_features: Number of slopes; 1 for one slope shared by all units.
        channel_dim: See `DReLU`.
    """

    def __init__(self, num_features: int, *, channel_dim: int | None = None):
        super().__init__(num_features)
        self.channel_dim = channel_dim

    def forward(self, input: Tensor) -> Tensor:
        """Scale the negative values of ``input``; the shape is kept."""
        channel_dim = channel_dim_of(input, self.channel_dim)
        return F.prelu(input.movedim(channel_dim, 1), self.weight.to(input.dtype)).movedim(1, channel_dim)


torch.fx.wrap("channel_dim_of")  # it reads the rank of the input, which is not known in a traced graph


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


_WITHOUT_ARGUMENTS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "gelu": nn.GELU, "pssilu": PSSiLU}
ACTIVATIONS = ("drelu", "pact", "srelu", "prelu", *_WITHOUT_ARGUMENTS)


def make_activation(activation: str, num_features: int, cap: float, channel_dim: int | None = None) -> nn.Module:
    """Create the activation module for a name in `ACTIVATIONS`.

    Args:
        activation: The name.
        num_features: Number of caps of D-ReLU, of slopes of PReLU.
        cap: Initial cap of D-ReLU and PACT (one learned cap for the layer), fixed cap of S-ReLU.
        channel_dim: See `DReLU`.
    """
    if activation == "drelu":
        return DReLU(num_features, cap, channel_dim=channel_dim)
    if activation == "pact":  # Choi et al. 2018, https://arxiv.org/abs/1805.06085, without its quantization
        return DReLU(1, cap, channel_dim=channel_dim)
    if activation == "prelu":
        return PReLU(num_features, channel_dim=channel_dim)
    return SReLU(cap) if activation == "srelu" else _WITHOUT_ARGUMENTS[activation]()
