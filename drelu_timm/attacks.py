"""Threat models, and projected gradient descent: the part that training and evaluation share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

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

    def contains(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Which adversarial images [B, C, H, W] lie in the ball of their image and in [0, 1], up to rounding; [B]."""
        rounding = 1e-6 * max(1.0, self.eps)
        in_range = ((adversarial >= 0) & (adversarial <= 1)).flatten(1).all(1)
        return in_range & (self.distance(adversarial, images) <= self.eps + rounding)

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
            length = per_image(difference.flatten(1).norm(dim=1), images)
            difference = difference * (self.eps / length.clamp(min=1e-12)).clamp(max=1)
        return (images + difference).clamp(0, 1)

    def noise(self, shape: torch.Size, generator: torch.Generator | None = None) -> Tensor:
        """Points of the ball around 0 (uniform for Linf; uniform direction and radius for L2), [B, C, H, W]."""
        device = generator.device if generator else None
        if self.norm == "Linf":
            return self.eps * (2 * torch.rand(shape, generator=generator, device=device) - 1)
        direction = torch.randn(shape, generator=generator, device=device)
        radius = self.eps * torch.rand(shape[0], generator=generator, device=device)
        return direction * per_image(radius / direction.flatten(1).norm(dim=1), direction)

    def random_start(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A point drawn from the ball around each image [B, C, H, W], in [0, 1]."""
        return self.project(images + self.noise(images.shape, generator).to(images), images)

    def ascend(self, adversarial: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """A step of ``step_size`` uphill: along the sign of the gradient (Linf) or its direction (L2)."""
        if self.norm == "Linf":
            return adversarial + step_size * gradient.sign()
        length = per_image(gradient.flatten(1).norm(dim=1), gradient)
        return adversarial + step_size * gradient / length.clamp(min=1e-12)


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """Values or flags [B], shaped to broadcast against images [B, ...]."""
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


@contextmanager
def channels_last(model: nn.Module) -> Iterator[nn.Module]:
    """The model with convolution weights in the memory format that CPUs like best; they are put back.

    With it a small CNN's forward pass takes a half to a third of the time, a resnet18's a tenth less.
    """
    weights = [weight for weight in model.parameters() if weight.ndim == 4 and not weight.is_cuda]
    before = [weight.data for weight in weights]
    try:
        for weight in weights:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        yield model
    finally:
        for weight, data in zip(weights, before, strict=True):
            weight.data = data


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


def margin(labels: Tensor) -> Loss:
    """The largest logit of another class minus that of the label [B]: unlike cross-entropy it never saturates."""

    def loss(logits: Tensor) -> Tensor:
        label = labels.unsqueeze(1)
        others = logits.scatter(1, label, float("-inf")).max(dim=1).values
        return others - logits.gather(1, label).squeeze(1)

    return loss


def targeted_margin(labels: Tensor, targets: Tensor) -> Loss:
    """The logit of the target [B] minus that of the label [B]."""
    return lambda logits: (logits.gather(1, targets.unsqueeze(1)) - logits.gather(1, labels.unsqueeze(1))).squeeze(1)


def scaled_cross_entropy(labels: Tensor) -> Loss:
    """Cross-entropy of logits [B, K] that are shrunk, image by image, where they spread over more than 20.

    Much larger logits, as a net has them whose caps are taken away, leave a float32 softmax without gradient.
    """

    def loss(logits: Tensor) -> Tensor:
        spread = (logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)).detach()
        return cross_entropy(labels)(logits / (spread / 20).clamp(min=1))

    return loss


LOSSES: dict[str, Callable[[Tensor], Loss]] = {
    "ce": cross_entropy,
    "scaled-ce": scaled_cross_entropy,
    "margin": margin,
}


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
    """

    images: Tensor
    steps: Tensor | None = None


# Attacks of the evaluation share one form: (model, images, labels, threat_model, seeds, *, settings) -> Found. The
# model is used as it is (see `frozen`). ``seeds`` holds one number an image, of which alone an image's randomness is
# made. Those that can begin at a point which a smaller ball gave take it as ``start``.


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
