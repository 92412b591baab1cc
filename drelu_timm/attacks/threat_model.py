"""Threat models: how far an adversary may move an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, get_args

from ..errors import InputError, unknown
from ..formatting import written

if TYPE_CHECKING:  # the command line reads norms and radii without torch
    import torch
    from torch import Tensor

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
    def parse(cls, norm: str, eps: str | float) -> ThreatModel:
        """Read a norm and a radius such as "8/255", "0.1" or 0.1.

        Raises:
            InputError: An unknown norm, a radius that is no number, negative, or not finite, or one above 1 for Linf.
        """
        if norm not in get_args(Norm):
            raise unknown("--norm", norm, get_args(Norm))
        written = str(eps)
        value = radius_of(written)
        if norm == "Linf" and value > 1:
            raise InputError(
                f"--eps {written} is more than a pixel's whole range, which is 1; write 8/255 for 8 of 255 levels"
            )
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
        import torch

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


def radius_of(written: str) -> float:
    """The number that a radius such as "8/255" or "0.1" stands for, in any norm.

    Raises:
        InputError: No number, a negative one, or one that is not finite.
    """
    try:
        numerator, _, denominator = written.partition("/")
        value = float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        value = float("nan")
    if not 0 <= value < float("inf"):
        raise InputError(f"--eps {written!r} is no radius; give a number >= 0 such as 8/255 or 0.1")
    return value


def radius_written(eps: str) -> str:
    """The one spelling of a radius: "0.1" for "0.10" and "1/10", "8/255" for "0.0313725490196".

    Raises:
        InputError: No radius.
    """
    radius = radius_of(eps)
    decimal, levels = written(round(radius, 9)), round(255 * radius)
    fraction = f"{levels}/255"
    return fraction if abs(levels / 255 - radius) < 1e-9 and len(fraction) < len(decimal) else decimal


def norm_and_radius(norm: str | None, eps: str | None, default: ThreatModel) -> tuple[str, str]:
    """What ``--norm`` and ``--eps`` ask for, each by default that of a threat model.

    Raises:
        InputError: A norm without a radius, where the default radius is one of another norm.
    """
    if eps is None and norm is not None and norm != default.norm and norm in get_args(Norm):
        raise InputError(
            f"--norm {norm} needs --eps: {default.written} is a radius for {default.norm}; give one for {norm}"
        )
    return default.norm if norm is None else norm, default.written if eps is None else eps


def parse_threat_models(norm: str, radii: Sequence[float | str]) -> list[ThreatModel]:
    """One for each radius, from the smallest.

    Raises:
        InputError: An unknown norm, text that is no radius, one named twice, or none above 0.
    """
    balls = sorted((ThreatModel.parse(norm, radius) for radius in radii), key=lambda ball: ball.eps)
    written = ",".join(map(str, radii))
    for smaller, larger in pairwise(balls):
        if smaller.eps == larger.eps:
            raise InputError(f"--eps {written} names {larger.written} twice; give each radius once")
    if not balls or balls[-1].eps == 0:
        raise InputError(f"--eps {written} leaves nothing to attack; give a radius above 0")
    return balls


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """Values or flags [B], shaped to broadcast against images [B, ...]."""
    return values.view(-1, *[1] * (images.ndim - 1))
