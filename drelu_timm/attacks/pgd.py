"""Projected gradient descent, used by training and evaluation, and two simple attacks: FGSM and noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .attack import LOSSES, Attack, Batch, Candidates, Kind, Loss, cross_entropy
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
    """Ascend ``loss`` by projected gradient steps (Madry et al. 2018, https://arxiv.org/abs/1706.06083).

    Args:
        model: Maps [0, 1] images to logits; frozen by the caller, see `models.inference.frozen`.
        images: [B, C, H, W] in [0, 1], around which eps is measured.
        loss: Function of the logits that is maximized.
        threat_model: Norm and eps.
        start: [B, C, H, W], where the ascent starts.
        steps: Number of gradients.
        step_size: Step length in units of a [0, 1] pixel.

    Returns:
        [B, C, H, W] within eps and in [0, 1]: the last point, not the best.
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
    """Return a CPU generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def drawn(draw: Callable[[Tensor, torch.Generator], Tensor], images: Tensor, seeds: Sequence[int]) -> Tensor:
    """Apply ``draw`` to every image [1, C, H, W] with its own seed: equal in every batch and on every device."""
    cpu = images.cpu()
    rows = [draw(cpu[i : i + 1], generator) for i, generator in enumerate(generators_of(seeds))]
    return torch.cat(rows).to(images.device)


def start_of(batch: Batch, threat_model: ThreatModel) -> Tensor:
    """Return the batch's start, or a random point within eps of each image [B, C, H, W]."""
    return drawn(threat_model.random_start, batch.images, batch.seeds) if batch.start is None else batch.start


@dataclass(frozen=True)
class FGSM(Attack):
    """Fast gradient sign method (Goodfellow et al. 2015, https://arxiv.org/abs/1412.6572); for L2, its direction."""

    def run(self, model: nn.Module, batch: Batch, threat_model: ThreatModel) -> Candidates:
        """Take one step of length eps from the image."""
        images, loss = batch.images, cross_entropy(batch.labels)
        return Candidates(pgd(model, images, loss, threat_model, start=images, steps=1, step_size=threat_model.eps))


@dataclass(frozen=True)
class PGD(Attack):
    """`pgd` from a random point within eps, or from the batch's start.

    Attributes:
        loss: A name in `LOSSES`.
        steps: Number of gradients.
        relative_step_size: Step length in units of eps.
    """

    loss: str = "ce"
    steps: int = 40
    relative_step_size: float = 0.1

    def run(self, model: nn.Module, batch: Batch, threat_model: ThreatModel) -> Candidates:
        """Search for adversarial images; see `Attack.run`."""
        loss, start = LOSSES[self.loss](batch.labels), start_of(batch, threat_model)
        step_size = self.relative_step_size * threat_model.eps
        images = pgd(model, batch.images, loss, threat_model, start=start, steps=self.steps, step_size=step_size)
        return Candidates(images)


@dataclass(frozen=True)
class SignNoise(Attack):
    """Random signs times eps for Linf, or a random direction of length eps for L2: a baseline."""

    kind: ClassVar[Kind] = "black-box"

    def run(self, model: nn.Module, batch: Batch, threat_model: ThreatModel) -> Candidates:
        """Draw the point; the model is not used."""
        direction = drawn(
            lambda image, generator: torch.randn(image.shape, generator=generator), batch.images, batch.seeds
        )
        moved = threat_model.ascend(batch.images, direction, threat_model.eps)
        return Candidates(threat_model.project(moved, batch.images))
