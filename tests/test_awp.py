"""Adversarial weight perturbation, on a tiny model with BatchNorm."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from drelu_timm.models.drelu import DReLU
from drelu_timm.training.objectives import make_objective
from drelu_timm.training.update import kept_statistics, perturbed_weights

GAMMA = 0.01


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6), DReLU(6), nn.Linear(6, 3)
    )


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(8, 1, 8, 8, generator=generator), torch.arange(8) % 3


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, before):
    """Return the names of weights and buffers that have changed in any bit."""
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def backward(model, images, labels):
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    return loss.item()


def test_each_weight_moves_along_its_gradient_by_gamma_times_its_norm(model, batch):
    model.eval()
    backward(model, *batch)
    before, gradients = state(model), {name: p.grad.clone() for name, p in model.named_parameters()}
    with perturbed_weights(model, GAMMA):
        assert changed(model, before) == {"0.weight", "4.weight", "6.weight"}
        for name in changed(model, before):
            move = model.state_dict()[name] - before[name]
            torch.testing.assert_close(move.norm(), GAMMA * before[name].norm(), rtol=1e-4, atol=0)
            cosine = F.cosine_similarity(move.flatten(), gradients[name].flatten(), dim=0)
            torch.testing.assert_close(cosine, torch.tensor(1.0), rtol=0, atol=1e-5)


def test_the_loss_increases_as_its_gradient_predicts(model, batch):
    model.eval()
    model.double()
    images, labels = batch[0].double(), batch[1]
    loss = backward(model, images, labels)
    moved = [p for p in model.parameters() if p.ndim > 1]
    expected = sum((1e-5 * p.norm() * p.grad.norm()).item() for p in moved)
    with perturbed_weights(model, 1e-5):
        assert backward(model, images, labels) - loss == pytest.approx(expected, rel=1e-3)


def test_gradients_inside_belong_to_the_moved_weights(model, batch):
    model.eval()
    backward(model, *batch)
    with perturbed_weights(model, GAMMA):
        assert all(p.grad is None for p in model.parameters())
        fresh = copy.deepcopy(model)
        backward(fresh, *batch)
        backward(model, *batch)
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_weights_are_restored_bit_for_bit(model, batch):
    model.eval()
    backward(model, *batch)
    before = state(model)
    with perturbed_weights(model, 0.3):
        backward(model, *batch)
    assert not changed(model, before)
    assert all(p.grad is not None for p in model.parameters())  # which the optimizer uses


def test_weights_are_restored_after_an_interruption(model, batch):
    model.eval()
    backward(model, *batch)
    before = state(model)
    with pytest.raises(KeyboardInterrupt), perturbed_weights(model, GAMMA):
        raise KeyboardInterrupt
    assert not changed(model, before)


def test_weights_without_a_gradient_stay(model, batch):
    model.eval()
    model[4].weight.requires_grad_(False)
    backward(model, *batch)
    model[6].weight.grad.zero_()
    before = state(model)
    with perturbed_weights(model, GAMMA):
        assert changed(model, before) == {"0.weight"}


def test_the_scale_of_the_gradient_does_not_matter(model, batch):
    model.eval()
    backward(model, *batch)
    with perturbed_weights(model, GAMMA):
        expected = state(model)
    backward(model, *batch)
    for parameter in model.parameters():
        parameter.grad *= 2**12  # as a loss scaler does
    with perturbed_weights(model, GAMMA):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[name])


def test_statistics_change_once_per_step(model, batch):
    images, labels = batch
    model.train()
    plain = copy.deepcopy(model)
    before = state(model)
    with kept_statistics(model):
        backward(model, images, labels)
        assert "1.running_mean" in changed(model, before)
    assert not changed(model, before)

    with perturbed_weights(model, GAMMA):
        backward(model, images, labels)
    backward(plain, images, labels)
    assert changed(model, state(plain)) == {"1.running_mean", "1.running_var"}  # of the moved weights' activations
    assert model[1].num_batches_tracked == plain[1].num_batches_tracked == 1


def test_statistics_are_restored_after_an_interruption(model, batch):
    model.train()
    before = state(model)

    def interrupted():
        with kept_statistics(model):
            model(batch[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not changed(model, before)


@pytest.mark.parametrize("name", ["natural", "at", "trades", "mart"])
def test_a_step_equals_the_authors_step_with_a_proxy(name, model, batch):
    """Without weight decay: their proxy ascends; its move is rescaled, added, and subtracted after the step."""
    images, labels = batch
    adversarial = (images + 0.1 * torch.rand(images.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    losses = make_objective(name, beta=6.0).losses
    model.train()
    theirs, proxy = copy.deepcopy(model), copy.deepcopy(model)

    optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01, maximize=True)
    losses(proxy, images, adversarial, labels).loss.backward()
    optimizer.step()
    way = {}
    for (key, old), new in zip(theirs.named_parameters(), proxy.parameters(), strict=True):
        if old.ndim > 1:
            difference = (new - old).detach()
            way[key] = GAMMA * old.norm().detach() / (difference.norm() + 1e-20) * difference
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for key, move in way.items():
            parameters[key] += move
    expected_loss = losses(theirs, images, adversarial, labels).loss
    expected_loss.backward()
    optimizer.step()
    with torch.no_grad():
        for key, move in way.items():
            parameters[key] -= move

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with kept_statistics(model):
        losses(model, images, adversarial, labels).loss.backward()
    with perturbed_weights(model, GAMMA):
        loss = losses(model, images, adversarial, labels).loss
        loss.backward()
    optimizer.step()

    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(model.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-6)
