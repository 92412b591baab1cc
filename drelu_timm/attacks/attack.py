"""Interface of attacks, from a batch of examples to candidates for adversarial images, and their losses."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .threat_model import ThreatModel

Kind = Literal["white-box", "black-box", "adaptive", "transfer"]
Loss = Callable[[Tensor], Tensor]  # logits [B, K] -> loss [B] or scalar, to be maximized


@dataclass(frozen=True)
class Batch:
    """Examples to attack, on the model's device.

    Attributes:
        images: [B, C, H, W] float32 in [0, 1].
        labels: [B] integers.
        seeds: One per image. All randomness of an image is drawn from its own seed, so that the result of an attack
            does not depend on the rest of the batch.
        start: [B, C, H, W] within eps, where attacks that support it start. None for their own start.
    """

    images: Tensor
    labels: Tensor
    seeds: Sequence[int]
    start: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor) -> "Batch":
        """Return the examples at some rows, given as positions [b] or as flags [B]."""
        positions = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        seeds = [self.seeds[position] for position in positions.tolist()]
        start = None if self.start is None else self.start[positions]
        return Batch(self.images[positions], self.labels[positions], seeds, start)


@dataclass(frozen=True)
class Candidates:
    """Images that an attack proposes. They need not fool the model or be within eps: the caller judges them.

    Attributes:
        images: [B, C, H, W].
        steps: [B], gradients or queries until the first success, or all of them without one. None if not known.
        succeeded: [B], whether a success ended the search. None for attacks that always run to their last step.
    """

    images: Tensor
    steps: Tensor | None = None
    succeeded: Tensor | None = None


@dataclass(frozen=True)
class Attack:
    """Base class of attacks. The fields of a subclass are its settings, which determine its result.

    Attributes:
        kind: What the attack uses: the model's own gradients ("white-box"), only its outputs ("black-box"), knowledge
            of the layers that hide gradients ("adaptive"), or another model ("transfer").
        minimum_norm: Whether the attack searches for the nearest adversarial image and ignores eps.
    """

    kind: ClassVar[Kind] = "white-box"
    minimum_norm: ClassVar[bool] = False

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as saved next to a result."""
        return asdict(self)

    def run(self, model: nn.Module, batch: Batch, threat_model: ThreatModel) -> Candidates:
        """Search for adversarial images of a batch.

        Args:
            model: Maps [0, 1] images [B, C, H, W] to logits [B, K]. The caller puts it into eval mode and freezes its
                weights (`models.inference.frozen`).
            batch: Examples that the model classifies correctly.
            threat_model: Norm and eps of the search.
        """
        raise NotImplementedError

    def for_classes(self, num_classes: int) -> "Attack":
        """Return the attack with settings that are valid for a number of classes."""
        return self


def cross_entropy(labels: Tensor) -> Loss:
    """Return the cross-entropy of each example against its label [B], the default loss of attacks."""
    return lambda logits: F.cross_entropy(logits.float(), labels, reduction="none")


def margin(labels: Tensor) -> Loss:
    """Return the largest logit of another class minus the label's, which never saturates."""

    def loss(logits: Tensor) -> Tensor:
        label = labels.unsqueeze(1)
        others = logits.scatter(1, label, float("-inf")).max(dim=1).values
        return others - logits.gather(1, label).squeeze(1)

    return loss


def targeted_margin(labels: Tensor, targets: Tensor) -> Loss:
    """Return the logit of the target [B] minus the label's."""
    return lambda logits: (logits.gather(1, targets.unsqueeze(1)) - logits.gather(1, labels.unsqueeze(1))).squeeze(1)


def scaled_cross_entropy(labels: Tensor) -> Loss:
    """Return the cross-entropy of logits that are scaled per image so that they span at most 20.

    For much larger logits, such as a model has without its caps, a float32 softmax has no gradient.
    """

    def loss(logits: Tensor) -> Tensor:
        span = (logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)).detach()
        return cross_entropy(labels)(logits / (span / 20).clamp(min=1))

    return loss


LOSSES: dict[str, Callable[[Tensor], Loss]] = {
    "ce": cross_entropy,
    "scaled-ce": scaled_cross_entropy,
    "margin": margin,
}
