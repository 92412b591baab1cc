"""What attacks raise, from a model's logits."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor], Tensor]  # logits [B, K] -> loss [B] or scalar, to be raised


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
