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

aten = torch.ops.aten


class CapLayer(nn.Module):
    """Base class of activations with a learnable ``cap`` per neuron, or per channel of 4-D input.

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

    def extra_repr(self) -> str:
        """Return the number of caps and, if it is not the default, their dimension."""
        channel_dim = "" if self.channel_dim is None else f", channel_dim={self.channel_dim}"
        return f"{self.cap.numel()}{channel_dim}"


class DReLU(CapLayer):
    """``DReLU(x) = max(0, min(m, x))`` with a learnable cap ``m`` per neuron, or per channel of 4-D input.

    A negative cap gives output 0, as in the formula, but receives the gradient of a cap at 0. With the formula's own
    gradient, which is zero there, a cap that an optimizer step moved below 0 would stay there. For positive caps the
    gradient is the formula's; at ``x == m`` it goes to ``x``. See `CapLayer` for the arguments.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Clamp ``x`` to [0, cap] of its unit."""
        return capped(x, self.cap, self.channel_dim)


def capped(x: Tensor, cap: Tensor, channel_dim: int | None) -> Tensor:
    """Return ``max(0, min(cap, x))`` with the gradients of `DReLU`, for caps [C] or [1]."""
    if has_torch_function_unary(x):  # `intervals.Interval`
        return handle_torch_function(capped, (x,), x, cap, channel_dim)
    # In x's dtype: a float32 cap would promote bf16 activations to float32 under autocast.
    cap = along_channels(cap, x, channel_dim).to(x.dtype)
    # TorchScript cannot save `_Capped`, and torch.compile cannot trace it. The last two lines have its values and
    # gradients, but take ten times as long on a CPU unless a compiler fuses them. `clamp` with a tensor as its bound is
    # as slow, and `minimum` divides the gradient where x is equal to the cap.
    if not torch.jit.is_scripting() and not (torch.jit.is_tracing() or torch.compiler.is_compiling()):
        transformed = torch._C._are_functorch_transforms_active()
        return (_CappedInTransforms if transformed else _Capped).apply(x, cap)
    cap = cap - cap.clamp(max=0).detach()  # value of cap.clamp(min=0), gradient of cap
    return torch.where(x > cap, cap, x.relu())


torch.fx.wrap("capped")  # one node in a traced graph, where the rank of x is not known


class _Capped(torch.autograd.Function):
    """``max(0, min(cap, x))`` that saves ``x`` and the caps for its backward pass, where autograd would save copies.

    It can be differentiated twice and in forward mode.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cap: Tensor) -> Tensor:
        ctx.save_for_backward(x, cap)
        ctx.save_for_forward(x, cap)
        return torch.minimum(x, cap.clamp(min=0)).relu_()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        x, cap = ctx.saved_tensors
        of_x, of_cap = tangents
        return torch.where(x > cap.clamp(min=0), of_cap, torch.where(x > 0, of_x, 0))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        (gradient,) = gradients
        x, cap = ctx.saved_tensors
        excess = x - cap.clamp(min=0)
        # One buffer for every step: allocating memory costs more than the arithmetic.
        buffer = excess if _may_overwrite(gradient) else None
        to_cap = None
        # Both functions return, in one pass, the gradient or 0. threshold_backward keeps it where its second argument
        # exceeds its third, hardtanh_backward between its last two; nothing lies between 0 and the least number.
        if ctx.needs_input_grad[1]:
            # A cap receives the gradient of the units above max(cap, 0) even if it is negative, so that it can recover.
            above = _keep(aten.threshold_backward, buffer, gradient, excess, 0)
            # Cloned, because a sum over no dimension returns the buffer itself.
            to_cap = above.sum_to_size(cap.shape).clone()
            below = torch.sub(gradient, above, out=buffer)
        else:
            least = 5e-324 if x.dtype == torch.float64 else 1e-45
            below = _keep(aten.hardtanh_backward, buffer, gradient, excess, -torch.inf, least)
        return _keep(aten.threshold_backward, buffer, below, x, 0), to_cap


class _CappedInTransforms(_Capped):
    """`_Capped` in the form that vmap and torch.func need, which costs a fifth more on a dense layer."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cap: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.minimum(x, cap.clamp(min=0)).relu_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)


def _keep(operation: Any, buffer: Tensor | None, *arguments: Any) -> Tensor:
    """Call an operation, writing into the buffer if there is one."""
    # By their overloads: to let torch choose one costs a sixth of the time of a dense layer.
    return operation.default(*arguments) if buffer is None else operation.grad_input(*arguments, grad_input=buffer)


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


def cap_layers(model: nn.Module) -> Iterator[CapLayer]:
    """Yield every layer of a model with learnable caps once."""
    return (module for module in model.modules() if isinstance(module, CapLayer))
