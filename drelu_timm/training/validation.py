"""Measurements on the held-out training images, on which every choice during training is based."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..attacks.attack import cross_entropy
from ..data.images import Images, to_float
from ..models.intervals import certified
from ..randomness import random_generator
from .distributed import reduced
from .objectives import InnerAttack
from .update import Update

# Held-out images that are attacked after every epoch: enough to see robustness, and cheap compared with an epoch.
ATTACKED = 1024
_BATCH = 256


@dataclass(frozen=True)
class Validation:
    """Loss, clean accuracy and accuracy under the inner attack, on held-out training images.

    Attributes:
        held_out: The images; every process measures a part of their batches.
        update: With the objective, and the inner attack; the attack maximizes cross-entropy here for every objective.
        seed: Keys the noise, which is the same after every epoch, so that only the model changes the figures.
    """

    held_out: Images
    update: Update
    seed: int

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return ``loss``, ``clean`` and ``pgd`` (accuracies in [0, 1]) of a model, which is left in eval mode.

        The first `ATTACKED` images are attacked. The loss is the objective's over these images, or over all held-out
        images where the objective attacks nothing, and includes the penalty on caps. For IBP there is also
        ``certified``, the accuracy that interval bounds prove at the radius of the attack, on all held-out images.
        """
        model.eval()
        attack, accelerator = replace(self.update.attack, model=model), self.update.accelerator
        sums = torch.zeros(6)
        with accelerator.autocast():
            for start, counts in self._own_batches():
                sums += counts * self._sums(model, attack, start)
        loss, with_loss, clean, robust, attacked, proven = reduced(sums, accelerator, "sum").tolist()
        figures = {
            "loss": loss / with_loss + self.update.penalty(model).item(),
            "clean": clean / len(self.held_out),
            "pgd": robust / attacked,
        }
        return figures | ({"certified": proven / len(self.held_out)} if self.update.objective.certifies else {})

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
        """Return, over a batch: sum of losses, images with one, correct, correct under attack, attacked, certified."""
        part = slice(start, start + _BATCH)
        images = to_float(self.held_out.images[part].to(self.update.accelerator.device))
        labels = self.held_out.labels[part].to(images.device)
        correct, proven = _correct(model, images, labels), 0
        if self.update.objective.certifies:
            proven = int(certified(model, images, labels, attack.threat_model.eps).sum())
        if start >= ATTACKED:
            if self.update.objective.raised is not None:
                return torch.tensor([0.0, 0.0, correct, 0.0, 0.0, proven])
            return torch.tensor([self._loss(model, images, images, labels), len(labels), correct, 0.0, 0.0, proven])
        noise = attack.threat_model.noise(images.shape, random_generator(self.seed, start)).to(images)
        adversarial = attack(images, cross_entropy(labels), noise)
        loss = self._loss(model, images, adversarial, labels)
        return torch.tensor([loss, len(labels), correct, _correct(model, adversarial, labels), len(labels), proven])

    @torch.no_grad()
    def _loss(self, model: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor) -> float:
        return self.update.objective.losses(model, images, adversarial, labels).loss.item() * len(labels)


@torch.no_grad()
def _correct(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    return int((model(images).argmax(1) == labels).sum())
