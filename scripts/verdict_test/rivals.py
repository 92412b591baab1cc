"""Other rules that say whether a robust accuracy can be believed, on the same models."""

import sys
import warnings
from dataclasses import dataclass

import torch
from pyautoattack import checks
from torch import Tensor, nn

from drelu_timm.attacks.apgd import APGD, TargetedAPGD
from drelu_timm.attacks.attack import Attack, Batch, cross_entropy, margin
from drelu_timm.attacks.pgd import PGD
from drelu_timm.attacks.square import Square
from drelu_timm.evaluation.driver import Attacked
from drelu_timm.models.inference import frozen

from .roster import Entry
from .training import task

IMAGES = 100  # every second one of the task


@dataclass(frozen=True)
class Rivals:
    """What other rules say of a model.

    Attributes:
        autoattack: Robust accuracy under AutoAttack without FAB, with 2,000 queries of Square, on `IMAGES` images.
        autoattack_flags: Whether one of its checks warns (randomized, dynamic, zero gradients, Square's success).
        square_below_pgd: Whether Square with 500 queries alone finds more than 50 steps of PGD.
        gradient_check: The rule of ART's `loss_gradient_check`: whether the gradient of the loss is zero, NaN, or
            infinite for any image.
    """

    autoattack: float
    autoattack_flags: bool
    square_below_pgd: bool
    gradient_check: bool


def ask_rivals(entry: Entry, model: nn.Module) -> Rivals:
    """Evaluate a model by the other rules."""
    data = task(entry.task)
    with torch.random.fork_rng(), frozen(model):
        torch.manual_seed(0)
        seen = Attacked(model)
        with torch.no_grad():
            right = (model(data.images).argmax(1) == data.labels).nonzero().squeeze(1)
        right = right[right % (len(data.labels) // IMAGES) == 0]
        batch = Batch(data.images[right], data.labels[right], right.tolist())

        def left(attack: Attack, standing: Tensor) -> Tensor:
            of = batch[standing]
            if len(of):
                found = attack.run(seen, of, entry.threat_model).images
                with torch.no_grad():
                    found = entry.threat_model.project(found, of.images)
                    standing = standing.clone()
                    standing[standing.clone()] = model(found).argmax(1) == of.labels
            return standing

        everything = torch.ones(len(right), dtype=torch.bool)
        pgd, square = left(PGD(steps=50), everything), left(Square(n_queries=500), everything)
        white_box = everything
        for attack in (APGD(), TargetedAPGD().for_classes(data.classes)):
            white_box = left(attack, white_box)
        standing = left(Square(n_queries=2000), white_box)
        return Rivals(
            autoattack=int(standing.sum()) / IMAGES,
            autoattack_flags=_flags(model, batch, int(white_box.sum()), int(standing.sum()), IMAGES),
            square_below_pgd=int(square.sum()) < int(pgd.sum()),
            gradient_check=_gradient_check(model, batch),
        )


def _flags(model: nn.Module, batch: Batch, white_box: int, standing: int, total: int) -> bool:
    """Return whether AutoAttack's own checks warn."""
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))
    tracer = sys.gettrace()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checks.check_randomized(model, batch.images, batch.labels)
        with torch.no_grad():
            checks.check_dynamic(model, batch.images)
        checks.check_zero_gradients(_gradient(Attacked(model), batch, margin(batch.labels)))
        checks.check_square_sr({"clean": 1.0, "white-box": white_box / total, "square": standing / total})
    sys.settrace(tracer)
    return any(issubclass(warning.category, Warning) and "flags_doc" in str(warning.message) for warning in caught)


def _gradient_check(model: nn.Module, batch: Batch) -> bool:
    gradient = _gradient(model, batch, cross_entropy(batch.labels)).flatten(1)
    return bool((~gradient.any(dim=1) | ~gradient.isfinite().all(dim=1)).any())


def _gradient(model: nn.Module, batch: Batch, loss) -> Tensor:
    images = batch.images.clone().requires_grad_()
    logits = model(images)
    if not logits.requires_grad:
        return torch.zeros_like(images)
    (gradient,) = torch.autograd.grad(loss(logits).sum(), images, allow_unused=True)
    return torch.zeros_like(images) if gradient is None else gradient
