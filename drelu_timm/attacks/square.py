"""Square, a random search without gradients, in which no example depends on its batch.

pyautoattack draws the position of a square once for the whole batch. Here every example draws from its own seed, in the
same order, and so has the result of pyautoattack for a batch of one. The schedule, the shapes and the acceptance rule
are pyautoattack's; its cross-entropy, which it does not use, is omitted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import ClassVar

import torch
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from .attack import Attack, Batch, Candidates, Kind, margin
from .pgd import generators_of
from .threat_model import ThreatModel, per_image

_QUERIES_DRAWN = 500  # drawn at once, which bounds the memory


@dataclass(frozen=True)
class Square(Attack):
    """Square on the margin (Andriushchenko et al. 2020, https://arxiv.org/abs/1912.00049).

    Attributes:
        n_queries: Number of squares that are tried; the start costs one more query.
        p_init: Share of the pixels that the first squares cover.
    """

    kind: ClassVar[Kind] = "black-box"
    n_queries: int = 5000
    p_init: float = 0.8

    @torch.no_grad()
    def run(self, model: nn.Module, batch: Batch, threat_model: ThreatModel) -> Candidates:
        """Return for every image the first point that fools the model, otherwise the one with the largest margin."""
        images, labels = batch.images, batch.labels
        norm, eps = threat_model.norm, threat_model.eps
        published = SquareAttack(
            model, norm=norm, eps=eps, p_init=self.p_init, resc_schedule=False, device=images.device
        )
        squares = (_LinfSquares if norm == "Linf" else _L2Squares)(published, eps, images.shape[1:])
        generators = generators_of(batch.seeds)
        numbers = _uniform(generators, squares.start_numbers, images.device)
        found, steps = images.clone(), torch.full_like(labels, self.n_queries + 1)
        ended = torch.zeros_like(labels, dtype=torch.bool)
        left, best = torch.arange(len(images), device=images.device), squares.start(images, numbers)
        losses, wrong = _asked(model, best, labels)
        for query in range(self.n_queries):
            if query % _QUERIES_DRAWN == 0:
                numbers = _uniform(generators, (_QUERIES_DRAWN, squares.step_numbers), images.device)
            if wrong.any():
                found[left[wrong]], steps[left[wrong]], ended[left[wrong]] = best[wrong], query + 1, True
                generators = [generator for generator, gone in zip(generators, wrong.tolist(), strict=True) if not gone]
                state = (left, images, labels, best, losses, numbers)
                left, images, labels, best, losses, numbers = (tensor[~wrong] for tensor in state)
            if not len(left):
                break
            candidates = squares.step(best, images, numbers[:, query % _QUERIES_DRAWN], query)
            tried, wrong = _asked(model, candidates, labels)
            better = (tried > losses) | (tried >= 0) | wrong
            best[better] = candidates[better]
            losses = tried.where(better, losses)
        found[left] = best
        return Candidates(found, steps, ended)


def _asked(model: nn.Module, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the margins [B] of points [B, C, H, W], and whether the model is wrong."""
    # pyautoattack takes a margin of 0 for a success. In bfloat16 it often is not one: of equal logits argmax takes the
    # first, which may be the label's.
    logits = model(points)
    return margin(labels)(logits), logits.argmax(dim=1) != labels


class _Squares:
    """Size and position of the squares, which do not depend on the norm.

    Attributes:
        published: pyautoattack's attack, with its schedule and shapes.
        eps: Radius of the threat model.
        shape: C, H, W.
        pixels: Maps the side of a window to its pixels in the flattened image, for a window in the first corner.
        start_numbers: Shape of the numbers in [0, 1) that an example needs for its start.
        step_numbers: Random numbers per example and step.
    """

    smallest = 1

    def __init__(self, published: SquareAttack, eps: float, shape: Sequence[int]):
        self.published, self.eps, self.shape = published, eps, shape
        self.pixels = cache(self._pixels)

    def side(self, query: int) -> int:
        """Return the side of the squares of a query."""
        _, height, width = self.shape
        side = max(round(math.sqrt(self.published.p_selection(query) * height * width)), self.smallest)
        return min(side, height, width)

    def window(self, side: int, corner: Tensor) -> Tensor:
        """Return the pixels [B, C * side * side] of windows in the flattened image, from numbers [B, 2]."""
        _, height, width = self.shape
        # Rounded down as in pyautoattack, so that only a window as large as the image reaches its last row and column.
        top, left = ((number * (size - side)).long() for number, size in zip(corner.T, (height, width), strict=True))
        return (top * width + left).unsqueeze(1) + self.pixels(side)

    def _pixels(self, side: int) -> Tensor:
        numbered = torch.arange(math.prod(self.shape), device=self.published.device).view(*self.shape)
        return numbered[:, :side, :side].flatten()


class _LinfSquares(_Squares):
    """Squares that move every channel of a part of the image by eps in one direction."""

    def __init__(self, published: SquareAttack, eps: float, shape: Sequence[int]):
        super().__init__(published, eps, shape)
        channels, _, width = shape
        self.start_numbers, self.step_numbers = (channels, 1, width), 2 + channels

    def start(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Return images [B, C, H, W] with stripes."""
        return (images + self.eps * _signs(numbers)).clamp(0, 1)

    def step(self, best: Tensor, images: Tensor, numbers: Tensor, query: int) -> Tensor:
        """Return the best points so far [B, C, H, W] with one more square each."""
        side = self.side(query)
        window = self.window(side, numbers[:, :2])
        signs = _signs(numbers[:, 2:]).repeat_interleave(side * side, dim=1)
        squares = (images.flatten(1).gather(1, window) + self.eps * signs).clamp(0, 1)
        return best.flatten(1).scatter(1, window, squares).view_as(best)


class _L2Squares(_Squares):
    """Squares that take the budget of another window and spend it on a pair of bumps."""

    smallest = 3

    def __init__(self, published: SquareAttack, eps: float, shape: Sequence[int]):
        super().__init__(published, eps, shape)
        channels, height, width = shape
        self.tile = max(height // 5, 1)  # pyautoattack divides by 0 where an image is lower than 5 pixels
        border = max((height - 5 * self.tile) // 2, 0)
        self.tiles = list(product(*(range(border, size - self.tile + 1, self.tile) for size in (height, width))))
        self.start_numbers, self.step_numbers = (len(self.tiles), 1 + channels), 5 + channels
        self.bumps = cache(self._upright_and_lying)

    def side(self, query: int) -> int:
        """Return the side of the squares of a query: odd, unless the image is smaller."""
        return min(super().side(query) // 2 * 2 + 1, *self.shape[1:])

    def start(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Return images [B, C, H, W] covered with bumps."""
        moves = torch.zeros_like(images)
        for (top, left), drawn in zip(self.tiles, numbers.unbind(1), strict=True):
            moves[:, :, top : top + self.tile, left : left + self.tile] = self._drawn_bumps(self.tile, drawn)
        return self._spent(images, moves)

    def step(self, best: Tensor, images: Tensor, numbers: Tensor, query: int) -> Tensor:
        """Return the best points so far [B, C, H, W] with one more square each."""
        side = self.side(query)
        here, there = self.window(side, numbers[:, :2]), self.window(side, numbers[:, 2:4])
        moves = (best - images).flatten(1)
        unspent = (self.eps**2 - moves.square().sum(dim=1)).clamp(min=0).view(-1, 1, 1)
        old = moves.gather(1, here).view(len(moves), -1, side * side)
        moves.scatter_(1, here, 0.0)  # pixels in both windows count once
        taken = moves.gather(1, there).view_as(old)
        moves.scatter_(1, there, 0.0)
        budget = unspent / self.shape[0] + _energy(old) + _energy(taken)
        new = self._drawn_bumps(side, numbers[:, 4:]).flatten(2) + old / (1e-12 + _energy(old).sqrt())
        new = new / (1e-12 + _energy(new).sqrt()) * budget.sqrt()
        moves.scatter_(1, here, new.flatten(1))
        return self._spent(images, moves.view_as(images))

    def _spent(self, images: Tensor, moves: Tensor) -> Tensor:
        """Return images [B, C, H, W] moved by eps in the direction of the moves."""
        lengths = per_image(moves.flatten(1).norm(dim=1), moves)
        return (images + moves * (self.eps / (lengths + 1e-12))).clamp(0, 1)

    def _drawn_bumps(self, side: int, numbers: Tensor) -> Tensor:
        """Return a pair of opposite bumps per channel, [B, C, side, side], from numbers [B, 1 + C]."""
        lying = (numbers[:, 0] > 0.5).long()
        return self.bumps(side)[lying].unsqueeze(1) * _signs(numbers[:, 1:, None, None])

    def _upright_and_lying(self, side: int) -> Tensor:
        rectangles = self.published.eta_rectangles
        upright = torch.cat([rectangles(side // 2, side), -rectangles(side - side // 2, side)])
        upright /= upright.norm()
        return torch.stack([upright, upright.T])


def _signs(numbers: Tensor) -> Tensor:
    return (2 * numbers - 1).sign()


def _energy(values: Tensor) -> Tensor:
    return values.square().sum(dim=-1, keepdim=True)


def _uniform(generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Return numbers in [0, 1), [B, *shape], for each example from its own generator."""
    return torch.stack([torch.rand(tuple(shape), generator=generator) for generator in generators]).to(device)
