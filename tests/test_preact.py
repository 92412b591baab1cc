"""The pre-activation models: equality with RobustBench, published details, and timm's interface."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from drelu_timm import InputError, load_folder, normalized, save_folder
from drelu_timm.models.drelu import cap_layers

SMALL = {"depth": 10, "widen_factor": 1}
ACTIVATIONS = {"wide_resnet28_10": 7, "preact_resnet18": 17}  # of the models of `create`
NAMES = list(ACTIVATIONS)


def create(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    small = SMALL if name.startswith("wide") else {"channels": (8, 12, 16, 20), "stem_chans": 8}
    return timm.create_model(name, **{**small, **kwargs})


def fresh_statistics(model: nn.Module) -> nn.Module:
    """Set running statistics and affine weights to values as after training, so that each has an effect."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return model.eval()


def with_weights_of(theirs: nn.Module, ours: nn.Module) -> nn.Module:
    """Return our model with the weights of one whose layers are equal and in the same order."""
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    return ours.eval()


@torch.no_grad()
def test_wide_resnet_equals_robustbenchs(robustbench):
    from robustbench.model_zoo.architectures.dm_wide_resnet import DMWideResNet

    theirs = fresh_statistics(DMWideResNet(depth=16, width=2, activation_fn=nn.SiLU))
    ours = with_weights_of(theirs, timm.create_model("wide_resnet28_10", depth=16, widen_factor=2))
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(normalized(ours)(x), theirs(x), rtol=1e-4, atol=1e-4)  # theirs normalizes its images


@torch.no_grad()
def test_preact_resnet18_equals_robustbenchs(robustbench):
    from robustbench.model_zoo.architectures.resnet import PreActBlockV2, PreActResNet

    theirs = fresh_statistics(PreActResNet(PreActBlockV2, [2, 2, 2, 2], bn_before_fc=True))
    ours = with_weights_of(theirs, timm.create_model("preact_resnet18"))
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("preact_resnet18", 11.17),
        ("wide_resnet28_10", 36.48),
        ("wide_resnet34_10", 46.16),
        ("wide_resnet70_16", 266.8),
    ],
)
def test_sizes_are_the_published_ones(name, millions):
    with torch.device("meta"):
        model = timm.create_model(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_published_momentum_and_initial_values():
    wide, preact = create("wide_resnet28_10", widen_factor=4), create("preact_resnet18")
    momenta = [
        {norm.momentum for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)} for model in (wide, preact)
    ]
    assert momenta == [{0.01}, {0.1}]
    conv = wide.layer2[0].conv1
    assert conv.weight.std().item() == pytest.approx((2 / (9 * conv.out_channels)) ** 0.5, rel=0.05)
    assert not wide.fc.bias.any()


@pytest.mark.parametrize("name", [*NAMES, *(f"{name}_drelu" for name in NAMES)])
@pytest.mark.parametrize(("in_chans", "size"), [(1, (28, 28)), (3, (32, 32)), (3, (64, 48)), (2, (33, 35))])
def test_any_image_size(name, in_chans, size):
    model = create(name, num_classes=5, in_chans=in_chans)
    assert model(torch.rand(2, in_chans, *size)).shape == (2, 5)


@pytest.mark.parametrize("name", NAMES)
def test_classifier_methods(name):
    model = create(name, num_classes=5, drop_rate=0.5).eval()
    x = torch.rand(2, 3, 32, 32)
    features = model.forward_features(x)
    assert features.shape[1] == model.num_features == model.head_hidden_size
    assert torch.equal(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.allclose(pooled, features.mean((2, 3)))
    assert model.get_classifier().out_features == model.num_classes == 5
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(3, "max")
    assert model(x).shape == (2, 3)
    assert torch.equal(model.forward_head(features, pre_logits=True), features.amax((2, 3)))
    model.reset_classifier(4)
    assert model.global_pool.pool_type == "max"
    assert not torch.equal(model.train()(x), model(x))  # dropout


@pytest.mark.parametrize("name", NAMES)
def test_feature_maps(name):
    net = create(name, features_only=True).eval()
    x = torch.rand(1, 3, 32, 32)
    features = net(x)
    assert [feature.shape[1] for feature in features] == net.feature_info.channels()
    assert [32 // feature.shape[-1] for feature in features] == net.feature_info.reduction()
    assert torch.allclose(features[-1], create(name).eval().forward_features(x), atol=1e-6)
    assert len(create(name, features_only=True, out_indices=(0, 1))(x)) == 2


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_no_gradient(name):
    model, x = create(name).eval(), torch.rand(2, 3, 32, 32)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    gradients = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_layer_decay_grows_towards_the_input(name):
    model = create(name)
    groups = create_optimizer_v2(model, "adamw", lr=0.1, layer_decay=0.5).param_groups
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    order = [model.conv1.weight, model.layer1[0].conv1.weight, model.layer2[0].conv1.weight, model.fc.weight]
    assert [scale[id(weight)] for weight in order] == sorted({scale[id(weight)] for weight in order})
    assert scale[id(model.fc.weight)] == 1


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_from_image_to_features(name):
    model, x = create(name).eval(), torch.rand(2, 3, 32, 32)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    assert model.forward_features(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_other_activations(name):
    model = create(name, act_layer="gelu")
    assert repr(model).count("GELU()") == repr(create(name, act_layer=nn.Tanh)).count("Tanh()") == ACTIVATIONS[name]


@pytest.mark.parametrize("placement", ["head", "stem", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_variants_are_saved_and_loaded(name, placement, tmp_path):
    model = create(f"{name}_drelu", placement=placement, width=6, num_classes=5).eval()
    assert list(cap_layers(model))
    save_folder(model, tmp_path / "model")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_folder(tmp_path / "model").eval()(x), model(x))


@pytest.mark.parametrize("name", NAMES)
def test_all_replaces_every_activation(name):
    model = create(f"{name}_drelu", placement="all")
    assert not [module for module in model.modules() if isinstance(module, nn.SiLU | nn.ReLU)]
    assert len(list(cap_layers(model))) == ACTIVATIONS[name]


def test_compiles_without_a_graph_break():
    model, x = create("wide_resnet28_10").eval(), torch.rand(1, 3, 32, 32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), model(x), atol=1e-5)


@pytest.mark.parametrize("depth", [4, 30])
def test_a_depth_without_blocks_is_refused(depth):
    with pytest.raises(InputError, match=f"depth {depth} does not divide .* Use 10, 16, 22, 28"):
        create("wide_resnet28_10", depth=depth)
