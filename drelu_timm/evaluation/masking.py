"""Gradient masking: whether a model is robust, or only hides the gradients that attacks follow.

After Athalye et al. 2018, https://arxiv.org/abs/1802.00420, and Carlini et al. 2019, https://arxiv.org/abs/1902.06705:
a model is masked if attacks without its gradients, or with repaired ones, fool it where attacks with its gradients do
not; or if the latter do not fool it even at an eps at which no model can be robust. The probes, the attacks that show
this, are the same for every suite and model.
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
from ..results.result import GAPS, Verdict, conclusion, share_interval

SIGNALS = ("zero_gradient_ce", "zero_gradient_margin", "unsteady", "changed")  # the flags of `signals`
PROBED = 200  # the first correctly classified examples; 0 of them bound a share by 2 %


@dataclass(frozen=True)
class Probe:
    """An attack that reveals masking, its name, and the threat model that it searches in."""

    name: str
    attack: Attack
    threat_model: ThreatModel


def probes(model: nn.Module, threat_model: ThreatModel, pixels: int) -> list[Probe]:
    """Return the probes for a model in their order; each one gets the examples that the earlier ones left.

    White-box attacks come first. They cost at most 255 gradients (230 without the adaptive attack) and 500 queries per
    example, nearly all of them on examples that stay correct.

    Args:
        model: The adaptive attack is only for models with layers that it can substitute.
        threat_model: The threat model of the robust accuracies.
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
    """Return the threat model of the smallest eps at which the mid-gray image is within eps of every image.

    A classifier has one answer there, so at most the examples of the most frequent class can stay correct.
    """
    eps = 0.5 if threat_model.norm == "Linf" else 0.5 * sqrt(pixels)
    return replace(threat_model, eps=eps, written=f"{eps:g}")


def signals(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Measure what a model itself shows of masking, without an attack.

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
        logits = model(points)  # once per loss: a compiled model keeps no graph for a second gradient
        (gradient,) = torch.autograd.grad(loss(labels)(logits).sum(), points)
        flags[f"zero_gradient_{name}"] = ~gradient.flatten(1).any(dim=1)
    with torch.no_grad():
        # In another order and in half batches: a model may seed its noise again, or mix the images of a batch.
        again = torch.cat([model(half) for half in images.flip(0).chunk(2)]).flip(0)
        # Only classes whose probability float32 can distinguish from 0: a class masked by -1e9 would hide changes of
        # the others.
        highest = logits.amax(dim=1, keepdim=True)
        possible = logits > highest - 100
        spread = highest.squeeze(1) - logits.where(possible, torch.inf).amin(dim=1)
        difference = ((again - logits).abs() * possible).amax(dim=1)
        unsteady = difference > _ROUNDING * spread + 1e-5 * highest.squeeze(1).abs()
    return flags | {"unsteady": unsteady, "changed": again.argmax(dim=1) != logits.argmax(dim=1)}


_ROUNDING = 1e-3  # of the range of an image's logits: more than other kernels or TF32 change them


@dataclass(frozen=True)
class PGDFromImage(PGD):
    """`PGD` that starts from the image: at a large eps, a random point alone can fool the model."""

    def run(self, model: nn.Module, batch: Batch, threat_model: ThreatModel) -> Candidates:
        """Search for adversarial images; see `Attack.run`."""
        return super().run(model, replace(batch, start=batch.images), threat_model)


@dataclass(frozen=True)
class AveragedPGD(Attack):
    """PGD on gradients averaged over noise around each point and over the model's own noise.

    It overcomes gradients that are shattered or zero in places. For randomized models it is the expectation over
    transformation of Athalye et al. 2018.

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
        found, left = images, torch.ones_like(labels, dtype=torch.bool)
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
                fooled = left & (model(adversarial).argmax(dim=1) != labels)
            found = torch.where(per_image(fooled, images), adversarial, found)
            left &= ~fooled
        return Candidates(found)


_FAR, _ADAPTIVE = "far", "annealing"
PROBES: dict[str, Attack] = {
    "pgd": PGD(steps=50),
    # The same loss on logits with a range below 20: examples that it adds were hidden by a saturated softmax.
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

_SENTENCES = {  # by probe, on examples that the earlier ones left
    "rescaled": "PGD on rescaled logits, which saturate no softmax, fools the model on {} that PGD left.",
    "margin": "PGD on the margin adds {}.",
    "restarts": "More restarts of fewer steps add {}.",
    "noise": "Random sign noise adds {}.",
    "averaged": "Gradients averaged over noise add {}.",
    "square": "Square, which uses no gradient, adds {}.",
    "annealing": "Caps that sharpen during the attack add {}.",
}


def verdict(labels: Tensor, flags: Mapping[str, Tensor], broken: Mapping[str, Tensor], hidden: Tensor) -> Verdict:
    """Return the verdict of the signals, the probes and the attacks of a suite.

    Args:
        labels: [n], of the examples that were probed.
        flags: Those of `signals`, [n] each.
        broken: By probe, [n]: the examples on which it fooled the model; False for examples that it did not get.
        hidden: [n], the examples that the suite's white-box attacks left and another of its attacks did not.
    """
    if not len(labels):
        nothing = "No example is classified correctly, so there is nothing to attack."
        return Verdict("undecided", (nothing,), {"examples": 0})
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
    for name in (*GAPS, "stuck"):
        numbers[f"{name}_low"], numbers[f"{name}_high"] = share_interval(int(shares[name].sum()), len(labels))
    return Verdict(conclusion(numbers), tuple(_evidence(numbers)), numbers)


def _any(broken: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    return torch.stack([broken[name] for name in names]).any(dim=0)


def _evidence(numbers: Mapping[str, float]) -> Iterator[str]:
    """Yield a sentence per signal; those that decide come first."""

    def percent(name: str) -> str:
        return f"{100 * numbers[name]:.1f} %"

    def with_interval(name: str) -> str:
        return f"{percent(name)} (95 % interval {100 * numbers[f'{name}_low']:.1f} to {percent(f'{name}_high')})"

    yield (
        f"Of {numbers['examples']} correctly classified examples, {percent('withstand_pgd')} stay correct under PGD, "
        f"{percent('withstand_white_box')} under every white-box attack, {percent('withstand_all')} under all attacks."
    )
    yield f"Attacks without the gradient, or with a repaired one, fool the model on {with_interval('hidden')} more."
    yield (
        f"At an eps that reaches the gray image from everywhere, at most {percent('chance')} (chance) can stay "
        f"correct; white-box PGD leaves {with_interval('stuck')}."
    )
    if numbers["unsteady"]:
        yield (
            f"In other batches, {percent('unsteady')} get other logits and {percent('changed')} another class: the "
            "forward pass is not deterministic or depends on the other images of a batch. The verdict cannot be sound."
        )
    else:
        yield "The forward pass is deterministic."
    yield (
        f"The input gradient is zero, or not finite, for {percent('zero_gradient_ce')} (cross-entropy) and "
        f"{percent('zero_gradient_margin')} (margin)."
    )
    for name, sentence in _SENTENCES.items():
        if f"broken_by_{name}" in numbers:
            yield sentence.format((with_interval if f"broken_by_{name}" in GAPS else percent)(f"broken_by_{name}"))
