"""The relatives of D-ReLU: the formulas of their papers, their gradients, and their use like a D-ReLU."""

import math

import pytest
import timm
import torch
from torch import nn

from drelu_timm.models.activations import ACTIVATIONS, KWTA, PACT, RCRAF, FitReLU, Tent, make_activation
from drelu_timm.models.caps import (
    cap_penalty,
    cap_statistics,
    check_cap_penalty,
    effective_cap_penalty,
    unit_shares,
)
from drelu_timm.models.drelu import DReLU, SReLU, cap_layers

FORMULAS = {
    "bounded-relu": lambda x: 0.0 if x < 0 else x if x <= 2 else 2.0,  # Zantedeschi et al. 2017, section 3
    "pact": lambda x: 0.5 * (abs(x) - abs(x - 2) + 2),  # Choi et al. 2018, eq. 1
    "tent": lambda x: max(0.0, 2 - abs(x)),
    "fitact": lambda x: max(0.0, x / (1 + math.exp(20 * (x - 2)))),
    "rcr-af": lambda x: min(2.0, math.log(1 + math.exp(-10 * x)) / 10 + x),
}
VALUES = [-5.0, -2.0, -0.5, 0.0, 0.25, 1.5, 2.0, 2.5, 7.0]


@pytest.mark.parametrize("name", FORMULAS)
def test_values(name):
    out = make_activation(name, len(VALUES), 2.0)(torch.tensor([VALUES]))
    assert out[0].tolist() == pytest.approx([FORMULAS[name](x) for x in VALUES], abs=1e-6)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(("shape", "channel_dim"), [((5, 3), None), ((2, 3, 4, 4), None), ((2, 4, 4, 3), -1)])
def test_gradients(name, shape, channel_dim):
    layer = make_activation(name, 3, 0.5, channel_dim).double()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *parameters: layer(x), (x, *layer.parameters()))


def test_gradients_of_the_tent():
    layer = Tent(5, 1.0)
    x = torch.tensor([[-2.0, -0.5, 0.0, 0.5, 2.0]], requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[0.0, 1.0, 0.0, -1.0, 0.0]]))
    assert torch.equal(layer.cap.grad, torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]))


def test_the_cap_of_pact_is_shared_by_the_layer():
    layer = PACT(1.0)
    x = torch.tensor([[0.5, 2.0], [3.0, -1.0]], requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(layer.cap.grad, torch.tensor([2.0]))


def test_kwta_keeps_the_largest_of_each_example():
    layer = KWTA(0.5)
    x = torch.tensor([[4.0, 1.0, -3.0, 2.0], [-1.0, -2.0, -3.0, -4.0]], requires_grad=True)
    out = layer(x)
    assert torch.equal(out, torch.tensor([[4.0, 0.0, 0.0, 2.0], [-1.0, -2.0, 0.0, 0.0]]))
    out.sum().backward()
    assert torch.equal(x.grad, torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]]))
    assert torch.equal(KWTA(0.01)(x), torch.tensor([[4.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]])), "at least one"
    maps = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert (layer(maps).flatten(1) != 0).sum(dim=1).tolist() == [16] * 3, "over channels and positions"
    assert torch.equal(layer(maps)[:1], layer(maps[:1])), "each example alone"


def test_rcr_af_tends_to_relu():
    x = torch.linspace(-3, 3, 31)
    torch.testing.assert_close(RCRAF(alpha=1000.0)(x), x.relu(), atol=1e-3, rtol=0)
    assert torch.equal(RCRAF(gamma=2.0, alpha=1.0)(x), nn.functional.softplus(x).clamp(max=2.0))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_lower_precision_is_kept(name):
    layer = make_activation(name, 3, 2.0)
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert layer.to(torch.bfloat16)(x).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["drelu", "pact", "tent", "fitact"])
def test_learnable_caps_are_trained_like_those_of_d_relu(name):
    model = timm.create_model("dense_drelu", activation=name, cap=2.0, width=6)
    caps = 1 if name == "pact" else 6
    assert [layer.cap.numel() for layer in cap_layers(model)] == [caps]
    assert cap_penalty(model).item() == 4.0 * caps
    check_cap_penalty("effective", model)
    assert effective_cap_penalty(model).item() > 0
    assert cap_statistics(model)["mean"] == 2.0
    assert bool(unit_shares(model, torch.rand(2, 1, 28, 28))) == isinstance(next(cap_layers(model)), DReLU)


def test_only_functions_that_are_a_d_relu_are_one():
    # Interval bounds and cap statistics of a DReLU assume its formula.
    assert isinstance(PACT(), DReLU)
    assert not isinstance(Tent(1), DReLU)
    assert not isinstance(FitReLU(1), DReLU)
    assert type(make_activation("bounded-relu", 3, 1.0)) is SReLU
