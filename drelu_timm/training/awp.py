"""Adversarial weight perturbation: the loss is lowered at the worst weights near the present ones.

Source: Wu, Xia and Wang, "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020,
https://arxiv.org/abs/2004.05884. A step takes the gradient of the loss, moves the weights uphill, takes the gradient
there, puts the weights back, and lets the optimiser step along the second gradient. The authors' code lets it step at
the moved weights and subtracts the move afterwards, so that weight decay shrinks the moved weights; without weight
decay both are the same.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def perturbed_weights(model: nn.Module, gamma: float) -> Iterator[None]:
    """Every weight of more than one dimension at ``w + gamma * |w| * g / |g|``, a norm a tensor; then back at ``w``.

    Biases, norms and caps stay, as do weights that have no gradient. Gradients are gone inside, so that a backward
    pass leaves those of the moved weights alone.

    Args:
        model: With the gradient g of the loss in ``.grad``, equal on all processes. Its scale does not matter.
        gamma: Length of the move relative to the weight's own, >= 0; the authors use 0.01, for TRADES
            0.005.
    """
    moved = [weight for weight in model.parameters() if weight.ndim > 1 and weight.grad is not None]
    before = [weight.detach().clone() for weight in moved]
    try:
        with torch.no_grad():
            for weight in moved:
                assert weight.grad is not None
                weight += gamma * weight.norm() * _direction(weight.grad)
        model.zero_grad()
        yield
    finally:
        _put_back(moved, before)


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """The model with all buffers, such as BatchNorm's running statistics, put back at the end.

    The backward pass belongs inside: it needs the buffers of its forward pass.
    """
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        _put_back(buffers, before)


def _direction(gradient: Tensor) -> Tensor:
    """A gradient at length 1; zero where it is zero."""
    return gradient / gradient.norm().clamp(min=torch.finfo(gradient.dtype).tiny)


@torch.no_grad()
def _put_back(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
