"""What training minimises: natural training, adversarial training, TRADES.

An objective takes (model, images, labels, attack) and returns the loss with its parts. BatchNorm: the inner attack runs
in eval mode, on running statistics that it neither uses up nor moves; the forwards of the loss run in training mode,
each on its own batch (clean images, adversarial images), as in the TRADES authors' code.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .attacks import Loss, ThreatModel, cross_entropy, frozen, pgd
from .errors import unknown


@dataclass(frozen=True)
class InnerAttack:
    """The maximisation inside a robust objective: PGD from a random start.

    Attributes:
        model: The bare module, not its distributed wrapper: no gradients are synchronised.
        threat_model: Norm and radius.
        steps: Number of gradients.
        step_size: In units of a [0, 1] pixel.
    """

    model: nn.Module
    threat_model: ThreatModel
    steps: int
    step_size: float

    def __call__(self, images: Tensor, loss: Loss, noise: Tensor) -> Tensor:
        """Adversarial images [B, C, H, W] that raise ``loss``, begun at ``images + noise``."""
        start = self.threat_model.project(images + noise, images)
        with frozen(self.model) as model:
            return pgd(
                model,
                images,
                loss,
                self.threat_model,
                start=start,
                steps=self.steps,
                step_size=self.step_size,
            )


@dataclass(frozen=True)
class Objective:
    """A loss with its parts, all scalars: ``parts`` go into the log under their names."""

    loss: Tensor
    parts: dict[str, Tensor]


ObjectiveFunction = Callable[[nn.Module, Tensor, Tensor, InnerAttack, Tensor], Objective]


def natural(model: nn.Module, images: Tensor, labels: Tensor, attack: InnerAttack, noise: Tensor) -> Objective:
    """Cross-entropy on clean images; the attack is not used."""
    del attack, noise
    loss = F.cross_entropy(model(images).float(), labels)
    return Objective(loss, {"cross_entropy": loss})


def adversarial_training(
    model: nn.Module, images: Tensor, labels: Tensor, attack: InnerAttack, noise: Tensor
) -> Objective:
    """Cross-entropy on adversarial images (Madry et al. 2018, https://arxiv.org/abs/1706.06083)."""
    adversarial = attack(images, cross_entropy(labels), noise)
    loss = F.cross_entropy(model(adversarial).float(), labels)
    return Objective(loss, {"adversarial_cross_entropy": loss})


def trades(beta: float) -> ObjectiveFunction:
    """TRADES (Zhang et al. 2019, https://arxiv.org/abs/1901.08573): cross-entropy on clean images + beta * KL.

    KL is KL(p(clean) || p(adversarial)), a mean over the batch, and the inner attack raises it. The attack begins at a
    uniform point of the ball; the authors begin at Gaussian noise of 0.001.

    Args:
        beta: Weight of the KL term, >= 0; the authors use 1 and 6.
    """

    def objective(model: nn.Module, images: Tensor, labels: Tensor, attack: InnerAttack, noise: Tensor) -> Objective:
        with frozen(attack.model) as still:
            clean = F.softmax(still(images).detach().float(), dim=1)
        adversarial = attack(images, lambda logits: kl_divergence(clean, logits), noise)
        logits = model(images).float()
        cross = F.cross_entropy(logits, labels)
        divergence = kl_divergence(F.softmax(logits, dim=1), model(adversarial)) / len(images)
        return Objective(cross + beta * divergence, {"cross_entropy": cross, "kl": divergence})

    return objective


def kl_divergence(probabilities: Tensor, logits: Tensor) -> Tensor:
    """Sum over the batch of KL(probabilities || softmax(logits)), both [B, K]."""
    return F.kl_div(F.log_softmax(logits.float(), dim=1), probabilities, reduction="sum")


def make_objective(name: str, *, beta: float) -> ObjectiveFunction:
    """The objective of a name; ``beta`` is for TRADES.

    Raises:
        InputError: No such objective.
    """
    objectives = {"natural": natural, "at": adversarial_training, "trades": trades(beta)}
    if name not in objectives:
        raise unknown("--objective", name, objectives)
    return objectives[name]
