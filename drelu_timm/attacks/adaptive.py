"""Attacks adapted to layers that hide adversarial examples behind a zero or useless input gradient.

A unit above its cap (or below its floor), a quantizer or a JPEG layer passes no gradient, so an attack that follows
gradients sees a flat loss. The attacks here use a substitute for each such layer while they search, and are judged on
the unchanged model. `backward` defines the substitutes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, singledispatch
from itertools import chain
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers.activations import HardSigmoid, Sigmoid, Tanh
from timm.layers.activations_me import HardSigmoidMe
from torch import Tensor, nn

from ..models.activations import KWTA, RCRAF, FitReLU, Tent, winners
from ..models.drelu import CapLayer, DReLU, SReLU, along_channels
from ..models.inference import frozen
from .apgd import APGD
from .attack import LOSSES, Attack, Batch, Candidates, Kind, Loss, targeted_margin
from .pgd import PGD, pgd, start_of
from .threat_model import ThreatModel, per_image

Clamp = Callable[[Tensor, float, float | Tensor], Tensor]  # (x, floor, cap) -> substitute for the clamped x
Forward = Callable[[Tensor], Tensor]


@singledispatch
def backward(layer: nn.Module, x: Tensor, clamp: Clamp) -> Tensor:
    """Return what attacks differentiate instead of a layer (BPDA, Athalye et al. 2018, arXiv 1802.00420).

    One line registers your own layer, with or without a cap::

        backward.register(Quantize, lambda layer, x, clamp: x)
        backward.register(Capped, lambda layer, x, clamp: clamp(x, 0.0, layer.cap))

    Args:
        layer: The layer.
        x: Its input.
        clamp: ``(x, floor, cap)`` to the substitute for a clamp, to be called wherever the layer has one. A floor
            below zero saturates as a cap does; a floor at zero, as in a ReLU, is kept. The cap may be a tensor
            that broadcasts against ``x``.

    Raises:
        TypeError: Nothing is registered for the layer.
    """
    raise TypeError(f"{type(layer).__name__} has no backward substitute. Register one with adaptive.backward.register.")


def _cap(layer: CapLayer, x: Tensor) -> Tensor:
    return along_channels(layer.cap.detach().clamp(min=0), x, layer.channel_dim).to(x.dtype)


backward.register(DReLU, lambda layer, x, clamp: clamp(x, 0.0, _cap(layer, x)))  # and PACT, a subclass
backward.register(SReLU, lambda layer, x, clamp: clamp(x, 0.0, max(layer.cap, 0.0)))
# Both slopes of a tent continue below 0, so that a unit outside it returns to it.
backward.register(Tent, lambda layer, x, clamp: _cap(layer, x) - clamp(x.abs(), 0.0, _cap(layer, x)))
# A hat of two straight sides, since the true slope underflows a few units above the bound.
backward.register(
    FitReLU,
    lambda layer, x, clamp: (
        torch.minimum(x.relu(), _cap(layer, x)) - clamp((x - _cap(layer, x)).relu(), 0.0, _cap(layer, x))
    ),
)
backward.register(RCRAF, lambda layer, x, clamp: clamp(F.softplus(x, layer.alpha), 0.0, layer.gamma))
# Losers pass a tenth of the gradient, so that they can become winners.
backward.register(KWTA, lambda layer, x, clamp: torch.lerp(winners(x, layer.ratio), x, 0.1))
# ReLU6 is a subclass of Hardtanh.
backward.register(nn.Hardtanh, lambda layer, x, clamp: clamp(x, layer.min_val, layer.max_val))
# With a floor below zero, because these saturate on both sides.
for _layer in (nn.Hardsigmoid, HardSigmoid, HardSigmoidMe):
    backward.register(_layer, lambda layer, x, clamp: 0.5 + clamp(x / 6, -0.5, 0.5))
for _layer in (nn.Sigmoid, Sigmoid):
    backward.register(_layer, lambda layer, x, clamp: 0.5 + clamp(x / 4, -0.5, 0.5))
for _layer in (nn.Tanh, Tanh):
    backward.register(_layer, lambda layer, x, clamp: clamp(x, -1.0, 1.0))


def substitutable_layers(model: nn.Module) -> list[nn.Module]:
    """Return every layer of the module tree that `backward` knows, each once."""
    unknown = backward.dispatch(object)
    return [layer for layer in model.modules() if backward.dispatch(type(layer)) is not unknown]


def substituted(model: nn.Module, clamp: Clamp) -> AbstractContextManager[nn.Module]:
    """Give the model the gradient of `backward` with ``clamp`` but its own outputs, until the context ends."""
    return _changed(model, lambda layer, own: lambda x: _valued(x, own, backward(layer, x, clamp)))


def replaced(model: nn.Module, clamp: Clamp) -> AbstractContextManager[nn.Module]:
    """Let the model compute `backward` with ``clamp`` instead of every layer it knows, until the context ends."""
    return _changed(model, lambda layer, own: lambda x: backward(layer, x, clamp))


@contextmanager
def _changed(model: nn.Module, change: Callable[[nn.Module, Forward], Forward]) -> Iterator[nn.Module]:
    """Change the ``forward`` of every known layer; restore it on exit."""
    layers = substitutable_layers(model)
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            vars(layer)["forward"] = change(layer, layer.forward)  # takes precedence over the class's own
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
    """Return a clamp without its cap: a ReLU, or the identity for a floor below zero as in hard tanh."""
    return x if floor < 0 else x.clamp(min=floor)


def leaky(x: Tensor, floor: float, cap: float | Tensor) -> Tensor:
    """Return a clamp that has a tenth of the slope of `straight_through` where it saturates."""
    inside = x.clamp(max=cap).clamp(min=floor)
    return inside + 0.1 * (straight_through(x, floor, cap) - inside)


def annealed(x: Tensor, floor: float, cap: float | Tensor, *, sharpness: float) -> Tensor:
    """Return a sigmoid from floor to cap, as wide as the pre-activations at sharpness 0, as steep as the clamp at 1.

    The width of the pre-activations is their root mean square distance from the middle of floor and cap, over the layer
    but for each example alone, so that no example depends on its batch.
    """
    from_middle = x - (floor + cap) / 2
    spread = from_middle.detach().flatten(1).square().mean(dim=1).sqrt().clamp(min=1e-12)
    spread = per_image(spread, x)
    clamp_width = torch.as_tensor((cap - floor) / 4, dtype=x.dtype, device=x.device).clamp(min=1e-12)
    width = spread ** (1 - sharpness) * clamp_width**sharpness
    return floor + (cap - floor) * torch.sigmoid(from_middle / width)


def soft(x: Tensor, floor: float, cap: float | Tensor) -> Tensor:
    """Return a sigmoid somewhat wider than the clamp, whose slope decreases with the distance from the cap."""
    return annealed(x, floor, cap, sharpness=0.75)


SUBSTITUTES: dict[str, Clamp] = {"straight-through": straight_through, "leaky": leaky, "soft": soft}


@dataclass(frozen=True)
class BPDA(Attack):
    """`PGD` with the gradient of a substitute for every known layer; the forward pass is unchanged.

    Source: Athalye et al. 2018, https://arxiv.org/abs/1802.00420.

    Attributes:
        loss, steps, relative_step_size: See `PGD`.
        substitute: A name in `SUBSTITUTES`.
    """

    kind: ClassVar[Kind] = "adaptive"
    loss: str = "scaled-ce"
    substitute: str = "leaky"
    steps: int = 20
    relative_step_size: float = 0.2

    def run(self, model: nn.Module, batch: Batch, threat_model: ThreatModel) -> Candidates:
        """Search for adversarial images; see `Attack.run`."""
        with substituted(model, SUBSTITUTES[self.substitute]):
            return PGD(self.loss, self.steps, self.relative_step_size).run(model, batch, threat_model)


@dataclass(frozen=True)
class BPDAWithAPGD(Attack):
    """`APGD` with the gradient of a substitute for every known layer, as in `BPDA`.

    Attributes:
        loss, n_iter, rho: See `APGD`.
        substitute: A name in `SUBSTITUTES`.
    """

    kind: ClassVar[Kind] = "adaptive"
    loss: str = "ce"
    substitute: str = "leaky"
    n_iter: int = 100
    rho: float = 0.75

    def run(self, model: nn.Module, batch: Batch, threat_model: ThreatModel) -> Candidates:
        """Search for adversarial images; see `Attack.run`."""
        with substituted(model, SUBSTITUTES[self.substitute]):
            return APGD(self.loss, self.n_iter, self.rho).run(model, batch, threat_model)


@dataclass(frozen=True)
class Surrogate(BPDA):
    """`PGD` on a surrogate that computes the substitutes, whose images are transferred to the model.

    With "straight-through" the surrogate has no caps.
    """

    def run(self, model: nn.Module, batch: Batch, threat_model: ThreatModel) -> Candidates:
        """Search for adversarial images; see `Attack.run`."""
        with replaced(model, SUBSTITUTES[self.substitute]):
            return PGD(self.loss, self.steps, self.relative_step_size).run(model, batch, threat_model)


@dataclass(frozen=True)
class Transfer(Attack):
    """`PGD` on another model of the same classes, whose images are transferred to the attacked model.

    Attributes:
        source: The other model, named by `evaluate --transfer-from`; None until it is known.
        attack: Attack on it.
    """

    kind: ClassVar[Kind] = "transfer"
    source: nn.Module | None = None
    attack: PGD = field(default_factory=lambda: PGD(loss="margin"))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the attack on the other model."""
        return self.attack.settings

    def run(self, model: nn.Module, batch: Batch, threat_model: ThreatModel) -> Candidates:
        """Search for adversarial images; see `Attack.run`."""
        assert self.source is not None
        with frozen(self.source):
            return self.attack.run(self.source, batch, threat_model)


@dataclass(frozen=True)
class Annealing(Attack):
    """PGD on caps that start as sigmoids and sharpen to the true clamp, until the unchanged model is fooled.

    Attributes:
        loss: A name in `LOSSES`.
        rounds: Number of sharpnesses from 0 to 1, after each of which the unchanged model judges the images.
        steps: Number of gradients per round.
        relative_step_size: Step length in units of eps.
    """

    kind: ClassVar[Kind] = "adaptive"
    loss: str = "scaled-ce"
    rounds: int = 10
    steps: int = 10
    relative_step_size: float = 0.1

    def run(self, model: nn.Module, batch: Batch, threat_model: ThreatModel) -> Candidates:
        """Search for adversarial images; see `Attack.run`."""
        start = start_of(batch, threat_model)

        def loss(left: Tensor) -> Loss:
            return LOSSES[self.loss](batch.labels[left])

        searches = _annealing_rounds(self, model, batch.images, threat_model, start, loss)
        return _first_success(model, batch, searches, self.steps)


@dataclass(frozen=True)
class TargetedAnnealing(Attack):
    """`Annealing` by the targeted margin, towards one other class after the other, the most likely first.

    Attributes:
        n_target_classes: Number of classes.
        rounds, steps, relative_step_size: See `Annealing`.
    """

    kind: ClassVar[Kind] = "adaptive"
    n_target_classes: int = 9
    rounds: int = 5
    steps: int = 10
    relative_step_size: float = 0.2

    def for_classes(self, num_classes: int) -> "TargetedAnnealing":
        """Limit the targets to the other classes."""
        return replace(self, n_target_classes=min(self.n_target_classes, num_classes - 1))

    def run(self, model: nn.Module, batch: Batch, threat_model: ThreatModel) -> Candidates:
        """Search for adversarial images; see `Attack.run`."""
        with torch.no_grad():
            others = model(batch.images).scatter(1, batch.labels.unsqueeze(1), -torch.inf)
        targets = others.topk(self.n_target_classes).indices
        start = start_of(batch, threat_model)

        def towards(target: Tensor) -> Iterator[Search]:
            def loss(left: Tensor) -> Loss:
                return targeted_margin(batch.labels[left], target[left])

            return _annealing_rounds(self, model, batch.images, threat_model, start, loss)

        searches = chain.from_iterable(map(towards, targets.unbind(1)))
        return _first_success(model, batch, searches, self.steps)


@dataclass(frozen=True)
class Restarts(Attack):
    """`PGD` from several random points within eps, until the model is fooled: a baseline.

    Attributes:
        loss, steps, relative_step_size: See `PGD`.
        restarts: Number of points.
    """

    loss: str = "ce"
    restarts: int = 10
    steps: int = 20
    relative_step_size: float = 0.2

    def run(self, model: nn.Module, batch: Batch, threat_model: ThreatModel) -> Candidates:
        """Search for adversarial images; see `Attack.run`."""
        attack = PGD(self.loss, self.steps, self.relative_step_size)

        def search(restart: int, left: Tensor) -> Tensor:
            seeds = [batch.seeds[i] + restart for i in left.tolist()]
            again = Batch(batch.images[left], batch.labels[left], seeds)  # restarts ignore the batch's start
            return attack.run(model, again, threat_model).images

        searches = [partial(search, restart) for restart in range(self.restarts)]
        return _first_success(model, batch, searches, self.steps)


Search = Callable[[Tensor], Tensor]  # positions [b] -> candidates [b, C, H, W] for the images there


def _first_success(model: nn.Module, batch: Batch, searches: Iterable[Search], steps: int) -> Candidates:
    """Run every search, of ``steps`` gradients, on what the ones before it left, and keep the first success."""
    images, labels = batch.images, batch.labels
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
    return Candidates(found, spent, ended)


def _annealing_rounds(
    attack: Annealing | TargetedAnnealing,
    model: nn.Module,
    images: Tensor,
    threat_model: ThreatModel,
    start: Tensor,
    loss: Callable[[Tensor], Loss],
) -> Iterator[Search]:
    """Yield a search for every sharpness, each from the result of the one before; ``loss`` takes positions [b]."""
    current = start.clone()
    step_size = attack.relative_step_size * threat_model.eps

    def search(sharpness: float, left: Tensor) -> Tensor:
        own, begin = images[left], current[left]
        with replaced(model, partial(annealed, sharpness=sharpness)):
            current[left] = pgd(
                model, own, loss(left), threat_model, start=begin, steps=attack.steps, step_size=step_size
            )
        return current[left]

    return (partial(search, sharpness) for sharpness in torch.linspace(0, 1, attack.rounds).tolist())
