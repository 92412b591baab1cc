"""Threat models: how far an adversary may move images."""

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
_SMALLEST = 2.0**-24  # pixels near 1 cannot move by less in float32


@dataclass(frozen=True)
class ThreatModel:
    """An adversary that moves an image by at most ``eps`` in ``norm``, inside [0, 1].

    Attributes:
        norm: "Linf" or "L2", as RobustBench spells them.
        eps: Radius, in units of a [0, 1] pixel.
        written: The radius as the user wrote it, e.g. "8/255", for display and files.
    """

    norm: Norm
    eps: float
    written: str

    @classmethod
    def parse(cls, norm: str, eps: str | float) -> ThreatModel:
        """Parse a norm and a radius such as "8/255", "0.1" or 0.1.

        Raises:
            InputError: An unknown norm, a radius that is not a finite number >= 0, or one above 1 for Linf.
        """
        if norm not in get_args(Norm):
            raise unknown("--norm", norm, get_args(Norm))
        written = str(eps).strip()
        value = radius_of(written)
        if 0 < value < _SMALLEST:
            raise InputError(
                f"--eps {written} is below {_SMALLEST:.2g}, float32's smallest step below 1. Use a larger one."
            )
        if norm == "Linf" and value > 1:
            raise InputError(f"--eps {written} is larger than the pixel range [0, 1]. Use 8/255 for 8 of 255 levels.")
        return cls(norm, value, written)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        return f"{self.norm}, eps {self.written}"

    def contains(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Return whether each adversarial image [B, C, H, W] is in [0, 1] and within eps, up to rounding, as [B]."""
        rounding = 1e-6 * max(1.0, self.eps)
        in_range = ((adversarial >= 0) & (adversarial <= 1)).flatten(1).all(1)
        return in_range & (self.distance(adversarial, images) <= self.eps + rounding)

    def distance(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Return the distance of each adversarial image [B, C, H, W] from its image, as [B]."""
        difference = (adversarial - images).flatten(1)
        return difference.abs().amax(1) if self.norm == "Linf" else difference.norm(dim=1)

    def project(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Project [B, C, H, W] to within eps of ``images``, then onto [0, 1]."""
        difference = adversarial - images
        if self.norm == "Linf":
            difference = difference.clamp(-self.eps, self.eps)
        else:
            length = per_image(difference.flatten(1).norm(dim=1), images)
            difference = difference * (self.eps / length.clamp(min=1e-12)).clamp(max=1)
        return (images + difference).clamp(0, 1)

    def noise(self, shape: torch.Size, generator: torch.Generator | None = None) -> Tensor:
        """Draw points [B, C, H, W] within eps of 0: uniform for Linf; direction and radius for L2."""
        import torch

        device = generator.device if generator else None
        if self.norm == "Linf":
            return self.eps * (2 * torch.rand(shape, generator=generator, device=device) - 1)
        direction = torch.randn(shape, generator=generator, device=device)
        radius = self.eps * torch.rand(shape[0], generator=generator, device=device)
        return direction * per_image(radius / direction.flatten(1).norm(dim=1), direction)

    def random_start(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw a point within eps of each image [B, C, H, W], in [0, 1]."""
        return self.project(images + self.noise(images.shape, generator).to(images), images)

    def ascend(self, adversarial: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """Move [B, C, H, W] by ``step_size`` along the sign (Linf) or the direction (L2) of the gradient."""
        if self.norm == "Linf":
            return adversarial + step_size * gradient.sign()
        length = per_image(gradient.flatten(1).norm(dim=1), gradient)
        return adversarial + step_size * gradient / length.clamp(min=1e-12)


def radius_of(written: str) -> float:
    """Return the number for a radius such as "8/255" or "0.1", in any norm.

    Raises:
        InputError: Text that is not a finite number >= 0.
    """
    try:
        if not written.isascii() or "_" in written:  # float accepts digits of other scripts, and 1_000
            raise ValueError
        numerator, _, denominator = written.partition("/")
        value = float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        value = float("nan")
    if not 0 <= value < float("inf"):
        raise InputError(f"--eps {written!r} is not a radius. Use a number >= 0 such as 8/255 or 0.1.")
    return value


def radius_written(eps: str) -> str:
    """Return the canonical form of a radius: "0.1" for "0.10" and "1/10", "8/255" for "0.0313725490196".

    Raises:
        InputError: Text that is not a radius.
    """
    radius = radius_of(eps)
    decimal, levels = written(round(radius, 9)), round(255 * radius)
    fraction = f"{levels}/255"
    return fraction if abs(levels / 255 - radius) < 1e-9 and len(fraction) < len(decimal) else decimal


def norm_and_radius(norm: str | None, eps: str | None, default: ThreatModel) -> tuple[str, str]:
    """Return the values of ``--norm`` and ``--eps``, by default taken from a threat model.

    Raises:
        InputError: A norm without a radius, if the default radius belongs to another norm.
    """
    if eps is None and norm is not None and norm != default.norm and norm in get_args(Norm):
        raise InputError(f"--norm {norm} needs --eps: the default {default.written} is a radius for {default.norm}.")
    return default.norm if norm is None else norm, default.written if eps is None else eps


def parse_threat_models(norm: str, radii: Sequence[float | str]) -> list[ThreatModel]:
    """Parse a threat model for each radius; return them from the smallest to the largest.

    Raises:
        InputError: An unknown norm, text that is not a radius, a radius named twice, or none above 0.
    """
    threat_models = sorted((ThreatModel.parse(norm, radius) for radius in radii), key=lambda parsed: parsed.eps)
    written = ",".join(map(str, radii))
    for smaller, larger in pairwise(threat_models):
        if smaller.eps == larger.eps:
            raise InputError(f"--eps {written} names {larger.written} twice. Name each radius once.")
    if not threat_models or threat_models[-1].eps == 0:
        raise InputError(f"--eps {written} leaves nothing to attack. Use a radius above 0.")
    return threat_models


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """Reshape values or flags [B] so that they broadcast against images [B, ...]."""
    return values.view(-1, *[1] * (images.ndim - 1))
