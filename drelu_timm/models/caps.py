"""Penalties that shrink the caps of a model, and statistics of the caps for the training log."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import InputError
from .drelu import CapLayer, DReLU, along_channels, cap_layers
from .head import DReLUHead


def cap_penalty(model: nn.Module) -> Tensor:
    """Return the sum of the squared learnable caps (second term of the paper's eq. 1), a scalar >= 0."""
    return _total([_gathered(layer.cap).square().sum() for layer in cap_layers(model)])


def effective_cap_penalty(model: nn.Module) -> Tensor:
    """Return the sum over all heads and their units i of ``(cap_i * |W_i|)^2``, a scalar >= 0.

    ``W_i`` are the weights from unit i to the logits, so ``cap_i * |W_i|`` is the largest distance (L2) by which the
    unit can move them. Shrinking the caps and scaling up the output layer, which lowers `cap_penalty` but does not
    change the model's function, does not lower this penalty. The gradient reaches the caps and the output layer.
    """
    return _total([(cap * weight.flatten(1)).square().sum() for cap, weight in _with_output(model)])


CAP_PENALTIES: dict[str, Callable[[nn.Module], Tensor]] = {"squared": cap_penalty, "effective": effective_cap_penalty}


def check_cap_penalty(name: str, model: nn.Module) -> None:
    """Check before training that a penalty in `CAP_PENALTIES` covers all caps of a model.

    Raises:
        InputError: "effective" for caps that have no output layer behind them.
    """
    if name == "effective" and len(_with_output(model)) < len(list(cap_layers(model))):
        raise InputError(
            "--cap-penalty effective weighs each cap by the output layer behind it, but this model has caps "
            "without one. Use --cap-penalty squared or --placement head."
        )


def _with_output(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return the caps of each head that has some and the weights [K, caps, ...] of the output layer behind them."""
    heads = [module for module in model.modules() if isinstance(module, DReLUHead)]
    return [
        (_gathered(head.activation.cap), _gathered(head.output.weight))
        for head in heads
        if isinstance(head.activation, CapLayer) and isinstance(head.output, nn.Linear | nn.Conv2d)
    ]


def _gathered(parameter: Tensor) -> Tensor:
    """Gather a parameter that FSDP has sharded over the processes; return any other unchanged."""
    from torch.distributed.tensor import DTensor  # imported here because it slows down `import drelu_timm`

    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _total(penalties: list[Tensor]) -> Tensor:
    return torch.stack(penalties).sum() if penalties else torch.zeros(())


def cap_statistics(model: nn.Module) -> dict[str, float]:
    """Return the mean, minimum and maximum cap and the share of caps <= 0; empty for a model without caps."""
    caps = [_gathered(layer.cap.detach()).flatten() for layer in cap_layers(model)]
    if not caps:
        return {}
    values = torch.cat(caps).float()
    return {
        "mean": values.mean().item(),
        "min": values.min().item(),
        "max": values.max().item(),
        "not_positive": (values <= 0).float().mean().item(),
    }


@torch.no_grad()
def unit_shares(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Return the shares of D-ReLU units that are at 0, between 0 and their cap, or above it, on images [B, C, H, W].

    Only the units between 0 and their cap pass a gradient. Empty for a model without D-ReLU.
    """
    counts: list[Tensor] = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, CapLayer)
        (x,) = inputs
        cap = along_channels(layer.cap.clamp(min=0), x, layer.channel_dim).to(x.dtype)
        zero, capped = x <= 0, x > cap
        counts.append(torch.stack([zero.sum(), (~zero & ~capped).sum(), (capped & ~zero).sum()]))

    hooks = [layer.register_forward_pre_hook(count) for layer in cap_layers(model) if isinstance(layer, DReLU)]
    try:
        model.forward(images)  # not __call__: a compiled model would skip the hooks
    finally:
        for hook in hooks:
            hook.remove()
    if not counts:
        return {}
    total = torch.stack(counts).sum(0).cpu().double()
    return dict(zip(("zero", "active", "capped"), (total / total.sum()).tolist(), strict=True))
