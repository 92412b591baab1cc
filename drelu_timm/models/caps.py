"""What is asked of a model's caps: the penalties that shrink them, and the statistics that a training log wants."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import InputError
from .drelu import DReLU, along_channels, drelu_layers
from .head import DReLUHead


def cap_penalty(model: nn.Module) -> Tensor:
    """Sum of the squared caps over all D-ReLUs of a model (the second term of the paper's eq. 1), a scalar >= 0."""
    return _total([_whole(layer.cap).square().sum() for layer in drelu_layers(model)])


def effective_cap_penalty(model: nn.Module) -> Tensor:
    """Sum over all D-ReLU heads and their units i of ``(cap_i * |W_i|)^2``, a scalar >= 0.

    ``W_i`` are the weights from unit i to the logits, so ``cap_i * |W_i|`` is the furthest (L2) that the unit can move
    them. Shrinking the caps while the output layer grows, by which a net escapes `cap_penalty` without a change of
    its function, leaves this as it is. The gradient reaches the caps and the output layer.
    """
    return _total([(cap * weight.flatten(1)).square().sum() for cap, weight in _with_output(model)])


CAP_PENALTIES: dict[str, Callable[[nn.Module], Tensor]] = {"squared": cap_penalty, "effective": effective_cap_penalty}


def check_cap_penalty(name: str, model: nn.Module) -> None:
    """Refuse a penalty that leaves out D-ReLUs of a model; called before training.

    Args:
        name: In `CAP_PENALTIES`.
        model: As it will be trained.

    Raises:
        InputError: "effective" for a D-ReLU that has no output layer behind it.
    """
    if name == "effective" and len(_with_output(model)) < len(list(drelu_layers(model))):
        raise InputError(
            "--cap-penalty effective weighs each cap by the output layer behind it, and belongs to --placement head; "
            "this model has a D-ReLU with no output layer behind it; give --cap-penalty squared or --placement head"
        )


def _with_output(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The caps of each D-ReLU head, and the weights [K, caps, ...] of the output layer behind them."""
    heads = [module for module in model.modules() if isinstance(module, DReLUHead)]
    return [
        (_whole(head.activation.cap), _whole(head.output.weight))
        for head in heads
        if isinstance(head.activation, DReLU) and isinstance(head.output, nn.Linear | nn.Conv2d)
    ]


def _whole(parameter: Tensor) -> Tensor:
    """A parameter that FSDP has shared out over the processes, gathered; any other as it is."""
    from torch.distributed.tensor import DTensor  # not with `import drelu_timm`, which it would slow down

    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _total(penalties: list[Tensor]) -> Tensor:
    return torch.stack(penalties).sum() if penalties else torch.zeros(())


def cap_statistics(model: nn.Module) -> dict[str, float]:
    """Mean, smallest and largest cap of a model, and the share of caps at or below 0; empty without a D-ReLU."""
    caps = [_whole(layer.cap.detach()).flatten() for layer in drelu_layers(model)]
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
        model.forward(images)  # not through __call__, where a compiled model would pass over the hooks
    finally:
        for hook in hooks:
            hook.remove()
    if not counts:
        return {}
    total = torch.stack(counts).sum(0).cpu().double()
    return dict(zip(("zero", "active", "capped"), (total / total.sum()).tolist(), strict=True))
