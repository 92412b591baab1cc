"""The penalties of the caps and the statistics of a training log."""

import pytest
import timm
import torch
from torch import nn

from drelu_timm import DReLU, InputError, SReLU, cap_penalty
from drelu_timm.models.caps import (
    CAP_PENALTIES,
    cap_statistics,
    check_cap_penalty,
    effective_cap_penalty,
    unit_shares,
)
from drelu_timm.models.head import DReLUHead


def head(cap: float = 2.0, *, convolution: bool = False) -> DReLUHead:
    torch.manual_seed(0)
    classifier = nn.Conv2d(5, 4, 1) if convolution else nn.Linear(5, 4)
    return DReLUHead(classifier, 3, DReLU(3, cap, channel_dim=1 if convolution else -1))


def test_penalty_sums_the_squares_of_all_caps():
    model = nn.Sequential(nn.Linear(2, 3), DReLU(3, 2.0), nn.Sequential(DReLU(2, 3.0)), SReLU(7.0))
    penalty = cap_penalty(model)
    assert penalty.item() == 3 * 4 + 2 * 9
    penalty.backward()
    assert torch.equal(model[1].cap.grad, torch.full((3,), 4.0))


def test_penalty_counts_a_shared_layer_once_and_is_0_without_any():
    shared = DReLU(2, 3.0)
    assert cap_penalty(nn.Sequential(shared, shared)).item() == 18
    assert cap_penalty(nn.Linear(2, 2)).item() == 0


def test_penalty_shrinks_caps():
    model = DReLU(3, 10.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cap_penalty(model).backward()
    optimizer.step()
    assert torch.equal(model.cap, torch.full((3,), 8.0))


@pytest.mark.parametrize("convolution", [False, True])
def test_effective_penalty_is_the_squared_range_of_each_unit_in_the_logits(convolution):
    model = head(convolution=convolution)
    with torch.no_grad():
        model.activation.cap.copy_(torch.tensor([1.0, 2.0, 3.0]))
        model.output.weight.copy_(torch.arange(12.0).view_as(model.output.weight))
    columns = torch.arange(12.0).view(4, 3).norm(dim=0)
    expected = (torch.tensor([1.0, 2.0, 3.0]) * columns).square().sum()
    assert effective_cap_penalty(model).item() == pytest.approx(expected.item())


def test_effective_penalty_sums_over_two_heads():
    one, other = head(1.0), head(3.0)
    both = effective_cap_penalty(nn.ModuleList([one, other])).item()
    assert both == pytest.approx(effective_cap_penalty(one).item() + effective_cap_penalty(other).item())


def scaled(model: DReLUHead, factor: torch.Tensor) -> DReLUHead:
    """A head whose dense layer and caps are multiplied by a factor per unit, and its output layer divided."""
    other = head()
    with torch.no_grad():
        other.dense.weight.copy_(model.dense.weight * factor[:, None])
        other.dense.bias.copy_(model.dense.bias * factor)
        other.activation.cap.copy_(model.activation.cap * factor)
        other.output.weight.copy_(model.output.weight / factor)
        other.output.bias.copy_(model.output.bias)
    return other


def test_effective_penalty_is_the_same_for_models_of_the_same_function():
    model = head(0.5)
    other = scaled(model, torch.tensor([0.01, 4.0, 100.0]))
    x = torch.randn(64, 5)
    assert torch.allclose(other(x), model(x), atol=1e-5)
    assert effective_cap_penalty(other).item() == pytest.approx(effective_cap_penalty(model).item())
    assert cap_penalty(other).item() != pytest.approx(cap_penalty(model).item(), rel=0.1)


def test_effective_penalty_moves_the_caps_and_the_output_layer_only():
    model = head().double()
    cap, weight = model.activation.cap, model.output.weight
    effective_cap_penalty(model).backward()
    assert torch.allclose(cap.grad, 2 * cap * weight.square().sum(dim=0))
    assert torch.allclose(weight.grad, 2 * cap.square() * weight)
    assert model.output.bias.grad is None and model.dense.weight.grad is None


@pytest.mark.parametrize("name", CAP_PENALTIES)
def test_penalties_are_0_without_a_d_relu(name):
    model = timm.create_model("dense_drelu", activation="relu")
    assert CAP_PENALTIES[name](model).shape == ()
    assert CAP_PENALTIES[name](model).item() == 0
    check_cap_penalty(name, model)


@pytest.mark.parametrize("name", CAP_PENALTIES)
@pytest.mark.parametrize("model", ["dense_drelu", "deit_tiny_distilled_patch16_224_drelu"])
def test_every_penalty_takes_a_head(name, model):
    model = timm.create_model(model, num_classes=3)
    check_cap_penalty(name, model)
    assert CAP_PENALTIES[name](model).item() > 0


@pytest.mark.parametrize("kwargs", [{"placement": "stem"}, {"placement": "all"}, {"num_classes": 0}])
def test_effective_penalty_refuses_caps_without_an_output_layer(kwargs):
    model = timm.create_model("shallow_cnn_drelu", **kwargs)
    check_cap_penalty("squared", model)
    with pytest.raises(InputError, match=r"effective weighs .* Use --cap-penalty squared or --placement head"):
        check_cap_penalty("effective", model)


def test_statistics_of_the_caps():
    model = nn.Sequential(DReLU(2, 3.0), DReLU(2))
    with torch.no_grad():
        model[1].cap.copy_(torch.tensor([0.0, -1.0]))
    assert cap_statistics(model) == {"mean": 1.25, "min": -1.0, "max": 3.0, "not_positive": 0.5}
    assert cap_statistics(nn.Linear(2, 2)) == {}


def test_shares_of_units():
    model = nn.Sequential(DReLU(4, 1.0))
    assert unit_shares(model, torch.tensor([[-1.0, 0.5, 1.0, 2.0]])) == {"zero": 0.25, "active": 0.5, "capped": 0.25}
    assert not model[0]._forward_pre_hooks
    assert unit_shares(nn.Linear(4, 4), torch.ones(1, 4)) == {}


def test_units_of_a_compiled_model_are_counted(toy_model):
    images = torch.rand(4, 1, 8, 8)
    expected = unit_shares(toy_model, images)
    toy_model.compile(backend="eager")
    with torch.no_grad():
        toy_model(images)
    assert unit_shares(toy_model, images) == expected != {}
