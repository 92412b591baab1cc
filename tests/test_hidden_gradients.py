"""Models whose gradient misleads: it is measured, the layer is named, and estimated gradients find what it hides."""

from dataclasses import replace

import pytest
import torch
from masking_battery import Noise, Times
from torch import nn
from verdict_test import defenses, tricks
from verdict_test.roster import Entry, behind, dense, fitted, mixture
from verdict_test.training import adversarial, natural, task

from drelu_timm.attacks.attack import Batch
from drelu_timm.attacks.estimated import EstimatedPGD
from drelu_timm.attacks.pgd import PGD
from drelu_timm.attacks.threat_model import ThreatModel
from drelu_timm.evaluation import pipeline
from drelu_timm.evaluation.checkpoint import Checkpoint
from drelu_timm.evaluation.driver import DRAWS, Driver
from drelu_timm.evaluation.evaluation import evaluate_model
from drelu_timm.evaluation.fidelity import gradient_flags
from drelu_timm.evaluation.layers import hiding_layers
from drelu_timm.evaluation.user_model import Defaults, opened
from drelu_timm.models.drelu import DReLU


def smooth(channels=1, size=6):
    """A small model with a faithful gradient, and images that it classifies correctly."""
    torch.manual_seed(0)
    pixels = channels * size * size
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 32), nn.GELU(), nn.Linear(32, 4)).requires_grad_(False)
    images = torch.rand(24, channels, size, size)
    return model, images, model(images).argmax(dim=1)


# Gradient fidelity


def test_the_gradient_of_a_smooth_model_is_its_derivative():
    model, images, labels = smooth()
    found = gradient_flags(model, images, labels, range(24))
    assert not found["misleading"].any()
    assert not found["not_finite"].any()


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_rounding_is_no_error_of_the_gradient(factor):
    model, images, labels = smooth()
    loud = nn.Sequential(model, Times(factor))
    assert not gradient_flags(loud, images, labels, range(24))["misleading"].any()
    offset = nn.Sequential(model, Shifted(1e6))  # of which float32 keeps no digit of a small difference
    assert not gradient_flags(offset, images, labels, range(24))["misleading"].any()


class Shifted(nn.Module):
    def __init__(self, offset):
        super().__init__()
        self.offset = offset

    def forward(self, x):
        return x + self.offset


@pytest.mark.parametrize(
    "tamper",
    [tricks.constant, tricks.random, tricks.flipped, tricks.permuted, tricks.few_pixels, torch.zeros_like],
)
def test_a_wrong_backward_pass_is_misleading(tamper):
    model, images, labels = smooth()
    found = gradient_flags(nn.Sequential(tricks.Tampered(tamper), model).eval(), images, labels, range(24))
    assert found["misleading"].double().mean() > 0.8


def test_shattered_gradients_are_misleading():
    model, images, labels = smooth()
    found = gradient_flags(nn.Sequential(tricks.Sinus(), model).eval(), images, labels, range(24))
    assert found["misleading"].double().mean() > 0.8


def test_gradients_that_are_not_finite_are_counted_before_they_are_replaced():
    model, images, labels = smooth()
    found = gradient_flags(nn.Sequential(tricks.Tampered(tricks.half_nan), model).eval(), images, labels, range(24))
    assert found["not_finite"].all()


def test_a_flat_model_is_not_misleading():
    class Flat(nn.Module):
        def forward(self, x):
            return torch.tensor([1.0, 0.0]).expand(len(x), 2)

    found = gradient_flags(Flat(), torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.long), range(4))
    assert not found["misleading"].any()


# Layers that hide the gradient


def named(model, images):
    with opened(model, images, batch_size=64, seed=0, called="the model", caller=Defaults.current()) as user_model:
        return [(hiding.name, hiding.effect, hiding.share) for hiding in hiding_layers(user_model, images[:16])]


@pytest.mark.parametrize(
    ("layer", "effect"),
    [
        (tricks.Steps(1 / 8), "passes no gradient"),
        (tricks.Tampered(tricks.half_nan), "passes a gradient that is NaN or infinite"),
        (tricks.Tampered(tricks.flipped), "passes a gradient that is not its derivative"),
        (Noise(0.1), "returns other values when it is called again"),
    ],
)
def test_the_layer_that_hides_the_gradient_is_named(layer, effect):
    model, images, _ = smooth()
    whole = nn.Sequential(model[:2], nn.Sequential(nn.GELU(), layer), nn.Linear(32, 4)).eval()
    assert named(whole, images) == [("1.1", effect, 1.0)]


def test_no_layer_of_an_honest_model_is_named():
    model, images, _ = smooth(channels=3, size=8)
    assert named(model, images) == []
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    assert named(nn.Sequential(convolutions, nn.Linear(72, 4)).eval(), images) == []


def test_code_outside_of_layers_is_that_of_the_model():
    model, images, _ = smooth()
    ((name, effect, _),) = named(defenses.RoundedOutput(nn.Sequential(model, Times(0.1))).eval(), images)
    assert (name, effect) == ("", "passes no gradient")


def test_examining_the_layers_leaves_the_model_as_it_was():
    model, images, _ = smooth()
    before = model(images)
    named(model, images)
    assert torch.equal(model(images), before)
    assert not any(layer._forward_hooks for layer in model.modules())


# Estimated gradients


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.5)])
@pytest.mark.parametrize("size", [6, 20])  # above 16 pixels, directions are constant in parts of the image
def test_estimated_gradients_find_what_rounding_hides(norm, eps, size):
    model, images, labels = smooth(size=size)
    hidden = nn.Sequential(tricks.Steps(1 / 16), model).eval()
    labels = hidden(images).argmax(dim=1)
    threat_model = ThreatModel.parse(norm, eps)
    found = EstimatedPGD().run(hidden, Batch(images, labels, range(24)), threat_model)
    assert threat_model.contains(found.images, images).all()
    fooled = hidden(found.images).argmax(dim=1) != labels
    known = PGD("margin").run(model, Batch(images, labels, range(24)), threat_model).images
    assert fooled.sum() >= 0.7 * (hidden(known).argmax(dim=1) != labels).sum() > 0
    assert torch.equal(found.succeeded, fooled)
    assert (found.steps[~fooled] == 1225).all()


def test_estimated_gradients_do_not_depend_on_the_batch():
    model, images, labels = smooth()
    threat_model = ThreatModel.parse("Linf", 0.02)
    together = EstimatedPGD(n_queries=300).run(model, Batch(images, labels, range(24)), threat_model)
    alone = EstimatedPGD(n_queries=300).run(model, Batch(images[8:], labels[8:], range(8, 24)), threat_model)
    assert (together.images != images).any()
    torch.testing.assert_close(together.images[8:], alone.images)


# Models whose output is not a function of the image


class Coin(nn.Module):
    """Wrong in a third of its calls."""

    def forward(self, images):
        score = torch.where(torch.rand(len(images)) < 2 / 3, 1.0, -1.0) + 0 * images.flatten(1).sum(dim=1)
        return torch.stack([score, -score], dim=1)


def test_the_majority_of_the_draws_counts():
    images, labels = torch.rand(200, 1, 2, 2), torch.zeros(200, dtype=torch.long)
    found = evaluate_model(Coin(), images, labels, eps=0.1)
    # With chance 2/3 per draw, 11 draws have a majority of errors for 12 % of the images; a single call for a third.
    assert 0.8 < found.clean < 0.95
    assert found.verdict.verdict != "sound"


def test_draws_see_the_images_in_other_batches():
    class OfBatch(nn.Module):
        def forward(self, images):
            score = images.flatten(1).mean(dim=1) - images.mean()
            return torch.stack([score, -score], dim=1)

    images = torch.linspace(0, 1, 8).view(8, 1, 1, 1)
    labels = torch.tensor([1] * 4 + [0] * 4)
    driver = Driver(OfBatch(), images, labels, [ThreatModel.parse("Linf", 0.1)], 0, 8, Checkpoint(8), draws=DRAWS)
    together = replace(driver, draws=1).margin(images, labels)
    assert not torch.equal(driver.margin(images, labels), together)


# How many examples are probed


@pytest.mark.parametrize(("decided_at", "probed"), [(10, 20), (40, 40), (1000, 80)])
def test_more_examples_are_probed_until_they_decide(monkeypatch, decided_at, probed):
    monkeypatch.setattr(pipeline, "PROBED", 20)
    monkeypatch.setattr(pipeline, "MOST_PROBED", 80)
    monkeypatch.setattr(pipeline, "needs_more_examples", lambda found: found.numbers["examples"] < decided_at)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).requires_grad_(False)
    images = torch.rand(100, 1, 2, 2)
    found = evaluate_model(model, images, model(images).argmax(dim=1), eps=0.1).verdict
    assert found.numbers["examples"] == probed


# The verdict on kinds that it was wrong for


def wrapped(wrap):
    return wrap(fitted(dense)).eval()


KINDS = {
    "half of the gradient is NaN": Entry("", "", lambda: behind(lambda: tricks.Tampered(tricks.half_nan))),
    "permuted backward, AT": Entry("", "", lambda: behind(lambda: tricks.Tampered(tricks.permuted), adversarial)),
    "anti-adversary": Entry("", "", lambda: wrapped(lambda model: defenses.AntiAdversary(model, 2, 0.15))),
    "blind": Entry("", "", lambda: behind(lambda: tricks.Blind(8))),
    "20 % against 80 %": Entry(
        "", "", lambda: fitted(lambda: dense(tricks.Steps(1 / 4), outputs=2), on="unequal"), "unequal"
    ),
    "four small tricks": Entry("", "", lambda: mixture(0, natural)),
    "jump activation": Entry("", "", lambda: fitted(lambda: dense(hidden=tricks.Jump))),
    "D-ReLU": Entry("", "", lambda: fitted(lambda: dense(last=lambda: DReLU(64, cap=10.0)), epochs=60)),
}


@pytest.fixture(scope="module")
def trained():
    models: dict[str, nn.Module] = {}

    def get(name):
        if name not in models:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                models[name] = KINDS[name].make()
        return models[name]

    return get


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", KINDS)
def test_kinds_that_were_believed_are_masked(trained, name, seed):
    data = task(KINDS[name].task)
    found = evaluate_model(trained(name), data.images, data.labels, eps=0.1, seed=seed)
    assert found.verdict.verdict == "masked", found.verdict.evidence


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("layer", [tricks.Dropout(0.5), tricks.BatchStandardized()], ids=["dropout", "batch norm"])
def test_outputs_that_are_not_a_function_of_the_image_are_never_sound(layer, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = fitted(lambda: dense(between=layer))
        found = evaluate_model(model, task("ten").images, task("ten").labels, eps=0.1, seed=seed)
    assert found.verdict.verdict != "sound"
    assert found.verdict.numbers["unsteady"] > 0.5
