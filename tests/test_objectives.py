"""The objectives and the inner attack, on a tiny net with BatchNorm and dropout."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from drelu_timm.attacks import ThreatModel, cross_entropy
from drelu_timm.objectives import InnerAttack, adversarial_training, natural, trades

THREAT_MODEL = ThreatModel.parse("Linf", "0.1")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(144, 3)
    )


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(8, 1, 8, 8, generator=generator), torch.arange(8) % 3


def inner_attack(model, steps=3):
    return InnerAttack(model, THREAT_MODEL, steps=steps, step_size=0.05)


def noise(images):
    return THREAT_MODEL.noise(images.shape, torch.Generator().manual_seed(1))


def test_inner_attack_leaves_the_model_as_it_was(model, batch):
    images, labels = batch
    model.train()
    model[1].eval()  # a frozen BatchNorm must stay frozen
    model[0].bias.requires_grad_(False)
    statistics = model[1].running_mean.clone()
    adversarial = inner_attack(model)(images, cross_entropy(labels), noise(images))

    assert [module.training for module in model] == [True, False, True, True, True, True]
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model[1].running_mean, statistics)
    assert THREAT_MODEL.distance(adversarial, images).max() <= 0.1 + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


def test_inner_attack_restores_the_model_when_interrupted(model, batch):
    images, _ = batch
    model.train()

    def stop(logits):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inner_attack(model)(images, stop, noise(images))
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_inner_attack_raises_the_loss(model, batch):
    images, labels = batch
    attack = inner_attack(model, steps=10)
    adversarial = attack(images, cross_entropy(labels), noise(images))
    model.eval()
    assert F.cross_entropy(model(adversarial), labels) > F.cross_entropy(model(images), labels) + 0.05


def test_natural_is_cross_entropy(model, batch):
    images, labels = batch
    model.eval()
    objective = natural(model, images, labels, inner_attack(model), noise(images))
    torch.testing.assert_close(objective.loss, F.cross_entropy(model(images), labels))


def test_adversarial_training_is_cross_entropy_on_the_attack(model, batch):
    images, labels = batch
    model.eval()
    attack = inner_attack(model)
    objective = adversarial_training(model, images, labels, attack, noise(images))
    adversarial = attack(images, cross_entropy(labels), noise(images))
    torch.testing.assert_close(objective.loss, F.cross_entropy(model(adversarial), labels))


def test_trades_adds_beta_times_the_divergence(model, batch):
    images, labels = batch
    model.eval()
    plain = trades(0.0)(model, images, labels, inner_attack(model), noise(images))
    weighted = trades(6.0)(model, images, labels, inner_attack(model), noise(images))
    torch.testing.assert_close(plain.loss, F.cross_entropy(model(images), labels))
    torch.testing.assert_close(weighted.loss, plain.loss + 6 * weighted.parts["kl"])
    assert weighted.parts["kl"] > 0


def test_trades_attack_raises_the_divergence(model, batch):
    images, labels = batch
    model.eval()
    one = trades(1.0)(model, images, labels, inner_attack(model, steps=1), noise(images))
    many = trades(1.0)(model, images, labels, inner_attack(model, steps=20), noise(images))
    assert many.parts["kl"] > one.parts["kl"]
