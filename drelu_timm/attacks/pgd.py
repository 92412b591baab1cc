"""Projected gradient descent, which training and evaluation share, and the simplest attacks of an evaluation."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .losses import LOSSES, Loss, cross_entropy
from .threat_model import ThreatModel


def pgd(
    model: nn.Module,
    images: Tensor,
    loss: Loss,
    threat_model: ThreatModel,
    *,
    start: Tensor,
    steps: int,
    step_size: float,
) -> Tensor:
    """Projected gradient ascent on ``loss`` (Madry et al. 2018, https://arxiv.org/abs/1706.06083).

    Args:
        model: Takes [0, 1] images; used as it is, see `models.modes.frozen`.
        images: [B, C, H, W] in [0, 1], the centres of the balls.
        loss: What is raised, from the logits.
        threat_model: The balls.
        start: [B, C, H, W], where the ascent begins.
        steps: Number of gradients.
        step_size: Length of a step, in units of a [0, 1] pixel.

    Returns:
        [B, C, H, W] in the ball and in [0, 1]: the last point, not the best.
    """
    adversarial = start.detach()
    for _ in range(steps):
        adversarial.requires_grad_()
        value = loss(model(adversarial)).sum()
        (gradient,) = torch.autograd.grad(value, adversarial)
        with torch.no_grad():
            adversarial = threat_model.project(threat_model.ascend(adversarial, gradient, step_size), images)
    return adversarial.detach()


def generators_of(seeds: Sequence[int]) -> list[torch.Generator]:
    """A generator on the CPU for each image's own seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def drawn(draw: Callable[[Tensor, torch.Generator], Tensor], images: Tensor, seeds: Sequence[int]) -> Tensor:
    """What ``draw`` makes of every image [1, C, H, W] with the image's own seed: equal in any batch, on any device."""
    cpu = images.cpu()
    rows = [draw(cpu[i : i + 1], generator) for i, generator in enumerate(generators_of(seeds))]
    return torch.cat(rows).to(images.device)


class Found(NamedTuple):
    """What a search comes back with, to be judged again by the caller: it need not fool the model, nor lie in the ball.

    Attributes:
        images: [B, C, H, W].
        steps: [B], gradients or queries until the first success, or all of them without one; None where not known.
        ended: [B], where a success ended the search; None of searches that always go on to their last step.
    """

    images: Tensor
    steps: Tensor | None = None
    ended: Tensor | None = None


# Attacks of the evaluation share one form: (model, images, labels, threat_model, seeds, *, settings) -> Found. The
# model is used as it is (see `models.modes.frozen`). ``seeds`` holds one number an image, of which alone an image's
# randomness is made. Those that can begin at a point which a smaller ball gave take it as ``start``.


def fgsm(model: nn.Module, images: Tensor, labels: Tensor, threat_model: ThreatModel, seeds: Sequence[int]) -> Found:
    """The fast gradient sign method (Goodfellow et al. 2015, https://arxiv.org/abs/1412.6572); for L2 its direction."""
    loss = cross_entropy(labels)
    return Found(pgd(model, images, loss, threat_model, start=images, steps=1, step_size=threat_model.eps))


def random_start_pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat_model: ThreatModel,
    seeds: Sequence[int],
    *,
    loss: str,
    steps: int,
    relative_step_size: float,
    start: Tensor | None = None,
) -> Found:
    """`pgd` from a random point of the ball, or from a given one.

    Args:
        model: Takes [0, 1] images.
        images: [B, C, H, W] in [0, 1].
        labels: [B].
        threat_model: The balls.
        seeds: One an image.
        loss: A name in `LOSSES`.
        steps: Number of gradients.
        relative_step_size: Length of a step, in units of eps.
        start: [B, C, H, W] in the ball.
    """
    start = drawn(threat_model.random_start, images, seeds) if start is None else start
    step_size = relative_step_size * threat_model.eps
    return Found(pgd(model, images, LOSSES[loss](labels), threat_model, start=start, steps=steps, step_size=step_size))


def sign_noise(
    model: nn.Module, images: Tensor, labels: Tensor, threat_model: ThreatModel, seeds: Sequence[int]
) -> Found:
    """One random corner of the Linf ball, or direction of the L2 ball: what every attack has to beat."""
    direction = drawn(lambda image, generator: torch.randn(image.shape, generator=generator), images, seeds)
    return Found(threat_model.project(threat_model.ascend(images, direction, threat_model.eps), images))
