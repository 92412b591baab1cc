"""Attacks that know of capped activations, where an input gradient of exactly zero hides an adversarial example.

A unit above its cap (or below its floor) passes no gradient, so an attack that follows gradients sees a flat loss. The
attacks here replace what a capped layer computes while they search, and are judged on the model as it is.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, singledispatch

import torch
from torch import Tensor, nn

from .attacks import LOSSES, ThreatModel, drawn, per_image, pgd, random_start_pgd
from .drelu import DReLU, SReLU, along_channels

Substitute = Callable[[nn.Module, Tensor], Tensor]  # (capped layer, its input) -> what it is to return meanwhile


@singledispatch
def bounds(layer: nn.Module, x: Tensor) -> tuple[float, float | Tensor]:
    """Floor and cap of a layer that clamps its input ``x``; ``@bounds.register(MyLayer)`` makes another one known.

    Returns:
        The floor, a number, and the cap, a number or a tensor that broadcasts against ``x``.
    """
    raise TypeError(f"{type(layer).__name__} is not known to have a cap")


@bounds.register(DReLU)
def _(layer: DReLU, x: Tensor) -> tuple[float, Tensor]:
    return 0.0, along_channels(layer.cap.detach().clamp(min=0), x, layer.channel_dim).to(x.dtype)


@bounds.register(SReLU)
def _(layer: SReLU, x: Tensor) -> tuple[float, float]:
    return 0.0, max(layer.cap, 0.0)


@bounds.register(nn.Hardtanh)  # and nn.ReLU6, which is one
def _(layer: nn.Hardtanh, x: Tensor) -> tuple[float, float]:
    return layer.min_val, layer.max_val


def capped_layers(model: nn.Module) -> list[nn.Module]:
    """Every layer of the module tree that `bounds` knows, each once."""
    unknown = bounds.dispatch(object)
    return [layer for layer in model.modules() if bounds.dispatch(type(layer)) is not unknown]


@contextmanager
def substituted(model: nn.Module, substitute: Substitute) -> Iterator[nn.Module]:
    """The model with every capped layer computing ``substitute`` instead; afterwards it is what it was."""
    layers = capped_layers(model)
    try:
        for layer in layers:
            vars(layer)["forward"] = partial(substitute, layer)  # found before the class's own
        yield model
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def uncapped(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer without its cap: a ReLU, or the identity where the floor lies below zero as in hard tanh."""
    floor, _ = bounds(layer, x)
    return x if floor < 0 else x.clamp(min=floor)


def straight_through(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's own value, with the gradient of the uncapped one."""
    passing = uncapped(layer, x)
    floor, cap = bounds(layer, x)
    value = torch.minimum(x, torch.as_tensor(cap, dtype=x.dtype, device=x.device)).clamp(min=floor)
    return passing + (value - passing).detach()


def annealed(layer: nn.Module, x: Tensor, *, sharpness: float) -> Tensor:
    """A sigmoid from floor to cap, as wide as the pre-activations spread at sharpness 0, as steep as the clamp at 1.

    The spread is the root mean square distance from the middle of floor and cap, over the layer but for each example
    alone, so that no example depends on its batch.
    """
    floor, cap = bounds(layer, x)
    from_middle = x - (floor + cap) / 2
    spread = from_middle.detach().flatten(1).square().mean(dim=1).sqrt().clamp(min=1e-12)
    spread = per_image(spread, x)
    clamp_width = torch.as_tensor((cap - floor) / 4, dtype=x.dtype, device=x.device).clamp(min=1e-12)
    width = spread ** (1 - sharpness) * clamp_width**sharpness
    return floor + (cap - floor) * torch.sigmoid(from_middle / width)


def bpda(
    model: nn.Module, images: Tensor, labels: Tensor, threat_model: ThreatModel, seeds: Sequence[int], **settings
) -> Tensor:
    """`random_start_pgd` with the gradient let through every cap, the forward pass untouched.

    Source: Athalye et al. 2018, https://arxiv.org/abs/1802.00420.
    """
    with substituted(model, straight_through):
        return random_start_pgd(model, images, labels, threat_model, seeds, **settings)


def twin(
    model: nn.Module, images: Tensor, labels: Tensor, threat_model: ThreatModel, seeds: Sequence[int], **settings
) -> Tensor:
    """`random_start_pgd` on the twin of the model that has no caps, to be transferred to the model itself."""
    with substituted(model, uncapped):
        return random_start_pgd(model, images, labels, threat_model, seeds, **settings)


def annealing(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat_model: ThreatModel,
    seeds: Sequence[int],
    *,
    loss: str,
    rounds: int,
    steps: int,
    relative_step_size: float,
) -> Tensor:
    """PGD on caps that are sigmoids at first and sharpen to the true clamp, with the first success on the model kept.

    Args:
        model: Takes [0, 1] images.
        images: [B, C, H, W] in [0, 1].
        labels: [B].
        threat_model: The balls.
        seeds: One an image.
        loss: A name in `LOSSES`.
        rounds: Number of sharpnesses, from 0 to 1.
        steps: Number of gradients a round.
        relative_step_size: Length of a step, in units of eps.
    """
    adversarial = drawn(threat_model.random_start, images, seeds)
    found = images
    for sharpness in torch.linspace(0, 1, rounds).tolist():
        with substituted(model, partial(annealed, sharpness=sharpness)):
            adversarial = pgd(
                model,
                images,
                LOSSES[loss](labels),
                threat_model,
                start=adversarial,
                steps=steps,
                step_size=relative_step_size * threat_model.eps,
            )
        fooled, unbroken = (_fooled(model, candidate, labels) for candidate in (adversarial, found))
        found = torch.where(per_image(fooled & ~unbroken, images), adversarial, found)
    return found


@torch.no_grad()
def _fooled(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Which images [B, C, H, W] the model puts into another class than their label."""
    return model(images).argmax(dim=1) != labels
