"""Interval bounds of a model's outputs for Linf, from the model's own forward pass.

Source: Gowal et al. 2018, "On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models",
https://arxiv.org/abs/1810.12715. The bounds hold up to the rounding of the dtype they are
computed in: a published certificate is computed in float64.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from math import pi
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import resolve_name
from torch.utils._pytree import tree_map

from ..errors import InputError
from .drelu import capped
from .inference import frozen

BATCH = 256


class Interval(Tensor):
    """Tensor with a lower and an upper bound of each of its elements, which torch's functions propagate.

    A model called on an `Interval` returns one: the logits of the images, with bounds that hold for every point of
    the input interval. An operation without a rule raises InputError with its name.

    Attributes:
        value: The tensor itself, such as clean images or their logits.
        lower: Lower bounds, of the same shape.
        upper: Upper bounds, likewise.
        linear: Of the result of a Linear: its input, weight [K, D] and bias [K] or None, so that `margins` can
            subtract two outputs before it bounds them.
    """

    value: Tensor
    lower: Tensor
    upper: Tensor
    linear: "tuple[Interval, Tensor, Tensor | None] | None"

    @staticmethod
    def of(value: Tensor, lower: Tensor, upper: Tensor) -> "Interval":
        """Return the interval with these ends."""
        # Code that bypasses __torch_function__, such as a TorchScript function, sees elements of NaN: what it computes
        # from them makes the values NaN, which `certified` refuses, instead of an unsound constant.
        shell = value.new_full((), float("nan")).expand(value.shape)
        interval = Tensor._make_subclass(Interval, shell)  # pyright: ignore[reportAttributeAccessIssue]
        interval.value, interval.lower, interval.upper, interval.linear = value, lower, upper, None
        return interval

    @staticmethod
    def around(images: Tensor, eps: float) -> "Interval":
        """Return the interval within eps (Linf) of images [B, C, H, W], inside [0, 1]."""
        return Interval.of(images, (images - eps).clamp(min=0), (images + eps).clamp(max=1))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Apply the rule of a function.

        Raises:
            InputError: It has none.
        """
        rule = _RULES.get(func)
        if rule is None:
            raise InputError(f"interval bounds have no rule for {_name(func)}. {_KNOWN}")
        with torch._C.DisableTorchFunctionSubclass():
            return rule(func, *args, **(kwargs or {}))

    def margins(self, labels: Tensor) -> Tensor:
        """Return lower bounds [B, K] of logit_label - logit_k of logits [B, K]; 0 at the label itself.

        Args:
            labels: Classes [B].
        """
        with torch._C.DisableTorchFunctionSubclass():
            return self._margins(labels).masked_fill(F.one_hot(labels, self.shape[1]).bool(), 0)

    def _margins(self, labels: Tensor) -> Tensor:
        if self.linear is None:
            return self.lower.gather(1, labels.unsqueeze(1)) - self.upper
        hidden, weight, bias = self.linear
        differences = weight[labels].unsqueeze(1) - weight  # [B, K, D]
        middle, radius = _middle(hidden).unsqueeze(2), _radius(hidden).unsqueeze(2)
        margins = (differences @ middle - differences.abs() @ radius).squeeze(2)
        return margins if bias is None else margins + bias[labels].unsqueeze(1) - bias


@torch.no_grad()
def certified(model: nn.Module, images: Tensor, labels: Tensor, eps: float, rounding: float = 0.0) -> Tensor:
    """Return on which images [N] the interval bounds prove that no point within eps fools a model.

    Args:
        model: Takes [0, 1] images; used in eval mode and restored.
        images: [N, C, H, W] in the model's dtype.
        labels: Classes [N].
        eps: Linf radius, in pixel values of [0, 1].
        rounding: Share of an image's largest bound that a margin has to exceed.

    Raises:
        InputError: The model has an operation without a rule.
    """
    with frozen(model):
        proofs = [
            _proofs(model, *batch, eps, rounding)
            for batch in zip(images.split(BATCH), labels.split(BATCH), strict=True)
        ]
    return torch.cat(proofs)


def _proofs(model: nn.Module, images: Tensor, labels: Tensor, eps: float, rounding: float) -> Tensor:
    logits = bounds(model, images, eps)
    if logits.value.isnan().any():
        raise InputError(
            f"the model's logits are not numbers, or their bounds are lost in a scripted function. {_KNOWN}"
        )
    least = rounding * torch.maximum(logits.upper.abs(), logits.lower.abs()).amax(1, keepdim=True)
    # Bounds that overflow are NaN, which proves nothing.
    return ((logits.margins(labels) > least) | F.one_hot(labels, logits.shape[1]).bool()).all(1)


def bounds(model: nn.Module, images: Tensor, eps: float) -> Interval:
    """Return the logits of images [B, C, H, W] with their bounds within eps (Linf).

    Raises:
        InputError: The model has an operation without a rule.
    """
    logits = model(Interval.around(images, eps))
    if not hasattr(logits, "lower"):
        raise InputError(f"the bounds of the model's output are lost. {_KNOWN}")
    return logits


def initialize_for_ibp(model: nn.Module) -> None:
    """Draw the weights of every Linear and Conv2d from N(0, 2 pi / fan_in^2), as Shi et al. 2021 do.

    A layer then keeps the expected width of its input's interval; with torch's initialization it multiplies that by
    up to sqrt(fan_in). Source: https://arxiv.org/abs/2103.15887, section 3.1.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.normal_(layer.weight, std=(2 * pi) ** 0.5 / layer.weight[0].numel())


# Rules: (function, arguments that are intervals or anything else) to an interval.

_Rule = Callable[..., Any]
_KNOWN = "Certify models of Linear, Conv2d, BatchNorm, pooling, additions and monotone activations."


def _name(func: Any) -> str:
    return resolve_name(func) or getattr(func, "__qualname__", repr(func))


def _parts(tree: Any, part: str) -> Any:
    """Return a tree of arguments with one part of each interval in its place."""
    return tree_map(lambda leaf: getattr(leaf, part) if isinstance(leaf, Interval) else leaf, tree)


def _monotone(func: _Rule, *args: Any, **kwargs: Any) -> Any:
    """Apply a function that decreases in none of its tensors, such as ReLU, max-pooling, flatten and a sum.

    It acts on each part, so that what it overwrites in place is overwritten in all of them.
    """
    value, lower, upper = (func(*_parts(args, part), **_parts(kwargs, part)) for part in ("value", "lower", "upper"))
    if isinstance(value, Tensor):
        return Interval.of(value, lower, upper)
    return type(value)(Interval.of(*parts) for parts in zip(value, lower, upper, strict=True))


def _add(func: _Rule, x: Any, y: Any, *, alpha: float = 1) -> Interval:
    if alpha != 1:
        raise InputError(f"interval bounds have no rule for {_name(func)} with alpha {alpha}. {_KNOWN}")
    if func in _IN_PLACE and not isinstance(x, Interval):  # which would be changed once for each part of y
        raise InputError(f"interval bounds have no rule for {_name(func)} of a constant. {_KNOWN}")
    return _monotone(func, x, y)


def _subtract(func: _Rule, x: Any, y: Any) -> Interval:
    return Interval.of(
        func(_parts(x, "value"), _parts(y, "value")),
        func(_parts(x, "lower"), _parts(y, "upper")),
        func(_parts(x, "upper"), _parts(y, "lower")),
    )


def _subtract_from(func: _Rule, x: Any, y: Any) -> Interval:
    """Apply ``Tensor.__rsub__(x, y)``, which is y - x."""
    del func
    return _subtract(torch.sub, y, x)


def _scale(func: _Rule, x: Any, y: Any) -> Interval:
    """Multiply or divide by a constant, or multiply two intervals: the extremes are at the ends."""
    if isinstance(y, Interval) and func in _DIVISIONS:
        raise InputError(f"interval bounds have no rule for {_name(func)} by an activation. {_KNOWN}")
    ends = [func(a, b) for a in _ends(x) for b in _ends(y)]
    value = func(_parts(x, "value"), _parts(y, "value"))
    # Not amin and amax of a stack: they keep their result for the backward pass, and `x += y` may overwrite it.
    return Interval.of(value, reduce(torch.minimum, ends), reduce(torch.maximum, ends))


def _ends(x: Any) -> Sequence[Any]:
    return (x.lower, x.upper) if isinstance(x, Interval) else (x,)


def _middle(x: Interval) -> Tensor:
    return (x.upper + x.lower) / 2


def _radius(x: Interval) -> Tensor:
    return (x.upper - x.lower) / 2


def _around(value: Tensor, middle: Tensor, radius: Tensor) -> Interval:
    return Interval.of(value, middle - radius, middle + radius)


def _affine(func: _Rule, input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Interval:
    """Apply a Linear or a convolution: the radius goes through the absolute weights."""
    if isinstance(weight, Interval) or isinstance(bias, Interval):
        raise InputError(f"interval bounds have no rule for {_name(func)} with computed weights. {_KNOWN}")
    output = _around(
        func(input.value, weight, bias, *args, **kwargs),
        func(_middle(input), weight, bias, *args, **kwargs),
        func(_radius(input), weight.abs(), None, *args, **kwargs),
    )
    if func is F.linear:
        output.linear = (input, weight, bias)
    return output


def _batch_norm(
    func: _Rule,
    input: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Interval:
    """Normalize the bounds with the statistics of the clean batch, or with the running ones in eval mode."""
    value = func(input.value, running_mean, running_var, weight, bias, training, momentum, eps)
    if training or running_mean is None or running_var is None:
        dims = [dim for dim in range(input.value.ndim) if dim != 1]
        var, mean = torch.var_mean(input.value, dims, correction=0)
    else:
        mean, var = running_mean, running_var
    slope = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
    shift = -mean * slope if bias is None else bias - mean * slope
    shape = [1, -1, *[1] * (input.value.ndim - 2)]
    slope, shift = slope.view(shape), shift.view(shape)
    return _around(value, _middle(input) * slope + shift, _radius(input) * slope.abs())


def _dropout(func: _Rule, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Interval:
    """Drop the same elements of the values and of both bounds."""
    del inplace
    return _scale(torch.mul, input, func(torch.ones_like(input.value), p, training))


def _inspect(func: _Rule, input: Any, *args: Any) -> Any:
    """Ask for what is the same of all parts, such as the shape."""
    return func(input.value, *args)


_IN_PLACE = (Tensor.add_, Tensor.__iadd__)
_DIVISIONS = (torch.div, Tensor.div, Tensor.__truediv__)
# fmt: off
_MONOTONE = (
    capped, F.relu, F.relu6, F.relu_, F.hardtanh, F.selu, F.softplus, F.adaptive_avg_pool2d, F.avg_pool2d, F.pad,
    F.max_pool2d, torch.max_pool2d, torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.clamp, torch.maximum,
    torch.minimum, torch.mean, torch.sum, torch.amax, torch.amin,
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.movedim, torch.squeeze, torch.unsqueeze,
    torch.cat, torch.stack, torch.chunk, torch.split,
    Tensor.relu, Tensor.relu_, Tensor.sigmoid, Tensor.tanh, Tensor.clamp, Tensor.clamp_,
    Tensor.maximum, Tensor.minimum, Tensor.mean, Tensor.sum, Tensor.amax, Tensor.amin,
    Tensor.flatten, Tensor.reshape, Tensor.view, Tensor.permute, Tensor.transpose, Tensor.movedim, Tensor.squeeze,
    Tensor.unsqueeze, Tensor.chunk, Tensor.split, Tensor.expand, Tensor.__getitem__,
    Tensor.contiguous, Tensor.clone, Tensor.to, Tensor.float, Tensor.double,
)
_INSPECTED = (
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout", "is_cuda")),
    Tensor.__len__, Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous,
    Tensor.is_floating_point,
)
_RULES: dict[Any, _Rule] = {
    **dict.fromkeys(_MONOTONE, _monotone),
    **dict.fromkeys(_INSPECTED, _inspect),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, *_IN_PLACE), _add),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__), _subtract),
    Tensor.__rsub__: _subtract_from,
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, *_DIVISIONS), _scale),
    **dict.fromkeys((F.linear, torch.conv1d, torch.conv2d), _affine),
    F.batch_norm: _batch_norm,
    F.dropout: _dropout,
}
# fmt: on
