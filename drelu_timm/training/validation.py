"""What a training sees of its held-out images: the only figures that choices during training are made on."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..attacks.losses import cross_entropy
from ..data.images import Images, to_float
from ..models.intervals import certified
from ..randomness import random_generator
from .objectives import InnerAttack, Objective

# Held-out images that are attacked after every epoch: enough to see robustness come, cheap beside an epoch.
ATTACKED = 1024
BATCH = 256


@dataclass(frozen=True)
class Validation:
    """Loss, clean accuracy and accuracy under the inner attack, on held-out training images.

    Attributes:
        held_out: The images; every process measures its own part of their batches.
        objective: Whose loss is measured.
        attack: The inner attack of the training; raises cross-entropy here, whatever it raises there.
        accelerator: Device, precision and processes.
        seed: Keys the noise, which is the same after every epoch: a change of the figures is a change of the model.
    """

    held_out: Images
    objective: Objective
    attack: InnerAttack
    accelerator: Accelerator
    seed: int

    def measure(self, model: nn.Module) -> dict[str, float]:
        """``loss``, ``clean`` and ``pgd`` (shares) of a model for [0, 1] images, which is left in eval mode.

        ``certified`` as well, if the objective is IBP: the share that its bounds prove robust at the attack's radius.

        The first `ATTACKED` images are attacked. The loss is that of the objective, over them; for an objective that
        attacks nothing, over all held-out images.
        """
        model.eval()
        attack = replace(self.attack, model=model)
        sums = torch.zeros(6)
        with self.accelerator.autocast():
            for start, counts in self._mine():
                sums += counts * self._sums(model, attack, start)
        reduced = self.accelerator.reduce(sums.to(self.accelerator.device), "sum")
        assert isinstance(reduced, Tensor)
        loss, lossy, clean, robust, attacked, proven = reduced.tolist()
        figures = {"loss": loss / lossy, "clean": clean / len(self.held_out), "pgd": robust / attacked}
        return figures | ({"certified": proven / len(self.held_out)} if self.objective.certifies else {})

    def _mine(self) -> Iterator[tuple[int, bool]]:
        """Where each batch of this process starts, and whether it counts.

        Every process gets as many batches, attacked and not, since under FSDP a forward pass of one waits for all: in
        the last round some repeat a batch of another, which then does not count.
        """
        images, count = len(self.held_out), self.accelerator.num_processes
        for starts in (range(0, min(images, ATTACKED), BATCH), range(ATTACKED, images, BATCH)):
            rounds = -(-len(starts) // count)
            for i in range(self.accelerator.process_index, rounds * count, count):
                yield starts[min(i, len(starts) - 1)], i < len(starts)

    def _sums(self, model: nn.Module, attack: InnerAttack, start: int) -> Tensor:
        """Over a batch: loss, images it was taken of, correct ones, correct under attack, attacked, certified."""
        part = slice(start, start + BATCH)
        images = to_float(self.held_out.images[part].to(self.accelerator.device))
        labels = self.held_out.labels[part].to(images.device)
        correct, proven = _correct(model, images, labels), 0
        if self.objective.certifies:
            proven = int(certified(model, images, labels, attack.threat_model.eps).sum())
        if start >= ATTACKED:
            if self.objective.raised is not None:
                return torch.tensor([0.0, 0.0, correct, 0.0, 0.0, proven])
            return torch.tensor([self._loss(model, images, images, labels), len(labels), correct, 0.0, 0.0, proven])
        noise = attack.threat_model.noise(images.shape, random_generator(self.seed, start)).to(images)
        adversarial = attack(images, cross_entropy(labels), noise)
        loss = self._loss(model, images, adversarial, labels)
        return torch.tensor([loss, len(labels), correct, _correct(model, adversarial, labels), len(labels), proven])

    @torch.no_grad()
    def _loss(self, model: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor) -> float:
        return self.objective.losses(model, images, adversarial, labels).loss.item() * len(labels)


@torch.no_grad()
def _correct(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    return int((model(images).argmax(1) == labels).sum())
