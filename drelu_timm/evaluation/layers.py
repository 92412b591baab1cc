"""Which layers of a model hide its gradient: each layer's derivative is compared with differences of its outputs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .user_model import UserModel

EXAMINED = 8  # images: the inputs of all layers are in memory at once
_DIRECTIONS = 8
_RELATIVE_WIDTH = 0.05  # of a difference, in standard deviations of the layer's input: rounding has to show in it
_ERROR_ABOVE = 0.6  # relative, of a derivative
_SHARE_ABOVE = 0.2  # of the images for which a layer's gradient is useless
_ROUNDING = 64 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class HidingLayer:
    """A layer that hides the gradient.

    Attributes:
        name: Its name in the model; empty for the model itself.
        layer: The module.
        effect: What it does, as part of a sentence.
        share: Share of its inputs on which it does so.
    """

    name: str
    layer: nn.Module
    effect: str
    share: float

    def __str__(self) -> str:
        kind = type(self.layer).__name__
        named = f"Layer {self.name} ({kind})" if self.name else f"The model's own code ({kind})"
        return f"{named} {self.effect} on {100 * self.share:.0f} % of its inputs."


def hiding_layers(model: UserModel, images: Tensor) -> list[HidingLayer]:
    """Find the layers whose backward pass does not return their derivative.

    A module is reported only if none of its children is: else its gradient is wrong because of theirs. Modules with
    several inputs or outputs are not examined.

    Args:
        model: The model; left as it was.
        images: [B, C, H, W] in [0, 1].
    """
    found: dict[str, HidingLayer] = {}
    with model.caller.applied(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        inputs = _layer_inputs(model, images)
        for name, layer in reversed(list(model.model.named_modules())):  # children before their parents
            prefix = f"{name}." if name else ""
            if name in inputs and not any(other.startswith(prefix) for other in found):
                try:
                    effect, share = _effect(layer, inputs[name])
                except Exception:  # a layer can need what its parent sets up; then it is not examined
                    continue
                if share > _SHARE_ABOVE:
                    found[name] = HidingLayer(name, layer, effect, share)
    return list(reversed(found.values()))


def _layer_inputs(model: UserModel, images: Tensor) -> dict[str, Tensor]:
    """Return by name the input of each module's first call with a single tensor."""
    inputs: dict[str, Tensor] = {}

    @contextmanager
    def recorded(name: str, layer: nn.Module) -> Iterator[None]:
        def keep(layer: nn.Module, arguments: tuple, output: object) -> None:
            single = len(arguments) == 1 and isinstance(arguments[0], Tensor) and arguments[0].is_floating_point()
            if single and isinstance(output, Tensor) and len(arguments[0]) == len(output) == len(images):
                inputs.setdefault(name, arguments[0].detach().clone())

        handle = layer.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    with ExitStack() as stack, torch.no_grad():
        for name, layer in model.model.named_modules():
            if isinstance(layer, torch.jit.ScriptModule):  # which takes no hooks
                continue
            stack.enter_context(recorded(name, layer))
        model(images)
    return inputs


def _effect(layer: nn.Module, x: Tensor) -> tuple[str, float]:
    """Return what a layer does to the gradient at its input [B, ...], and on which share of the B."""
    points = x.clone().requires_grad_()
    with torch.enable_grad():
        output = layer(points.clone())  # the layer may work in place
    weights = torch.randn_like(output)
    gradient = torch.zeros_like(x)
    if output.requires_grad:
        (own,) = torch.autograd.grad((output * weights).sum(), points, allow_unused=True)
        gradient = gradient if own is None else own
    with torch.no_grad():
        again = layer(x.clone())
    scale = _per_row(output.detach() * weights).abs()
    if ((_per_row((again - output.detach()) * weights)).abs() > 1e-4 * scale.mean()).any():
        return "returns other values when it is called again", 1.0
    not_finite = ~gradient.flatten(1).isfinite().all(dim=1)
    if not_finite.double().mean() > _SHARE_ABOVE:
        return "passes a gradient that is NaN or infinite", float(not_finite.double().mean())
    nothing = ~gradient.flatten(1).any(dim=1)
    if nothing.double().mean() > _SHARE_ABOVE:
        return "passes no gradient", float(nothing.double().mean())
    width = _RELATIVE_WIDTH * float(x.std().clamp(min=1e-6))
    rounding = _ROUNDING * (output.detach() * weights).flatten(1).abs().sum(dim=1) / width
    error, size = torch.zeros_like(rounding), torch.zeros_like(rounding)
    with torch.no_grad():
        for _ in range(_DIRECTIONS):
            direction = torch.randn_like(x).sign()
            ahead, behind = (layer(x + side * direction) for side in (width, -width))
            difference = _per_row((ahead - behind) * weights) / (2 * width)
            derivative = _per_row(gradient * direction)
            larger = torch.maximum(difference.abs(), derivative.abs())
            error += (difference - derivative).square().where(larger > rounding, 0)
            size += larger.square().where(larger > rounding, 0)
    useless = error > _ERROR_ABOVE**2 * size
    return "passes a gradient that is not its derivative", float(useless.double().mean())


def _per_row(values: Tensor) -> Tensor:
    return values.flatten(1).sum(dim=1)
