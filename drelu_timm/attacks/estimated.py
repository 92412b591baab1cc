"""PGD on gradients that are estimated from the model's outputs, for models whose own gradient misleads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attack import Attack, Batch, Candidates, Kind, margin
from .pgd import generators_of
from .threat_model import ThreatModel, per_image

_FINE = 16  # height and width up to which every pixel has a random sign


@dataclass(frozen=True)
class EstimatedPGD(Attack):
    """PGD on the margin with gradients from differences in random directions.

    After SPSA (Uesato et al. 2018, https://arxiv.org/abs/1802.05666). The differences are as wide as a part of eps, so
    that the estimate follows a smoothed model: rounding and shattered gradients vanish in it.

    Attributes:
        n_queries: Number of queries at most.
        samples: Directions per step; each costs two queries, and the step's end one.
        relative_width: Length of a difference, in units of eps.
        relative_step_size: First step, in units of eps; it falls to a fifth of it.
        momentum: Share of the earlier estimates that is kept at each step. It averages over more directions.
    """

    kind: ClassVar[Kind] = "black-box"
    n_queries: int = 1225
    samples: int = 24
    relative_width: float = 0.5
    relative_step_size: float = 0.4
    momentum: float = 0.75

    def run(self, model: nn.Module, batch: Batch, threat_model: ThreatModel) -> Candidates:
        """Search for adversarial images; see `Attack.run`."""
        samples = max(min(self.samples, (self.n_queries - 1) // 2), 1)  # at least one step, with any budget
        per_step = 2 * samples + 1
        steps = self.n_queries // per_step
        found = batch.images.clone()
        spent = torch.full_like(batch.labels, steps * per_step)
        ended = torch.zeros_like(batch.labels, dtype=torch.bool)
        left = torch.arange(len(batch), device=batch.labels.device)
        generators = generators_of(batch.seeds)
        images, labels, points = batch.images, batch.labels, batch.images
        mean = torch.zeros_like(images)
        for step in range(steps):
            mean = self.momentum * mean + replace(self, samples=samples)._estimated(
                model, points, labels, generators, threat_model
            )
            size = self.relative_step_size * (1 - 0.8 * step / steps) * threat_model.eps
            points = threat_model.project(threat_model.ascend(points, mean, size), images)
            with torch.no_grad():
                wrong = model(points).argmax(dim=1) != labels
            found[left] = points
            if wrong.any():
                ended[left[wrong]], spent[left[wrong]] = True, (step + 1) * per_step
                generators = [own for own, gone in zip(generators, wrong.tolist(), strict=True) if not gone]
                left, images, labels, points, mean = (tensor[~wrong] for tensor in (left, images, labels, points, mean))
            if not len(left):
                break
        return Candidates(found, spent, ended)

    @torch.no_grad()
    def _estimated(
        self,
        model: nn.Module,
        points: Tensor,
        labels: Tensor,
        generators: Sequence[torch.Generator],
        threat_model: ThreatModel,
    ) -> Tensor:
        """Return the gradient of the margin [B, C, H, W] from differences in random directions."""
        width = self.relative_width * threat_model.eps
        estimate = torch.zeros_like(points)
        for _ in range(self.samples):
            direction = _direction(generators, points)
            # Of length `width` for L2 and of +-width per pixel for Linf; in [0, 1] on both sides.
            ahead = threat_model.ascend(points, direction, width).clamp(0, 1)
            behind = threat_model.ascend(points, -direction, width).clamp(0, 1)
            gain = margin(labels)(model(ahead)) - margin(labels)(model(behind))
            estimate += per_image(gain, points) * direction
        return estimate


def _direction(generators: Sequence[torch.Generator], images: Tensor) -> Tensor:
    """Return random signs [B, C, H, W] from each example's own generator; of larger images they are constant in parts.

    An estimate from few directions is useful only in a space of few dimensions.
    """
    _, channels, height, width = images.shape
    coarse = (channels, min(height, _FINE), min(width, _FINE))
    signs = torch.stack([2 * torch.randint(0, 2, coarse, generator=own) - 1 for own in generators]).to(images)
    return signs if coarse[1:] == (height, width) else F.interpolate(signs, (height, width))
