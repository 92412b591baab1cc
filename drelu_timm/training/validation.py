"""Measurements on the held-out training images, on which every choice during training is based.

The inner attack of a training can be deceived by what it trains: single-step training overfits to its step, TRADES with
a high learning rate and capped layers flatten the loss that the attack follows. After every epoch of a robust objective
an attack of another kind is therefore measured as well, and a gap between the two that noise does not explain is
reported: the model hides gradients, and its accuracy under the inner attack is not its robustness.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import comb, fsum
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks.adaptive import straight_through, substitutable_layers, substituted
from ..attacks.attack import cross_entropy, margin
from ..data.images import Images, to_float
from ..models.intervals import certified
from ..randomness import random_generator
from .distributed import reduced
from .objectives import InnerAttack
from .update import Update

# Held-out images that are attacked after every epoch: enough to see robustness, and cheap compared with training.
ATTACKED = 1024
MARGIN_STEPS = 10
_BATCH = 256
# An attack of another kind fools some of the images that remain correct under the inner attack on honest models too:
# at most about a tenth where the inner attack is PGD, by the gaps between PGD and AutoAttack on RobustBench, and more
# where it is a single step, which is a weaker attack.
_HONEST_SHARE, _HONEST_SHARE_OF_SINGLE_STEP = 0.1, 0.3
_SIGNIFICANCE = 1e-4  # per epoch, so that an honest training of 100 epochs rarely has one alarm


@dataclass(frozen=True)
class Validation:
    """Loss, clean accuracy and accuracy under attack, on held-out training images.

    Attributes:
        held_out: The images; every process measures a part of their batches.
        update: With the objective, and the inner attack; the attack maximizes cross-entropy here for every objective.
        seed: Keys the noise, which is the same after every epoch, so that only the model changes the figures.
    """

    held_out: Images
    update: Update
    seed: int

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """Measure a model for [0, 1] images, which is left in eval mode.

        The first `ATTACKED` images are attacked. The loss is the objective's over these images, or over all held-out
        images where the objective attacks nothing, and includes the penalty on caps.

        Returns:
            ``loss``, ``clean`` and ``pgd`` (accuracies in [0, 1]); for robust objectives also ``margin``, the accuracy
            under PGD on the margin loss, and ``hides_gradients``, whether its gap to ``pgd`` is beyond noise; for IBP
            also ``certified``, the accuracy that bounds prove at the radius of the attack, on all held-out images.
        """
        model.eval()
        attack, accelerator = replace(self.update.attack, model=model), self.update.accelerator
        sums = torch.zeros(8)
        with accelerator.autocast():
            for start, counts in self._own_batches():
                sums += counts * self._sums(model, attack, start)
        totals = reduced(sums, accelerator, "sum").tolist()
        loss, with_loss, clean, proven, attacked, robust, robust_margin, only_margin = totals
        figures = {
            "loss": loss / with_loss + self.update.penalty(model).item(),
            "clean": clean / len(self.held_out),
            "pgd": robust / attacked,
        }
        if self.update.objective.certifies:
            figures["certified"] = proven / len(self.held_out)
        if self.update.objective.raised is None:
            return figures
        hides = hides_gradients(int(only_margin), int(robust), single_step=self.update.objective.single_step)
        return {**figures, "margin": robust_margin / attacked, "hides_gradients": hides}

    def _own_batches(self) -> Iterator[tuple[int, bool]]:
        """Yield the first image of each batch of this process, and whether the batch counts.

        Every process gets equally many batches, attacked and not, since under FSDP a forward pass waits for all
        processes: in the last round some repeat a batch of another process, which then does not count.
        """
        images, accelerator = len(self.held_out), self.update.accelerator
        for starts in (range(0, min(images, ATTACKED), _BATCH), range(ATTACKED, images, _BATCH)):
            rounds = -(-len(starts) // accelerator.num_processes)
            for i in range(accelerator.process_index, rounds * accelerator.num_processes, accelerator.num_processes):
                yield starts[min(i, len(starts) - 1)], i < len(starts)

    def _sums(self, model: nn.Module, attack: InnerAttack, start: int) -> Tensor:
        """Return, over a batch, what `measure` adds up: the sum of losses, and counts of images."""
        part = slice(start, start + _BATCH)
        images = to_float(self.held_out.images[part].to(self.update.accelerator.device))
        labels = self.held_out.labels[part].to(images.device)
        correct, count = _correct(model, images, labels).sum(), len(labels)
        is_robust, proven = self.update.objective.raised is not None, 0
        if self.update.objective.certifies:
            proven = certified(model, images, labels, attack.threat_model.eps).sum()
        if start >= ATTACKED:
            loss, counted = (0.0, 0) if is_robust else (self._loss(model, images, images, labels), count)
            return torch.tensor([loss, counted, correct, proven, 0, 0, 0, 0])
        noise = attack.threat_model.noise(images.shape, random_generator(self.seed, start)).to(images)
        adversarial = attack(images, cross_entropy(labels), noise)
        loss = self._loss(model, images, adversarial, labels)
        robust = under_margin = _correct(model, adversarial, labels)
        if is_robust:
            under_margin = _correct(model, margin_attack(attack, images, labels, noise), labels)
        only_margin = robust & ~under_margin
        counts = [count, robust.sum(), under_margin.sum(), only_margin.sum()]
        return torch.tensor([loss, count, correct, proven, *counts])

    @torch.no_grad()
    def _loss(self, model: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor) -> float:
        return self.update.objective.losses(model, images, adversarial, labels).loss.item() * len(labels)


def margin_attack(attack: InnerAttack, images: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
    """Return adversarial images [B, C, H, W] of PGD on the margin loss, which does not saturate as cross-entropy does.

    Capped layers are differentiated as if they had no caps (BPDA, https://arxiv.org/abs/1802.00420).

    Args:
        attack: The inner attack; its model and threat model are used.
        images: [B, C, H, W] in [0, 1].
        labels: [B].
        noise: [B, C, H, W]; the attack starts from ``images + noise``.
    """
    other = replace(attack, steps=MARGIN_STEPS, step_size=attack.threat_model.eps / 4)
    has_caps = bool(substitutable_layers(attack.model))
    with substituted(attack.model, straight_through) if has_caps else nullcontext():
        return other(images, margin(labels), noise)


def hides_gradients(only_margin: int, robust: int, *, single_step: bool) -> bool:
    """Return whether the margin attack fools more images than it would on an honest model, by an exact binomial test.

    Args:
        only_margin: Images that are correct under the inner attack, and fooled by the margin attack.
        robust: Images that are correct under the inner attack.
        single_step: Whether the inner attack is a single step.
    """
    share = _HONEST_SHARE_OF_SINGLE_STEP if single_step else _HONEST_SHARE
    # P(at least `only_margin` of `robust` | each with probability `share`)
    tail = fsum(comb(robust, k) * share**k * (1 - share) ** (robust - k) for k in range(only_margin, robust + 1))
    return tail < _SIGNIFICANCE


@torch.no_grad()
def _correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return which images are classified correctly, bool [B]."""
    return model(images).argmax(1) == labels
