"""D-ReLU, a ReLU with a learnable cap per neuron, and S-ReLU, a ReLU with a fixed cap.

Source: Sooksatra and Rivas, "Dynamic-Max-Value ReLU Functions for Adversarially Robust Machine Learning Models",
Mathematics 2024, 12(22), 3551, https://doi.org/10.3390/math12223551.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.overrides import handle_torch_function, has_torch_function_unary


class DReLU(nn.Module):
    """``DReLU(x) = max(0, min(m, x))`` with a learnable cap ``m`` per neuron, or per channel of 4-D input.

    A negative cap gives output 0, as in the formula, but receives the gradient of a cap at 0. With the formula's own
    gradient, which is zero there, a cap that an optimizer step moved below 0 would stay there. For positive caps the
    gradient is the formula's; at ``x == m`` it goes to ``x``.

    Args:
        num_features: Number of caps; 1 for one cap shared by all units.
        cap: Initial value of every cap, in units of the pre-activation (100 in the paper).
        channel_dim: Dimension of the caps. By default 1 for 4-D input [B, C, H, W], otherwise the last, as in [B, C]
            and [B, N, C]; -1 for [B, H, W, C].

    Shape:
        Input and output are equal: [B, C], [B, N, C], [B, C, H, W], or any that fits ``channel_dim``.
    """

    def __init__(self, num_features: int, cap: float = 100.0, *, channel_dim: int | None = None):
        super().__init__()
        self.channel_dim = channel_dim
        self.cap = nn.Parameter(torch.full((num_features,), float(cap)))

    def forward(self, x: Tensor) -> Tensor:
        """Clamp ``x`` to [0, cap] of its unit."""
        return capped(x, self.cap, self.channel_dim)

    def extra_repr(self) -> str:
        """Return the number of caps and, if it is not the default, their dimension."""
        channel_dim = "" if self.channel_dim is None else f", channel_dim={self.channel_dim}"
        return f"{self.cap.numel()}{channel_dim}"


def capped(x: Tensor, cap: Tensor, channel_dim: int | None) -> Tensor:
    """Return ``max(0, min(cap, x))`` with the gradients of `DReLU`, for caps [C] or [1]."""
    if has_torch_function_unary(x):  # `intervals.Interval`
        return handle_torch_function(capped, (x,), x, cap, channel_dim)
    # In x's dtype: a float32 cap would promote bf16 activations to float32 under autocast.
    cap = along_channels(cap, x, channel_dim).to(x.dtype)
    # TorchScript cannot save `_Capped`, and torch.compile cannot trace it. The last two lines have its values and
    # gradients, but take ten times as long on a CPU unless a compiler fuses them. `clamp` and `minimum` are no
    # alternative: for x equal to the cap they divide the gradient, in ways that differ between versions of torch.
    if not torch.jit.is_scripting() and not (torch.jit.is_tracing() or torch.compiler.is_compiling()):
        return _Capped.apply(x, cap)
    cap = cap - cap.clamp(max=0).detach()  # value of cap.clamp(min=0), gradient of cap
    return torch.where(x > cap, cap, x.relu())


torch.fx.wrap("capped")  # one node in a traced graph, where the rank of x is not known


class _Capped(torch.autograd.Function):
    """``max(0, min(cap, x))`` that saves ``x`` and the caps for its backward pass, where autograd would save copies.

    It can be differentiated twice, in forward mode, and under vmap and torch.func.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cap: Tensor) -> Tensor:
        return torch.minimum(x, cap.clamp(min=0)).relu_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        x, cap = ctx.saved_tensors
        of_x, of_cap = tangents
        return torch.where(x > cap.clamp(min=0), of_cap, torch.where(x > 0, of_x, 0))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        (gradient,) = gradients
        x, cap = ctx.saved_tensors
        # threshold_backward returns, in one pass, the gradient where its second argument exceeds the third, else 0.
        # A cap receives the gradient of the units above max(cap, 0) even if it is negative, so that it can recover.
        above = x - cap.clamp(min=0)
        # One buffer for every step: allocating memory costs more than the arithmetic.
        buffer = {"grad_input": above} if _may_overwrite(gradient) else {}
        above = torch.ops.aten.threshold_backward(gradient, above, 0, **buffer)
        # Cloned, because a sum over no dimension returns the buffer itself.
        to_cap = above.sum_to_size(cap.shape).clone() if ctx.needs_input_grad[1] else None
        below = torch.sub(gradient, above, out=buffer.get("grad_input"))
        return torch.ops.aten.threshold_backward(below, x, 0, **buffer), to_cap


def _may_overwrite(gradient: Tensor) -> bool:
    """Return whether a backward pass may write into a buffer: not in double backward or for batched gradients."""
    # Batched gradients (is_grads_batched, vmap) do not support `out`, and torch has no public test for them.
    batched = functorch.is_batchedtensor(gradient) or functorch.is_legacy_batchedtensor(gradient)
    return not (batched or torch.is_grad_enabled())


class SReLU(nn.Module):
    """``SReLU(x) = max(0, min(m, x))`` with one fixed cap ``m`` (section 3 of the paper).

    Args:
        cap: The cap, in units of the pre-activation.
    """

    def __init__(self, cap: float = 100.0):
        super().__init__()
        self.cap = float(cap)

    def forward(self, x: Tensor) -> Tensor:
        """Clamp ``x``, of any shape, to [0, cap]."""
        return x.clamp(min=0.0).clamp(max=max(self.cap, 0.0))

    def extra_repr(self) -> str:
        """Return the cap."""
        return f"cap={self.cap}"


def along_channels(values: Tensor, x: Tensor, channel_dim: int | None) -> Tensor:
    """Reshape values [C] so that they broadcast along the channel dimension of ``x``."""
    shape = [1] * x.ndim
    shape[channel_dim_of(x, channel_dim)] = values.numel()
    return values.view(shape)


def channel_dim_of(x: Tensor, channel_dim: int | None) -> int:
    """Return ``channel_dim``, or the default of `DReLU` for the rank of ``x`` if it is None."""
    if channel_dim is not None:
        return channel_dim
    return 1 if x.ndim == 4 else -1


def drelu_layers(model: nn.Module) -> Iterator[DReLU]:
    """Yield every D-ReLU of a model once."""
    return (module for module in model.modules() if isinstance(module, DReLU))
