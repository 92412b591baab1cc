"""Auto-PGD, untargeted and targeted, by pyautoattack's own loop (Croce and Hein 2020, https://arxiv.org/abs/2003.01690).

pyautoattack seeds its attacks by the clock and by the batch. Here every example draws from its own seed and leaves the
batch when it is misclassified, so that it gets what pyautoattack gives it in a batch of one.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import Tensor, nn

from .attack import Attack, Batch, Candidates, margin, targeted_margin
from .pgd import generators_of
from .threat_model import ThreatModel


@dataclass(frozen=True)
class APGD(Attack):
    """Auto-PGD from a random point within eps, or from the batch's start.

    Attributes:
        loss: "ce", "dlr" (at least three classes) or, with fewer, "margin".
        n_iter: Number of steps; the start costs one more gradient.
        rho: Share of the steps that have to raise the loss; otherwise the step size is halved.
    """

    loss: str = "ce"
    n_iter: int = 100
    rho: float = 0.75

    def for_classes(self, num_classes: int) -> "APGD":
        """Replace the DLR loss for two classes: it divides by a difference to the third largest logit."""
        return replace(self, loss="margin") if self.loss == "dlr" and num_classes < 3 else self

    def run(self, model: nn.Module, batch: Batch, threat_model: ThreatModel) -> Candidates:
        """Return for every image the first point that fools the model, otherwise the one with the largest loss."""
        attack_class = _MarginAPGD if self.loss == "margin" else APGDAttack
        loss = "ce" if self.loss == "ce" else "dlr"
        attack = attack_class(
            model, n_iter=self.n_iter, rho=self.rho, loss=loss, **_threat_model_arguments(threat_model, batch.images)
        )
        start = batch.start
        if start is None:
            start = _random_start(attack, threat_model, batch.images, generators_of(batch.seeds))
        found = _run_apgd(attack, model, batch.images, batch.labels, start)
        return Candidates(found.images, found.steps, found.score == torch.inf)


@dataclass(frozen=True)
class TargetedAPGD(Attack):
    """Auto-PGD towards one class after the other, each from a new random point, or all from the batch's start.

    Attributes:
        loss: The targeted "dlr" (at least four classes) or, with fewer, the targeted "margin".
        n_target_classes: Number of classes, starting with the second most likely one of the clean image.
        n_iter: Number of steps per class; the start costs one more gradient.
        rho: See `APGD`.
    """

    loss: str = "dlr"
    n_target_classes: int = 9
    n_iter: int = 100
    rho: float = 0.75

    def for_classes(self, num_classes: int) -> "TargetedAPGD":
        """Limit the targets, and replace the targeted DLR loss, which needs the fourth largest logit."""
        loss = "margin" if self.loss == "dlr" and num_classes < 4 else self.loss
        return replace(self, loss=loss, n_target_classes=min(self.n_target_classes, num_classes - 1))

    def run(self, model: nn.Module, batch: Batch, threat_model: ThreatModel) -> Candidates:
        """Return for every image the first point that fools the model, otherwise the one with the largest loss."""
        attack_class = _TargetedMarginAPGD if self.loss == "margin" else APGDAttack_targeted
        images, labels, start = batch.images, batch.labels, batch.start
        attack = attack_class(model, n_iter=self.n_iter, rho=self.rho, **_threat_model_arguments(threat_model, images))
        generators = generators_of(batch.seeds)

        def search(left: Tensor, targets: Tensor) -> SearchResult:
            attack.y_target = targets
            own = [generators[row] for row in left.tolist()]
            begin = _random_start(attack, threat_model, images[left], own) if start is None else start[left]
            return _run_apgd(attack, model, images[left], labels[left], begin)

        return target_by_target(model, images, self.n_target_classes, search)


class SearchResult(NamedTuple):
    """Result of a single search: images [B, C, H, W], gradients [B], and a score [B] that is infinite for a success."""

    images: Tensor
    steps: Tensor
    score: Tensor


@torch.no_grad()
def target_by_target(
    model: nn.Module, images: Tensor, count: int, search: Callable[[Tensor, Tensor], SearchResult]
) -> Candidates:
    """Run ``search(positions, targets)`` for the second to the ``count + 1``-th most likely class, until a success."""
    ranked = model(images).sort(dim=1).indices
    found, score = images.clone(), torch.full((len(images),), -torch.inf, device=images.device)
    steps, left = torch.zeros_like(score, dtype=torch.long), torch.arange(len(images), device=images.device)
    for rank in range(2, count + 2):
        run = search(left, ranked[left, -rank])
        steps[left] += run.steps
        better = run.score > score[left]
        found[left[better]], score[left[better]] = run.images[better], run.score[better]
        left = left[run.score < torch.inf]
        if not len(left):
            break
    return Candidates(found, steps, score == torch.inf)


def _run_apgd(attack: APGDAttack, model: nn.Module, images: Tensor, labels: Tensor, start: Tensor) -> SearchResult:
    """Run pyautoattack's loop from ``start`` [B, C, H, W]; a misclassified example costs no more passes."""
    attack.init_hyperparam(images)
    attack.model = unbroken = _Unbroken(model, images, labels)
    score = torch.full((len(images),), torch.inf, device=images.device)
    with _contained(), suppress(_AllBroken):
        highest, _, loss, _ = attack.attack_single_run(images, labels, x_init=start)
        unbroken.images[unbroken.left], score[unbroken.left] = highest[unbroken.left], loss[unbroken.left]
    return SearchResult(unbroken.images, unbroken.steps, score)


class _AllBroken(Exception):
    """Ends pyautoattack's loop when every example is misclassified."""


class _Unbroken(nn.Module):
    """Wrapper that evaluates the model on each example only until it is misclassified, then repeats its last logits.

    Attributes:
        left: Positions of the examples that are still classified correctly.
        images: [B, C, H, W], the points at which the others were misclassified.
        steps: [B], number of passes per example.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor):
        super().__init__()
        self.model, self.labels = model, labels
        self.left = torch.arange(len(images), device=images.device)
        self.images, self.steps = images.clone(), torch.zeros_like(labels)
        self.logits = images.new_empty(0)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, C, H, W], constant for misclassified examples."""
        asked = self.left
        if not len(asked):
            raise _AllBroken
        everyone = len(asked) == len(images)
        logits = self.model(images if everyone else images.index_select(0, asked))
        self.steps[asked] += 1
        broken = logits.argmax(dim=1) != self.labels[asked]
        if broken.any():
            self.images[asked[broken]] = images.detach()[asked[broken]]
            self.left = asked[~broken]
        if not everyone:
            logits = self.logits.index_copy(0, asked, logits)
        self.logits = logits.detach()
        return logits


class _MarginAPGD(APGDAttack):
    """APGD on the margin instead of the DLR loss, which needs three classes."""

    def dlr_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return margin(y)(x)


class _TargetedMarginAPGD(APGDAttack_targeted):
    """Targeted APGD on the targeted margin instead of the DLR loss, which needs four classes."""

    def dlr_loss_targeted(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.y_target is not None  # set before every run
        return targeted_margin(y, self.y_target)(x)


def _threat_model_arguments(threat_model: ThreatModel, images: Tensor) -> dict:
    return {"norm": threat_model.norm, "eps": threat_model.eps, "device": images.device}


def _random_start(
    attack: APGDAttack, threat_model: ThreatModel, images: Tensor, generators: Sequence[torch.Generator]
) -> Tensor:
    """Draw a point on the sphere of radius eps around each image [B, C, H, W], as pyautoattack does."""
    attack.init_hyperparam(images)
    linf = threat_model.norm == "Linf"
    draw = torch.rand if linf else torch.randn
    noise = torch.cat([draw(images[:1].shape, generator=generator) for generator in generators]).to(images)
    return images + threat_model.eps * attack.normalize(2 * noise - 1 if linf else noise)


@contextmanager
def _contained() -> Iterator[None]:
    """Contain side effects of pyautoattack: graphs of every step, draws from the global generator, warnings."""
    # pyautoattack enables gradients where it needs them, and draws a start on the CPU even when it is given one.
    # Zero gradients, of which it warns, are reported by `evaluation.masking` for every model.
    with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*zero gradient")
        yield
