"""Threat models, every attack against models whose answer is known, and attacks that know of caps."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from drelu_timm import adaptive
from drelu_timm.attacks import LOSSES, ThreatModel, fgsm, frozen, pgd, random_start_pgd
from drelu_timm.drelu import DReLU, SReLU
from drelu_timm.errors import InputError
from drelu_timm.suites import ATTACKS, SUITES, find_suite

THREAT_MODELS = [ThreatModel.parse("Linf", "0.0125"), ThreatModel.parse("L2", "0.08")]


class Linear(nn.Module):
    """Two classes apart by a plane, so that the distance of every image from the other class is known."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(0)))

    def forward(self, images):
        score = images.flatten(1) @ self.weight - self.weight.sum() / 2
        return torch.stack([score, -score], dim=1)

    def distance(self, images, norm):
        length = self.weight.abs().sum() if norm == "Linf" else self.weight.norm()
        return (self(images)[:, 0].abs() / length).detach()


@pytest.fixture
def linear():
    """The model, images around mid-grey (so that [0, 1] never interferes), and the classes it puts them into."""
    model = Linear().eval()
    images = 0.5 + 0.1 * torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-3, 3)
    return model, images, model(images).argmax(dim=1)


@pytest.mark.parametrize(("written", "value"), [("8/255", 8 / 255), ("0.1", 0.1), (0.3, 0.3), ("0", 0.0)])
def test_eps_is_read_and_kept_as_written(written, value):
    threat_model = ThreatModel.parse("Linf", written)
    assert threat_model.eps == pytest.approx(value)
    assert threat_model.written == str(written)


@pytest.mark.parametrize("eps", ["hello", "-0.1", "8/0", "nan", "inf", "", "8/255/2"])
def test_eps_that_is_no_radius(eps):
    with pytest.raises(InputError, match=r"--eps .* is no radius; give a number >= 0 such as 8/255 or 0.1"):
        ThreatModel.parse("Linf", eps)


def test_unknown_norm_names_the_near_miss():
    with pytest.raises(InputError, match="--norm 'linf' is unknown; did you mean Linf"):
        ThreatModel.parse("linf", "0.1")


@pytest.mark.parametrize("threat_model", THREAT_MODELS, ids=str)
def test_projection_lands_in_the_ball_and_leaves_what_is_there(threat_model):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(50, 3, 6, 6, generator=generator)
    far = images + torch.randn(images.shape, generator=generator)
    assert not threat_model.contains(far, images).any()
    near = threat_model.project(far, images)
    assert threat_model.contains(near, images).all()
    torch.testing.assert_close(threat_model.project(near, images), near)
    assert not threat_model.contains(near + 1.0, images).any()


def test_distance_is_that_of_the_norm():
    moved = torch.full((1, 1, 2, 2), 0.5)
    assert ThreatModel.parse("Linf", 1).distance(moved, torch.zeros_like(moved)) == 0.5
    assert ThreatModel.parse("L2", 1).distance(moved, torch.zeros_like(moved)) == 1.0


def searched(name, linear, threat_model, seeds=None, **settings):
    model, images, labels = linear
    attack = ATTACKS[name].for_classes(2)
    attack = replace(attack, settings={**attack.settings, **settings})
    with frozen(model):
        return attack(model, images, labels, threat_model, seeds or list(range(len(images))))


@pytest.mark.parametrize("threat_model", THREAT_MODELS, ids=str)
@pytest.mark.parametrize("name", ATTACKS)
def test_attack_stays_in_the_ball_and_is_deterministic(name, threat_model, linear):
    model, images, _ = linear
    state = torch.get_rng_state()
    cheap = {"square": {"n_queries": 50}, "cw-l2": {"steps": 20}}.get(name, {})
    first, second = (searched(name, linear, threat_model, **cheap) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state was moved"
    assert not first.requires_grad
    assert first.shape == images.shape
    if not ATTACKS[name].minimum_norm:
        assert threat_model.contains(first, images).all()
    assert model.weight.requires_grad


@pytest.mark.parametrize("threat_model", THREAT_MODELS, ids=str)
@pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"noise", "square"}))
def test_attack_with_gradients_breaks_just_what_can_be_broken(name, threat_model, linear):
    model, images, labels = linear
    distance = model.distance(images, threat_model.norm)
    assert 4 < (distance < threat_model.eps).sum() < 20, "the test has nothing to tell apart"
    adversarial = searched(name, linear, threat_model)
    broken = (model(adversarial).argmax(dim=1) != labels) & threat_model.contains(adversarial, images)
    if name == "cw-l2" and threat_model.norm == "Linf":  # the nearest in L2 need not be near in Linf
        assert not broken[distance > threat_model.eps].any()
    else:
        sure = (distance - threat_model.eps).abs() > 0.03 * threat_model.eps
        assert torch.equal(broken[sure], (distance < threat_model.eps)[sure])


def test_black_box_attacks_break_something_and_nothing_impossible(linear):
    model, images, labels = linear
    threat_model = THREAT_MODELS[0]
    broken = model(searched("square", linear, threat_model, n_queries=500)).argmax(dim=1) != labels
    assert broken.sum() > 0
    assert (model.distance(images, "Linf")[broken] <= threat_model.eps).all()


def test_carlini_wagner_finds_the_nearest_example(linear):
    model, images, _ = linear
    found = (searched("cw-l2", linear, THREAT_MODELS[1]) - images).flatten(1).norm(dim=1)
    nearest = model.distance(images, "L2")
    assert (found >= nearest * 0.999).all()
    assert (found / nearest).median() < 1.05


def test_carlini_wagner_gives_the_image_back_where_it_finds_nothing():
    class Constant(nn.Module):
        def forward(self, images):
            return torch.tensor([1.0, 0.0]) + 0 * images.flatten(1)[:, :2]

    images = torch.rand(3, 1, 4, 4)
    labels = torch.zeros(3, dtype=torch.long)
    attack = ATTACKS["cw-l2"]
    assert torch.equal(attack(Constant().eval(), images, labels, THREAT_MODELS[1], [0, 1, 2]), images)


@pytest.mark.parametrize("name", ["fgsm", "pgd", "noise", "bpda", "twin", "annealing"])
def test_our_attacks_do_not_depend_on_the_batch(name, linear):
    model, images, labels = linear
    seeds = list(range(100, 100 + len(images)))
    whole = searched(name, linear, THREAT_MODELS[0], seeds)
    parts = [
        searched(name, (model, images[part], labels[part]), THREAT_MODELS[0], seeds[part])
        for part in (slice(0, 7), slice(7, None))
    ]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_other_seeds_give_other_starts(linear):
    pgd_0, pgd_1 = (searched("noise", linear, THREAT_MODELS[0], [seed] * 24) for seed in (0, 1))
    assert not torch.equal(pgd_0, pgd_1)


@pytest.mark.parametrize(
    ("num_classes", "dlr", "targeted", "targets"),
    [(2, "margin", "margin", 1), (3, "dlr", "margin", 2), (20, "dlr", "dlr", 9)],
)
def test_settings_fit_the_number_of_classes(num_classes, dlr, targeted, targets):
    suite = find_suite("all", num_classes)
    apgd_t, fab_t = suite["autoattack"][1:3]
    assert suite["apgd-dlr"][0].settings["loss"] == dlr
    assert apgd_t.settings["loss"] == targeted
    assert apgd_t.settings["n_target_classes"] == fab_t.settings["n_target_classes"] == targets
    assert ATTACKS["apgd-t"].settings["n_target_classes"] == 9, "the table itself was changed"


def test_every_suite_holds_the_adaptive_attacks():
    for columns in SUITES.values():
        assert {"bpda", "twin", "annealing", "noise"} <= set(columns)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_raised_by_worse_logits(loss):
    labels = torch.tensor([0, 2])
    good = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 4.0]])
    bad = torch.tensor([[1.0, 3.0, 0.0], [0.0, 4.0, 1.0]])
    assert (LOSSES[loss](labels)(bad) > LOSSES[loss](labels)(good)).all()


def test_scaled_cross_entropy_keeps_a_gradient_where_cross_entropy_has_none():
    labels = torch.tensor([0])

    def gradient(loss):
        logits = torch.tensor([[500.0, 0.0, -500.0]], requires_grad=True)
        return torch.autograd.grad(LOSSES[loss](labels)(logits).sum(), logits)[0]

    assert not gradient("ce").any()
    assert gradient("scaled-ce").any()
    small = torch.tensor([[3.0, 0.0, -3.0]])
    torch.testing.assert_close(LOSSES["scaled-ce"](labels)(small), LOSSES["ce"](labels)(small))


def test_frozen_puts_modes_and_flags_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval(), nn.Dropout())
    model[0].bias.requires_grad_(False)
    with frozen(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False, True, True]


# Attacks that know of caps

CAPPED = {
    "drelu": (DReLU(4, cap=1.0), 0.0, 1.0),
    "srelu": (SReLU(2.0), 0.0, 2.0),
    "relu6": (nn.ReLU6(), 0.0, 6.0),
    "relu6, inplace": (nn.ReLU6(inplace=True), 0.0, 6.0),
    "hardtanh": (nn.Hardtanh(), -1.0, 1.0),
    "hardtanh, inplace": (nn.Hardtanh(-2.0, 3.0, inplace=True), -2.0, 3.0),
}


@pytest.mark.parametrize(("layer", "floor", "cap"), CAPPED.values(), ids=CAPPED)
@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3, 3)])
def test_straight_through_keeps_the_value_and_passes_the_gradient(layer, floor, cap, shape):
    model = nn.Sequential(nn.Identity(), nn.Sequential(layer))
    x = (10 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    with adaptive.substituted(model, adaptive.straight_through):
        value = model(x * 1)
    torch.testing.assert_close(value, x.clamp(floor, cap))
    (gradient,) = torch.autograd.grad(value.sum(), x)
    passes = torch.ones_like(x) if floor < 0 else (x > 0).float()
    assert torch.equal(gradient, passes)


@pytest.mark.parametrize(("layer", "floor", "cap"), CAPPED.values(), ids=CAPPED)
def test_twin_and_annealed_layers(layer, floor, cap):
    model = nn.Sequential(layer)
    x = torch.linspace(-20, 20, 44).view(11, 4)
    with adaptive.substituted(model, adaptive.uncapped):
        torch.testing.assert_close(model(x.clone()), x if floor < 0 else x.relu())
    for sharpness in (0.0, 0.5, 1.0):
        with adaptive.substituted(model, partial(adaptive.annealed, sharpness=sharpness)):
            value = model(x.clone())
        assert (value >= floor).all()
        assert (value <= cap).all()
    middle = torch.full((1, 4), (floor + cap) / 2, requires_grad=True)
    (slope,) = torch.autograd.grad(adaptive.annealed(layer, middle, sharpness=1.0).sum(), middle)
    torch.testing.assert_close(slope, torch.ones_like(slope))  # that of the clamp


def test_layers_are_put_back_whatever_happens():
    layer = DReLU(3, cap=1.0)
    model = nn.Sequential(nn.Sequential(layer), layer, nn.ReLU())
    assert adaptive.capped_layers(model) == [layer]
    x = torch.full((2, 3), 5.0)
    with adaptive.substituted(model, adaptive.uncapped):
        assert torch.equal(model(x), x)
    assert torch.equal(model(x), torch.ones(2, 3))
    with pytest.raises(TypeError), adaptive.substituted(model, adaptive.uncapped):
        model(torch.ones(2), "no such argument")
    assert torch.equal(model(x), torch.ones(2, 3))
    assert "forward" not in vars(layer)


def test_a_layer_of_ones_own_is_made_known_in_one_line():
    class Clipped(nn.Module):
        def forward(self, x):
            return x.clamp(0, 4)

    model = nn.Sequential(Clipped())
    assert not adaptive.capped_layers(model)
    with pytest.raises(TypeError, match="Clipped is not known to have a cap"):
        adaptive.bounds(model[0], torch.ones(1))
    adaptive.bounds.register(Clipped, lambda layer, x: (0.0, 4.0))
    with adaptive.substituted(model, adaptive.uncapped):
        assert torch.equal(model(torch.full((1, 2), 9.0)), torch.full((1, 2), 9.0))


@pytest.mark.parametrize("name", ["bpda", "twin", "annealing"])
def test_adaptive_attacks_see_past_a_saturated_unit(name):
    """A unit far above its cap hides the class from gradients; moving 0.1 would bring it back under the cap."""
    first, second = nn.Linear(16, 1, bias=False), nn.Linear(1, 2)
    model = nn.Sequential(nn.Flatten(), first, DReLU(1, cap=1.0), second)
    with torch.no_grad():
        first.weight.fill_(1.0)
        second.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        second.bias.copy_(torch.tensor([-0.5, 0.5]))
    images = torch.full((8, 1, 4, 4), 0.1)  # pre-activation 1.6, cap 1, boundary at 0.5
    labels = torch.zeros(8, dtype=torch.long)
    threat_model = ThreatModel.parse("Linf", "0.09")
    with frozen(model):
        blind = random_start_pgd(
            model, images, labels, threat_model, range(8), loss="ce", steps=10, relative_step_size=0.1
        )
        seen = ATTACKS[name](model, images, labels, threat_model, list(range(8)))
        assert (model(blind).argmax(dim=1) == labels).all()
        assert (model(seen).argmax(dim=1) != labels).all()


# Against other implementations


def small_cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_same_as_torchattacks(norm):
    torchattacks = pytest.importorskip("torchattacks", reason="it overwrites robustbench, see pyproject.toml")
    model = small_cnn()
    images = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = model(images).argmax(dim=1)
    threat_model = ThreatModel.parse(norm, "0.1")
    theirs_pgd = torchattacks.PGD if norm == "Linf" else torchattacks.PGDL2
    theirs = theirs_pgd(model, eps=0.1, alpha=0.02, steps=7, random_start=False)(images, labels)
    ours = pgd(model, images, LOSSES["ce"](labels), threat_model, start=images, steps=7, step_size=0.02)
    torch.testing.assert_close(ours, theirs)
    if norm == "Linf":
        theirs = torchattacks.FGSM(model, eps=0.1)(images, labels)
        torch.testing.assert_close(fgsm(model, images, labels, threat_model, range(16)), theirs)
