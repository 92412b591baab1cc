"""Threat models, and every attack on models with a known result."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from drelu_timm.attacks.adaptive import Transfer
from drelu_timm.attacks.attack import LOSSES, Batch
from drelu_timm.attacks.pgd import FGSM, pgd
from drelu_timm.attacks.suites import ATTACKS, SUITES, find_suite
from drelu_timm.attacks.threat_model import ThreatModel, norm_and_radius, radius_of
from drelu_timm.errors import InputError
from drelu_timm.models.inference import frozen

THREAT_MODELS = [ThreatModel.parse("Linf", "0.0125"), ThreatModel.parse("L2", "0.08")]


class Linear(nn.Module):
    """Two classes divided by a plane, so that the distance of every image from the other class is known."""

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
    """Return the model, images around mid-gray (so that [0, 1] has no effect), and its predictions."""
    model = Linear().eval()
    images = 0.5 + 0.1 * torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-3, 3)
    return model, images, model(images).argmax(dim=1)


@pytest.mark.parametrize(("written", "value"), [("8/255", 8 / 255), ("0.1", 0.1), (0.3, 0.3), ("0", 0.0)])
def test_eps_is_parsed_and_kept_as_written(written, value):
    threat_model = ThreatModel.parse("Linf", written)
    assert threat_model.eps == pytest.approx(value)
    assert threat_model.written == str(written)


@pytest.mark.parametrize("eps", ["hello", "-0.1", "8/0", "nan", "inf", "", "8/255/2"])
def test_eps_that_is_not_a_radius(eps):
    with pytest.raises(InputError, match=r"--eps .* is not a radius. Use a number >= 0 such as 8/255 or 0.1"):
        ThreatModel.parse("Linf", eps)


def test_a_radius_above_the_pixel_range_is_valid_only_for_l2():
    with pytest.raises(InputError, match=r"--eps 8 is larger than the pixel range \[0, 1\]\. Use 8/255 for 8"):
        ThreatModel.parse("Linf", "8")
    assert ThreatModel.parse("L2", "8").eps == radius_of("8") == 8


def test_an_empty_radius_is_not_the_default():
    norm, eps = norm_and_radius(None, "", ThreatModel.parse("Linf", "8/255"))
    with pytest.raises(InputError, match="--eps '' is not a radius"):
        ThreatModel.parse(norm, eps)
    assert norm_and_radius(None, None, ThreatModel.parse("Linf", "8/255")) == ("Linf", "8/255")


def test_unknown_norm_suggests_the_nearest():
    with pytest.raises(InputError, match="--norm 'linf' is unknown; did you mean Linf"):
        ThreatModel.parse("linf", "0.1")


@pytest.mark.parametrize("threat_model", THREAT_MODELS, ids=str)
def test_projection_is_inside_eps_and_keeps_points_inside(threat_model):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(50, 3, 6, 6, generator=generator)
    far = images + torch.randn(images.shape, generator=generator)
    assert not threat_model.contains(far, images).any()
    near = threat_model.project(far, images)
    assert threat_model.contains(near, images).all()
    torch.testing.assert_close(threat_model.project(near, images), near)
    assert not threat_model.contains(near + 1.0, images).any()


def test_distance_is_the_norm():
    moved = torch.full((1, 1, 2, 2), 0.5)
    assert ThreatModel.parse("Linf", 1).distance(moved, torch.zeros_like(moved)) == 0.5
    assert ThreatModel.parse("L2", 1).distance(moved, torch.zeros_like(moved)) == 1.0


def searched(name, linear, threat_model, seeds=None, **settings):
    model, images, labels = linear
    attack = ATTACKS[name].for_classes(2)
    attack = Transfer(model) if name == "transfer" else replace(attack, **settings)
    with frozen(model):
        return attack.run(model, Batch(images, labels, seeds or range(len(images))), threat_model).images


@pytest.mark.parametrize("threat_model", THREAT_MODELS, ids=str)
@pytest.mark.parametrize("name", ATTACKS)
def test_attack_stays_within_eps_and_is_deterministic(name, threat_model, linear):
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
def test_attack_with_gradients_fools_the_model_exactly_where_possible(name, threat_model, linear):
    model, images, labels = linear
    distance = model.distance(images, threat_model.norm)
    assert 4 < (distance < threat_model.eps).sum() < 20, "the test has nothing to tell apart"
    adversarial = searched(name, linear, threat_model)
    broken = (model(adversarial).argmax(dim=1) != labels) & threat_model.contains(adversarial, images)
    if name == "cw-l2" and threat_model.norm == "Linf":  # the nearest in L2 may be far in Linf
        assert not broken[distance > threat_model.eps].any()
    else:
        sure = (distance - threat_model.eps).abs() > 0.03 * threat_model.eps
        assert torch.equal(broken[sure], (distance < threat_model.eps)[sure])


def test_black_box_attacks_fool_the_model_only_where_possible(linear):
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


def test_carlini_wagner_returns_the_image_if_it_finds_nothing():
    class Constant(nn.Module):
        def forward(self, images):
            return torch.tensor([1.0, 0.0]) + 0 * images.flatten(1)[:, :2]

    images = torch.rand(3, 1, 4, 4)
    labels = torch.zeros(3, dtype=torch.long)
    attack = ATTACKS["cw-l2"]
    found = attack.run(Constant().eval(), Batch(images, labels, [0, 1, 2]), THREAT_MODELS[1])
    assert torch.equal(found.images, images)


@pytest.mark.parametrize("name", ["fgsm", "pgd", "noise", "bpda", "twin", "annealing"])
def test_attacks_do_not_depend_on_the_batch(name, linear):
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
    apgd_t, fab_t = suite["autoattack"]["apgd-t"], suite["autoattack"]["fab-t"]
    assert suite["apgd-dlr"]["apgd-dlr"].settings["loss"] == dlr
    assert apgd_t.settings["loss"] == targeted
    assert apgd_t.settings["n_target_classes"] == fab_t.settings["n_target_classes"] == targets
    assert ATTACKS["apgd-t"].settings["n_target_classes"] == 9, "the table itself was changed"


@pytest.mark.parametrize("name", sorted(set(SUITES) - {"autoattack"}))
def test_every_suite_has_adaptive_attacks_for_models_with_known_layers(name):
    adaptive = {"bpda", "bpda-soft", "twin"}
    assert adaptive <= set(find_suite(name, 10))
    assert not adaptive & set(find_suite(name, 10, adaptive=False))
    assert find_suite(name, 10, adaptive=False)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_increase_for_worse_logits(loss):
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


def test_frozen_restores_modes_and_flags():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval(), nn.Dropout())
    model[0].bias.requires_grad_(False)
    with frozen(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False, True, True]


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
        found = FGSM().run(model, Batch(images, labels, range(16)), threat_model).images
        torch.testing.assert_close(found, theirs)
