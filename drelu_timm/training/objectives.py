"""What training minimizes: natural training, adversarial training (by PGD or in a single step), TRADES, MART, IBP.

An objective states what the inner attack maximizes, and the loss on the images that it returns. These are two calls,
since adversarial weight perturbation evaluates the loss twice on the same adversarial images. The inner attack runs in
eval mode, on BatchNorm's running statistics, which it does not change; the forward passes of the loss run in training
mode, on clean and on adversarial images separately, as in the TRADES authors' code.

Labels are classes [B], or, for all but MART, probabilities [B, K] as CutMix mixes them. Losses are float32.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks.attack import Loss, cross_entropy
from ..attacks.pgd import pgd
from ..attacks.threat_model import ThreatModel
from ..errors import InputError, unknown
from ..models.inference import frozen
from ..models.intervals import bounds


@dataclass(frozen=True)
class InnerAttack:
    """PGD from a random start, which robust objectives train against.

    Attributes:
        model: The bare module, not its distributed wrapper, so that no gradients are synchronized.
        threat_model: Norm and eps.
        steps: Number of gradients.
        step_size: In pixel values of [0, 1].
    """

    model: nn.Module
    threat_model: ThreatModel
    steps: int
    step_size: float

    def __call__(self, images: Tensor, loss: Loss, noise: Tensor) -> Tensor:
        """Return adversarial images [B, C, H, W] that increase ``loss``, searched from ``images + noise``."""
        start = self.threat_model.project(images + noise, images)
        with frozen(self.model) as model:
            settings = {"steps": self.steps, "step_size": self.step_size}
            return pgd(model, images, loss, self.threat_model, start=start, **settings)

    def single_step(self, images: Tensor, loss: Loss, noise: Tensor) -> Tensor:
        """Return N-FGSM's images [B, C, H, W]: one step from twice the noise, clipped to [0, 1] only; see `n_fgsm`."""
        start = (images + 2 * noise).clamp(0, 1).detach().requires_grad_()
        with frozen(self.model) as model:
            (gradient,) = torch.autograd.grad(loss(model(start)).sum(), start)
        return self.threat_model.ascend(start.detach(), gradient, self.step_size).clamp(0, 1)


@dataclass(frozen=True)
class Losses:
    """A loss with its parts, all scalars: ``parts`` are logged under their names."""

    loss: Tensor
    parts: dict[str, Tensor]


LossFunction = Callable[[nn.Module, Tensor, Tensor, Tensor], Losses]


@dataclass(frozen=True)
class Objective:
    """What training minimizes, and what its inner attack maximizes.

    Attributes:
        raised: Maps (frozen model in eval mode, images [B, C, H, W], labels) to what the inner attack maximizes; None
            for an objective without an attack.
        losses: Maps (model in training mode, images, adversarial images, labels) to the loss; images are [B, C, H, W].
        single_step: Whether the inner attack is the single step of N-FGSM instead of PGD.
        ramp: Maps the progress of the training, in [0, 1], to ``losses``; None if the loss does not change.
        certifies: Whether the loss is one of interval bounds; then validation reports the certified accuracy.
    """

    raised: Callable[[nn.Module, Tensor, Tensor], Loss] | None
    losses: LossFunction
    single_step: bool = False
    ramp: Callable[[float], LossFunction] | None = None
    certifies: bool = False

    def at(self, share: float) -> "Objective":
        """Return the objective at a training progress ``share`` in [0, 1]."""
        return self if self.ramp is None else replace(self, losses=self.ramp(share))

    def adversarial(self, images: Tensor, labels: Tensor, attack: InnerAttack, noise: Tensor) -> Tensor:
        """Return adversarial images [B, C, H, W] from ``images + noise``; the images themselves without an attack."""
        if self.raised is None:
            return images
        with frozen(attack.model) as model:
            loss = self.raised(model, images, labels)
        return attack.single_step(images, loss, noise) if self.single_step else attack(images, loss, noise)


def natural(label_smoothing: float = 0.0) -> Objective:
    """Return cross-entropy on clean images; ``label_smoothing`` is the share spread over all classes, in [0, 1]."""

    def losses(model: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor) -> Losses:
        del adversarial
        loss = F.cross_entropy(model(images).float(), labels, label_smoothing=label_smoothing)
        return Losses(loss, {"cross_entropy": loss})

    return Objective(None, losses)


def adversarial_training(label_smoothing: float = 0.0) -> Objective:
    """Return cross-entropy on adversarial images (Madry et al. 2018, https://arxiv.org/abs/1706.06083).

    The attack maximizes plain cross-entropy, without label smoothing.
    """

    def losses(model: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor) -> Losses:
        del images
        loss = F.cross_entropy(model(adversarial).float(), labels, label_smoothing=label_smoothing)
        return Losses(loss, {"adversarial_cross_entropy": loss})

    return Objective(_cross_entropy, losses)


def n_fgsm(label_smoothing: float = 0.0) -> Objective:
    """Return single-step adversarial training, N-FGSM (de Jorge et al. 2022, https://arxiv.org/abs/2202.01181).

    Cross-entropy on ``x + noise + step_size * sign(gradient)``, with the gradient at ``x + noise`` and noise uniform in
    [-2 eps, 2 eps]. As in the authors' code, both points are clipped to [0, 1], and neither to within eps of
    x, which is what prevents catastrophic overfitting in most cases. Their step is eps long. They compute the gradient
    in training mode; here it is computed in eval mode, as for every inner attack.
    """
    return replace(adversarial_training(label_smoothing), single_step=True)


def trades(beta: float, label_smoothing: float = 0.0) -> Objective:
    """Return TRADES (Zhang et al. 2019, https://arxiv.org/abs/1901.08573): clean cross-entropy + beta * KL.

    KL is KL(p(clean) || p(adversarial)), a mean over the batch, which the inner attack maximizes. The attack starts at
    a uniform point within eps; the authors start at Gaussian noise of 0.001.

    Args:
        beta: Weight of the KL term, >= 0; the authors use 1 and 6.
        label_smoothing: As for `natural`, in the cross-entropy.
    """

    def raised(model: nn.Module, images: Tensor, labels: Tensor) -> Loss:
        del labels
        clean = F.softmax(model(images).detach().float(), dim=1)
        return lambda logits: kl_divergence(clean, logits)

    def losses(model: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor) -> Losses:
        logits = model(images).float()
        cross = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        divergence = kl_divergence(F.softmax(logits, dim=1), model(adversarial)) / len(images)
        return Losses(cross + beta * divergence, {"cross_entropy": cross, "kl": divergence})

    return Objective(raised, losses)


def mart(beta: float, label_smoothing: float = 0.0) -> Objective:
    """Return MART (Wang et al. 2020, https://openreview.net/forum?id=rklOg6EFwS): boosted cross-entropy + beta * KL.

    On adversarial images, boosted cross-entropy is cross-entropy minus log(1 - p), with p the largest probability of
    another class. KL is KL(p(clean) || p(adversarial)), weighted for each image by 1 - p(clean) of its label. Both are
    means over the batch. The inner attack maximizes cross-entropy. Everything is computed from log-probabilities, where
    the authors add 1e-4 and 1e-12 to probabilities, so very confident mistakes cost more here.

    Args:
        beta: Weight of the KL term, >= 0; the authors use 5.
        label_smoothing: As for `natural`, in the cross-entropy.
    """

    def losses(model: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor) -> Losses:
        if labels.is_floating_point():
            raise InputError(
                "--objective mart needs one class per image, and --cutmix mixes labels. "
                "Leave --cutmix out, or use --objective at or trades."
            )
        clean = F.log_softmax(model(images).float(), dim=1)
        logits = model(adversarial).float()
        boosted = F.cross_entropy(logits, labels, label_smoothing=label_smoothing) + _runner_up(logits, labels).mean()
        kl = F.kl_div(F.log_softmax(logits, dim=1), clean, reduction="none", log_target=True).sum(dim=1)
        mistaken = -torch.expm1(clean.gather(1, labels.unsqueeze(1)).squeeze(1))
        weighted = (kl * mistaken).mean()
        return Losses(boosted + beta * weighted, {"boosted_cross_entropy": boosted, "weighted_kl": weighted})

    return Objective(_cross_entropy, losses)


def ibp(eps: float, clean_weight: float, ramp: float) -> Objective:
    """Return cross-entropy on interval bounds (IBP, Gowal et al. 2018, https://arxiv.org/abs/1810.12715).

    The loss is ``kappa * CE(logits) + (1 - kappa) * CE(worst-case logits)``. The worst-case logits are the upper
    bounds of logit_k - logit_label within eps (Linf). From the first step on, the radius rises linearly from 0
    to ``eps``, and ``kappa`` falls from 1 to ``clean_weight``.

    Args:
        eps: Radius after the ramp, in pixel values of [0, 1]; the authors use 0.4 for a test radius of 0.3.
        clean_weight: ``kappa`` after the ramp, in [0, 1]; the authors use 0.5.
        ramp: Share of the training's steps that the ramp takes, in [0, 1].
    """

    def losses_after(share: float) -> LossFunction:
        risen = min(1.0, share / ramp) if ramp else 1.0
        kappa = 1 - (1 - clean_weight) * risen

        def losses(model: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor) -> Losses:
            del adversarial
            logits = bounds(model, images, eps * risen)
            clean = F.cross_entropy(logits.value, labels)
            certified = F.cross_entropy(-logits.margins(labels), labels)
            parts = {"cross_entropy": clean, "certified_cross_entropy": certified}
            return Losses(kappa * clean + (1 - kappa) * certified, parts)

        return losses

    return Objective(None, losses_after(1), ramp=losses_after, certifies=True)


def _cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Loss:
    """Return plain cross-entropy as `Objective.raised`; it does not depend on model and images."""
    del model, images
    return cross_entropy(labels)


def _runner_up(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log(1 - p) of logits [B, K] as [B], with p the largest probability of a class other than the label."""
    # log(1 - p) as a difference of logsumexp stays finite where p rounds to 1.
    nothing = float("-inf")
    other = logits.scatter(1, labels.unsqueeze(1), nothing).argmax(dim=1, keepdim=True)
    return logits.logsumexp(dim=1) - logits.scatter(1, other, nothing).logsumexp(dim=1)


def kl_divergence(probabilities: Tensor, logits: Tensor) -> Tensor:
    """Return the sum over the batch of KL(probabilities || softmax(logits)), both [B, K]."""
    # A probability that underflowed to 0, as with logits some 100 apart, would have a NaN gradient.
    probabilities = probabilities.clamp(min=torch.finfo(torch.float32).tiny)
    return F.kl_div(F.log_softmax(logits.float(), dim=1), probabilities, reduction="sum")


def make_objective(
    name: str,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    ibp_eps: float = 0.0,
    ibp_clean_weight: float = 0.5,
    ibp_ramp: float = 0.4,
) -> Objective:
    """Return an objective by name; ``beta`` is for TRADES and MART, the others are arguments of the named functions.

    Raises:
        InputError: Unknown name.
    """
    objectives = {
        "natural": natural(label_smoothing),
        "at": adversarial_training(label_smoothing),
        "n-fgsm": n_fgsm(label_smoothing),
        "trades": trades(beta, label_smoothing),
        "mart": mart(beta, label_smoothing),
        "ibp": ibp(ibp_eps, ibp_clean_weight, ibp_ramp),
    }
    if name not in objectives:
        raise unknown("--objective", name, objectives)
    return objectives[name]
