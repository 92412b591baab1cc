"""Gradient fidelity: whether the input gradient that attacks follow is the derivative of what the model computes.

A layer can return any backward pass: NaN, noise, the gradient of another point. White-box attacks then find less than
there is, and the black-box probes find too little to show it. Here the derivative of the margin in random directions is
compared with central differences, example by example.
"""

from collections.abc import Sequence
from itertools import cycle

import torch
from torch import Tensor, nn

from ..attacks.attack import targeted_margin
from ..attacks.pgd import generators_of

EXAMINED = 60  # examples
_DIRECTIONS = 24
# Of a difference, in units of a [0, 1] pixel, in turn: a wave of high frequency can agree with one of them.
_HALF_WIDTHS = (0.001, 0.004)
_ERROR_ABOVE = 0.6  # relative; below for all but 0 to 3 % of the examples of honest models, at kinks of ReLU
_ROUNDING = 32 * torch.finfo(torch.float32).eps  # of a logit, relative to the largest one
FLAGS = ("misleading", "not_finite")  # what `gradient_flags` measures


def gradient_flags(model: nn.Module, images: Tensor, labels: Tensor, seeds: Sequence[int]) -> dict[str, Tensor]:
    """Compare the input gradient of the margin with differences of the margin.

    The margin is that to the class which is second at the image. Where neither the derivatives nor the differences are
    more than rounding, the model is flat and the gradient right.

    Args:
        model: With its own gradient: values that are not finite must not be replaced.
        images: [B, C, H, W] in [0, 1].
        labels: [B].
        seeds: One per image; the directions are drawn from it.

    Returns:
        Flags [B]: "misleading", whether the finite part of the gradient is not the derivative; "not_finite", whether
        a part of it is not finite.
    """
    margin = max(_HALF_WIDTHS)
    points = images.clamp(margin, 1 - margin).detach().requires_grad_()  # so that both sides are in [0, 1]
    with torch.enable_grad():
        logits = model(points).float()
        others = logits.detach().scatter(1, labels.unsqueeze(1), -torch.inf).argmax(dim=1)
        loss = targeted_margin(labels, others)
        gradient = _gradient(loss(logits).sum(), points)
    not_finite = ~gradient.isfinite().flatten(1).all(dim=1)
    gradient = gradient.nan_to_num(0, 0, 0)
    generators = generators_of(seeds)
    error, size = (torch.zeros(len(images), dtype=torch.float64, device=images.device) for _ in range(2))
    rounding = _ROUNDING * logits.detach().abs().amax(dim=1).double()
    with torch.no_grad():
        for _, width in zip(range(_DIRECTIONS), cycle(_HALF_WIDTHS)):
            direction = torch.stack([torch.randint(0, 2, images.shape[1:], generator=own) for own in generators])
            direction = (2 * direction - 1).to(images)
            derivative = (gradient * direction).flatten(1).sum(dim=1).double()
            ahead, behind = (loss(model(points + side * direction).float()).double() for side in (width, -width))
            difference = (ahead - behind) / (2 * width)
            larger = torch.maximum(derivative.abs(), difference.abs())
            size += (larger.square()).where(larger > rounding / width, 0)
            error += ((derivative - difference).square()).where(larger > rounding / width, 0)
    return {"misleading": error > _ERROR_ABOVE**2 * size, "not_finite": not_finite}


def _gradient(value: Tensor, points: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(points)
    (gradient,) = torch.autograd.grad(value, points, allow_unused=True)
    return torch.zeros_like(points) if gradient is None else gradient
