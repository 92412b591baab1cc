"""Classification tasks made of scikit-learn's digits, and the training of small models on them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from drelu_timm.attacks.attack import cross_entropy
from drelu_timm.attacks.pgd import pgd
from drelu_timm.attacks.threat_model import ThreatModel
from drelu_timm.models.inference import frozen

EVALUATED = 200  # test images per model
LINF = ThreatModel.parse("Linf", "0.1")
L2 = ThreatModel.parse("L2", "0.5")


@dataclass(frozen=True)
class Task:
    """Images and classes of a classification problem.

    Attributes:
        train_images: [M, 1, 8, 8] in [0, 1].
        train_labels: [M].
        images: [`EVALUATED`, 1, 8, 8], not seen in training.
        labels: [`EVALUATED`].
        classes: Number of classes.
    """

    train_images: Tensor
    train_labels: Tensor
    images: Tensor
    labels: Tensor
    classes: int


@cache
def task(name: str) -> Task:
    """Return a task; the same images every time.

    Args:
        name: "ten": all digits. "three": 0 or 1 to 4, 5 to 7, the others. "two": even or odd. "unequal": 3 or 8 (20 %)
            against the others. "rare": 8 (10 %) against the others. The last two are in class order, as image folders.
    """
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16)[order]
    digits = torch.tensor(digits)[order]
    labels, classes = {
        "ten": (digits, 10),
        "three": ((digits > 4).long() + (digits > 7).long(), 3),
        "two": (digits % 2, 2),
        "unequal": (((digits == 3) | (digits == 8)).long(), 2),
        "rare": ((digits == 8).long(), 2),
    }[name]
    tested = torch.arange(1400, 1400 + EVALUATED)
    if name in ("unequal", "rare"):
        tested = tested[labels[tested].argsort(stable=True)]
    return Task(images[:1400], labels[:1400], images[tested], labels[tested], classes)


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]  # model, images, labels -> scalar


def natural(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy."""
    return F.cross_entropy(model(images), labels)


def smoothed(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy with strong label smoothing."""
    return F.cross_entropy(model(images), labels, label_smoothing=0.5)


def cooled(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of logits divided by 100: the temperature of defensive distillation."""
    return F.cross_entropy(model(images) / 100, labels)


def adversarial(model: nn.Module, images: Tensor, labels: Tensor, *, threat_model: ThreatModel = LINF) -> Tensor:
    """Return the cross-entropy of adversarial images (Madry et al. 2018)."""
    return F.cross_entropy(model(_attacked(model, images, cross_entropy(labels), threat_model)), labels)


def adversarial_l2(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return `adversarial` in the L2 threat model."""
    return adversarial(model, images, labels, threat_model=L2)


def trades(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the TRADES loss with beta 6 (Zhang et al. 2019)."""
    with torch.no_grad():
        clean = model(images).softmax(1)
    attacked = model(_attacked(model, images, lambda logits: _divergence(logits, clean), LINF))
    logits = model(images)
    return F.cross_entropy(logits, labels) + 6 * _divergence(attacked, logits.softmax(1)).mean()


def _divergence(logits: Tensor, target: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(1), target, reduction="none").sum(1)


def _attacked(model: nn.Module, images: Tensor, loss: Callable[[Tensor], Tensor], threat_model: ThreatModel) -> Tensor:
    start = threat_model.random_start(images)
    with frozen(model):
        return pgd(model, images, loss, threat_model, start=start, steps=3, step_size=threat_model.eps / 2)


def trained(
    model: nn.Module, data: Task, *, loss: Loss = natural, epochs: int = 15, cap_weight: float = 0.1
) -> nn.Module:
    """Train a model with Adam and return it in eval mode.

    Parameters named "cap" have a learning rate of their own and a squared penalty: at the rate of the weights they
    would need 100,000 steps.
    """
    caps = [parameter for name, parameter in model.named_parameters() if name.endswith("cap")]
    weights = [parameter for name, parameter in model.named_parameters() if not name.endswith("cap")]
    optimizer = torch.optim.Adam([{"params": weights, "lr": 1e-3}, {"params": caps, "lr": 0.1}])
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_labels)).split(64):
            value = loss(model, data.train_images[batch], data.train_labels[batch])
            value = value + cap_weight * sum(cap.square().sum() for cap in caps)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return model.eval()
