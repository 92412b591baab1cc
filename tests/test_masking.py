"""The verdict: nets that hide their gradients are found out, honest ones are believed."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from drelu_timm.attacks import ThreatModel, cross_entropy, frozen, margin, pgd
from drelu_timm.drelu import DReLU, cap_penalty
from drelu_timm.evaluation import evaluate_model
from drelu_timm.masking import ZeroGradients, verdict, wilson_interval, zero_gradient_share

EPS = 0.1
NO_ZERO_GRADIENTS = ZeroGradients(0.0, 0.0, 0.0)


@pytest.fixture(scope="session")
def digits():
    """1,400 images to train on and 397 to attack, with their labels."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16)[order]
    labels = torch.tensor(labels)[order]
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def trained(digits, *, drelu, adversarially=False, epochs):
    """A dense net of a second's training, as in the paper but with a learning rate of its own for the caps."""
    images, labels, _, _ = digits
    threat_model = ThreatModel.parse("Linf", EPS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        activation = DReLU(64, cap=10.0) if drelu else nn.ReLU()
        hidden = [nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
        model = nn.Sequential(*hidden, nn.Linear(128, 64), activation, nn.Linear(64, 10))
        caps = [layer.cap for layer in model if isinstance(layer, DReLU)]
        rest = [parameter for parameter in model.parameters() if not any(parameter is cap for cap in caps)]
        optimizer = torch.optim.Adam([{"params": rest, "lr": 1e-3}, {"params": caps, "lr": 0.1}])
        for _ in range(epochs):
            for batch in torch.randperm(len(labels)).split(64):
                inputs = images[batch]
                if adversarially:
                    with frozen(model):
                        loss, start = cross_entropy(labels[batch]), threat_model.random_start(inputs)
                        inputs = pgd(model, inputs, loss, threat_model, start=start, steps=5, step_size=EPS / 3)
                loss = F.cross_entropy(model(inputs), labels[batch]) + 0.1 * cap_penalty(model)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.eval()


@pytest.fixture(scope="session")
def evaluations(digits):
    """The quick suite on a net of each kind."""
    nets = {
        "relu": trained(digits, drelu=False, epochs=15),
        "drelu": trained(digits, drelu=True, epochs=60),
        "relu, adversarial training": trained(digits, drelu=False, adversarially=True, epochs=15),
        "drelu, adversarial training": trained(digits, drelu=True, adversarially=True, epochs=15),
    }
    _, _, images, labels = digits
    return {name: evaluate_model(net, images, labels, eps=EPS, suite="quick") for name, net in nets.items()}


def test_a_drelu_net_trained_as_in_the_paper_is_masked(evaluations):
    result = evaluations["drelu"]
    white_box = min(result.accuracy["pgd"], result.accuracy["apgd-ce"])
    assert result.clean > 0.93
    assert white_box > 0.6, "white-box attacks are to be fooled"
    for attack in ("bpda", "twin", "annealing"):
        assert result.accuracy[attack] < white_box - 0.15, attack
    assert result.worst < 0.5
    assert result.zero_gradient_share > 0.4
    assert result.zero_gradients.through_caps < 0.05
    assert str(result.verdict) == "masked"
    assert f"{100 * result.zero_gradient_share:.1f} % (cross-entropy)" in result.verdict.evidence[2]
    assert f"{100 * result.worst:.1f} % the adaptive and black-box attacks" in result.verdict.evidence[0]


def test_a_plain_relu_net_is_weak_but_sound(evaluations):
    result = evaluations["relu"]
    assert result.worst < 0.5
    assert result.zero_gradient_share == 0
    assert str(result.verdict) == "sound"


@pytest.mark.parametrize("activation", ["relu", "drelu"])
def test_adversarially_trained_nets_are_robust_and_sound(evaluations, activation):
    result = evaluations[f"{activation}, adversarial training"]
    assert result.worst > evaluations["relu"].worst + 0.15
    assert str(result.verdict) == "sound"


def flags(count, total=200):
    return torch.arange(total) < count


def judged(hidden, *, total=200, zero_gradients=NO_ZERO_GRADIENTS, kind="adaptive"):
    broken = {"pgd": torch.zeros(total, dtype=torch.bool), "other": flags(hidden, total)}
    return verdict(flags(total, total), broken, {"pgd": "white-box", "other": kind}, zero_gradients)


@pytest.mark.parametrize(
    ("hidden", "total", "expected"),
    [
        (0, 200, "sound"),
        (6, 200, "sound"),  # 3 %: what cross-entropy and margin losses differ by
        (20, 200, "masked"),
        (12, 200, "undecided"),
        (0, 20, "undecided"),  # too few to say
        (2, 20, "undecided"),
        (15, 20, "masked"),
    ],
)
@pytest.mark.parametrize("kind", ["adaptive", "black-box"])
def test_verdict_goes_by_the_interval_of_the_hidden_share(hidden, total, expected, kind):
    assert judged(hidden, total=total, kind=kind).verdict == expected


def test_examples_that_white_box_attacks_break_too_are_not_hidden():
    broken = {"pgd": flags(100), "bpda": flags(100)}
    kinds = {"pgd": "white-box", "bpda": "adaptive"}
    judgement = verdict(flags(200), broken, kinds, NO_ZERO_GRADIENTS)
    assert judgement.verdict == "sound"
    assert judgement.evidence[0].startswith("50.0 % of 200 examples withstand the white-box attacks (pgd), 50.0 %")


def test_zero_gradients_that_no_adaptive_attack_gets_around_are_not_sound():
    assert judged(0, zero_gradients=ZeroGradients(0.5, 0.5, 0.5)).verdict == "undecided"
    assert judged(0, zero_gradients=ZeroGradients(0.5, 0.5, 0.0)).verdict == "sound"


def test_nothing_right_is_nothing_to_judge():
    none = torch.zeros(10, dtype=torch.bool)
    judgement = verdict(none, {"pgd": none}, {"pgd": "white-box"}, NO_ZERO_GRADIENTS)
    assert (judgement.verdict, judgement.evidence) == (
        "undecided",
        ("No example is classified right, so there is nothing to break.",),
    )


def test_wilson_interval():
    # Values of the textbook formula, e.g. R's prop.test(..., correct=FALSE).
    assert wilson_interval(0, 100) == pytest.approx((0, 0.0370), abs=1e-4)
    assert wilson_interval(10, 100) == pytest.approx((0.0552, 0.1744), abs=1e-4)
    assert wilson_interval(100, 100) == pytest.approx((0.9630, 1), abs=1e-4)


class Switch(nn.Module):
    """Two logits that see the image only where its mean is below one half; ``scale`` saturates the softmax."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale

    def forward(self, images):
        mean = images.flatten(1).mean(1)
        score = self.scale * (1 + torch.where(mean < 0.5, mean, mean.detach()))
        return torch.stack([score, -score], dim=1)


def test_zero_gradient_share_counts_correct_examples_only():
    images = torch.tensor([0.1, 0.2, 0.3, 0.9, 0.9]).view(5, 1, 1, 1).expand(5, 1, 2, 2)
    labels = torch.tensor([0, 0, 0, 0, 1])  # the last one is classified wrong
    for batch_size in (2, 5):
        assert zero_gradient_share(Switch(), images, labels, batch_size=batch_size) == 0.25
    assert zero_gradient_share(Switch(), images[4:], labels[4:]) == 0


def test_margin_tells_a_saturated_softmax_from_a_flat_model():
    images = torch.tensor([0.1, 0.2, 0.3, 0.9]).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    labels = torch.zeros(4, dtype=torch.long)
    model = Switch(scale=1e4)
    assert zero_gradient_share(model, images, labels) == 1
    assert zero_gradient_share(model, images, labels, loss=margin) == 0.25
    assert ZeroGradients.measure(model, images, labels) == ZeroGradients(1.0, 0.25, 0.25)


def test_gradients_that_are_not_finite_count_as_zero():
    class Root(nn.Module):
        def forward(self, images):
            score = images.flatten(1).sum(1).sqrt()  # infinite slope at 0
            return torch.stack([1 + score, -score], dim=1)

    images = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    assert zero_gradient_share(Root(), images, torch.zeros(2, dtype=torch.long)) == 0.5
