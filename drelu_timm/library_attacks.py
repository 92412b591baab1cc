"""The published attacks that pyautoattack and foolbox implement, in the form that our own attacks have.

AutoAttack's four single attacks (Croce and Hein 2020, https://arxiv.org/abs/2003.01690) are used one by one: its own
driver takes seeds from the clock and cannot resume.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from foolbox import PyTorchModel
from foolbox.attacks import L2CarliniWagnerAttack
from foolbox.criteria import Misclassification
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from .attacks import ThreatModel, margin, per_image


def apgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat_model: ThreatModel,
    seeds: Sequence[int],
    *,
    loss: str,
    **settings,
) -> Tensor:
    """Auto-PGD on "ce", "dlr" (three classes at least) or, where those are fewer, "margin"."""
    attack_class = _MarginAPGD if loss == "margin" else APGDAttack
    common = _common(threat_model, images, seeds)
    attack = attack_class(model, loss="ce" if loss == "ce" else "dlr", **common, **settings)
    with _contained(images):
        return attack.perturb(images.contiguous(), labels)


def apgd_targeted(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat_model: ThreatModel,
    seeds: Sequence[int],
    *,
    loss: str,
    **settings,
) -> Tensor:
    """Auto-PGD on the targeted "dlr" (four classes at least) or, where those are fewer, on the targeted "margin"."""
    attack_class = _TargetedMarginAPGD if loss == "margin" else APGDAttack_targeted
    attack = attack_class(model, **_common(threat_model, images, seeds), **settings)
    with _contained(images):
        return attack.perturb(images.contiguous(), labels)


def fab_targeted(
    model: nn.Module, images: Tensor, labels: Tensor, threat_model: ThreatModel, seeds: Sequence[int], **settings
) -> Tensor:
    """The targeted fast adaptive boundary attack (Croce and Hein 2020, https://arxiv.org/abs/1907.02044)."""
    attack = FABAttack_PT(model, targeted=True, **_common(threat_model, images, seeds), **settings)
    with _contained(images):
        return attack.perturb(images.contiguous(), labels)


def square(
    model: nn.Module, images: Tensor, labels: Tensor, threat_model: ThreatModel, seeds: Sequence[int], **settings
) -> Tensor:
    """Square, a random search without gradients (Andriushchenko et al. 2020, https://arxiv.org/abs/1912.00049)."""
    attack = SquareAttack(model, resc_schedule=False, **_common(threat_model, images, seeds), **settings)
    with _contained(images):
        return attack.perturb(images.contiguous(), labels)


def carlini_wagner(
    model: nn.Module, images: Tensor, labels: Tensor, threat_model: ThreatModel, seeds: Sequence[int], **settings
) -> Tensor:
    """The nearest example in L2 that fools the model (Carlini and Wagner 2017, https://arxiv.org/abs/1608.04644).

    It knows no radius: the example may lie outside the ball. Where it finds none, the image comes back.
    """
    attack = L2CarliniWagnerAttack(abort_early=False, **settings)  # that abort is one decision for the whole batch
    foolbox_model = PyTorchModel(model, bounds=(0, 1), device=images.device)
    adversarial = attack.run(foolbox_model, images, Misclassification(labels))
    missing = ~adversarial.flatten(1).any(dim=1)  # foolbox hands back black images
    return torch.where(per_image(missing, images), images, adversarial).detach()


class _MarginAPGD(APGDAttack):
    """With the margin where pyautoattack has the DLR loss, which needs three classes."""

    def dlr_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return margin(y)(x)


class _TargetedMarginAPGD(APGDAttack_targeted):
    """With the targeted margin where pyautoattack has the targeted DLR loss, which needs four classes."""

    def dlr_loss_targeted(self, x: Tensor, y: Tensor) -> Tensor:
        row = torch.arange(len(x), device=x.device)
        return x[row, self.y_target] - x[row, y]


def _common(threat_model: ThreatModel, images: Tensor, seeds: Sequence[int]) -> dict:
    """What every attack of pyautoattack takes; one seed stands for the batch there."""
    return {"norm": threat_model.norm, "eps": threat_model.eps, "seed": seeds[0], "device": images.device}


@contextmanager
def _contained(images: Tensor) -> Iterator[None]:
    """Keep to themselves what these attacks do: graphs of every step, the global random state, warnings.

    They enable gradients where they need them. `masking` reports zero gradients for every model.
    """
    cuda = [images.device] if images.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices=cuda), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*zero gradient")
        yield
