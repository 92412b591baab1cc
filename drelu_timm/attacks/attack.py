"""The interface of attacks: a batch of examples in, candidates for adversarial images out."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .threat_model import ThreatModel

Kind = Literal["white-box", "black-box", "adaptive", "transfer"]


@dataclass(frozen=True)
class Batch:
    """Examples to attack, on the model's device.

    Attributes:
        images: [B, C, H, W] float32 in [0, 1].
        labels: [B] integers.
        seeds: One per image. All randomness of an image is drawn from its own seed, so that what an attack finds does
            not depend on the rest of the batch.
        start: [B, C, H, W] in the epsilon ball, where attacks that can do so start their search. None for their own
            starting point.
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
    """Images that an attack proposes. They need not fool the model or lie in the epsilon ball: the caller judges them.

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
    """Base class of attacks. The fields of a subclass are its settings, which decide what it finds.

    Attributes:
        kind: What the attack uses: the model's own gradients ("white-box"), its outputs only ("black-box"), knowledge
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
            model: Takes [0, 1] images [B, C, H, W] and returns logits [B, K]. It is used as it is: the caller puts it
                into eval mode and freezes its weights (`models.modes.frozen`).
            batch: Examples that the model classifies correctly.
            threat_model: Norm and eps of the search.
        """
        raise NotImplementedError

    def for_classes(self, num_classes: int) -> "Attack":
        """Return the attack with settings that a number of classes allows."""
        return self
