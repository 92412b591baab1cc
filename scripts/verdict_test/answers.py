"""True robust accuracies, from attacks that know the trick of each model."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from drelu_timm.attacks.adaptive import Annealing, TargetedAnnealing, substitutable_layers
from drelu_timm.attacks.apgd import APGD, TargetedAPGD
from drelu_timm.attacks.attack import LOSSES, Attack, Batch
from drelu_timm.attacks.pgd import PGD
from drelu_timm.attacks.square import Square
from drelu_timm.attacks.threat_model import ThreatModel
from drelu_timm.evaluation.driver import Attacked
from drelu_timm.models.inference import frozen

from .roster import Entry
from .training import task
from .tricks import Trick, tricks_set

DRAWS = 21  # predictions per image of a model whose output is not a function of the image; the majority counts


@dataclass(frozen=True)
class Answer:
    """What is true of a model.

    Attributes:
        clean: Clean accuracy.
        pgd: Robust accuracy under 50 steps of PGD on the cross-entropy with the model's own gradient.
        robust: Robust accuracy under all attacks here.
        stable: Whether the output is a function of the image alone. If not, the majority of `DRAWS` draws counts.
    """

    clean: float
    pgd: float
    robust: float
    stable: bool

    @property
    def truth(self) -> str:
        """One of "masked" (PGD overstates by more than 10 points), "honest" (at most 5), "between", and "unstable"."""
        overstated = self.pgd - self.robust
        if not self.stable:
            return "unstable"
        return "masked" if overstated > 0.1 else "honest" if overstated <= 0.05 else "between"


class Judge:
    """Decides which images fool a model: in the majority of the draws, each among others than before."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor):
        self.model, self.labels = model, labels
        with torch.no_grad():
            again = model(images.flip(0)).flip(0)
            self.stable = torch.allclose(model(images), again, rtol=1e-3, atol=1e-4)

    @torch.no_grad()
    def right(self, images: Tensor, positions: Tensor) -> Tensor:
        """Return whether images [B, C, H, W] of the examples at some positions [B] are classified correctly."""
        labels = self.labels[positions]
        if self.stable:
            return self.model(images).argmax(1) == labels
        shuffled = [torch.randperm(len(images)) for _ in range(DRAWS)]
        votes = torch.zeros(len(images))
        for order in shuffled:
            votes[order] += (self.model(images[order]).argmax(1) == labels[order]).float()
        return votes > DRAWS / 2


@dataclass(frozen=True)
class JudgedPGD(Attack):
    """PGD that keeps the first image which fools the model as it is, with gradients averaged over noise and draws.

    Attributes:
        loss: A name in `LOSSES`.
        steps: Number of steps; the step size falls from ``relative_step_size`` to a tenth of it.
        samples: Gradients per step.
        spread: Standard deviation of the noise, in units of eps.
        relative_step_size: First step, in units of eps.
    """

    loss: str = "margin"
    steps: int = 30
    samples: int = 1
    spread: float = 0.0
    relative_step_size: float = 0.5

    def search(self, model: nn.Module, batch: Batch, threat_model: ThreatModel) -> Iterator[Tensor]:
        """Yield the images [B, C, H, W] after each step."""
        point = threat_model.random_start(batch.images)
        loss = LOSSES[self.loss](batch.labels)
        for step in range(self.steps):
            gradient = torch.zeros_like(point)
            for _ in range(self.samples):
                noisy = (point + self.spread * threat_model.noise(point.shape)).detach().requires_grad_()
                value = loss(model(noisy)).sum()
                (own,) = torch.autograd.grad(value, noisy, allow_unused=True)
                gradient += 0 if own is None else own.nan_to_num(0, 0, 0)
            size = self.relative_step_size * threat_model.eps * (1 - 0.9 * step / self.steps)
            point = threat_model.project(threat_model.ascend(point, gradient, size), batch.images).detach()
            yield point


class _Search:
    """The examples that are left, and the model that has to be fooled."""

    def __init__(self, entry: Entry, model: nn.Module):
        data = task(entry.task)
        self.model, self.threat_model = Attacked(model), entry.threat_model
        self.images, self.labels = data.images, data.labels
        self.judge = Judge(model, self.images, self.labels)
        self.clean = self.judge.right(self.images, torch.arange(len(self.labels)))
        self.left = self.clean.clone()

    def _batch(self) -> tuple[Tensor, Batch]:
        positions = self.left.nonzero().squeeze(1)
        seeds = [int(position) for position in positions]
        return positions, Batch(self.images[positions], self.labels[positions], seeds)

    def run(self, attack: Attack, threat_model: ThreatModel | None = None) -> None:
        """Run an attack on the examples that are left."""
        positions, batch = self._batch()
        if not len(positions):
            return
        inner = threat_model or self.threat_model
        if isinstance(attack, JudgedPGD):
            points = attack.search(self.model, batch, inner)
        else:
            points = iter([attack.run(self.model, batch, inner).images.detach()])
        for point in points:
            self.count(positions, point, batch)

    def count(self, positions: Tensor, point: Tensor, batch: Batch) -> None:
        """Count the images that fool the model, as it is, as found."""
        point = self.threat_model.project(point, batch.images)
        with tricks_set(self.model):
            self.left[positions] &= self.judge.right(point, positions)


def find_answer(entry: Entry, model: nn.Module) -> Answer:
    """Attack a model with all that is known of its trick.

    The attacks differentiate the model with its tricks opened, without its tricks, and as it is; gradients are averaged
    over noise and draws; Square has 2,000 queries. Wider steps and radii help across quantization.
    """
    with torch.random.fork_rng(), frozen(model):
        torch.manual_seed(0)
        search = _Search(entry, model)
        search.run(PGD(steps=50))
        pgd = float(search.left.double().mean())
        if any(isinstance(layer, Trick) for layer in model.modules()):
            for flags in ({"opened": True}, {"removed": True}):
                with tricks_set(model, **flags):
                    _search_along(search)
        _search_along(search)
        classes = task(entry.task).classes
        search.run(TargetedAPGD(n_iter=50, n_target_classes=5).for_classes(classes))
        if substitutable_layers(model):
            search.run(Annealing())
            search.run(TargetedAnnealing().for_classes(classes))
        search.run(Square(n_queries=2000))
        share = float(search.left.double().mean())
        return Answer(float(search.clean.double().mean()), pgd, share, search.judge.stable)


def _search_along(search: _Search) -> None:
    """Follow the gradient that the model gives now."""
    wider = replace(search.threat_model, eps=1.5 * search.threat_model.eps)
    draws = 1 if search.judge.stable else 16
    for loss in ("margin", "scaled-ce"):
        search.run(JudgedPGD(loss, samples=draws))
    search.run(JudgedPGD(samples=max(draws, 8), spread=0.3))
    search.run(JudgedPGD(samples=draws, relative_step_size=1.0), wider)
    search.run(JudgedPGD(samples=max(draws, 8), spread=1.0, relative_step_size=1.0), wider)
    search.run(APGD(n_iter=50))
