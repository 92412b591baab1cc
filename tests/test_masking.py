"""The verdict on gradient masking: right for models that hide their gradients, by any trick, and for honest models."""

import json
from dataclasses import replace

import pytest
import torch
from masking_battery import NETS, Digits, judged, train_and_judge
from torch import nn

from drelu_timm.attacks.adaptive import Restarts
from drelu_timm.attacks.attack import Batch
from drelu_timm.attacks.pgd import PGD
from drelu_timm.attacks.suites import ATTACKS, SUITES
from drelu_timm.attacks.threat_model import ThreatModel
from drelu_timm.evaluation import masking
from drelu_timm.evaluation.driver import Attacked
from drelu_timm.evaluation.evaluation import evaluate_model
from drelu_timm.evaluation.masking import (
    AveragedPGD,
    PGDFromImage,
    farthest,
    probes,
    probing_order,
    signals,
)
from drelu_timm.evaluation.verdicts import verdict
from drelu_timm.models.drelu import DReLU

THREAT_MODEL = ThreatModel.parse("Linf", 0.1)
BY_NAME = {net.name: net for net in NETS}


@pytest.fixture(scope="session")
def digits():
    return Digits.load()


@pytest.mark.parametrize("name", BY_NAME)
def test_battery(digits, name):
    found = train_and_judge(BY_NAME[name], digits).verdict
    hidden = found.numbers["withstand_pgd"] - found.numbers["withstand_all"]
    assert found.verdict in BY_NAME[name].expected, found.evidence
    if found.verdict == "masked":
        assert hidden > 0.2, "the trick does not work, so the test shows nothing"
    else:
        assert hidden < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
@pytest.mark.parametrize("name", BY_NAME)
def test_no_seed_reverses_a_verdict(digits, name, seed):
    """A model near a threshold may be undecided for some seed, but gets never the opposite verdict."""
    found = train_and_judge(BY_NAME[name], digits, seed=seed).verdict
    assert found.verdict in (*BY_NAME[name].expected, "undecided"), found.evidence


def test_a_few_examples_decide_nothing(digits):
    assert str(train_and_judge(BY_NAME["ReLU"], digits).verdict) == "sound"
    few = replace(digits, images=digits.images[:20], labels=digits.labels[:20])
    assert str(train_and_judge(BY_NAME["ReLU"], few).verdict) == "undecided"


def test_a_constant_answer_is_robust_though_it_has_no_gradient():
    class Constant(nn.Module):
        def forward(self, images):
            return torch.tensor([0.0, 2.0]).expand(len(images), 2)

    found = judged(Constant(), torch.rand(120, 1, 2, 2), torch.ones(120, dtype=torch.long)).verdict
    assert (found.numbers["zero_gradient_margin"], found.numbers["stuck"], found.numbers["chance"]) == (1, 1, 1)
    assert found.verdict == "sound"


class Frugal(nn.Module):
    """Counts its images, and how many require a gradient; its answer is constant."""

    def __init__(self):
        super().__init__()
        self.cap = DReLU(2)  # for the adaptive attack
        self.images, self.gradients = 0, 0

    def forward(self, images):
        self.images += len(images)
        self.gradients += len(images) * (images.requires_grad and torch.is_grad_enabled())
        mean = images.flatten(1).mean(dim=1)
        return self.cap(torch.stack([2 + 0 * mean, mean], dim=1))


def test_the_probes_cost_what_their_documentation_states(monkeypatch):
    monkeypatch.setitem(SUITES, "none", {"noise": {"noise": ATTACKS["noise"]}})
    model = Frugal()
    evaluate_model(model, torch.rand(1, 1, 2, 2), torch.zeros(1, dtype=torch.long), eps=0.1, suite="none")
    # Two signals, the comparison with differences, a check whether there is a gradient, and the layer that has none.
    assert model.gradients <= 255 + 2 + 1 + 1 + 1
    # Square, the estimated gradients, the differences, and judging the images found.
    assert model.images - model.gradients <= 500 + 1225 + 48 + 130


# The verdict of given flags


def flags(count, total):
    return torch.arange(total) < count


def decided(
    *,
    total=200,
    pgd=0,
    rescaled=0,
    restarts=0,
    margin=0,
    other=0,
    far=None,
    unsteady=0,
    misleading=0,
    not_finite=0,
    labels=None,
    by="square",
    suite=0,
    looked=True,
):
    """The verdict if each attack fools the model on so many examples, ``other`` on some that white-box PGD left.

    ``looked``: whether the probe for suspicious models ran.
    """
    labels = torch.arange(total) % 10 if labels is None else labels
    names = {"pgd": pgd, "rescaled": rescaled, "margin": margin, "far": total if far is None else far}
    broken = {name: flags(count, total) for name, count in names.items()}
    broken |= {name: flags(0, total) for name in ("noise", "averaged", "square", *(["estimated"] if looked else []))}
    white_box = broken["pgd"] | broken["rescaled"] | broken["margin"]
    broken["restarts"] = flags(int(white_box.sum()) + restarts, total) & ~white_box
    white_box = white_box | broken["restarts"]
    broken[by] = flags(int(white_box.sum()) + other, total) & ~white_box
    own = {"zero_gradient_ce": 0, "zero_gradient_margin": 0, "unsteady": unsteady, "changed": 0}
    own = {name: flags(count, total) for name, count in own.items()}
    gradients = {"misleading": flags(misleading, 60), "not_finite": flags(not_finite, 60)}
    return verdict(labels, own, gradients, broken, flags(white_box.sum() + suite, total) & ~white_box)


@pytest.mark.parametrize(
    ("other", "total", "expected"),
    [
        (0, 99, "undecided"),  # fewer than 100
        (0, 100, "sound"),
        (0, 200, "sound"),
        (6, 200, "sound"),  # 3 %: a difference of attacks on honest models
        (20, 200, "masked"),
        (12, 200, "undecided"),
        (0, 20, "undecided"),  # too few examples
        (2, 20, "undecided"),
        (15, 20, "masked"),
    ],
)
@pytest.mark.parametrize("by", ["noise", "restarts", "averaged", "square", "annealing"])
def test_examples_that_white_box_attacks_miss_decide(other, total, expected, by):
    assert decided(other=other, total=total, by=by).verdict == expected


def test_examples_that_only_the_suite_finds_count_too():
    assert decided(pgd=50, suite=30).verdict == "masked"
    assert decided(pgd=50, suite=30, other=30).numbers["hidden"] == 0.15, "the same examples"


def test_examples_that_white_box_attacks_find_are_not_hidden():
    # Cross-entropy and the margin differ by some points on models trained by TRADES.
    assert decided(pgd=80, margin=100).verdict == "sound"
    assert decided(pgd=200, margin=0).numbers["withstand_all"] == 0


def test_a_saturated_softmax_is_masked_though_the_margin_fools_it():
    found = decided(pgd=0, rescaled=150)
    assert found.verdict == "masked"
    assert any("rescaled logits" in sentence and "75.0 %" in sentence for sentence in found.evidence)
    assert decided(pgd=100, rescaled=8).verdict == "sound"  # long-trained ReLU models


def shares(count):
    """Labels of 200 examples, so many of the first of 20 classes, the rest of the others."""
    return torch.cat([torch.zeros(count, dtype=torch.long), torch.arange(200 - count) % 19 + 1])


@pytest.mark.parametrize(
    ("left", "chance", "expected"),
    [
        (20, 0.1, "sound"),  # chance
        (60, 0.1, "sound"),  # adversarially trained with caps
        (80, 0.1, "undecided"),  # at the limit, chance + (1 - chance) / 3 = 0.4
        (140, 0.1, "masked"),
        (110, 0.5, "sound"),  # half of them may be correct
        (170, 0.5, "masked"),
        (200, 0.5, "masked"),
        (200, 0.69, "masked"),  # chance + 1/3 would be above 1
        (200, 0.75, "sound"),  # cannot be told
        (200, 1.0, "sound"),  # all may be correct
    ],
)
def test_at_an_eps_that_reaches_the_gray_image_only_chance_stays_correct(left, chance, expected):
    assert decided(far=200 - left, labels=shares(round(200 * chance))).verdict == expected


def test_several_gaps_below_their_limits_count_together():
    assert decided(pgd=50, rescaled=8).verdict == "sound"
    several = decided(pgd=50, rescaled=10, restarts=10, other=10)
    assert all(several.numbers[f"{gap}_low"] < 0.05 for gap in ("broken_by_rescaled", "broken_by_restarts", "hidden"))
    assert (several.verdict, several.numbers["any_gap"]) == ("masked", 0.15)


@pytest.mark.parametrize("reason", [{"misleading": 10}, {"not_finite": 10}, {"other": 5}, {"margin": 30}])
def test_a_suspicious_model_is_sound_only_after_the_stronger_probe(reason):
    assert decided(**reason, looked=False).verdict == "undecided"
    assert decided(**reason).verdict == "sound", "a wrong gradient alone is not masking"


def test_probed_examples_have_the_classes_shares_whatever_the_order_of_the_images():
    labels = torch.cat([torch.zeros(600), torch.ones(300), torch.full((100,), 2.0)]).long()
    correct = torch.arange(1000) % 10 != 0
    order = probing_order(labels, correct, seed=0)
    assert sorted(order.tolist()) == correct.nonzero().squeeze(1).tolist()
    assert labels[order[:100]].bincount().tolist() == pytest.approx([60, 30, 10], abs=1)
    assert not torch.equal(order, probing_order(labels, correct, seed=1))


def test_a_model_that_changes_its_answers_is_never_sound():
    assert decided(unsteady=1).verdict == "undecided"
    assert decided(unsteady=200, other=50).verdict == "masked"
    assert any("not deterministic" in sentence for sentence in decided(unsteady=1).evidence)


def test_every_signal_is_a_sentence_and_a_number():
    found = decided(pgd=100, other=30, by="annealing")
    assert found.evidence[0].startswith(
        "Of 200 correctly classified examples, 50.0 % stay correct under PGD, 50.0 % under every white-box"
    )
    assert "15.0 % (95 % interval 10.7 to 20.6 %)" in found.evidence[1]
    for word in (
        "gray",
        "same logits",
        "gradient is zero",
        "rescaled",
        "sign noise",
        "restarts",
        "Square, which",
        "Cap annealing",
    ):
        assert sum(word in sentence for sentence in found.evidence) == 1, word
    assert json.loads(json.dumps(found.numbers))["broken_by_annealing"] == 0.15


def test_without_correct_examples_nothing_is_decided():
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.rand(3, 1, 2, 2)
    found = judged(model, images, 1 - model(images).argmax(dim=1)).verdict
    assert (found.verdict, found.evidence) == (
        "undecided",
        ("No example is classified correctly, so there is nothing to attack.",),
    )


@pytest.mark.parametrize(("count", "low", "high"), [(0, 0, 0.0370), (10, 0.0552, 0.1744), (100, 0.9630, 1)])
def test_shares_have_wilson_intervals(count, low, high):
    numbers = decided(total=100, other=count).numbers
    # Of R's prop.test(count, 100, correct=FALSE).
    assert (numbers["hidden_low"], numbers["hidden_high"]) == pytest.approx((low, high), abs=1e-4)


# Signals of a model


class Switch(nn.Module):
    """Two logits with a gradient only where the mean of the image is below 0.5; ``scale`` saturates the softmax."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale

    def forward(self, images):
        mean = images.flatten(1).mean(1)
        score = self.scale * (1 + torch.where(mean < 0.5, mean, mean.detach()))
        return torch.stack([score, -score], dim=1)


def test_the_margin_distinguishes_a_saturated_softmax_from_a_flat_model():
    images = torch.tensor([0.1, 0.2, 0.3, 0.9]).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    labels = torch.zeros(4, dtype=torch.long)
    flat = [False, False, False, True]
    plain, loud = (signals(Attacked(Switch(scale), torch.float32), images, labels) for scale in (1.0, 1e4))
    assert plain["zero_gradient_ce"].tolist() == plain["zero_gradient_margin"].tolist() == flat
    assert loud["zero_gradient_ce"].tolist() == [True] * 4
    assert loud["zero_gradient_margin"].tolist() == flat
    assert not plain["unsteady"].any()


def test_gradients_that_are_not_finite_count_as_zero():
    class Root(nn.Module):
        def forward(self, images):
            score = images.flatten(1).sum(1).sqrt()  # infinite slope at 0
            return torch.stack([1 + score, -score], dim=1)

    images = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    found = signals(Attacked(Root(), torch.float32), images, torch.zeros(2, dtype=torch.long))
    assert found["zero_gradient_margin"].tolist() == [True, False]


@pytest.mark.parametrize("seeded", [False, True])
def test_noise_in_the_forward_pass_is_seen_even_where_it_is_seeded(seeded):
    class Noisy(nn.Module):
        def forward(self, images):
            generator = torch.Generator().manual_seed(0) if seeded else None
            return images.flatten(1) + 0.1 * torch.randn(len(images), 4, generator=generator)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = signals(Noisy(), torch.rand(8, 1, 2, 2), torch.zeros(8, dtype=torch.long))
    assert found["unsteady"].all()


# Attacks of the probes


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_farthest_threat_model_reaches_the_gray_image(norm):
    threat_model = farthest(ThreatModel.parse(norm, 0.1), 12)
    corners = torch.rand(50, 3, 2, 2).round()
    assert threat_model.contains(torch.full_like(corners, 0.5), corners).all()
    assert not ThreatModel.parse(norm, 0.99 * threat_model.eps).contains(torch.full_like(corners, 0.5), corners).any()


def toy():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3)).requires_grad_(False)
    images = torch.rand(12, 1, 4, 4)
    return model, images, model(images).argmax(dim=1)


@pytest.mark.parametrize(
    "attack",
    [
        Restarts(restarts=3, steps=2, relative_step_size=0.5),
        AveragedPGD("ce", samples=2, steps=3, relative_step_size=0.5),
        PGDFromImage(steps=2, relative_step_size=0.5),
    ],
    ids=["restarts", "averaged", "from_image"],
)
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_an_example_does_not_depend_on_its_batch(attack, norm):
    model, images, labels = toy()
    threat_model = ThreatModel.parse(norm, 0.2 if norm == "Linf" else 0.8)
    together = attack.run(model, Batch(images, labels, range(12)), threat_model).images
    alone = attack.run(model, Batch(images[6:], labels[6:], range(6, 12)), threat_model).images
    assert (together[6:] != images[6:]).any(), "no adversarial image, so the test shows nothing"
    torch.testing.assert_close(together[6:], alone)
    assert threat_model.contains(together, images).all()


def test_restarts_keep_the_first_success():
    model, images, labels = toy()
    threat_model = ThreatModel.parse("Linf", 0.15)
    seeds = list(range(0, 1200, 100))
    settings = {"steps": 1, "relative_step_size": 0.5}
    own = [[seed + restart for seed in seeds] for restart in range(4)]
    each = [PGD(**settings).run(model, Batch(images, labels, s), threat_model).images for s in own]
    fooled = torch.stack([model(candidate).argmax(dim=1) != labels for candidate in each])
    found = Restarts(restarts=4, **settings).run(model, Batch(images, labels, seeds), threat_model).images
    assert (model(found).argmax(dim=1) != labels).tolist() == fooled.any(dim=0).tolist()


def test_averaged_gradients_cross_a_flat_region():
    class Flat(nn.Module):
        """A slope with a flat region around the clean images."""

        def forward(self, images):
            mean = images.flatten(1).mean(dim=1)
            score = 0.02 - (mean - 0.5).sign() * ((mean - 0.5).abs() - 0.05).clamp(min=0)
            return torch.stack([score, -score], dim=1)

    images, labels = torch.full((8, 1, 1, 1), 0.5), torch.zeros(8, dtype=torch.long)
    threat_model, batch = ThreatModel.parse("Linf", 0.1), Batch(images, labels, range(8))
    plain = PGDFromImage(steps=10, relative_step_size=0.25).run(Flat(), batch, threat_model).images
    assert torch.equal(plain, images)
    found = AveragedPGD("ce", samples=4, steps=10, relative_step_size=0.25).run(Flat(), batch, threat_model).images
    assert (Flat()(found).argmax(dim=1) != labels).all()


def test_the_adaptive_probe_is_only_for_models_with_layers_to_substitute():
    names = [probe.name for probe in probes(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), THREAT_MODEL, 4)]
    assert names == ["pgd", "rescaled", "margin", "restarts", "far", "noise", "averaged", "square", "estimated"]
    assert [probe.name for probe in probes(nn.Sequential(DReLU(4)), THREAT_MODEL, 4)] == [
        *names[:-1],
        "annealing",
        "estimated",
    ]


def test_an_upper_bound_states_what_the_probed_examples_suggest():
    flags = {name: torch.zeros(100, dtype=torch.bool) for name in masking.SIGNALS}
    broken = {name: torch.zeros(100, dtype=torch.bool) for name in ("pgd", *masking.WHITE_BOX, masking.FAR, "square")}
    broken["square"][:80] = True
    correct = torch.arange(500) < 400
    labels = torch.arange(100) % 10
    gradients = {name: torch.zeros(10, dtype=torch.bool) for name in ("misleading", "not_finite")}
    found = verdict(labels, flags, gradients, broken, torch.zeros(100, dtype=torch.bool), (), correct)
    assert str(found) == "masked"
    expected = "Only 100 of 400 correctly classified examples were probed. If the others are like them, the robust"
    assert any(sentence.startswith(expected) and sentence.endswith("about 16.0 %.") for sentence in found.evidence)
