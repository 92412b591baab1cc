"""Gradient masking: does a model withstand attacks, or only hide the gradients that they follow?

After Athalye et al. 2018, https://arxiv.org/abs/1802.00420, and Carlini et al. 2019, https://arxiv.org/abs/1902.06705:
a model that falls to attacks without its gradients, or to those that repair them, where attacks with its gradients fail
is masked; so is one that these cannot even break with a radius at which nothing can withstand. The attacks that show it
are the same whatever suite a model is evaluated under, and know of no particular trick.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..attacks.adaptive import Annealing, Restarts, substitutable_layers
from ..attacks.attack import LOSSES, Attack, Batch, Candidates, Kind, cross_entropy, margin
from ..attacks.pgd import PGD, SignNoise, drawn
from ..attacks.square import Square
from ..attacks.threat_model import ThreatModel, per_image
from ..results.result import Verdict, Word

SIGNALS = ("zero_gradient_ce", "zero_gradient_margin", "unsteady", "changed")  # what `signals` measures
PROBED = 200  # examples, the first that are classified right: they bound a share of 0 by 2 %

# Tried on the nets of scripts/masking_battery.py.
_MASKED_ABOVE = 0.05  # share of examples that one attack leaves and another breaks; 4 % on long-trained ReLU nets
_SOUND_BELOW = 0.10
# Adversarial training with capped units, whose zero gradients hide nothing at eps, leaves some 20 % there.
_STUCK_ABOVE = 1 / 3  # share of examples that withstand, beyond chance, a radius which nothing can withstand


@dataclass(frozen=True)
class Probe:
    """An attack that reveals masking, its name, and the threat model that it searches in."""

    name: str
    attack: Attack
    threat_model: ThreatModel


def probes(model: nn.Module, threat_model: ThreatModel, pixels: int) -> list[Probe]:
    """What is tried on a model, in this order; each on the examples that those before it in the same ball left.

    White-box attacks come first. At most 255 gradients (230 where there is nothing to adapt to) and 500 queries an
    example, nearly all of them on examples that withstand.

    Args:
        model: The adaptive attack is for those that have layers it knows.
        threat_model: The one whose robust accuracies are in question.
        pixels: Numbers in an image, C * H * W.
    """
    skipped = () if substitutable_layers(model) else (_ADAPTIVE,)
    far = farthest(threat_model, pixels)
    return [
        Probe(name, attack, far if name == _FAR else threat_model)
        for name, attack in PROBES.items()
        if name not in skipped
    ]


def farthest(threat_model: ThreatModel, pixels: int) -> ThreatModel:
    """The smallest ball that holds the mid-grey image whatever its centre.

    There a classifier gives one answer for all examples, so no more of them withstand than the most frequent class has.
    """
    eps = 0.5 if threat_model.norm == "Linf" else 0.5 * sqrt(pixels)
    return replace(threat_model, eps=eps, written=f"{eps:g}")


def signals(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What the model itself tells of masking, without an attack.

    Args:
        model: As attacks see it: its gradient is 0 where it is not finite, or where there is none.
        images: [B, C, H, W] in [0, 1].
        labels: [B].

    Returns:
        Flags [B]: "zero_gradient_ce" and "zero_gradient_margin", whether the input gradient of that loss is zero
        everywhere (a softmax that float32 saturates gives zeros of cross-entropy, but not of the margin); "unsteady"
        and "changed", whether a second call in other batches gives other logits, by more than rounding, and another
        class.
    """
    flags = {}
    for name, loss in (("ce", cross_entropy), ("margin", margin)):
        points = images.detach().clone().requires_grad_()
        logits = model(points)  # once for each: what torch.compile makes keeps no graph for a second gradient
        (gradient,) = torch.autograd.grad(loss(labels)(logits).sum(), points)
        flags[f"zero_gradient_{name}"] = _zero(gradient)
    with torch.no_grad():
        # In another order and in half batches: a model may seed its noise again, or mix the images of a batch.
        again = torch.cat([model(half) for half in images.flip(0).chunk(2)]).flip(0)
        # Only classes whose probability float32 can tell from 0: a class masked by -1e9 is no measure of the others.
        highest = logits.amax(dim=1, keepdim=True)
        possible = logits > highest - 100
        spread = highest.squeeze(1) - logits.where(possible, torch.inf).amin(dim=1)
        difference = ((again - logits).abs() * possible).amax(dim=1)
        unsteady = difference > _ROUNDING * spread + 1e-5 * highest.squeeze(1).abs()
    return flags | {"unsteady": unsteady, "changed": again.argmax(dim=1) != logits.argmax(dim=1)}


_ROUNDING = 1e-3  # of the spread of an image's logits: more than other kernels or TF32 make of them


def _zero(gradient: Tensor) -> Tensor:
    return ~gradient.flatten(1).any(dim=1)


@dataclass(frozen=True)
class PGDFromImage(PGD):
    """`PGD` from the image itself: with an eps this large, a random point alone can fool the model."""

    def run(self, model: nn.Module, batch: Batch, threat_model: ThreatModel) -> Candidates:
        """Search for adversarial images; see `Attack.run`."""
        return super().run(model, replace(batch, start=batch.images), threat_model)


@dataclass(frozen=True)
class AveragedPGD(Attack):
    """PGD on gradients averaged over noise around each point and over the model's own noise.

    It overcomes gradients that are shattered, or zero in one place and not in another, and is the expectation over
    transformation of Athalye et al. 2018 for randomized models.

    Attributes:
        loss: A name in `LOSSES`.
        samples: Gradients per step.
        steps: Number of steps.
        relative_step_size: Length of a step, in units of eps.
    """

    kind: ClassVar[Kind] = "adaptive"
    loss: str = "scaled-ce"
    samples: int = 4
    steps: int = 10
    relative_step_size: float = 0.25

    def run(self, model: nn.Module, batch: Batch, threat_model: ThreatModel) -> Candidates:
        """Search for adversarial images; see `Attack.run`."""
        images, labels = batch.images, batch.labels
        adversarial = drawn(threat_model.random_start, images, batch.seeds)
        found, standing = images, torch.ones_like(labels, dtype=torch.bool)
        wide = replace(threat_model, eps=2 * threat_model.eps)
        for step in range(self.steps):
            gradient = torch.zeros_like(images)
            for sample in range(self.samples):
                own = [seed + step * self.samples + sample + 1 for seed in batch.seeds]
                point = drawn(wide.random_start, adversarial, own).requires_grad_()
                gradient += torch.autograd.grad(LOSSES[self.loss](labels)(model(point)).sum(), point)[0]
            step_size = self.relative_step_size * threat_model.eps
            adversarial = threat_model.project(threat_model.ascend(adversarial, gradient, step_size), images)
            with torch.no_grad():
                fooled = standing & (model(adversarial).argmax(dim=1) != labels)
            found = torch.where(per_image(fooled, images), adversarial, found)
            standing &= ~fooled
        return Candidates(found)


_FAR, _ADAPTIVE = "far", "annealing"
PROBES: dict[str, Attack] = {
    "pgd": PGD(steps=50),
    # The same loss with logits that spread over less than 20: what it breaks beyond luck, a saturated softmax hid.
    "rescaled": PGD("scaled-ce", steps=20, relative_step_size=0.25),
    "margin": PGD("margin", steps=50),
    "restarts": Restarts("scaled-ce", restarts=5, steps=10, relative_step_size=0.25),
    _FAR: PGDFromImage("scaled-ce", steps=20, relative_step_size=0.5),
    "noise": SignNoise(),
    "averaged": AveragedPGD(),
    "square": Square(n_queries=500),
    _ADAPTIVE: Annealing(rounds=5, steps=5, relative_step_size=0.2),
}
_WHITE_BOX = [name for name, attack in PROBES.items() if attack.kind == "white-box" and name != _FAR]

# Shares of examples where an attack fails and another succeeds that scales the logits, that begins at more points, or
# that does not follow the gradient at the point alone.
_GAPS = ("broken_by_rescaled", "broken_by_restarts", "hidden")

_SENTENCES = {  # by attack, what it broke of those that the ones before it left
    "rescaled": "PGD on rescaled logits, which no softmax saturates, breaks {} that PGD left.",
    "margin": "PGD on the margin breaks {} more.",
    "restarts": "More restarts in the place of more steps break {} that these left.",
    "noise": "Random sign noise breaks {} that all these left.",
    "averaged": "Gradients averaged over noise break {} more.",
    "square": "Square, which asks for no gradient, breaks {} more.",
    "annealing": "Caps that sharpen while the attack goes on break {} more.",
}


def verdict(labels: Tensor, flags: Mapping[str, Tensor], broken: Mapping[str, Tensor], hidden: Tensor) -> Verdict:
    """What the signals, the probes and the attacks of a suite say together.

    Args:
        labels: [n], of the examples that were probed.
        flags: Those of `signals`, [n] each.
        broken: For each probe, by name, [n]: which examples it broke; one that it was not given is not broken.
        hidden: [n], which examples the suite's white-box attacks left and another of its attacks broke.
    """
    if not len(labels):
        return Verdict("undecided", ("No example is classified right, so there is nothing to break.",), {"examples": 0})
    white_box = _any(broken, _WHITE_BOX)
    others = hidden | _any(broken, broken.keys() - {*_WHITE_BOX, _FAR})
    shares = {
        **flags,
        **{f"broken_by_{name}": flag for name, flag in broken.items()},
        "withstand_pgd": ~broken["pgd"],
        "withstand_white_box": ~white_box,
        "withstand_all": ~white_box & ~others,
        "hidden": ~white_box & others,
        "stuck": ~white_box & ~broken[_FAR],
    }
    numbers = {"examples": len(labels), "chance": int(labels.bincount().max()) / len(labels)}
    numbers |= {name: float(flag.double().mean()) for name, flag in shares.items()}
    for name in (*_GAPS, "stuck"):
        numbers[f"{name}_low"], numbers[f"{name}_high"] = wilson_interval(int(shares[name].sum()), len(labels))
    return Verdict(_conclusion(numbers), tuple(_evidence(numbers)), numbers)


def _any(broken: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    return torch.stack([broken[name] for name in names]).any(dim=0)


def _conclusion(numbers: Mapping[str, float]) -> Word:
    stuck_above = numbers["chance"] + _STUCK_ABOVE
    if numbers["stuck_low"] > stuck_above or any(numbers[f"{gap}_low"] > _MASKED_ABOVE for gap in _GAPS):
        return "masked"
    found_all = numbers["stuck_high"] < stuck_above and all(numbers[f"{gap}_high"] < _SOUND_BELOW for gap in _GAPS)
    return "sound" if found_all and not numbers["unsteady"] else "undecided"


def _evidence(numbers: Mapping[str, float]) -> Iterator[str]:
    """A sentence for each signal, those that decide first."""

    def percent(name: str) -> str:
        return f"{100 * numbers[name]:.1f} %"

    def with_interval(name: str) -> str:
        return f"{percent(name)} (95 % interval {100 * numbers[f'{name}_low']:.1f} to {percent(f'{name}_high')})"

    yield (
        f"Of {numbers['examples']} examples classified right, {percent('withstand_pgd')} withstand PGD, "
        f"{percent('withstand_white_box')} every white-box attack, {percent('withstand_all')} the others too."
    )
    yield f"Attacks without the gradient, or with a repaired one, break {with_interval('hidden')} that those left."
    yield (
        f"In a ball that holds the grey image nothing withstands but by chance, {percent('chance')}; there white-box "
        f"PGD leaves {with_interval('stuck')}."
    )
    if numbers["unsteady"]:
        yield (
            f"Seen again in other batches, {percent('unsteady')} get other logits and {percent('changed')} another "
            "class: the forward pass is not deterministic or depends on the other images of a batch. No verdict can "
            "be sound."
        )
    else:
        yield "The forward pass is deterministic."
    yield (
        f"The input gradient is zero, or not finite, for {percent('zero_gradient_ce')} (cross-entropy) and "
        f"{percent('zero_gradient_margin')} (margin)."
    )
    for name, sentence in _SENTENCES.items():
        if f"broken_by_{name}" in numbers:
            yield sentence.format((with_interval if f"broken_by_{name}" in _GAPS else percent)(f"broken_by_{name}"))


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of a binomial share (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953)."""
    z = 1.96
    share = count / total
    centre = share + z * z / (2 * total)
    spread = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
