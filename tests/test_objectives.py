"""The objectives and the inner attack, on a tiny model with BatchNorm and dropout."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from drelu_timm.attacks.attack import cross_entropy
from drelu_timm.attacks.threat_model import ThreatModel
from drelu_timm.errors import InputError
from drelu_timm.training.objectives import InnerAttack, make_objective

THREAT_MODEL = ThreatModel.parse("Linf", "0.1")
NAMES = ("natural", "at", "n-fgsm", "trades", "mart")


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


class Table(nn.Module):
    """A model whose logits are given: images [B, 1, 1, 1] hold the rows to look up."""

    def __init__(self, *rows):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(rows))

    def forward(self, images):
        return self.logits[images.flatten().long()]


def rows(*numbers):
    return torch.tensor(numbers, dtype=torch.float).view(-1, 1, 1, 1)


def inner_attack(model, steps=3):
    return InnerAttack(model, THREAT_MODEL, steps=steps, step_size=0.05)


def noise(images):
    return THREAT_MODEL.noise(images.shape, torch.Generator().manual_seed(1))


def losses_of(objective, model, images, labels, steps=3):
    adversarial = objective.adversarial(images, labels, inner_attack(model, steps), noise(images))
    return objective.losses(model, images, adversarial, labels)


def mixed(labels, num_classes=3):
    """Labels as CutMix mixes them: 0.7 of each, 0.3 of the next image's."""
    one_hot = F.one_hot(labels, num_classes).float()
    return 0.7 * one_hot + 0.3 * one_hot.roll(1, 0)


def test_inner_attack_leaves_the_model_unchanged(model, batch):
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


def test_inner_attack_increases_the_loss(model, batch):
    images, labels = batch
    attack = inner_attack(model, steps=10)
    adversarial = attack(images, cross_entropy(labels), noise(images))
    model.eval()
    assert F.cross_entropy(model(adversarial), labels) > F.cross_entropy(model(images), labels) + 0.05


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_inner_attack_keeps_the_memory_format(norm):
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 3)).to(memory_format=torch.channels_last)
    images = torch.rand(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    attack = InnerAttack(model, ThreatModel.parse(norm, "0.1"), steps=2, step_size=0.05)
    adversarial = attack(images, cross_entropy(torch.arange(4) % 3), 0.1 * torch.rand(4, 3, 8, 8))
    assert adversarial.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", NAMES)
def test_the_attack_of_an_objective_does_not_change_the_model(name, model, batch):
    images, labels = batch
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adversarial = make_objective(name, beta=6.0).adversarial(images, labels, inner_attack(model), noise(images))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not adversarial.requires_grad
    assert (adversarial is images) == (name == "natural")


def test_natural_is_cross_entropy(model, batch):
    images, labels = batch
    model.eval()
    losses = losses_of(make_objective("natural", beta=6.0), model, images, labels)
    assert torch.equal(losses.loss, F.cross_entropy(model(images), labels))


def test_adversarial_training_is_cross_entropy_on_the_attack(model, batch):
    images, labels = batch
    model.eval()
    losses = losses_of(make_objective("at", beta=6.0), model, images, labels)
    adversarial = inner_attack(model)(images, cross_entropy(labels), noise(images))
    assert torch.equal(losses.loss, F.cross_entropy(model(adversarial), labels))


def test_n_fgsm_equals_the_authors_formula(model, batch):
    """Noise of twice eps, one step of eps, both clipped to [0, 1] and neither to within eps."""
    images, labels = batch
    model.eval()
    eta = (2 * noise(images)).clamp(-images, 1 - images).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(images + eta), labels), eta)
    expected = images + (eta + 0.1 * gradient.sign()).clamp(-images, 1 - images)
    attack = InnerAttack(model, THREAT_MODEL, steps=1, step_size=0.1)
    adversarial = make_objective("n-fgsm", beta=6.0).adversarial(images, labels, attack, noise(images))
    torch.testing.assert_close(adversarial, expected)
    assert THREAT_MODEL.distance(adversarial, images).max() > 0.2
    losses = make_objective("n-fgsm", beta=6.0).losses(model, images, adversarial, labels)
    assert torch.equal(losses.loss, F.cross_entropy(model(adversarial), labels))


def test_trades_adds_beta_times_the_divergence(model, batch):
    images, labels = batch
    model.eval()
    plain = losses_of(make_objective("trades", beta=0.0), model, images, labels)
    weighted = losses_of(make_objective("trades", beta=6.0), model, images, labels)
    assert torch.equal(plain.loss, F.cross_entropy(model(images), labels))
    torch.testing.assert_close(weighted.loss, plain.loss + 6 * weighted.parts["kl"])
    assert weighted.parts["kl"] > 0


def test_trades_attack_increases_the_divergence(model, batch):
    images, labels = batch
    model.eval()
    one = losses_of(make_objective("trades", beta=1.0), model, images, labels, steps=1)
    many = losses_of(make_objective("trades", beta=1.0), model, images, labels, steps=20)
    assert many.parts["kl"] > one.parts["kl"]


def test_trades_equals_the_authors_formula(model, batch):
    images, labels = batch
    model.eval()
    adversarial = (images + noise(images)).clamp(0, 1)
    loss = make_objective("trades", beta=6.0).losses(model, images, adversarial, labels).loss
    clean, moved = model(images), model(adversarial)
    divergence = nn.KLDivLoss(reduction="sum")(F.log_softmax(moved, dim=1), F.softmax(clean, dim=1))
    expected = F.cross_entropy(clean, labels) + 6.0 * (1 / len(images)) * divergence
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters, retain_graph=True), torch.autograd.grad(expected, parameters)
    )


def test_mart_equals_the_authors_formula(model, batch):
    images, labels = batch
    model.eval()
    adversarial = (images + noise(images)).clamp(0, 1)
    losses = make_objective("mart", beta=5.0).losses(model, images, adversarial, labels)
    clean, moved = model(images).softmax(dim=1), model(adversarial).softmax(dim=1)
    boosted, weighted = 0.0, 0.0
    for i, label in enumerate(labels):
        other = max(moved[i, k] for k in range(3) if k != label)
        boosted += (-moved[i, label].log() - (1 - other).log()) / len(labels)
        kl = (clean[i] * (clean[i] / moved[i]).log()).sum()
        weighted += kl * (1 - clean[i, label]) / len(labels)
    torch.testing.assert_close(losses.parts["boosted_cross_entropy"], boosted)
    torch.testing.assert_close(losses.parts["weighted_kl"], weighted)
    torch.testing.assert_close(losses.loss, boosted + 5 * weighted)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(losses.loss, parameters, retain_graph=True),
        torch.autograd.grad(boosted + 5 * weighted, parameters),
    )


def test_mart_attacks_cross_entropy(model, batch):
    images, labels = batch
    attack = inner_attack(model)
    adversarial = make_objective("mart", beta=5.0).adversarial(images, labels, attack, noise(images))
    assert torch.equal(adversarial, attack(images, cross_entropy(labels), noise(images)))


def test_mart_needs_hard_labels(model, batch):
    images, labels = batch
    with pytest.raises(InputError, match=r"--objective mart needs one class per image.*Leave --cutmix out"):
        make_objective("mart", beta=5.0).losses(model, images, images, mixed(labels))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("label", [0, 1])
def test_large_logits_leave_losses_and_gradients_finite(name, label):
    model = Table([1e3, -1e3, 0.0], [-1e4, 1e4, 0.0])
    losses = make_objective(name, beta=6.0).losses(model, rows(0), rows(1), torch.tensor([label]))
    losses.loss.backward()
    assert torch.isfinite(losses.loss)
    assert torch.isfinite(model.logits.grad).all()


@pytest.mark.parametrize("name", ["natural", "at", "trades"])
def test_mixed_labels_give_weighted_losses_of_their_classes(name, model, batch):
    images, labels = batch
    model.eval()
    objective = make_objective(name, beta=6.0)
    adversarial = objective.adversarial(images, mixed(labels), inner_attack(model), noise(images))
    one, other, both = (
        objective.losses(model, images, adversarial, y).loss for y in (labels, labels.roll(1, 0), mixed(labels))
    )
    torch.testing.assert_close(both, 0.7 * one + 0.3 * other)


def test_mixed_labels_of_one_class_give_the_images_of_that_class(model, batch):
    images, labels = batch
    at, attack = make_objective("at", beta=6.0), inner_attack(model)
    hard, soft, between = (
        at.adversarial(images, y, attack, noise(images)) for y in (labels, F.one_hot(labels, 3).float(), mixed(labels))
    )
    torch.testing.assert_close(hard, soft)
    assert not torch.allclose(between, hard)


@pytest.mark.parametrize("name", NAMES)
def test_label_smoothing_changes_only_the_cross_entropy(name, model, batch):
    images, labels = batch
    model.eval()
    plain, smoothed = (make_objective(name, beta=6.0, label_smoothing=amount) for amount in (0.0, 0.2))
    attack = inner_attack(model)
    adversarial = plain.adversarial(images, labels, attack, noise(images))
    assert torch.equal(smoothed.adversarial(images, labels, attack, noise(images)), adversarial)

    logits = model(images if name in ("natural", "trades") else adversarial)
    change = F.cross_entropy(logits, labels, label_smoothing=0.2) - F.cross_entropy(logits, labels)
    before, after = (objective.losses(model, images, adversarial, labels).loss for objective in (plain, smoothed))
    torch.testing.assert_close(after - before, change, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_losses_of_bfloat16_logits_are_float32(name):
    model = Table([1.0, 2.0, 0.5], [1.5, 1.0, 3.0]).bfloat16()
    losses = make_objective(name, beta=6.0).losses(model, rows(0), rows(1), torch.tensor([1]))
    exact = make_objective(name, beta=6.0).losses(model.float(), rows(0), rows(1), torch.tensor([1]))
    assert {value.dtype for value in (losses.loss, *losses.parts.values())} == {torch.float32}
    assert torch.equal(losses.loss, exact.loss)


def test_an_unknown_objective_gets_a_suggestion():
    with pytest.raises(InputError, match="--objective 'trade' is unknown; did you mean trades"):
        make_objective("trade", beta=6.0)
