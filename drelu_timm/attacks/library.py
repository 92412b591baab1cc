"""The published attacks that pyautoattack and foolbox implement, in the form that our own attacks have.

AutoAttack (Croce and Hein 2020, https://arxiv.org/abs/2003.01690) seeds its single attacks by the clock and by the
batch. Here every example draws from its own seed and leaves the batch when it falls, so that it gets what pyautoattack
gives it in a batch of one.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from foolbox import PyTorchModel
from foolbox.attacks import L2CarliniWagnerAttack
from foolbox.criteria import Misclassification
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import Tensor, nn

from .losses import margin, targeted_margin
from .pgd import Found, generators_of
from .projections import shortest_move
from .threat_model import Norm, ThreatModel, per_image


def apgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat_model: ThreatModel,
    seeds: Sequence[int],
    *,
    loss: str,
    n_iter: int,
    rho: float,
    start: Tensor | None = None,
) -> Found:
    """Auto-PGD from a random point of the ball, or from a given one.

    Args:
        model: Takes [0, 1] images.
        images: [B, C, H, W] in [0, 1].
        labels: [B].
        threat_model: The balls.
        seeds: One an image.
        loss: "ce", "dlr" (three classes at least) or, where those are fewer, "margin".
        n_iter: Number of steps; the start takes one gradient more.
        rho: Share of the steps that have to raise the loss, else the next ones are half as long.
        start: [B, C, H, W] in the ball.

    Returns:
        Of every image the first point that fools the model, or else the one of largest loss; and the gradients.
    """
    attack_class = _MarginAPGD if loss == "margin" else APGDAttack
    attack = attack_class(
        model, n_iter=n_iter, rho=rho, loss="ce" if loss == "ce" else "dlr", **_ball(threat_model, images)
    )
    if start is None:
        start = _random_start(attack, threat_model, images, generators_of(seeds))
    run = _run_apgd(attack, model, images, labels, start)
    return Found(run.images, run.steps, run.score == torch.inf)


def apgd_targeted(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat_model: ThreatModel,
    seeds: Sequence[int],
    *,
    loss: str,
    n_iter: int,
    rho: float,
    n_target_classes: int,
    start: Tensor | None = None,
) -> Found:
    """Auto-PGD towards one class after the other, each from another random point of the ball, or all from a given one.

    Args:
        model: Takes [0, 1] images.
        images: [B, C, H, W] in [0, 1].
        labels: [B].
        threat_model: The balls.
        seeds: One an image.
        loss: The targeted "dlr" (four classes at least) or, where those are fewer, the targeted "margin".
        n_iter: Number of steps a class; the start takes one gradient more.
        rho: Share of the steps that have to raise the loss, else the next ones are half as long.
        n_target_classes: How many classes, from the second likeliest of the clean image.
        start: [B, C, H, W] in the ball.

    Returns:
        Of every image the first point that fools the model, or else the one of largest loss; and the gradients.
    """
    attack_class = _TargetedMarginAPGD if loss == "margin" else APGDAttack_targeted
    attack = attack_class(model, n_iter=n_iter, rho=rho, **_ball(threat_model, images))
    generators = generators_of(seeds)

    def towards(left: Tensor, targets: Tensor) -> _Run:
        attack.y_target = targets
        drawing = [generators[row] for row in left.tolist()]
        begin = _random_start(attack, threat_model, images[left], drawing) if start is None else start[left]
        return _run_apgd(attack, model, images[left], labels[left], begin)

    return _one_class_after_the_other(model, images, n_target_classes, towards)


def fab_targeted(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat_model: ThreatModel,
    seeds: Sequence[int],
    *,
    n_iter: int,
    n_target_classes: int,
) -> Found:
    """The targeted fast adaptive boundary attack (Croce and Hein 2020, https://arxiv.org/abs/1907.02044).

    It looks for the nearest example, but only whether that lies in the ball is asked for. Nothing in it is random.

    Args:
        model: Takes [0, 1] images.
        images: [B, C, H, W] in [0, 1].
        labels: [B].
        threat_model: The balls.
        seeds: Not used.
        n_iter: Number of steps a class, of one gradient each.
        n_target_classes: How many classes, from the second likeliest of the clean image.

    Returns:
        Of every image the first point in the ball that fools the model, or else the image; and the gradients.
    """

    def towards(left: Tensor, targets: Tensor) -> _Run:
        return _run_fab(model, images[left], labels[left], targets, threat_model, n_iter)

    return _one_class_after_the_other(model, images, n_target_classes, towards)


def carlini_wagner(
    model: nn.Module, images: Tensor, labels: Tensor, threat_model: ThreatModel, seeds: Sequence[int], **settings
) -> Found:
    """The nearest example in L2 that fools the model (Carlini and Wagner 2017, https://arxiv.org/abs/1608.04644).

    It knows no radius: the example may lie outside the ball. Where it finds none, the image comes back.
    """
    attack = L2CarliniWagnerAttack(abort_early=False, **settings)  # that abort is one decision for the whole batch
    foolbox_model = PyTorchModel(model, bounds=(0, 1), device=images.device)
    adversarial = attack.run(foolbox_model, images, Misclassification(labels))
    missing = ~adversarial.flatten(1).any(dim=1)  # foolbox hands back black images
    return Found(torch.where(per_image(missing, images), images, adversarial).detach())


class _Run(NamedTuple):
    """What a single run found: images [B, C, H, W], how many gradients [B], and a score [B], infinite for a success."""

    images: Tensor
    steps: Tensor
    score: Tensor


@torch.no_grad()
def _one_class_after_the_other(
    model: nn.Module, images: Tensor, count: int, towards: Callable[[Tensor, Tensor], _Run]
) -> Found:
    """Run ``towards(rows, their targets)`` for the second to the ``count + 1``-th class, while images are left."""
    ranked = model(images).sort(dim=1).indices
    found, score = images.clone(), torch.full((len(images),), -torch.inf, device=images.device)
    steps, left = torch.zeros_like(score, dtype=torch.long), torch.arange(len(images), device=images.device)
    for rank in range(2, count + 2):
        run = towards(left, ranked[left, -rank])
        steps[left] += run.steps
        better = run.score > score[left]
        found[left[better]], score[left[better]] = run.images[better], run.score[better]
        left = left[run.score < torch.inf]
        if not len(left):
            break
    return Found(found, steps, score == torch.inf)


# APGD: pyautoattack's own loop, over a model that computes no more than is needed


def _run_apgd(attack: APGDAttack, model: nn.Module, images: Tensor, labels: Tensor, start: Tensor) -> _Run:
    """Pyautoattack's single run from ``start`` [B, C, H, W]; an example that fell costs nothing any more."""
    attack.init_hyperparam(images)
    attack.model = unbroken = _Unbroken(model, images, labels)
    score = torch.full((len(images),), torch.inf, device=images.device)
    with _contained(), suppress(_AllBroken):
        highest, _, loss, _ = attack.attack_single_run(images, labels, x_init=start)
        unbroken.images[unbroken.left], score[unbroken.left] = highest[unbroken.left], loss[unbroken.left]
    return _Run(unbroken.images, unbroken.steps, score)


class _AllBroken(Exception):
    """The way out of pyautoattack's loop."""


class _Unbroken(nn.Module):
    """A model that is asked of examples until it is wrong on them; from then on they keep the logits they had.

    Attributes:
        left: Positions of the examples that are unbroken.
        images: [B, C, H, W], where the others broke.
        steps: [B], how often the model was asked.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor):
        super().__init__()
        self.model, self.labels = model, labels
        self.left = torch.arange(len(images), device=images.device)
        self.images, self.steps = images.clone(), torch.zeros_like(labels)
        self.logits = images.new_empty(0)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W], constant for the broken ones."""
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
    """With the margin where pyautoattack has the DLR loss, which needs three classes."""

    def dlr_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return margin(y)(x)


class _TargetedMarginAPGD(APGDAttack_targeted):
    """With the targeted margin where pyautoattack has the targeted DLR loss, which needs four classes."""

    def dlr_loss_targeted(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.y_target is not None  # set before every run
        return targeted_margin(y, self.y_target)(x)


def _ball(threat_model: ThreatModel, images: Tensor) -> dict:
    return {"norm": threat_model.norm, "eps": threat_model.eps, "device": images.device}


def _random_start(
    attack: APGDAttack, threat_model: ThreatModel, images: Tensor, generators: Sequence[torch.Generator]
) -> Tensor:
    """A point of the sphere around each image [B, C, H, W], drawn as pyautoattack draws it."""
    attack.init_hyperparam(images)
    linf = threat_model.norm == "Linf"
    draw = torch.rand if linf else torch.randn
    noise = torch.cat([draw(images[:1].shape, generator=generator) for generator in generators]).to(images)
    return images + threat_model.eps * attack.normalize(2 * noise - 1 if linf else noise)


@contextmanager
def _contained() -> Iterator[None]:
    """Keep to themselves what pyautoattack does: graphs of every step, the global random state, warnings.

    It enables gradients where it needs them, and draws a start, on the CPU, even where it is given one. Zero gradients
    are reported by `evaluation.masking`, for every model.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*zero gradient")
        yield


# FAB: the third of pyautoattack's loop that one targeted run from the image needs, where only the ball matters


@torch.no_grad()
def _run_fab(
    model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor, threat_model: ThreatModel, n_iter: int
) -> _Run:
    """FAB towards ``targets`` [B] until it fools the model in the ball; parameters are those of pyautoattack.

    Each step goes a little beyond the boundary, as that looks from the point, and a little towards the image.
    """
    alpha_max, eta, beta = 0.1, 1.05, 0.9
    norm = threat_model.norm
    found, steps = images.clone(), torch.full_like(labels, n_iter)
    score = torch.full((len(images),), -torch.inf, device=images.device)
    left, points = torch.arange(len(images), device=images.device), images
    for step in range(1, n_iter + 1):
        lead, normals = _lead_and_gradient(model, points, labels, targets)
        offsets = (normals * points).flatten(1).sum(dim=1) - lead
        onward = _shortest_move(points, normals, offsets, norm)
        direct = _shortest_move(images, normals, offsets, norm)
        far, near = _length(onward, norm).clamp(min=1e-8), _length(direct, norm).clamp(min=1e-8)
        alpha = per_image((far / (far + near)).clamp(max=alpha_max), images)
        points = torch.lerp(points + eta * onward, images + eta * direct, alpha).clamp(0, 1)
        fooled = model(points).argmax(dim=1) != labels
        moves = points - images
        broken = fooled & (_length(moves, norm) <= threat_model.eps)
        found[left[broken]], steps[left[broken]], score[left[broken]] = points[broken], step, torch.inf
        points[fooled] = (images + beta * moves)[fooled]
        if broken.any():
            state = (left, points, images, labels, targets)
            left, points, images, labels, targets = (tensor[~broken] for tensor in state)
            if not len(left):
                break
    return _Run(found, steps, score)


def _lead_and_gradient(model: nn.Module, points: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """By how much the target's logit exceeds the label's [B], and its gradient at the points [B, C, H, W]."""
    points = points.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(points)
        lead = targeted_margin(labels, targets)(logits)
        (gradient,) = torch.autograd.grad(lead.sum(), points)
    return lead.detach(), gradient


def _shortest_move(points: Tensor, normals: Tensor, offsets: Tensor, norm: Norm) -> Tensor:
    return shortest_move(points.flatten(1), normals.flatten(1), offsets, norm).view_as(points)


def _length(moves: Tensor, norm: Norm) -> Tensor:
    """Norms [B] of moves [B, C, H, W]."""
    moves = moves.flatten(1)
    return moves.abs().amax(dim=1) if norm == "Linf" else moves.norm(dim=1)
