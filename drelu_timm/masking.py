"""Gradient masking: does a model withstand attacks, or only hide the gradients that they follow?

After Athalye et al. 2018, https://arxiv.org/abs/1802.00420, and Carlini et al. 2019, https://arxiv.org/abs/1902.06705:
a model that attacks without its gradients, or attacks which know its trick, break where attacks with its gradients fail
is masked.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn

from .adaptive import straight_through, substituted
from .attacks import Loss, cross_entropy, frozen, margin
from .suites import Kind

# Sound evaluations have attacks that differ by a few points (cross-entropy against margin losses on TRADES: 2 to 3).
_MASKED_ABOVE = 0.05  # share of examples that only a gradient-free or adaptive attack breaks
_SOUND_BELOW = 0.10  # the same, and the share of examples where even the adaptive attacks see no gradient


@dataclass(frozen=True)
class ZeroGradients:
    """Shares of the correctly classified examples whose input gradient is exactly zero or not finite, in [0, 1].

    Attributes:
        cross_entropy: Of the cross-entropy. A softmax that float32 saturates gives zeros too.
        margin: Of the margin between logits, which never saturates: these zeros are the model's own.
        through_caps: Of the margin with the gradient let through every cap, as the adaptive attacks see it.
    """

    cross_entropy: float
    margin: float
    through_caps: float

    @classmethod
    def measure(cls, model: nn.Module, images: Tensor, labels: Tensor) -> "ZeroGradients":
        """Measure all three on images [N, C, H, W] in [0, 1] and their labels [N]."""
        with substituted(model, straight_through):
            through_caps = zero_gradient_share(model, images, labels, loss=margin)
        return cls(
            cross_entropy=zero_gradient_share(model, images, labels),
            margin=zero_gradient_share(model, images, labels, loss=margin),
            through_caps=through_caps,
        )


@dataclass(frozen=True)
class Verdict:
    """What is to be thought of white-box robust accuracies.

    Attributes:
        verdict: "sound": white-box attacks find nearly all that is to be found; "masked": they do not, by far;
            "undecided": neither is shown.
        evidence: Sentences with the numbers that it rests on.
    """

    verdict: Literal["sound", "masked", "undecided"]
    evidence: tuple[str, ...]

    def __str__(self) -> str:
        return self.verdict


def zero_gradient_share(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    loss: Callable[[Tensor], Loss] = cross_entropy,
    batch_size: int = 256,
) -> float:
    """Share of the correctly classified images whose input gradient is exactly zero, or not finite.

    Args:
        model: Takes [0, 1] images; read in eval mode.
        images: [N, C, H, W] in [0, 1], on the model's device.
        labels: [N].
        loss: From labels to the loss whose gradient is looked at.
        batch_size: Images a pass.

    Returns:
        In [0, 1]; 0 where no image is classified right.
    """
    zero = correct = 0
    with frozen(model):
        for batch, batch_labels in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            batch = batch.detach().requires_grad_()
            logits = model(batch)
            (gradient,) = torch.autograd.grad(loss(batch_labels)(logits).sum(), batch)
            gradient = gradient.flatten(1)
            blind = ~gradient.isfinite().all(1) | ~gradient.any(1)
            right = logits.argmax(dim=1) == batch_labels
            zero += int((blind & right).sum())
            correct += int(right.sum())
    return zero / max(correct, 1)


def verdict(
    correct: Tensor, broken: Mapping[str, Tensor], kinds: Mapping[str, Kind], zero_gradients: ZeroGradients
) -> Verdict:
    """Compare what white-box attacks leave with what adaptive and black-box attacks break of it.

    Args:
        correct: [N], which examples the model classifies right.
        broken: For each attack, [N]: which examples it broke.
        kinds: For each attack, what it uses.
        zero_gradients: Of the same examples.
    """
    if not correct.any():
        return Verdict("undecided", ("No example is classified right, so there is nothing to break.",))
    white_box = [name for name in broken if kinds[name] == "white-box"]
    others = [name for name in broken if kinds[name] != "white-box"]
    withstood = correct & ~_any(broken, white_box, correct)
    hidden = withstood & _any(broken, others, correct)
    count, total = int(hidden.sum()), len(hidden)
    low, high = wilson_interval(count, total)
    evidence = (
        f"{_percent(withstood)} of {total} examples withstand the white-box attacks ({', '.join(white_box)}), "
        f"{_percent(withstood & ~hidden)} the adaptive and black-box attacks ({', '.join(others)}) as well.",
        f"{_percent(hidden)} of the examples withstand every white-box attack and fall to another one "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f} %{_by_attack(broken, others, hidden)}).",
        f"The input gradient is exactly zero for {100 * zero_gradients.cross_entropy:.1f} % (cross-entropy) and "
        f"{100 * zero_gradients.margin:.1f} % (margin) of the correctly classified examples, and for "
        f"{100 * zero_gradients.through_caps:.1f} % where it is let through every cap.",
    )
    if low > _MASKED_ABOVE:
        return Verdict("masked", evidence)
    if high < _SOUND_BELOW and zero_gradients.through_caps < _SOUND_BELOW:
        return Verdict("sound", evidence)
    return Verdict("undecided", evidence)


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of a binomial share (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953)."""
    z = 1.96
    share = count / total
    centre = share + z * z / (2 * total)
    spread = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _any(broken: Mapping[str, Tensor], names: list[str], like: Tensor) -> Tensor:
    flags = torch.zeros_like(like)
    for name in names:
        flags |= broken[name]
    return flags


def _by_attack(broken: Mapping[str, Tensor], names: list[str], hidden: Tensor) -> str:
    shares = {name: _percent(broken[name] & hidden) for name in names if (broken[name] & hidden).any()}
    return "; " + ", ".join(f"{name} {share}" for name, share in shares.items()) if shares else ""


def _percent(flags: Tensor) -> str:
    return f"{100 * flags.double().mean():.1f} %"
