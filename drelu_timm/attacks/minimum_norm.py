"""Minimum-norm attacks: FAB and the attack of Carlini and Wagner."""

from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
from foolbox import PyTorchModel
from foolbox.attacks import L2CarliniWagnerAttack
from foolbox.criteria import Misclassification
from torch import Tensor, nn

from .apgd import SearchResult, target_by_target
from .attack import Attack, Batch, Candidates, targeted_margin
from .threat_model import Norm, ThreatModel, per_image


@dataclass(frozen=True)
class TargetedFAB(Attack):
    """Targeted fast adaptive boundary attack (Croce and Hein 2020, https://arxiv.org/abs/1907.02044).

    It searches for the nearest adversarial image, but here it stops at the first one within eps. It is
    deterministic.

    Attributes:
        n_iter: Number of steps per class, of one gradient each.
        n_target_classes: Number of classes, starting with the second most likely one of the clean image.
    """

    n_iter: int = 100
    n_target_classes: int = 9

    def for_classes(self, num_classes: int) -> "TargetedFAB":
        """Limit the targets to the other classes."""
        return replace(self, n_target_classes=min(self.n_target_classes, num_classes - 1))

    def run(self, model: nn.Module, batch: Batch, threat_model: ThreatModel) -> Candidates:
        """Return for every image the first point within eps that fools the model, otherwise the image."""
        images, labels = batch.images, batch.labels

        def search(left: Tensor, targets: Tensor) -> SearchResult:
            return _run_fab(model, images[left], labels[left], targets, threat_model, self.n_iter)

        return target_by_target(model, images, self.n_target_classes, search)


@dataclass(frozen=True)
class CarliniWagner(Attack):
    """Nearest adversarial image in L2 (Carlini and Wagner 2017, https://arxiv.org/abs/1608.04644), by foolbox.

    It ignores eps: the adversarial image may be farther away than eps.

    Attributes:
        binary_search_steps: Steps of the search for the constant that weighs distance against misclassification.
        steps: Gradients for each constant.
        stepsize: Learning rate of Adam.
        initial_const: First constant.
        confidence: Margin by which the model has to be wrong.
    """

    minimum_norm: ClassVar[bool] = True
    binary_search_steps: int = 5
    steps: int = 200
    stepsize: float = 0.01
    initial_const: float = 1.0
    confidence: float = 0.0

    def run(self, model: nn.Module, batch: Batch, threat_model: ThreatModel) -> Candidates:
        """Return the nearest adversarial image for every image, or the image where none was found."""
        images = batch.images
        # foolbox's early abort is one decision for the whole batch, with which an example would depend on the others.
        attack = L2CarliniWagnerAttack(abort_early=False, **asdict(self))
        foolbox_model = PyTorchModel(model, bounds=(0, 1), device=images.device)
        adversarial = attack.run(foolbox_model, images, Misclassification(batch.labels))
        missing = ~adversarial.flatten(1).any(dim=1)  # foolbox returns black images where it finds nothing
        return Candidates(torch.where(per_image(missing, images), images, adversarial).detach())


@torch.no_grad()
def _run_fab(
    model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor, threat_model: ThreatModel, n_iter: int
) -> SearchResult:
    """Run FAB towards ``targets`` [B] until it fools the model within eps, with pyautoattack's parameters.

    Each step goes a little beyond the linearized decision boundary and a little back towards the image.
    """
    alpha_max, eta, beta = 0.1, 1.05, 0.9
    norm = threat_model.norm
    found, steps = images.clone(), torch.full_like(labels, n_iter)
    score = torch.full((len(images),), -torch.inf, device=images.device)
    left, points = torch.arange(len(images), device=images.device), images
    for step in range(1, n_iter + 1):
        lead, normals = _lead_and_gradient(model, points, labels, targets)
        offsets = (normals * points).flatten(1).sum(dim=1) - lead
        onward = _move_to_plane(points, normals, offsets, norm)
        direct = _move_to_plane(images, normals, offsets, norm)
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
    return SearchResult(found, steps, score)


def _lead_and_gradient(model: nn.Module, points: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the target's logit minus the label's [B], and its gradient at the points [B, C, H, W]."""
    points = points.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(points)
        lead = targeted_margin(labels, targets)(logits)
        (gradient,) = torch.autograd.grad(lead.sum(), points)
    return lead.detach(), gradient


def _move_to_plane(points: Tensor, normals: Tensor, offsets: Tensor, norm: Norm) -> Tensor:
    return shortest_move(points.flatten(1), normals.flatten(1), offsets, norm).view_as(points)


def _length(moves: Tensor, norm: Norm) -> Tensor:
    """Return the norms [B] of moves [B, C, H, W]."""
    moves = moves.flatten(1)
    return moves.abs().amax(dim=1) if norm == "Linf" else moves.norm(dim=1)


def shortest_move(points: Tensor, normals: Tensor, offsets: Tensor, norm: Norm) -> Tensor:
    r"""Return the shortest move from each point to its hyperplane that stays in [0, 1]; if none does, the longest.

    Every coordinate moves at a constant speed (1 for Linf, \|normal\| for L2) until it reaches the box. The progress
    towards the hyperplane is therefore a concave, piecewise linear function of time, and Newton's method from time 0
    reaches the exact time from below, in about five passes of O(D); pyautoattack sorts the coordinates.

    Args:
        points: [B, D] in [0, 1].
        normals: [B, D].
        offsets: [B]; the hyperplane is the set of x with <normal, x> = offset.
        norm: Norm of the move, "Linf" or "L2".

    Returns:
        [B, D], to be added to ``points``; 0 where the normal is 0.
    """
    missing = offsets - (normals * points).sum(dim=1)
    direction = normals * missing.sign().unsqueeze(1)
    weights = normals.abs()
    face = torch.gt(direction, 0, out=torch.empty_like(points))  # as floats: `where` takes thirty times as long
    room = (face - points).abs()
    if norm == "Linf":
        speeds, meeting = weights, room
    else:
        speeds, meeting = weights.square(), (room / weights).nan_to_num(nan=0.0)
    reach = weights * room
    time, limits, free = torch.zeros_like(offsets), torch.finfo(points.dtype), torch.empty_like(points)
    for _ in range(points.shape[1]):  # every pass but the last finds a coordinate that reached the box
        torch.gt(meeting, time.unsqueeze(1), out=free)
        remaining = missing.abs() - (reach * (1 - free)).sum(dim=1)
        later = (remaining / (speeds * free).sum(dim=1).clamp(min=limits.tiny)).clamp(max=limits.max)
        if not (later > time).any():
            break
        time = torch.maximum(time, later)
    pace = 1 if norm == "Linf" else weights
    return direction.sign() * torch.minimum(time.unsqueeze(1) * pace, room)
