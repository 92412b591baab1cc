"""Interval bounds: against hand-computed ones, against attacks, and for models that they do not know."""

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d
from torch import nn

from drelu_timm import DReLU, SReLU
from drelu_timm.attacks.attack import cross_entropy
from drelu_timm.attacks.pgd import pgd
from drelu_timm.attacks.threat_model import ThreatModel
from drelu_timm.errors import InputError
from drelu_timm.models.inference import normalized
from drelu_timm.models.intervals import Interval, bounds, certified, initialize_for_ibp
from drelu_timm.training.objectives import make_objective


class Residual(nn.Module):
    """What timm's residual models do: in-place addition and ReLU, and a gate by squeeze-and-excitation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), BatchNormAct2d(4), nn.MaxPool2d(2))
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.gate = nn.Conv2d(4, 4, 1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(1 - x / 2)
        shortcut = x
        x = self.branch(x)
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        x += shortcut
        x = self.act(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def dense(*activations):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), activations[0], nn.Linear(16, 8), activations[1], nn.Linear(8, 3)
    )


def drelu_with_negative_caps():
    layer = DReLU(16)
    with torch.no_grad():
        layer.cap.copy_(torch.linspace(-0.5, 1, 16))
    return layer


def variant(name, **arguments):
    return normalized(timm.create_model(name, num_classes=3, img_size=8, **arguments), mean=(0.4,), std=(0.3,))


MODELS = {
    "relu": lambda: dense(nn.ReLU(), nn.ReLU()),
    "drelu": lambda: dense(drelu_with_negative_caps(), DReLU(8, cap=0.2)),
    "srelu": lambda: dense(SReLU(0.5), nn.ReLU6()),
    "smooth": lambda: dense(nn.Tanh(), nn.Softplus()),
    "residual": Residual,
    "strided": lambda: variant("strided_cnn_drelu", placement="all", activation="pact", cap=0.5),
    "pooled": lambda: variant("shallow_cnn_drelu", placement="head", width=8, cap=0.5),
    "cnn7": lambda: variant("cnn7_drelu", placement="all", cap=10.0, channels=2),
}


def images_and_labels(count=48):
    """Images [N, 1, 8, 8] of three classes: a bright bar at the top, in the middle, or at the bottom."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = 0.3 * torch.rand(count, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels, strict=True):
        image[:, 3 * label : 3 * label + 2] += 0.6
    return images.double(), labels


def trained(name):
    """Train for a certificate at 0.05, for 60 steps; returns the model in eval mode."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    initialize_for_ibp(model)
    images, labels = images_and_labels()
    objective = make_objective("ibp", beta=6.0, ibp_eps=0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(60):
        optimizer.zero_grad()
        objective.at(step / 60).losses(model.train(), images, images, labels).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_no_attack_fools_a_certified_example(name):
    images, labels = images_and_labels()
    model = trained(name)
    proven = []
    for eps in ("0.01", "0.05", "0.1", "0.3"):
        threat_model = ThreatModel.parse("Linf", eps)
        found = certified(model, images, labels, threat_model.eps)
        for seed in range(3):
            start = threat_model.random_start(images, torch.Generator().manual_seed(seed))
            for attacked in (
                start,
                threat_model.project(images + (start - images).sign(), images),
                pgd(
                    model,
                    images,
                    cross_entropy(labels),
                    threat_model,
                    start=start,
                    steps=20,
                    step_size=threat_model.eps / 4,
                ),
            ):
                assert (model(attacked).argmax(1) == labels)[found].all()
        proven.append(int(found.sum()))
    assert proven == sorted(proven, reverse=True)
    assert proven[0] > 0


@pytest.mark.parametrize("name", MODELS)
def test_bounds_hold_and_are_exact_at_a_point(name):
    torch.manual_seed(1)
    model = MODELS[name]().double().eval()
    images, labels = images_and_labels(6)
    with torch.no_grad():
        logits = model(images)
        at_point = bounds(model, images, 0.0)
        around = bounds(model, images, 0.05)
        margins = around.margins(labels)
        others = [model((images + 0.05 * torch.randn_like(images).sign()).clamp(0, 1)) for _ in range(20)]
    assert torch.equal(around.value, logits)
    torch.testing.assert_close(at_point.lower, logits)
    torch.testing.assert_close(at_point.upper, logits)
    for other in others:
        assert ((around.lower <= other + 1e-9) & (other <= around.upper + 1e-9)).all()
        assert (margins <= other.gather(1, labels.unsqueeze(1)) - other + 1e-9).all()


def two_layers():
    """Hidden (x0 - x1, x0 + 2 x1 - 1) with D-ReLU of caps (1, 0.5); logits (h0 + h1, h1, -h0)."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), DReLU(2), nn.Linear(2, 3)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, -1.0], [1.0, 2.0]]))
        model[1].bias.copy_(torch.tensor([0.0, -1.0]))
        model[2].cap.copy_(torch.tensor([1.0, 0.5]))
        model[3].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 1.0], [-1.0, 0.0]]))
        model[3].bias.zero_()
    return model


def test_two_layers_by_hand():
    # x0 in [0.5, 0.7], x1 in [0.1, 0.3]: hidden in [0.2, 0.6] x [-0.3, 0.3], after D-ReLU in [0.2, 0.6] x [0, 0.3].
    image = torch.tensor([0.6, 0.2], dtype=torch.float64).view(1, 1, 1, 2)
    found = bounds(two_layers(), image, 0.1)
    torch.testing.assert_close(found.lower, torch.tensor([[0.2, 0.0, -0.6]], dtype=torch.float64))
    torch.testing.assert_close(found.upper, torch.tensor([[0.9, 0.3, -0.2]], dtype=torch.float64))
    # Of logit 0 the margins are h0 and 2 h0 + h1, which end at 0.2 and 0.4; the bounds of the logits give -0.1 and 0.4.
    margins = found.margins(torch.tensor([0]))
    torch.testing.assert_close(margins, torch.tensor([[0.0, 0.2, 0.4]], dtype=torch.float64))
    assert certified(two_layers(), image, torch.tensor([0]), 0.1).tolist() == [True]
    assert certified(two_layers(), image, torch.tensor([0]), 0.21).tolist() == [False]  # h0 may be 0


def test_images_are_bounded_inside_the_pixel_range():
    images = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3)
    ball = Interval.around(images, 0.3)
    torch.testing.assert_close(ball.lower.flatten(), torch.tensor([0.0, 0.2, 0.7]))
    torch.testing.assert_close(ball.upper.flatten(), torch.tensor([0.3, 0.8, 1.0]))


finite = st.floats(-3, 3, width=32)


@given(finite, finite, finite)
def test_drelu_takes_the_ends_of_an_interval(one, other, cap):
    layer = DReLU(1, cap)
    lower, upper = (torch.tensor([[end]]) for end in sorted((one, other)))
    with torch.no_grad():
        found = layer(Interval.of((lower + upper) / 2, lower, upper))
        assert found.lower == layer(lower)
        assert found.upper == layer(upper)


# Unknown operations


class Scripted(nn.Module):
    def forward(self, x):
        return x + _scripted(x)


@torch.jit.script
def _scripted(x):
    return 2 * x


class Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x


class Custom(nn.Module):
    def forward(self, x):
        return Passed.apply(x)


class Accumulated(nn.Module):
    def forward(self, x):
        total = torch.zeros(x.shape)
        total += x
        return total


class Weighed(nn.Module):
    def forward(self, x):
        return F.linear(x, x)


class Divided(nn.Module):
    def forward(self, x):
        return x / x.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.LayerNorm(4), r"no rule for torch\.nn\.functional\.layer_norm"),
        (nn.Softmax(1), r"no rule for torch\.nn\.functional\.softmax"),
        (nn.SiLU(), r"no rule for torch\.nn\.functional\.silu"),
        (Scripted(), "not numbers, or their bounds are lost in a scripted function"),
        (torch.jit.script(nn.ReLU()), "no rule for"),
        (Custom(), r"no rule for torch\.Tensor\.view_as"),
        (Accumulated(), r"no rule for torch\.Tensor\.\w+ of a constant"),
        (Weighed(), "with computed weights"),
        (Divided(), "by an activation"),
    ],
)
def test_an_unknown_operation_is_refused_by_name(layer, message):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), layer)
    with pytest.raises(InputError, match=message) as error:
        certified(model, torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.long), 0.1)
    assert "\n" not in str(error.value)


def test_bounds_that_overflow_prove_nothing():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    nn.init.constant_(model[1].weight, 3e38)
    model[1].weight.data[1] *= -1
    assert not certified(model, torch.full((1, 1, 2, 2), 0.1), torch.tensor([0]), 1.0).any()


# Training


def test_batchnorm_takes_the_statistics_of_the_clean_batch():
    torch.manual_seed(0)
    model, reference = (nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)) for _ in range(2))
    reference.load_state_dict(model.state_dict())
    images = torch.rand(8, 1, 6, 6)
    values = reference(images)
    found = bounds(model, images, 0.0)
    torch.testing.assert_close(found.value, values)
    torch.testing.assert_close(found.lower, values)
    torch.testing.assert_close(found.upper, values)
    for name, buffer in reference.named_buffers():  # moved once, by the clean batch
        torch.testing.assert_close(model.get_buffer(name), buffer)


def test_ibp_is_the_formula_of_gowal():
    torch.manual_seed(0)
    model, (images, labels) = MODELS["drelu"]().double(), images_and_labels()
    objective = make_objective("ibp", beta=6.0, ibp_eps=0.2, ibp_clean_weight=0.5, ibp_ramp=0.4)

    def expected(eps, kappa):
        found = bounds(model, images, eps)
        worst = F.cross_entropy(-found.margins(labels), labels)
        return kappa * F.cross_entropy(model(images), labels) + (1 - kappa) * worst

    for share, eps, kappa in ((0, 0, 1), (0.1, 0.05, 0.875), (0.2, 0.1, 0.75), (0.4, 0.2, 0.5), (0.9, 0.2, 0.5)):
        losses = objective.at(share).losses(model, images, images, labels)
        torch.testing.assert_close(losses.loss, expected(eps, kappa))
    torch.testing.assert_close(objective.losses(model, images, images, labels).loss, expected(0.2, 0.5))


def test_ibp_has_gradients_for_weights_and_caps():
    model, (images, labels) = MODELS["drelu"]().double(), images_and_labels()
    make_objective("ibp", beta=6.0, ibp_eps=0.2).losses(model, images, images, labels).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_ibp_initialization_keeps_the_width_of_intervals():
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(512, 512), nn.ReLU())])
    inputs = torch.rand(4, 512)

    def growth():
        found = model(Interval.of(inputs, inputs - 0.1, inputs + 0.1))
        return ((found.upper - found.lower).mean() / 0.2).item()

    with torch.no_grad():
        before = growth()
        initialize_for_ibp(model)
        assert before > 1000 * growth()
        assert 0.1 < growth() < 10
