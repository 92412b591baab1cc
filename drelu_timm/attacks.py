"""Threat models, and the projected gradient descent that training and evaluation share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError, unknown

Norm = Literal["Linf", "L2"]


@dataclass(frozen=True)
class ThreatModel:
    """What an adversary may do: move an image by at most ``eps`` in ``norm``, inside [0, 1].

    Attributes:
        norm: "Linf" or "L2", as RobustBench spells them.
        eps: Radius, in units of a [0, 1] pixel.
        written: The radius as the user wrote it, e.g. "8/255": how it is shown and saved.
    """

    norm: Norm
    eps: float
    written: str

    @classmethod
    def parse(cls, norm: str, eps: str | float) -> "ThreatModel":
        """Read a norm and a radius such as "8/255", "0.1" or 0.1.

        Raises:
            InputError: An unknown norm, or a radius that is no number, negative, or not finite.
        """
        if norm not in get_args(Norm):
            raise unknown("--norm", norm, get_args(Norm))
        written = str(eps)
        try:
            numerator, _, denominator = written.partition("/")
            value = float(numerator) / float(denominator or 1)
        except (ValueError, ZeroDivisionError):
            value = float("nan")
        if not 0 <= value < float("inf"):
            raise InputError(f"--eps {written!r} is no radius; give a number >= 0 such as 8/255 or 0.1")
        return cls(norm, value, written)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        return f"{self.norm}, eps {self.written}"

    def distance(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Distance of each adversarial image [B, C, H, W] from its image, as [B]."""
        difference = (adversarial - images).flatten(1)
        return difference.abs().amax(1) if self.norm == "Linf" else difference.norm(dim=1)

    def project(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """The nearest point of the ball around ``images``, then of [0, 1]; [B, C, H, W] in and out."""
        difference = adversarial - images
        if self.norm == "Linf":
            difference = difference.clamp(-self.eps, self.eps)
        else:
            length = _per_image(difference.flatten(1).norm(dim=1), images)
            difference = difference * (self.eps / length.clamp(min=1e-12)).clamp(max=1)
        return (images + difference).clamp(0, 1)

    def random_start(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A point drawn from the ball around each image (uniform for Linf, uniform in radius for L2), in [0, 1]."""
        if self.norm == "Linf":
            noise = 2 * torch.rand(images.shape, generator=generator, device=images.device) - 1
        else:
            noise = torch.randn(images.shape, generator=generator, device=images.device)
            radius = torch.rand(len(images), generator=generator, device=images.device)
            noise = noise * _per_image(radius / noise.flatten(1).norm(dim=1), images)
        return self.project(images + self.eps * noise, images)

    def ascend(self, adversarial: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """A step of ``step_size`` uphill: along the sign of the gradient (Linf) or its direction (L2)."""
        if self.norm == "Linf":
            return adversarial + step_size * gradient.sign()
        length = _per_image(gradient.flatten(1).norm(dim=1), gradient)
        return adversarial + step_size * gradient / length.clamp(min=1e-12)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    """[B] values, shaped to multiply [B, ...] images."""
    return values.view(-1, *[1] * (images.ndim - 1))


Loss = Callable[[Tensor], Tensor]  # logits [B, K] -> loss [B] or scalar, to be raised


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode and without weight gradients; every module's mode and every flag is put back.

    An attack in eval mode neither uses nor moves the batch statistics of BatchNorm, and draws no dropout. Weight
    gradients, which nobody uses here, cost about a quarter of an attack's time.
    """
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)


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
        model: Takes [0, 1] images; used as it is, see `frozen`.
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


def cross_entropy(labels: Tensor) -> Loss:
    """The loss that attacks raise by default: cross-entropy of each example against its label [B]."""
    return lambda logits: F.cross_entropy(logits.float(), labels, reduction="none")
