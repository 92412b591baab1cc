"""The activation: the paper's formula, its Table A1, theorem 1 and corollary 1, and its use with torch."""

import copy
import io

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from drelu_timm import DReLU, SReLU
from drelu_timm.models.activations import ACTIVATIONS, make_activation
from drelu_timm.models.drelu import along_channels

numbers = st.floats(-1e3, 1e3, allow_subnormal=False)
caps = st.floats(2**-10, 1024, width=32)  # as in a layer


def relu(x: float) -> float:
    return max(0.0, x)


def capped(x: float, cap: float) -> float:
    """Return the output of our layers for one number; D-ReLU and S-ReLU must agree."""
    value = torch.tensor([[x]], dtype=torch.float64)
    dynamic = DReLU(1, cap).double()(value).item()
    static = SReLU(cap)(value).item()
    assert dynamic == static
    return dynamic


def difference(clean: float, perturbation: float, cap: float) -> float:
    return abs(capped(clean, cap) - capped(clean + perturbation, cap))


# Table A1: the conditions on A, A + B and m, and the output difference of S-ReLU. Case 1 prints |A - B| for ReLU, but
# its left side, |0 - (A + B)|, is |A + B|; the comparison holds for that too.
TABLE_A1 = {
    "A <= 0, A + B > m": (lambda a, b, m: a <= 0 and a + b > m, lambda a, b, m: m),
    "0 < A <= m, A + B > m": (lambda a, b, m: 0 < a <= m < a + b, lambda a, b, m: abs(a - m)),
    "A > m, A + B > m": (lambda a, b, m: a > m and a + b > m, lambda a, b, m: 0.0),
    "A > m, 0 < A + B <= m": (lambda a, b, m: a > m and 0 < a + b <= m, lambda a, b, m: abs(b + a - m)),
    "A > m, A + B <= 0": (lambda a, b, m: a > m and a + b <= 0, lambda a, b, m: m),
    "A <= m, A + B <= m": (lambda a, b, m: a <= m and a + b <= m, lambda a, b, m: abs(relu(a) - relu(a + b))),
}
EXAMPLES = {  # a, a + b and m of each row, to be scaled: hypothesis alone rarely finds a row
    "A <= 0, A + B > m": (st.floats(-10, 0), st.floats(1.001, 10)),
    "0 < A <= m, A + B > m": (st.floats(1e-3, 1), st.floats(1.001, 10)),
    "A > m, A + B > m": (st.floats(1.001, 10), st.floats(1.001, 10)),
    "A > m, 0 < A + B <= m": (st.floats(1.001, 10), st.floats(1e-3, 0.999)),
    "A > m, A + B <= 0": (st.floats(1.001, 10), st.floats(-10, 0)),
    "A <= m, A + B <= m": (st.floats(-10, 1), st.floats(-10, 0.999)),
}


@pytest.mark.parametrize("row", TABLE_A1)
@given(data=st.data())
def test_every_row_of_table_a1(row, data):
    condition, expected = TABLE_A1[row]
    clean, perturbed = (data.draw(strategy) for strategy in EXAMPLES[row])
    m = data.draw(st.sampled_from([0.5, 1.0, 2.0, 64.0]))  # powers of 2: scaling by them is exact
    a, b = clean * m, perturbed * m - clean * m
    assume(condition(a, b, m))
    assert difference(a, b, m) == pytest.approx(expected(a, b, m), rel=1e-9, abs=1e-9)
    assert difference(a, b, m) <= abs(relu(a) - relu(a + b)) + 1e-12


@given(numbers, numbers, caps)
def test_the_rows_of_table_a1_cover_every_case(a, b, m):
    assert sum(condition(a, b, m) for condition, _ in TABLE_A1.values()) == 1


@given(numbers, numbers, caps)
def test_theorem_1_the_output_changes_at_most_as_relus(a, b, m):
    assert difference(a, b, m) <= abs(relu(a) - relu(a + b)) + 1e-12


@given(numbers, numbers, caps, caps)
def test_corollary_1_a_smaller_cap_changes_no_more(a, b, m, other):
    low, high = sorted((m, other))
    assert difference(a, b, low) <= difference(a, b, high) + 1e-12


@given(numbers, st.floats(-16, 1024, width=32))
def test_the_formula(x, m):
    assert capped(x, m) == max(0.0, min(max(m, 0.0), x)) == max(0.0, min(m, x))


@pytest.mark.parametrize(
    ("shape", "channel_dim", "dim"),
    [((2, 3), None, 1), ((2, 5, 3), None, 2), ((2, 3, 4, 5), None, 1), ((2, 4, 5, 3), -1, 3)],
)
def test_a_cap_per_channel(shape, channel_dim, dim):
    layer = DReLU(3, channel_dim=channel_dim)
    with torch.no_grad():
        layer.cap.copy_(torch.tensor([1.0, 2.0, 3.0]))
    largest = layer(torch.full(shape, 10.0)).movedim(dim, 0).flatten(1)
    assert torch.equal(largest, torch.tensor([[1.0], [2.0], [3.0]]).expand_as(largest))


def test_one_cap_for_all():
    assert torch.equal(DReLU(1, 2.0)(torch.full((2, 3, 4, 4), 5.0)), torch.full((2, 3, 4, 4), 2.0))


def test_initial_cap_is_the_papers():
    assert torch.equal(DReLU(4).cap, torch.full((4,), 100.0))


def test_gradcheck():
    layer = DReLU(3, 1.0).double()
    x = torch.tensor([[-2.0, 0.5, 2.0], [0.3, -0.7, 1.7]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, cap: torch.func.functional_call(layer, {"cap": cap}, x), (x, layer.cap))


def plain(x: torch.Tensor, cap: torch.Tensor) -> torch.Tensor:
    """Return the formula, with the gradient of a negative cap, in operations that autograd differentiates."""
    cap = cap + (cap.clamp(min=0) - cap).detach()
    return torch.where(x > cap, cap, x.relu())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "channel_dim"),
    [((64, 3), None), ((8, 3, 4, 4), None), ((8, 4, 4, 3), -1), ((1, 3), None), ((3,), None), ((0, 3), None)],
)
def test_values_and_gradients_equal_the_plain_formulas(shape, channel_dim, dtype):
    generator = torch.Generator().manual_seed(0)
    layer = DReLU(3, channel_dim=channel_dim).to(dtype)
    with torch.no_grad():
        layer.cap.copy_(torch.tensor([1.0, 0.0, -0.5]))
    x = torch.randint(-8, 9, shape, generator=generator).to(dtype) / 4  # many values at 0, at the cap and between them
    x.requires_grad_()
    dims = along_channels(layer.cap, x, channel_dim)
    weights = torch.randint(-3, 4, shape, generator=generator).to(dtype)  # integers: their sum is exact
    out, expected = layer(x), plain(x, dims)
    assert torch.equal(out, expected)
    ours = torch.autograd.grad(out, (x, layer.cap), weights)
    theirs = torch.autograd.grad(expected, (x, layer.cap), weights)
    assert all(torch.equal(gradient, other) for gradient, other in zip(ours, theirs, strict=True))


def kept_bytes(function, x: torch.Tensor) -> int:
    """Return the bytes that a function saves for its backward pass, each storage once."""
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = function(x)
    assert out.requires_grad
    return sum(kept.values())


def test_saves_no_more_for_the_backward_pass_than_relu6():
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    caps = 8 * 4  # bytes
    assert kept_bytes(nn.ReLU6(), x) == x.nbytes
    assert kept_bytes(DReLU(8), x) == x.nbytes + caps
    assert kept_bytes(lambda x: plain(x, torch.ones(8, 1, 1)), x) > 1.2 * x.nbytes


def test_differentiates_twice():
    layer = DReLU(3, 1.0).double()
    x = torch.tensor([[-2.0, 0.5, 2.0], [0.3, -0.7, 1.7]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda x, cap: torch.func.functional_call(layer, {"cap": cap}, x), (x, layer.cap)
    )


@pytest.mark.parametrize(("shape", "channel_dim"), [((4, 3), None), ((4, 3, 2, 2), None), ((4, 2, 2, 3), -1)])
def test_gradients_of_single_examples_by_torch_func(shape, channel_dim):
    layer = DReLU(3, 0.5, channel_dim=channel_dim)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def loss(cap: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"cap": cap}, example[None]).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(layer.cap, x)
    expected = [torch.func.grad(loss)(layer.cap, example) for example in x]
    assert torch.equal(gradients, torch.stack(expected))
    assert gradients.any()


@pytest.mark.parametrize(("shape", "channel_dim"), [((4, 3), None), ((4, 3, 2, 2), None), ((4, 2, 2, 3), -1)])
def test_derivatives_of_every_mode_agree(shape, channel_dim):
    layer = DReLU(3, 0.5, channel_dim=channel_dim).double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor, cap: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"cap": cap}, x)

    modes = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(function, (x, layer.cap), **modes)
    assert torch.autograd.gradgradcheck(function, (x, layer.cap), check_fwd_over_rev=True, check_rev_over_rev=True)


# Caps and units above, at and below 0, and units at their caps: the values that gradcheck does not support.
CORNERS = torch.tensor([[-1.0, -1.0, -1.0], [0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])


def with_corner_caps() -> DReLU:
    layer = DReLU(3)
    with torch.no_grad():
        layer.cap.copy_(torch.tensor([1.0, 0.0, -0.5]))
    return layer


def test_forward_mode_at_0_and_at_the_cap():
    layer = with_corner_caps()
    _, to_x = torch.func.jvp(layer, (CORNERS,), (torch.ones_like(CORNERS),))
    assert torch.equal(to_x, torch.tensor([[0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]]).float())
    _, to_cap = torch.func.jvp(
        lambda cap: torch.func.functional_call(layer, {"cap": cap}, CORNERS), (layer.cap.detach(),), (torch.ones(3),)
    )
    assert torch.equal(to_cap, torch.tensor([[0, 0, 0], [0, 0, 0], [0, 1, 1], [0, 1, 1], [1, 1, 1]]).float())


def test_batched_gradients_equal_single_ones():
    layer = with_corner_caps()
    x = CORNERS.clone().requires_grad_()
    gradients = torch.randn(4, *x.shape, generator=torch.Generator().manual_seed(0))
    batched = torch.autograd.grad(layer(x), (x, layer.cap), gradients, is_grads_batched=True)
    each = [torch.autograd.grad(layer(x), (x, layer.cap), gradient) for gradient in gradients]
    for ours, theirs in zip(batched, map(torch.stack, zip(*each, strict=True)), strict=True):
        assert torch.equal(ours, theirs)
    one, other = (torch.autograd.functional.jacobian(layer, x, vectorize=vectorize) for vectorize in (True, False))
    assert torch.equal(one, other)


def scripted(layer: nn.Module) -> nn.Module:
    return saved_and_loaded(torch.jit.script(layer))


def traced(layer: nn.Module) -> nn.Module:
    return saved_and_loaded(torch.jit.trace(layer, torch.ones(2, 3)))


def saved_and_loaded(module: torch.jit.ScriptModule) -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize(
    "converted",
    [
        scripted,
        traced,
        torch.fx.symbolic_trace,
        lambda layer: torch.export.export(layer, (CORNERS,)).module(),
        lambda layer: torch.compile(layer, backend="aot_eager", fullgraph=True),
    ],
    ids=["script", "trace", "fx", "export", "compile"],
)
def test_other_forms_have_the_same_values_and_gradients(converted):
    layer = with_corner_caps()
    other = converted(layer)
    results = []
    for module in (layer, other):
        x = CORNERS.clone().requires_grad_()
        out = module(x)
        results.append((out, *torch.autograd.grad(out.sum(), (x, module.cap))))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    assert torch.equal(results[0][2], torch.tensor([1.0, 3.0, 3.0]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "channel_dim"), [((2, 3), None), ((2, 3, 4, 4), None), ((2, 4, 4, 3), -1)])
def test_every_activation_traces_and_scripts(activation, shape, channel_dim):
    layer = make_activation(activation, 3, 0.5, channel_dim)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.fx.symbolic_trace(layer)(x), layer(x))
    assert torch.allclose(scripted(layer)(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_frozen_caps_change_no_gradient_of_the_input(dtype):
    layer = DReLU(3, 1.0).to(dtype)
    with torch.no_grad():
        layer.cap.copy_(torch.tensor([1.0, 0.0, -1.0]))
    values = [-1.0, -1e-7, 0.0, 1e-7, 0.5, 1 - 2**-8, 1.0, 1 + 2**-7, 3.0, torch.inf]
    gradients = []
    for learned in (True, False):
        layer.cap.requires_grad_(learned)
        x = torch.tensor(values, dtype=dtype).unsqueeze(1).repeat(1, 3).requires_grad_()
        layer(x).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    rounded = torch.tensor(values, dtype=dtype).tolist()
    assert gradients[1][:, 0].tolist() == [float(0 < value <= 1) for value in rounded]


def test_gradients_go_to_the_input_below_the_cap_and_to_the_cap_above():
    layer = DReLU(4, 1.0)
    x = torch.tensor([[-1.0, 0.5, 1.0, 2.0]], requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[0.0, 1.0, 1.0, 0.0]]))
    assert torch.equal(layer.cap.grad, torch.tensor([0.0, 0.0, 0.0, 1.0]))


def test_a_negative_cap_outputs_0_and_recovers():
    layer = DReLU(2, -1.0)
    x = torch.tensor([[3.0, -3.0]])
    assert torch.equal(layer(x), torch.zeros(1, 2))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        (layer(x) - 1).square().sum().backward()
        optimizer.step()
    assert layer.cap[0] > 0  # the unit that lowers the loss
    assert layer.cap[1] == -1  # a unit that is never active has no gradient


def test_a_negative_cap_passes_no_gradient_to_the_input():
    x = torch.tensor([[3.0]], requires_grad=True)
    DReLU(1, -1.0)(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros(1, 1))


def test_autocast_to_bf16_keeps_activations_in_bf16_and_caps_in_float32():
    model = nn.Sequential(nn.Linear(4, 3), DReLU(3, 0.1))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(2, 4))
    out.float().sum().backward()
    assert (out.dtype, model[1].cap.dtype, model[1].cap.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    layer = DReLU(3, 1.0).to(dtype)
    assert torch.equal(layer(torch.tensor([[-1, 0.5, 2]], dtype=dtype)), torch.tensor([[0, 0.5, 1]], dtype=dtype))


def test_channels_last_stays_channels_last():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    out = DReLU(3, 0.5)(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, DReLU(3, 0.5)(x.contiguous()))


def test_compiles_without_a_graph_break():
    layer = DReLU(3, 0.5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    compiled(x).sum().backward()
    compiled_gradient, layer.cap.grad = layer.cap.grad, None
    layer(y).sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(compiled_gradient, layer.cap.grad)


def test_deepcopy_is_independent():
    layer = DReLU(3, 1.0, channel_dim=-1)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.cap.zero_()
    assert torch.equal(layer.cap, torch.ones(3))
    assert twin.channel_dim == -1


def test_state_dict_round_trip_is_exact():
    layer, other = DReLU(3), DReLU(3)
    with torch.no_grad():
        layer.cap.copy_(torch.tensor([0.1, -0.2, 1e-30]))
    assert list(layer.state_dict()) == ["cap"]
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer.cap, other.cap)


def test_nan_is_propagated():
    assert DReLU(1)(torch.tensor([[float("nan")]])).isnan().all()
    assert SReLU()(torch.tensor([[float("nan")]])).isnan().all()


def test_repr():
    assert repr(DReLU(3)) == "DReLU(3)"
    assert repr(DReLU(3, channel_dim=-1)) == "DReLU(3, channel_dim=-1)"
    assert repr(SReLU(2.0)) == "SReLU(cap=2.0)"


def test_caps_apply_to_their_channel():
    assert along_channels(torch.ones(3), torch.ones(2, 3, 4, 4), None).shape == (1, 3, 1, 1)
