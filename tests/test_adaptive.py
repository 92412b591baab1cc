"""Adaptive attacks: the substitutes of layers that hide gradients, and what the attacks find with them."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from timm.layers.activations import HardSigmoid, Sigmoid, Tanh
from timm.layers.activations_me import HardSigmoidMe
from torch import nn

from drelu_timm.attacks import adaptive
from drelu_timm.attacks.adaptive import SUBSTITUTES
from drelu_timm.attacks.attack import LOSSES, Batch
from drelu_timm.attacks.pgd import PGD
from drelu_timm.attacks.threat_model import ThreatModel
from drelu_timm.models.activations import KWTA, PACT, RCRAF, FitReLU, Tent
from drelu_timm.models.drelu import DReLU, SReLU
from drelu_timm.models.inference import frozen

CAPPED = {
    "drelu": (DReLU(4, cap=1.0), 0.0, 1.0),
    "srelu": (SReLU(2.0), 0.0, 2.0),
    "relu6": (nn.ReLU6(), 0.0, 6.0),
    "relu6, inplace": (nn.ReLU6(inplace=True), 0.0, 6.0),
    "hardtanh": (nn.Hardtanh(), -1.0, 1.0),
    "hardtanh, inplace": (nn.Hardtanh(-2.0, 3.0, inplace=True), -2.0, 3.0),
}
SATURATING = [nn.Hardsigmoid(), HardSigmoid(), HardSigmoid(inplace=True), HardSigmoidMe(), nn.Sigmoid(), Sigmoid()]
SATURATING += [nn.Tanh(), Tanh(inplace=True)]
THREAT_MODEL = ThreatModel.parse("Linf", "0.09")


def value_and_slope(model, x, change=None):
    """Return the output for ``x`` and the gradient of its sum, with changed or unchanged layers."""
    x = x.clone().requires_grad_()
    if change is None:
        value = model(x * 1)  # a layer cannot work in place on a leaf
    else:
        with change:
            value = model(x * 1)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


@pytest.mark.parametrize(("layer", "floor", "cap"), CAPPED.values(), ids=CAPPED)
@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3, 3)])
@pytest.mark.parametrize("substitute", SUBSTITUTES)
def test_every_substitute_keeps_the_value_and_passes_a_gradient_above_the_cap(layer, floor, cap, shape, substitute):
    model = nn.Sequential(nn.Identity(), nn.Sequential(layer))
    x = 10 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    value, slope = value_and_slope(model, x, adaptive.substituted(model, SUBSTITUTES[substitute]))
    assert torch.equal(value, x.clamp(floor, cap))
    outside = (x > cap) | ((x < floor) & (floor < 0))
    expected = {"straight-through": slope == 1, "leaky": (slope - 0.1).abs() < 1e-6, "soft": (slope > 0) & (slope < 1)}
    near = (x - (floor + cap) / 2).abs() < 10
    assert expected[substitute][outside & near].all()
    if substitute != "soft":
        assert (slope[(x > floor) & (x < cap)] == 1).all()
        assert floor < 0 or not slope[x < 0].any(), "the floor of a ReLU stays"


@pytest.mark.parametrize("layer", SATURATING, ids=lambda layer: f"{type(layer).__module__}.{layer}")
def test_units_that_saturate_on_both_sides(layer):
    model = nn.Sequential(layer)
    assert adaptive.substitutable_layers(model) == [layer]
    x = torch.linspace(-10, 10, 24).view(6, 4)
    own, _ = value_and_slope(model, x)
    for clamp in SUBSTITUTES.values():
        value, slope = value_and_slope(model, x, adaptive.substituted(model, clamp))
        assert torch.equal(value, own)
        assert (slope > 0).all()
    straight, _ = value_and_slope(model, x, adaptive.replaced(model, adaptive.straight_through))
    at_zero = value_and_slope(model, torch.zeros(1, 4))
    torch.testing.assert_close(straight, at_zero[0] + at_zero[1] * x)  # the tangent


@pytest.mark.parametrize(("layer", "floor", "cap"), CAPPED.values(), ids=CAPPED)
def test_surrogate_and_annealed_layers(layer, floor, cap):
    model = nn.Sequential(layer)
    x = torch.linspace(-20, 20, 44).view(11, 4)
    with adaptive.replaced(model, adaptive.straight_through):
        torch.testing.assert_close(model(x.clone()), x if floor < 0 else x.relu())
    for sharpness in (0.0, 0.5, 1.0):
        with adaptive.replaced(model, partial(adaptive.annealed, sharpness=sharpness)):
            value = model(x.clone())
        assert (value >= floor).all()
        assert (value <= cap).all()
    middle = torch.full((1, 4), (floor + cap) / 2)
    sharp = adaptive.replaced(model, partial(adaptive.annealed, sharpness=1.0))
    torch.testing.assert_close(value_and_slope(model, middle, sharp)[1], torch.ones(1, 4))  # the gradient of the clamp


def test_the_value_survives_in_bf16_where_the_substitute_is_much_larger():
    model = nn.Sequential(nn.ReLU6())
    x = torch.full((1, 1), 5000.0, dtype=torch.bfloat16)
    value, slope = value_and_slope(model, x, adaptive.substituted(model, adaptive.straight_through))
    assert (value.item(), slope.item()) == (6, 1)


def test_layers_are_restored_after_an_error():
    layer = DReLU(3, cap=1.0)
    model = nn.Sequential(nn.Sequential(layer), layer, nn.ReLU())
    assert adaptive.substitutable_layers(model) == [layer]
    x = torch.full((2, 3), 5.0)
    with adaptive.replaced(model, adaptive.straight_through):
        assert torch.equal(model(x), x)
        with adaptive.substituted(model, adaptive.straight_through):
            pass
        assert torch.equal(model(x), x), "the outer change stays"
    assert torch.equal(model(x), torch.ones(2, 3))
    with pytest.raises(TypeError), adaptive.substituted(model, adaptive.straight_through):
        model(torch.ones(2), "no such argument")
    assert torch.equal(model(x), torch.ones(2, 3))
    assert "forward" not in vars(layer)


def test_a_users_layer_is_registered_in_one_line():
    class Quantised(nn.Module):
        def forward(self, x):
            return x.mul_(4).round_().div_(4)  # in place, without a gradient

    class Shifted(nn.Module):
        def forward(self, x):
            return (x + 1).clamp(0, 4)

    model = nn.Sequential(Quantised(), Shifted())
    x = torch.tensor([[0.3, 9.1]])
    assert not adaptive.substitutable_layers(model)
    with pytest.raises(TypeError, match=r"Quantised has no backward substitute\. Register one with adaptive.back"):
        adaptive.backward(model[0], x, adaptive.leaky)

    adaptive.backward.register(Quantised, lambda layer, x, clamp: x)
    adaptive.backward.register(Shifted, lambda layer, x, clamp: clamp(x + 1, 0.0, 4.0))

    assert adaptive.substitutable_layers(model) == [model[0], model[1]]
    value, slope = value_and_slope(model, x, adaptive.substituted(model, adaptive.leaky))
    torch.testing.assert_close(value, torch.tensor([[1.25, 4.0]]))
    torch.testing.assert_close(slope, torch.tensor([[1.0, 0.1]]))
    value, _ = value_and_slope(model, x, adaptive.replaced(model, adaptive.straight_through))
    torch.testing.assert_close(value, x + 1)


# Attacks


def saturated_unit(layer=None, scale=1.0):
    """Return two classes divided by one unit far above its cap, images, and its predictions, fooled from eps 0.09."""
    first, second = nn.Linear(16, 1, bias=False), nn.Linear(1, 3)
    with torch.no_grad():
        first.weight.fill_(scale)
        second.weight.copy_(torch.tensor([[1.0], [-1.0], [0.0]]))
        second.bias.copy_(torch.tensor([-0.5, 0.5, -9.0]))
    model = nn.Sequential(nn.Flatten(), first, layer or DReLU(1, cap=1.0), second).eval().requires_grad_(False)
    images = torch.full((8, 1, 4, 4), 0.1)  # pre-activation 1.6 * scale, cap 1, boundary at 0.5
    return model, images, model(images).argmax(dim=1)


def losing_unit():
    """Return two classes divided by the winner of two units, one of them constant, images, and its predictions."""
    first, second = nn.Linear(16, 2), nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.stack([torch.zeros(16), torch.ones(16)]))
        first.bias.copy_(torch.tensor([2.5, 0.0]))
        second.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-9.0, -9.0]]))
    model = nn.Sequential(nn.Flatten(), first, KWTA(0.5), second).eval().requires_grad_(False)
    images = torch.full((8, 1, 4, 4), 0.1)  # 1.6 against 2.5; 3.04 within eps
    return model, images, model(images).argmax(dim=1)


BRIEF = {"loss": "scaled-ce", "steps": 20, "relative_step_size": 0.2}
ROUNDS = {"rounds": 5, "steps": 6, "relative_step_size": 0.2}
ATTACKS = {
    **{f"bpda, {name}": adaptive.BPDA(substitute=name, **BRIEF) for name in SUBSTITUTES},
    **{f"surrogate, {name}": adaptive.Surrogate(substitute=name, **BRIEF) for name in SUBSTITUTES},
    "bpda_apgd": adaptive.BPDAWithAPGD(n_iter=20),
    "annealing": adaptive.Annealing(**ROUNDS),
    "targeted_annealing": adaptive.TargetedAnnealing(n_target_classes=2, **ROUNDS),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_adaptive_attacks_pass_a_saturated_unit(attack):
    model, images, labels = saturated_unit()
    batch = Batch(images, labels, range(8))
    blind = adaptive.Restarts(restarts=3, **BRIEF).run(model, batch, THREAT_MODEL)
    assert (model(blind.images).argmax(dim=1) == labels).all()
    assert (blind.steps == 60).all()
    seen = attack.run(model, batch, THREAT_MODEL)
    assert THREAT_MODEL.contains(seen.images, images).all()
    assert (model(seen.images).argmax(dim=1) != labels).all()


HIDING = {
    "srelu": partial(saturated_unit, SReLU(1.0)),
    "pact": partial(saturated_unit, PACT(1.0)),
    "tent": partial(saturated_unit, Tent(1, 1.0)),
    "fitact": partial(saturated_unit, FitReLU(1, 1.59), scale=10.0),  # from 16.0; its peak is at the 1.6 of eps 0.09
    "rcr-af": partial(saturated_unit, RCRAF(1.0)),
    "kwta": losing_unit,
}


@pytest.mark.parametrize("make", HIDING.values(), ids=HIDING)
def test_adaptive_attacks_pass_the_relatives_of_d_relu(make):
    model, images, labels = make()
    batch = Batch(images, labels, range(8))
    x = images.clone().requires_grad_()
    assert not torch.autograd.grad(model(x).sum(), x)[0].any(), "the gradient is hidden"
    blind = adaptive.Restarts(restarts=3, **BRIEF).run(model, batch, THREAT_MODEL)
    assert (model(blind.images).argmax(dim=1) == labels).all()
    for name, attack in ATTACKS.items():
        seen = attack.run(model, batch, THREAT_MODEL)
        assert THREAT_MODEL.contains(seen.images, images).all()
        assert (model(seen.images).argmax(dim=1) != labels).all(), name


def test_the_substitutes_of_the_relatives_have_their_values_inside():
    x = torch.linspace(-0.9, 0.9, 40).view(10, 4)
    for layer in (PACT(1.0), Tent(4, 1.0), RCRAF(1.0), SReLU(1.0)):
        torch.testing.assert_close(adaptive.backward(layer, x, adaptive.leaky), layer(x))
    inside = x.clamp(max=0.6)  # a sigmoid of slope 20 is smooth around the bound
    torch.testing.assert_close(adaptive.backward(FitReLU(4, 1.0), inside, adaptive.leaky), inside.relu())
    assert torch.equal(adaptive.backward(KWTA(0.5), x, adaptive.leaky)[:, 2:], x[:, 2:])


@pytest.fixture(scope="module")
def net():
    """Return a small model whose units reach their caps, images, and its predictions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 8, 3), nn.Hardtanh(-0.2, 0.2), nn.Flatten(), nn.Linear(288, 16), DReLU(16, cap=0.1)]
        model = nn.Sequential(*layers, nn.Linear(16, 6)).eval().requires_grad_(False)
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model[-1].bias -= model(images).mean(dim=0)  # otherwise all would be of one class
    return model, images, model(images).argmax(dim=1)


SOURCE = nn.Sequential(nn.Flatten(), nn.Linear(64, 6))
BASELINES = {
    "restarts": adaptive.Restarts(restarts=3, **BRIEF),
    "transfer": adaptive.Transfer(SOURCE, PGD(**BRIEF)),
}


@pytest.mark.parametrize("attack", [*ATTACKS.values(), *BASELINES.values()], ids=[*ATTACKS, *BASELINES])
def test_adaptive_attacks_do_not_depend_on_the_batch(net, attack):
    model, images, labels = net
    seeds = list(range(100, 140))
    whole = attack.run(model, Batch(images, labels, seeds), THREAT_MODEL)
    torch.rand(3)
    for part in (slice(0, 7), slice(7, 40)):
        alone = attack.run(model, Batch(images[part], labels[part], seeds[part]), THREAT_MODEL)
        torch.testing.assert_close(alone.images, whole.images[part])
        assert whole.steps is None or torch.equal(alone.steps, whole.steps[part])


@pytest.mark.parametrize("name", ["annealing", "targeted_annealing", "restarts"])
def test_the_first_success_is_kept_and_ends_the_search(net, name):
    model, images, labels = net
    batch = Batch(images, labels, range(40))
    found = (ATTACKS | BASELINES)[name].run(model, batch, ThreatModel.parse("Linf", "0.02"))
    broken = model(found.images).argmax(dim=1) != labels
    most = {"annealing": 30, "targeted_annealing": 60, "restarts": 60}[name]
    assert 0 < broken.sum() < 40, "the test has nothing to tell apart"
    assert (found.steps[~broken] == most).all()
    assert (found.steps[broken] < most).any()


def test_misclassified_examples_cost_no_more_passes(net):
    model, images, labels = net
    passes = []
    handle = model.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    attack = adaptive.Restarts(restarts=4, steps=5, relative_step_size=0.4)
    found = attack.run(model, Batch(images, labels, range(40)), ThreatModel.parse("Linf", "0.02"))
    handle.remove()
    judged = found.steps.sum() // 5
    assert sum(passes) == found.steps.sum() + judged  # one pass per gradient, and one per restart to judge it


def test_targets_are_the_most_likely_other_classes(net, monkeypatch):
    model, images, labels = net
    aimed = []

    def recorded(labels, targets):
        aimed.append((labels, targets))
        return LOSSES["ce"](targets)  # away from the target: nothing is found

    monkeypatch.setattr(adaptive, "targeted_margin", recorded)
    attack = adaptive.TargetedAnnealing(n_target_classes=5, **{**ROUNDS, "rounds": 1})
    attack.run(model, Batch(images, labels, range(40)), ThreatModel.parse("Linf", "0"))
    targets = torch.stack([target for _, target in aimed], dim=1)
    order = model(images).argsort(dim=1, descending=True)
    assert torch.equal(order[:, 0], labels)
    assert torch.equal(targets, order[:, 1:])


@pytest.mark.parametrize("attack", [ATTACKS["annealing"], ATTACKS["targeted_annealing"], ATTACKS["bpda, leaky"]])
def test_the_search_starts_from_the_batchs_start(net, attack):
    model, images, labels = net
    attack = replace(attack, steps=0)
    start = THREAT_MODEL.project(images + 0.05, images)
    found = attack.run(model, Batch(images, labels, range(40), start), THREAT_MODEL)
    assert torch.equal(found.images, start)
    drawn = attack.run(model, Batch(images, labels, range(40)), THREAT_MODEL)
    assert not torch.equal(drawn.images, start)


def test_transfer_searches_on_the_source_and_restores_it(net):
    model, images, labels = net
    source = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Dropout()).train()
    batch = Batch(images, labels, range(40))
    found = adaptive.Transfer(source, PGD(**BRIEF)).run(model, batch, THREAT_MODEL)
    with frozen(source):
        expected = PGD(**BRIEF).run(source, batch, THREAT_MODEL)
    assert torch.equal(found.images, expected.images)
    assert source.training and all(parameter.requires_grad for parameter in source.parameters())
