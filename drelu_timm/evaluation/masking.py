"""Gradient masking: whether a model is robust, or only hides the gradients that attacks follow.

After Athalye et al. 2018, https://arxiv.org/abs/1802.00420, and Carlini et al. 2019, https://arxiv.org/abs/1902.06705:
a model is masked if attacks without its gradients, or with repaired ones, fool it where attacks with its gradients do
not; or if the latter do not fool it even at an eps at which no model can be robust. The probes, the attacks that show
this, are the same for every suite and model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..attacks.adaptive import Annealing, Restarts, substitutable_layers
from ..attacks.attack import LOSSES, Attack, Batch, Candidates, Kind, cross_entropy, margin
from ..attacks.estimated import EstimatedPGD
from ..attacks.pgd import PGD, SignNoise, drawn
from ..attacks.square import Square
from ..attacks.threat_model import ThreatModel, per_image

SIGNALS = ("zero_gradient_ce", "zero_gradient_margin", "unsteady", "changed")  # the flags of `signals`
PROBED = 200  # correctly classified examples; 0 of them bound a share by 2 %
MOST_PROBED = 800  # where fewer do not decide

_SUSPICIOUS = 0.1  # share of examples with a useless gradient above which `STRONGER` is needed
_SUSPICIOUS_GAP = 0.02  # share that attacks without the gradient find in addition
_SUSPICIOUS_MARGIN = 0.05  # share that PGD on the margin finds in addition to PGD on the cross-entropy


@dataclass(frozen=True)
class Probe:
    """An attack that reveals masking, its name, and the threat model that it searches in."""

    name: str
    attack: Attack
    threat_model: ThreatModel


def probes(model: nn.Module, threat_model: ThreatModel, pixels: int) -> list[Probe]:
    """Return the probes for a model in their order; each attacks the examples that earlier ones at the same eps left.

    White-box attacks come first. All but `STRONGER` cost at most 255 gradients (230 without the adaptive attack) and
    500 queries per example, nearly all of them on examples that stay correct. `STRONGER`, the last one, costs 1,225
    queries more and is only for models that `is_suspicious`.

    Args:
        model: The adaptive attack is only for models with layers that it can substitute.
        threat_model: The threat model of the robust accuracies.
        pixels: Values per image, C * H * W.
    """
    skipped = () if substitutable_layers(model) else (_ADAPTIVE,)
    far = farthest(threat_model, pixels)
    return [
        Probe(name, attack, far if name == FAR else threat_model)
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
        relative_step_size: Step length in units of eps.
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


FAR, STRONGER, _ADAPTIVE = "far", "estimated", "annealing"
PROBES: dict[str, Attack] = {
    "pgd": PGD(steps=50),
    # The same loss on logits with a range below 20: examples that it adds were hidden by a saturated softmax.
    "rescaled": PGD("scaled-ce", steps=20, relative_step_size=0.25),
    "margin": PGD("margin", steps=50),
    "restarts": Restarts("scaled-ce", restarts=5, steps=10, relative_step_size=0.25),
    FAR: PGDFromImage("scaled-ce", steps=20, relative_step_size=0.5),
    "noise": SignNoise(),
    "averaged": AveragedPGD(),
    "square": Square(n_queries=500),
    _ADAPTIVE: Annealing(rounds=5, steps=5, relative_step_size=0.2),
    STRONGER: EstimatedPGD(),
}
WHITE_BOX = [name for name, attack in PROBES.items() if attack.kind == "white-box" and name != FAR]


def is_suspicious(flags: Mapping[str, Tensor], gradients: Mapping[str, Tensor], broken: Mapping[str, Tensor]) -> bool:
    """Return whether white-box attacks and a short Square can both have missed much, so that `STRONGER` has to look.

    Args:
        flags: From `signals`, [n] each.
        gradients: From `fidelity.gradient_flags`, on a part of the examples.
        broken: By probe, [n]: the examples on which it fooled the model.
    """
    useless = [
        flags["zero_gradient_ce"],
        flags["zero_gradient_margin"],
        gradients["misleading"] | gradients["not_finite"],
    ]
    found = torch.stack([flag for name, flag in broken.items() if name not in (*WHITE_BOX, FAR)]).any(dim=0)
    return (
        any(_share(flag) > _SUSPICIOUS for flag in useless)
        or _share(found) > _SUSPICIOUS_GAP
        or _share(broken["margin"]) > _SUSPICIOUS_MARGIN  # PGD on the cross-entropy missed much
        or bool(flags["unsteady"].any())
    )


def _share(flags: Tensor) -> float:
    return float(flags.double().mean()) if len(flags) else 0.0


def probing_order(labels: Tensor, correct: Tensor, seed: int) -> Tensor:
    """Return the correctly classified examples in the order in which they are probed.

    The order is random and each class is spread evenly over it, so that its start has the classes' shares, also for
    images in class order.

    Args:
        labels: [N].
        correct: [N].
        seed: Decides the order.
    """
    generator = torch.Generator().manual_seed(seed)
    positions = correct.nonzero().squeeze(1)
    positions = positions[torch.randperm(len(positions), generator=generator)]
    place = torch.zeros(len(positions), dtype=torch.float64)
    for label in labels[positions].unique().tolist():
        of_class = labels[positions] == label
        count = int(of_class.sum())
        place[of_class] = (torch.arange(count) + torch.rand(1, generator=generator)).double() / count
    return positions[place.argsort(stable=True)]
