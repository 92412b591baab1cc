"""Attacks that know of the layers which hide an adversarial example behind a zero or useless input gradient.

A unit above its cap (or below its floor), a quantiser or a JPEG layer passes no gradient, so an attack that follows
gradients sees a flat loss. The attacks here differentiate, or compute, something else in the place of such a layer
while they search, and are judged on the model as it is. What stands in for a layer is said once, in `backward`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial, singledispatch
from itertools import chain

import torch
from timm.layers.activations import HardSigmoid, Sigmoid, Tanh
from timm.layers.activations_me import HardSigmoidMe
from torch import Tensor, nn

from ..models.drelu import DReLU, SReLU, along_channels
from ..models.modes import frozen
from .library import apgd
from .losses import LOSSES, Loss, targeted_margin
from .pgd import Found, drawn, pgd, random_start_pgd
from .threat_model import ThreatModel, per_image

Clamp = Callable[[Tensor, float, float | Tensor], Tensor]  # (x, floor, cap) -> what stands in for the clamped x
Forward = Callable[[Tensor], Tensor]


@singledispatch
def backward(layer: nn.Module, x: Tensor, clamp: Clamp) -> Tensor:
    """What attacks differentiate in the place of a layer (BPDA, Athalye et al. 2018, https://arxiv.org/abs/1802.00420).

    One line makes a layer of one's own known, with or without a cap::

        backward.register(Quantise, lambda layer, x, clamp: x)
        backward.register(Capped, lambda layer, x, clamp: clamp(x, 0.0, layer.cap))

    Args:
        layer: The layer.
        x: Its input.
        clamp: ``(x, floor, cap)`` to what stands in for a clamp, to be called wherever the layer has one. A floor
            below zero saturates as a cap does; one at zero is that of a ReLU and stays. The cap may be a tensor that
            broadcasts against ``x``.

    Raises:
        TypeError: Nothing is registered for the layer.
    """
    raise TypeError(f"{type(layer).__name__} has no backward substitute; give it one by adaptive.backward.register")


def _drelu(layer: DReLU, x: Tensor, clamp: Clamp) -> Tensor:
    return clamp(x, 0.0, along_channels(layer.cap.detach().clamp(min=0), x, layer.channel_dim).to(x.dtype))


backward.register(DReLU, _drelu)
backward.register(SReLU, lambda layer, x, clamp: clamp(x, 0.0, max(layer.cap, 0.0)))
# ReLU6 is a Hardtanh too.
backward.register(nn.Hardtanh, lambda layer, x, clamp: clamp(x, layer.min_val, layer.max_val))
# Written with a floor below zero, since these are blind on both sides.
for _layer in (nn.Hardsigmoid, HardSigmoid, HardSigmoidMe):
    backward.register(_layer, lambda layer, x, clamp: 0.5 + clamp(x / 6, -0.5, 0.5))
for _layer in (nn.Sigmoid, Sigmoid):
    backward.register(_layer, lambda layer, x, clamp: 0.5 + clamp(x / 4, -0.5, 0.5))
for _layer in (nn.Tanh, Tanh):
    backward.register(_layer, lambda layer, x, clamp: clamp(x, -1.0, 1.0))


def substitutable_layers(model: nn.Module) -> list[nn.Module]:
    """Every layer of the module tree that `backward` knows, each once: without any there is nothing to adapt to."""
    unknown = backward.dispatch(object)
    return [layer for layer in model.modules() if backward.dispatch(type(layer)) is not unknown]


def substituted(model: nn.Module, clamp: Clamp) -> AbstractContextManager[nn.Module]:
    """The model with its own outputs, but with the gradient of `backward` with ``clamp``; a context manager."""
    return _changed(model, lambda layer, own: lambda x: _valued(x, own, backward(layer, x, clamp)))


def replaced(model: nn.Module, clamp: Clamp) -> AbstractContextManager[nn.Module]:
    """The model that computes `backward` with ``clamp`` in the place of every layer it knows; a context manager."""
    return _changed(model, lambda layer, own: lambda x: backward(layer, x, clamp))


@contextmanager
def _changed(model: nn.Module, change: Callable[[nn.Module, Forward], Forward]) -> Iterator[nn.Module]:
    """The model with another ``forward`` for every known layer; afterwards it is what it was."""
    layers = substitutable_layers(model)
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            vars(layer)["forward"] = change(layer, layer.forward)  # found before the class's own
        yield model
    finally:
        for layer, forward in zip(layers, before, strict=True):
            vars(layer).pop("forward", None)
            if forward is not None:
                vars(layer)["forward"] = forward


def _valued(x: Tensor, own: Forward, substitute: Tensor) -> Tensor:
    with torch.no_grad():
        value = own(x.clone())  # the layer may work in place
    return _Valued.apply(substitute, value)


class _Valued(torch.autograd.Function):
    """The value of one tensor with the gradient of another.

    The usual ``substitute + (value - substitute).detach()`` rounds the value where the substitute is much larger: in
    bf16 nothing may be left of it.
    """

    @staticmethod
    def forward(ctx, substitute: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *gradients, None


def straight_through(x: Tensor, floor: float, cap: float | Tensor) -> Tensor:
    """A clamp without its cap: a ReLU, or the identity where the floor lies below zero as in hard tanh."""
    return x if floor < 0 else x.clamp(min=floor)


def leaky(x: Tensor, floor: float, cap: float | Tensor) -> Tensor:
    """A clamp that goes on with a tenth of the slope where `straight_through` goes on with all of it."""
    inside = x.clamp(max=cap).clamp(min=floor)
    return inside + 0.1 * (straight_through(x, floor, cap) - inside)


def annealed(x: Tensor, floor: float, cap: float | Tensor, *, sharpness: float) -> Tensor:
    """A sigmoid from floor to cap, as wide as the pre-activations spread at sharpness 0, as steep as the clamp at 1.

    The spread is the root mean square distance from the middle of floor and cap, over the layer but for each example
    alone, so that no example depends on its batch.
    """
    from_middle = x - (floor + cap) / 2
    spread = from_middle.detach().flatten(1).square().mean(dim=1).sqrt().clamp(min=1e-12)
    spread = per_image(spread, x)
    clamp_width = torch.as_tensor((cap - floor) / 4, dtype=x.dtype, device=x.device).clamp(min=1e-12)
    width = spread ** (1 - sharpness) * clamp_width**sharpness
    return floor + (cap - floor) * torch.sigmoid(from_middle / width)


def soft(x: Tensor, floor: float, cap: float | Tensor) -> Tensor:
    """A sigmoid somewhat wider than the clamp, whose slope falls as the distance from the cap grows."""
    return annealed(x, floor, cap, sharpness=0.75)


SUBSTITUTES: dict[str, Clamp] = {"straight-through": straight_through, "leaky": leaky, "soft": soft}


def bpda(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat_model: ThreatModel,
    seeds: Sequence[int],
    *,
    substitute: str,
    **settings,
) -> Found:
    """`random_start_pgd` with the gradient of a substitute for every known layer, the forward pass untouched.

    Source: Athalye et al. 2018, https://arxiv.org/abs/1802.00420.

    Args:
        model: Takes [0, 1] images.
        images: [B, C, H, W] in [0, 1].
        labels: [B].
        threat_model: The balls.
        seeds: One an image.
        substitute: A name in `SUBSTITUTES`.
        settings: As of `random_start_pgd`.
    """
    with substituted(model, SUBSTITUTES[substitute]):
        return random_start_pgd(model, images, labels, threat_model, seeds, **settings)


def bpda_apgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat_model: ThreatModel,
    seeds: Sequence[int],
    *,
    substitute: str,
    **settings,
) -> Found:
    """`library.apgd` with the gradient of a substitute for every known layer, as in `bpda`."""
    with substituted(model, SUBSTITUTES[substitute]):
        return apgd(model, images, labels, threat_model, seeds, **settings)


def twin(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat_model: ThreatModel,
    seeds: Sequence[int],
    *,
    substitute: str,
    **settings,
) -> Found:
    """`random_start_pgd` on the twin of the model that computes the substitutes, to be transferred to the model itself.

    With "straight-through" the twin has no caps at all. The arguments are those of `bpda`.
    """
    with replaced(model, SUBSTITUTES[substitute]):
        return Found(random_start_pgd(model, images, labels, threat_model, seeds, **settings).images)


def transfer(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat_model: ThreatModel,
    seeds: Sequence[int],
    *,
    source: nn.Module,
    **settings,
) -> Found:
    """`random_start_pgd` on another model of the same classes, ``source``, to be transferred to this one."""
    with frozen(source):
        return Found(random_start_pgd(source, images, labels, threat_model, seeds, **settings).images)


def annealing(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat_model: ThreatModel,
    seeds: Sequence[int],
    *,
    loss: str,
    steps: int,
    start: Tensor | None = None,
    **settings,
) -> Found:
    """PGD on caps that are sigmoids at first and sharpen to the true clamp, until the model itself is fooled.

    Args:
        model: Takes [0, 1] images.
        images: [B, C, H, W] in [0, 1].
        labels: [B].
        threat_model: The balls.
        seeds: One an image.
        loss: A name in `LOSSES`.
        steps: Number of gradients a round.
        start: [B, C, H, W] in the ball; by default a random point of it.
        settings: ``rounds``, the number of sharpnesses from 0 to 1, after each of which the model is asked, and
            ``relative_step_size``, the length of a step in units of eps.
    """
    start = drawn(threat_model.random_start, images, seeds) if start is None else start
    searches = _annealing_rounds(
        model, images, threat_model, start, lambda left: LOSSES[loss](labels[left]), steps=steps, **settings
    )
    return _first_success(model, images, labels, searches, steps)


def targeted_annealing(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat_model: ThreatModel,
    seeds: Sequence[int],
    *,
    n_target_classes: int,
    steps: int,
    start: Tensor | None = None,
    **settings,
) -> Found:
    """`annealing` towards one other class after the other, the likeliest first, by the margin to it.

    ``n_target_classes`` is at most the number of classes less one; the other arguments are those of `annealing`.
    """
    with torch.no_grad():
        others = model(images).scatter(1, labels.unsqueeze(1), -torch.inf)
    targets = others.topk(n_target_classes).indices
    start = drawn(threat_model.random_start, images, seeds) if start is None else start
    rounds = partial(_annealing_rounds, model, images, threat_model, start, steps=steps, **settings)
    losses = [lambda left, target=target: targeted_margin(labels[left], target[left]) for target in targets.unbind(1)]
    searches = chain.from_iterable(map(rounds, losses))
    return _first_success(model, images, labels, searches, steps)


def restarts(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat_model: ThreatModel,
    seeds: Sequence[int],
    *,
    restarts: int,
    steps: int,
    **settings,
) -> Found:
    """`random_start_pgd` from several random points of the ball, until the model is fooled: a baseline.

    ``restarts`` is the number of points; the other arguments are those of `random_start_pgd`.
    """

    def search(restart: int, left: Tensor) -> Tensor:
        own = [seeds[i] + restart for i in left.tolist()]
        return random_start_pgd(model, images[left], labels[left], threat_model, own, steps=steps, **settings).images

    return _first_success(model, images, labels, [partial(search, restart) for restart in range(restarts)], steps)


Search = Callable[[Tensor], Tensor]  # positions [b] -> candidates [b, C, H, W] for the images there


def _first_success(model: nn.Module, images: Tensor, labels: Tensor, searches: Iterable[Search], steps: int) -> Found:
    """Every search, of ``steps`` gradients, on what those before it left; the first success on the model is kept."""
    found, spent = images.clone(), torch.zeros_like(labels)
    left = torch.arange(len(labels), device=labels.device)
    for search in searches:
        if not len(left):
            break
        found[left] = search(left)
        spent[left] += steps
        with torch.no_grad():
            left = left[model(found[left]).argmax(dim=1) == labels[left]]
    ended = torch.ones_like(labels, dtype=torch.bool)
    ended[left] = False
    return Found(found, spent, ended)


def _annealing_rounds(
    model: nn.Module,
    images: Tensor,
    threat_model: ThreatModel,
    start: Tensor,
    loss: Callable[[Tensor], Loss],
    *,
    rounds: int,
    steps: int,
    relative_step_size: float,
) -> Iterator[Search]:
    """A search for every sharpness, each from where the one before it ended; ``loss`` is made for positions [b]."""
    current = start.clone()
    step_size = relative_step_size * threat_model.eps

    def search(sharpness: float, left: Tensor) -> Tensor:
        own, begin = images[left], current[left]
        with replaced(model, partial(annealed, sharpness=sharpness)):
            current[left] = pgd(model, own, loss(left), threat_model, start=begin, steps=steps, step_size=step_size)
        return current[left]

    return (partial(search, sharpness) for sharpness in torch.linspace(0, 1, rounds).tolist())
