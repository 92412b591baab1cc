"""Registration and construction of `_drelu` variants, their weights and folders, and their use by timm."""

import argparse
import copy
import json
import logging
import os
import subprocess
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.models._registry import _model_pretrained_cfgs
from timm.optim import create_optimizer_v2
from torch import nn

from drelu_timm import DReLU, DReLUWarning, InputError, load_folder, normalized, save_folder
from drelu_timm.models.activations import ACTIVATIONS, PReLU, PSSiLU, make_activation
from drelu_timm.models.drelu import cap_layers

NEWEST = tuple(int(part) for part in timm.__version__.split(".")[:3]) >= (1, 0, 20)  # knows local-dir


def create(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 5, **kwargs})


def learn_caps(model: nn.Module) -> None:
    """Give every cap a different value, as training does."""
    with torch.no_grad():
        for layer in cap_layers(model):
            layer.cap.copy_(torch.rand(layer.cap.shape) * 3 + 0.1)


def images(model: nn.Module, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, *model.pretrained_cfg["input_size"], generator=generator)


def same(model: nn.Module, other: nn.Module) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# The import


IMPORT = """
import sys, timm, torch
def refuse(*args, **kwargs): raise AssertionError("a parameter was created")
torch.nn.Parameter.__new__ = refuse
import drelu_timm
print(*{name.partition(".")[0] for name in sys.modules})
"""


def test_importing_builds_no_model_and_loads_torch_and_timm_only():
    loaded = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"accelerate", "torchattacks", "foolbox", "pyautoattack", "robustbench", "tyro", "sklearn", "matplotlib"}
    assert "drelu_timm" in loaded
    assert not heavy & set(loaded)


# The registry


# Read before any test runs: importing robustbench registers further models.
ALL_MODELS = set(timm.list_models(exclude_filters="drelutimm2026_*"))  # without the published, trained ones


def test_every_architecture_has_its_variant():
    bases = {name for name in ALL_MODELS if not name.endswith("_drelu")}
    assert len(bases) > 1100
    assert ALL_MODELS - bases == {f"{base}_drelu" for base in bases}


def test_tags_are_those_of_the_base():
    assert timm.list_models("resnet50_drelu", include_tags=True) == [
        name.replace("resnet50", "resnet50_drelu") for name in timm.list_models("resnet50", include_tags=True)
    ]
    cfg, base = (timm.get_pretrained_cfg(f"{name}.a1_in1k") for name in ("resnet50_drelu", "resnet50"))
    assert (cfg.architecture, cfg.classifier) == ("resnet50_drelu", "fc.output")
    assert (cfg.hf_hub_id, cfg.mean, cfg.tag) == (base.hf_hub_id, base.mean, "a1_in1k")


def test_a_tag_selects_its_cfg():
    model = timm.create_model("vit_tiny_patch16_224_drelu.augreg_in21k", depth=1)
    assert model.num_classes == 21843
    assert model.pretrained_cfg["tag"] == "augreg_in21k"


def test_an_unknown_tag_is_refused():
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("resnet18_drelu.nonsense")


# The head

ROUND = [  # linear; two heads; convolutional; token-wise; classifier that is Identity by default
    "resnet18_drelu",
    "mobilenetv2_035_drelu",
    "mobilenetv3_small_050_drelu",
    "regnetx_002_drelu",
    "resnetv2_50_drelu",
    "levit_128s_drelu",
    "efficientvim_m1_drelu",
    "crossvit_9_240_drelu",
    "vit_tiny_patch16_224_drelu",
    "deit_tiny_distilled_patch16_224_drelu",
    "convnext_atto_drelu",
    "repvit_m0_9_drelu",
    "efficientnet_b0_drelu",
    "shallow_cnn_drelu",
    "dense_drelu",
    "preact_resnet18_drelu",
]


@pytest.mark.parametrize("name", [name for name in ROUND if timm.is_model(name)])
def test_train_save_and_load_a_model(name, tmp_path):
    model = create(name, width=7)
    learn_caps(model)
    caps = [layer.cap.detach().clone() for layer in cap_layers(model)]
    x = images(model)

    out = model(x)
    logits = out[0] if isinstance(out, tuple) else out  # distilled models train on both
    logits.sum().backward()
    assert all(layer.cap.grad is not None for layer in list(cap_layers(model))[:1])

    model.eval()
    with torch.no_grad():
        logits = model(x)
        assert logits.shape == (2, 5)
        assert torch.equal(model.forward_head(model.forward_features(x)), logits)
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        assert features.shape == (2, 7) == (2, model.head_hidden_size)
        save_folder(model, tmp_path / "model")
        assert same(load_folder(tmp_path / "model"), model)

        model.reset_classifier(0)
        assert torch.equal(model(x), features)
        model.reset_classifier(4)
        assert model(x).shape == (2, 4)
    outputs = model.get_classifier()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert [output.weight.shape[:2] for output in outputs] == [(4, 7)] * len(caps)
    assert all(torch.equal(cap, layer.cap) for cap, layer in zip(caps, cap_layers(model), strict=True))


def test_the_papers_dense_model_on_mnist():
    model = timm.create_model("dense_drelu")
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [
        (784, 256),
        (256, 256),
        (256, 128),
        (128, 10),
    ]
    assert [type(module).__name__ for module in model.fc.children()] == ["Linear", "DReLU", "Linear"]


@pytest.mark.parametrize(
    "name", ["dense", "shallow_cnn", "strided_cnn", "dense_drelu", "shallow_cnn_drelu", "strided_cnn_drelu"]
)
@pytest.mark.parametrize(("in_chans", "img_size"), [(1, 8), (3, 32), (3, (12, 20))])
def test_the_papers_models_take_any_image_size(name, in_chans, img_size):
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    model = create(name, in_chans=in_chans, img_size=img_size)
    assert model(torch.rand(2, in_chans, *size)).shape == (2, 5)
    assert model.num_features == {"dense": 256, "shallow_cnn": 64, "strided_cnn": 32}[name.removesuffix("_drelu")]


def test_a_head_missing_from_the_cfg_is_found():
    model = create("levit_384_s8_drelu")
    assert model.drelu_heads == ["head.linear", "head_dist.linear"]


def test_num_classes_0_returns_the_output_of_the_d_relu():
    model = create("resnet18_drelu", num_classes=0, width=9)
    assert model.num_classes == 0
    assert model(torch.rand(2, 3, 96, 96)).shape == (2, 9)
    model.reset_classifier(3)
    assert model(torch.rand(2, 3, 96, 96)).shape == (2, 3)


def test_a_head_on_a_model_with_0_classes_by_default():
    model = timm.create_model("vit_small_patch14_dinov2_drelu", img_size=112, depth=1)
    assert model(torch.zeros(1, 3, 112, 112)).shape == (1, 128)
    model.reset_classifier(6)
    assert model(torch.zeros(1, 3, 112, 112)).shape == (1, 6)


def test_reset_classifier_changes_a_compatible_pooling():
    model = create("mobilenetv3_small_050_drelu").eval()
    learn_caps(model)
    dense, cap = model.classifier.dense.weight, model.classifier.activation.cap.clone()
    model.reset_classifier(3, "max")
    assert model.global_pool.pool_type == "max"
    assert model(torch.rand(1, 3, 64, 96)).shape == (1, 3)
    assert model.classifier.dense.weight is dense
    assert torch.equal(model.classifier.activation.cap, cap)


def test_reset_classifier_refuses_an_incompatible_pooling_and_changes_nothing():
    model = create("resnet18_drelu").eval()
    x = torch.rand(1, 3, 96, 96)
    before = model(x)
    with pytest.raises(
        InputError, match=r"'catavgmax' gives the classifier 1024 inputs, but .* has 512\. Set global_pool when"
    ):
        model.reset_classifier(3, "catavgmax")
    assert (model.num_classes, model.global_pool.pool_type) == (5, "avg")
    assert torch.equal(model(x), before)


def test_other_models_of_the_class_keep_their_methods():
    create("resnet18_drelu")
    plain = timm.create_model("resnet18", num_classes=5)
    plain.reset_classifier(2)
    assert plain.fc.in_features == 512


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("drelu", "DReLU(6, channel_dim=-1)"),
        ("srelu", "SReLU(cap=3.0)"),
        ("relu", "ReLU()"),
        ("relu6", "ReLU6()"),
        ("silu", "SiLU()"),
        ("gelu", "GELU(approximate='none')"),
        ("prelu", "PReLU(num_parameters=6)"),
        ("pssilu", "PSSiLU()"),
    ],
)
def test_controls_differ_in_the_activation_only(activation, expected):
    model = create("resnet18_drelu", activation=activation, width=6, cap=3.0)
    reference = create("resnet18_drelu", width=6)
    assert repr(model.fc.activation) == expected
    weights = other_weights(reference)
    assert other_weights(model) == weights
    assert all(torch.equal(model.get_parameter(name), reference.get_parameter(name)) for name in weights)


def other_weights(model: nn.Module) -> set[str]:
    """Return the names of the parameters outside the head's activation."""
    return {name for name, _ in model.named_parameters() if not name.startswith("fc.activation.")}


@pytest.mark.parametrize("placement", ["head", "stem", "all"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_at_every_placement(activation, placement, tmp_path):
    model = create("shallow_cnn_drelu", activation=activation, placement=placement, width=6)
    made = type(make_activation(activation, 1, 1.0))
    learned = [module for module in model.modules() if type(module) is made for _ in module.parameters()]
    with torch.no_grad():
        for module in learned:
            for parameter in module.parameters():
                assert parameter.ndim == 1  # so that weight decay excludes it
                parameter.copy_(torch.rand(parameter.shape) / 2 + 0.1)
    x = torch.rand(3, 1, 28, 28)
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    save_folder(model, tmp_path / "model")
    loaded = load_folder(tmp_path / "model")
    assert same(loaded, model)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert bool(learned) == (activation in ("drelu", "prelu", "pssilu", "pact", "tent", "fitact"))


@pytest.mark.parametrize(
    ("shape", "channel_dim", "dim"),
    [((2, 3), None, 1), ((2, 5, 3), None, 2), ((2, 3, 4, 5), None, 1), ((2, 4, 5, 3), -1, 3)],
)
def test_prelu_has_a_slope_per_channel(shape, channel_dim, dim):
    layer = PReLU(3, channel_dim=channel_dim)
    assert torch.equal(layer.weight, nn.PReLU(3).weight)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 0.25, 2.0]))
    values = layer(torch.full(shape, -4.0)).movedim(dim, 0).flatten(1)
    assert torch.equal(values, torch.tensor([[-2.0], [-1.0], [-8.0]]).expand_as(values))
    assert torch.equal(layer(torch.ones(shape)), torch.ones(shape))


def test_pssilu_equals_robustbenchs(robustbench):
    from robustbench.model_zoo.architectures.paf_wide_resnet import PSSiLU as Theirs

    ours, theirs, x = PSSiLU(), Theirs(), torch.linspace(-5, 5, 101)
    assert dict(ours.named_parameters()) == dict(theirs.named_parameters())
    for alpha, beta in ((1.0, 1e-8), (-2.0, -0.3)):
        for layer in (ours, theirs):
            nn.init.constant_(layer.alpha, alpha)
            nn.init.constant_(layer.beta, beta)
            layer.zero_grad()
            layer(x).square().sum().backward()
        assert torch.allclose(ours(x), theirs(x))
        assert torch.allclose(ours.alpha.grad, theirs.alpha.grad)
        assert torch.allclose(ours.beta.grad, theirs.beta.grad)


@pytest.mark.parametrize("layer", [PReLU(3), PSSiLU()])
def test_learned_activations_keep_bf16(layer):
    assert layer(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


# The other placements


def test_stem_is_a_convolution_behind_the_input():
    model = create("resnet18_drelu", placement="stem", width=6, cap=2.0, in_chans=2)
    assert repr(model.conv1.conv) == "Conv2d(2, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))"
    assert repr(model.conv1.activation) == "DReLU(6)"
    assert model.conv1.base.in_channels == 6
    assert (model.pretrained_cfg["first_conv"], model.pretrained_cfg["input_size"][0]) == ("conv1.conv", 3)
    assert isinstance(model.fc, nn.Linear)
    assert model(torch.rand(1, 2, 96, 96)).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "first_conv"),
    [
        ("vit_tiny_patch16_224", "patch_embed.proj.conv"),
        ("repvgg_a0", "stem.conv"),  # two branches on the image share one convolution
        ("crossvit_tiny_240", ("patch_embed.0.proj.conv", "patch_embed.1.proj.conv")),
        ("tresnet_m", "body.conv1.conv.conv"),  # space to depth comes first
    ],
)
def test_stem_for_other_families(name, first_conv):
    model = timm.create_model(f"{name}_drelu", num_classes=5, placement="stem", width=16).eval()
    assert model(images(model)).shape == (2, 5)
    assert model.pretrained_cfg["first_conv"] == first_conv


def test_stem_needs_a_convolution():
    with pytest.raises(InputError, match=r"dense_drelu: placement 'stem' needs a convolution .* The nearest is \w+"):
        create("dense_drelu", placement="stem")


@pytest.mark.skipif(not timm.is_model("naflexvit_base_patch16_gap"), reason="this timm has no patches by a Linear")
def test_stem_refuses_patches_by_a_linear_layer():
    with pytest.raises(
        InputError, match=r"naflexvit_base_patch16_gap_drelu: placement 'stem' needs a convolution"
    ) as caught:
        create("naflexvit_base_patch16_gap_drelu", placement="stem")
    assert "nearest is naflexvit" not in str(caught.value)


def test_all_gives_each_channel_of_each_activation_a_cap():
    model = create("resnet18_drelu", placement="all", cap=5.0).eval()
    assert not [module for module in model.modules() if isinstance(module, nn.ReLU)]
    assert sorted({layer.cap.numel() for layer in cap_layers(model)}) == [64, 128, 256, 512]
    plain = timm.create_model("resnet18", num_classes=5).eval()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if not name.endswith(".cap")})
    x = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        for layer in cap_layers(model):
            layer.cap.fill_(float("inf"))
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize(
    ("name", "channels", "channel_dim"),
    [
        ("vit_tiny_patch16_224", 768, None),  # [B, N, C]
        ("convnext_tiny", 384, -1),  # [B, H, W, C]
        ("efficientnet_b0", 32, None),  # [B, C, H, W]
        ("mixer_s32_224", 256, None),  # [B, C, N]: the units of a Linear over tokens
    ],
)
def test_all_finds_the_channel_dimension(name, channels, channel_dim):
    model = timm.create_model(f"{name}_drelu", placement="all")
    first = next(cap_layers(model))
    assert (first.cap.numel(), first.channel_dim) == (channels, channel_dim)


def test_all_keeps_gates():
    model = timm.create_model("efficientnet_b0_drelu", placement="all")
    gates = [module for name, module in model.named_modules() if name.endswith("se.gate")]
    assert {type(gate).__name__ for gate in gates} == {"Sigmoid"}


def test_all_with_relu_is_the_control():
    model = create("shallow_cnn_drelu", placement="all", activation="relu6")
    assert [type(module) for module in (model.act1, model.act2, model.act3)] == [nn.ReLU6] * 3


def test_all_restores_the_model_after_its_probe():
    model = create("resnet18_drelu", placement="all")
    assert model.training
    assert model.bn1.num_batches_tracked == 0
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("placement", ["head", "stem", "all"])
@pytest.mark.parametrize("name", ["resnet18_drelu", "mobilenetv3_small_050_drelu", "shallow_cnn_drelu"])
def test_features_only(placement, name):
    net = timm.create_model(name, features_only=True, placement=placement, width=6).eval()
    base = timm.create_model(name.removesuffix("_drelu"), features_only=True)
    assert net.feature_info.channels() == base.feature_info.channels()
    size = base.pretrained_cfg["input_size"]
    shapes = [feature.shape for feature in net(torch.rand(1, *size))]
    assert shapes == [feature.shape for feature in base.eval()(torch.rand(1, *size))]
    assert len(list(cap_layers(net))) == {"head": 0, "stem": 1}.get(placement, len(list(cap_layers(net))))


# Small images


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet18d", "densenet121", "regnetx_002", "resnetv2_50", "mobilenetv2_035"]
)
def test_small_images_keep_their_size_in_the_stem(name):
    model = timm.create_model(f"{name}_drelu", num_classes=5, small_images=True).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    plain = timm.create_model(name).eval()
    reduction = 64 // plain.forward_features(torch.zeros(1, 3, 64, 64)).shape[-1]
    small = 64 // model.forward_features(torch.zeros(1, 3, 64, 64)).shape[-1]
    pooled = name.startswith(("resnet", "densenet"))
    assert reduction == small * (4 if pooled else 2)


def test_small_images_keep_the_center_of_a_larger_kernel():
    base, small = create("resnet18_drelu"), create("resnet18_drelu", small_images=True)
    assert torch.allclose(small.conv1.weight, base.conv1.weight[:, :, 2:5, 2:5] * 7 / 3)
    assert isinstance(small.maxpool, nn.Identity)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "repvgg_a0"])
def test_other_families_upsample_small_images(name):
    model = timm.create_model(f"{name}_drelu", num_classes=5, small_images=True).eval()
    x = torch.zeros(2, 3, 32, 32)
    assert model(x).shape == (2, 5)
    assert model.forward_head(model.forward_features(x)).shape == (2, 5)
    assert model.upsample.size == (224, 224)


def test_inception_trains_at_32x32():
    model = create("inception_v3_drelu", small_images=True, width=8)
    nn.functional.cross_entropy(model(torch.rand(2, 3, 32, 32)), torch.tensor([0, 1])).backward()
    assert model.Conv2d_1a_3x3.conv.weight.grad.abs().sum() > 0


def test_small_images_are_restored_from_a_folder(tmp_path):
    model = create("convnext_atto_drelu", small_images=True).eval()
    model.pretrained_cfg.update(input_size=(3, 32, 32))
    save_folder(model, tmp_path / "model")
    loaded = load_folder(tmp_path / "model").eval()
    x = torch.rand(1, 3, 32, 32)
    assert loaded.upsample.size == (224, 224)
    assert torch.equal(loaded(x), model(x))


def test_small_images_change_nothing_in_the_papers_models():
    assert repr(create("shallow_cnn_drelu", small_images=True)) == repr(create("shallow_cnn_drelu"))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18_drelu", {"pretrained_cfg_overlay": {"input_size": (3, 32, 32)}}),
        ("resnet18_drelu", {"pretrained_cfg_overlay": {"input_size": (3, 32, 32)}, "placement": "stem"}),
        ("vit_tiny_patch16_224_drelu", {"img_size": 32, "depth": 1}),
    ],
)
def test_create_model_warns_of_an_imagenet_stem_on_small_images(name, kwargs):
    with pytest.warns(DReLUWarning, match=f"{name} starts with an ImageNet stem.*32x32.*small_images=True"):
        create(name, **kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18_drelu", {}),
        ("resnet18_drelu", {"small_images": True, "pretrained_cfg_overlay": {"input_size": (3, 32, 32)}}),
        ("vit_tiny_patch16_224_drelu", {"img_size": 32, "patch_size": 4, "depth": 1}),
        ("dense_drelu", {}),
        ("strided_cnn_drelu", {}),
    ],
)
def test_no_warning_for_suitable_stems(name, kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error", DReLUWarning)
        create(name, **kwargs)


# Weights


@pytest.fixture
def base_weights(tmp_path, monkeypatch):
    """Replace resnet18's hub id in timm's registry by a file; yield the model in it."""
    torch.manual_seed(7)
    model = timm.create_model("resnet18")
    path = tmp_path / "base.pth"
    torch.save(model.state_dict(), path)
    for name in ("resnet18", "resnet18.a1_in1k", "resnet18_drelu", "resnet18_drelu.a1_in1k"):
        cfg = copy.copy(_model_pretrained_cfgs[name])
        cfg.file, cfg.hf_hub_id, cfg.url = str(path), None, None
        monkeypatch.setitem(_model_pretrained_cfgs, name, cfg)
    return model, path


def backbone(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if not name.startswith("fc.")}


@pytest.mark.parametrize("name", ["resnet18_drelu", "resnet18_drelu.a1_in1k"])
@pytest.mark.parametrize("num_classes", [1000, 5])
def test_pretrained_fills_the_backbone_and_logs_it(base_weights, caplog, name, num_classes):
    base, _ = base_weights
    with caplog.at_level(logging.INFO, "drelu_timm"):
        model = create(name, pretrained=True, num_classes=num_classes)
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in backbone(model).items())
    assert model.fc.output.out_features == num_classes
    assert "weights of resnet18 in the backbone, the new layers are untrained" in caplog.text


def test_pretrained_with_the_registered_cfg_as_a_dict(base_weights):
    base, _ = base_weights
    cfg = timm.get_pretrained_cfg("resnet18_drelu").to_dict()  # as timm 1.0.31's train.py resolves it
    model = create("resnet18_drelu", pretrained=True, pretrained_cfg=cfg)
    assert torch.equal(model.conv1.weight, base.conv1.weight)


def test_pretrained_stem_keeps_the_first_convolution_that_timm_adapts(base_weights):
    base, _ = base_weights
    model = create("resnet18_drelu", pretrained=True, placement="stem", width=6)
    repeated = base.conv1.weight.repeat(1, 2, 1, 1) * 3 / 6
    assert torch.allclose(model.conv1.base.weight, repeated)


def test_weights_of_the_base_from_a_file(base_weights):
    base, path = base_weights
    overlay = {"file": str(path), "architecture": "resnet18"}
    model = create("resnet18_drelu", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.conv1.weight, base.conv1.weight)


@pytest.fixture
def trained(tmp_path):
    """Return a small variant with learned caps, and its folder."""
    model = create("shallow_cnn_drelu", width=6, in_chans=2, img_size=8, cap=50.0)
    learn_caps(model)
    save_folder(model, tmp_path / "model")
    return model, tmp_path / "model"


ARGUMENTS = {"width": 6, "in_chans": 2, "img_size": 8}


def test_a_file_overlay_is_the_whole_variant(trained):
    model, folder = trained
    overlay = {"file": str(folder / "model.safetensors"), "num_classes": 5, "input_size": (2, 8, 8)}
    loaded = create("shallow_cnn_drelu", pretrained=True, pretrained_cfg_overlay=overlay, **ARGUMENTS)
    assert same(loaded, model)


def test_a_state_dict_overlay_is_the_whole_variant(trained):
    model, _ = trained
    overlay = {"state_dict": model.state_dict(), "num_classes": 5, "input_size": (2, 8, 8)}
    assert same(create("shallow_cnn_drelu", pretrained=True, pretrained_cfg_overlay=overlay, **ARGUMENTS), model)


def test_another_number_of_classes_replaces_only_the_output_layer(trained):
    model, folder = trained
    overlay = {"file": str(folder / "model.safetensors"), "num_classes": 5, "input_size": (2, 8, 8)}
    loaded = create(
        "shallow_cnn_drelu", pretrained=True, pretrained_cfg_overlay=overlay, **{**ARGUMENTS, "num_classes": 3}
    )
    assert loaded.fc.output.out_features == 3
    assert torch.equal(loaded.fc.dense.weight, model.fc.dense.weight)
    assert torch.equal(loaded.fc.activation.cap, model.fc.activation.cap)


def test_weights_for_four_channels_are_loaded(tmp_path):
    model = create("resnet18_drelu", in_chans=4, width=6)
    overlay = {"state_dict": model.state_dict(), "num_classes": 5, "input_size": (4, 224, 224)}
    loaded = create("resnet18_drelu", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=4, width=6)
    assert same(loaded, model)


def test_features_of_a_trained_variant():
    model = create("resnet18_drelu", placement="all")
    learn_caps(model)
    overlay = {"state_dict": model.state_dict(), "num_classes": 5}
    net = timm.create_model(
        "resnet18_drelu", pretrained=True, pretrained_cfg_overlay=overlay, placement="all", features_only=True
    )
    assert torch.equal(net.layer1[0].act1.cap, model.layer1[0].act1.cap)
    assert torch.equal(net.conv1.weight, model.conv1.weight)


def test_weights_of_another_kind_are_refused(base_weights):
    _, path = base_weights
    other = str(path.with_name("copy.pth"))
    path.rename(other)
    with pytest.raises(
        InputError, match=r"resnet18_drelu: the weights of .* do not fit: .* names differ.*architecture='resnet18'"
    ):
        create("resnet18_drelu", pretrained=True, pretrained_cfg_overlay={"file": other})


@pytest.mark.parametrize("num_classes", [5, 3])
def test_weights_of_another_width_are_refused(trained, num_classes):
    _, folder = trained
    overlay = {"file": str(folder / "model.safetensors"), "num_classes": 5, "input_size": (2, 8, 8)}
    arguments = {**ARGUMENTS, "width": 7, "num_classes": num_classes}
    with pytest.raises(InputError, match=r"do not fit: .*size mismatch for fc\.dense\.weight"):
        create("shallow_cnn_drelu", pretrained=True, pretrained_cfg_overlay=overlay, **arguments)


def test_a_missing_file_of_weights_is_refused():
    with pytest.raises(InputError, match=r"the weights of nowhere\.safetensors cannot be loaded: FileNotFoundError"):
        create("shallow_cnn_drelu", pretrained=True, pretrained_cfg_overlay={"file": "nowhere.safetensors"})


class Harm:
    """Object whose unpickling creates a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture
def hostile(tmp_path):
    """Yield a checkpoint whose unpickling creates a file; the file must not exist afterwards."""
    torch.save({"fc.weight": Harm(tmp_path / "harm")}, tmp_path / "bad.pth")
    yield str(tmp_path / "bad.pth")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("overlay", [{}, {"architecture": "shallow_cnn"}])
@pytest.mark.parametrize("name", ["shallow_cnn_drelu", "shallow_cnn"])
def test_a_pickle_that_runs_code_is_refused(hostile, name, overlay):
    with pytest.raises(InputError, match=r"bad\.pth cannot be loaded: (UnpicklingError|RuntimeError)"):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": hostile, **overlay})


ROBUST = "drelutimm2026_dense_drelu_at_eps01_mnist_linf"


@pytest.mark.parametrize("name", ["shallow_cnn_drelu", "shallow_cnn", "resnet18_drelu", ROBUST])
def test_a_checkpoint_path_that_runs_code_is_refused(hostile, name):
    with pytest.raises((InputError, RuntimeError), match=r"contain only weights|weights_only=True blocked"):
        timm.create_model(name, checkpoint_path=hostile, pretrained=name == ROBUST)


@pytest.mark.skipif(NEWEST, reason="this timm unpickles nothing")
def test_the_checkpoint_path_of_other_models_is_timms(hostile, tmp_path):
    with pytest.raises(RuntimeError, match="Error"):
        timm.create_model("resnet18", checkpoint_path=hostile)
    (tmp_path / "harm").unlink()


def test_a_checkpoint_of_timms_training_script(trained, tmp_path):
    model, _ = trained
    torch.save({"state_dict": model.state_dict(), "args": Namespace(lr=0.1)}, tmp_path / "last.pth.tar")
    assert same(create("shallow_cnn_drelu", checkpoint_path=str(tmp_path / "last.pth.tar"), **ARGUMENTS), model)


def test_checkpoint_path(trained):
    model, folder = trained
    loaded = create("shallow_cnn_drelu", checkpoint_path=str(folder / "model.safetensors"), **ARGUMENTS)
    assert same(loaded, model)


# Folders


@pytest.mark.skipif(not NEWEST, reason="timm 1.0.9 knows no local-dir")
@pytest.mark.parametrize("save", ["ours", "timm"])
@pytest.mark.parametrize("placement", ["head", "stem", "all"])
def test_local_dir(tmp_path, save, placement):
    model = create("shallow_cnn_drelu", placement=placement, width=6, img_size=8, in_chans=2)
    learn_caps(model)
    if save == "ours":
        save_folder(model, tmp_path / "model")
    else:
        timm.models.save_for_hf(model, tmp_path / "model", safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert same(loaded, model)
    assert loaded.num_classes == 5
    fewer = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, num_classes=3)
    assert fewer.num_classes == 3
    assert all(
        torch.equal(ours.cap, theirs.cap) for ours, theirs in zip(cap_layers(fewer), cap_layers(model), strict=True)
    )


@pytest.mark.parametrize("placement", ["head", "stem", "all"])
@pytest.mark.parametrize("activation", ["drelu", "srelu"])
def test_a_folder_restores_all_arguments(tmp_path, placement, activation):
    kwargs = {"placement": placement, "activation": activation, "width": 6, "cap": 3.0, "in_chans": 2, "img_size": 8}
    model = create("shallow_cnn_drelu", **kwargs).eval()
    learn_caps(model)
    model.pretrained_cfg.update(mean=(0.1, 0.2), std=(0.3, 0.4))
    save_folder(model, tmp_path / "model")
    loaded = load_folder(tmp_path / "model").eval()
    assert same(loaded, model)
    assert torch.equal(loaded(torch.ones(1, 2, 8, 8)), model(torch.ones(1, 2, 8, 8)))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architecture"] == "shallow_cnn_drelu"
    assert {**kwargs, "small_images": False} == config["model_args"]
    assert config["num_classes"] == 5
    assert (tuple(loaded.pretrained_cfg["mean"]), tuple(loaded.pretrained_cfg["input_size"])) == (
        (0.1, 0.2),
        (2, 28, 28),
    )


def test_a_folder_of_a_plain_timm_model(tmp_path):
    model = timm.create_model("resnet18", num_classes=3, in_chans=1)
    save_folder(model, tmp_path / "model", model_args={"in_chans": 1})
    assert same(load_folder(tmp_path / "model"), model)


@pytest.mark.parametrize("num_classes", [9, 0])
def test_a_folder_after_reset_classifier(tmp_path, num_classes):
    model = create("shallow_cnn_drelu", width=6)
    model.reset_classifier(num_classes)
    save_folder(model, tmp_path / "model")
    loaded = load_folder(tmp_path / "model")
    assert loaded.num_classes == num_classes
    assert same(loaded, model)


@pytest.mark.parametrize("num_classes", [9, 0])
def test_a_folder_of_an_earlier_version_with_num_classes_in_its_arguments(tmp_path, num_classes):
    model = create("shallow_cnn_drelu", width=6)
    model.reset_classifier(num_classes)
    save_folder(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["model_args"]["num_classes"] = num_classes
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert same(load_folder(tmp_path / "model"), model)


@pytest.mark.skipif(not NEWEST, reason="TimmWrapper needs the huggingface_hub that timm 1.0.9 loses")
@pytest.mark.parametrize("placement", ["head", "stem", "all"])
def test_transformers_reads_a_folder(tmp_path, placement):
    transformers = pytest.importorskip("transformers")
    model = create("shallow_cnn_drelu", placement=placement, width=6, cap=3.0, img_size=8, in_chans=2).eval()
    learn_caps(model)
    save_folder(model, tmp_path / "model")
    wrapped = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path / "model").eval()
    x = torch.rand(2, 2, 8, 8)
    assert torch.equal(wrapped(pixel_values=x).logits, model(x))


def test_nothing_is_overwritten(trained):
    model, folder = trained
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    with pytest.raises(InputError, match=r"model exists already\. Choose a new folder"):
        save_folder(model, folder)
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())


def test_a_failed_save_leaves_nothing(tmp_path):
    model = create("shallow_cnn_drelu", width=6)
    with pytest.raises(TypeError):
        save_folder(model, tmp_path / "model", model_args={"norm_layer": object()})
    assert list(tmp_path.iterdir()) == []


def spoil(folder, what: str) -> None:
    config, weights = folder / "config.json", folder / "model.safetensors"
    text = json.loads(config.read_text())
    match what:
        case "no folder":
            folder.rename(folder.with_name("elsewhere"))
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "no weights":
            weights.unlink()
        case "cut config":
            config.write_text(config.read_text()[:50])
        case "other json":
            config.write_text("[]")
        case "unknown architecture":
            config.write_text(json.dumps({**text, "architecture": "shallow_cnn_dreluu"}))
        case "other width":
            config.write_text(json.dumps({**text, "model_args": {**text["model_args"], "width": 7}}))
        case "unknown argument":
            config.write_text(json.dumps({**text, "model_args": {**text["model_args"], "colour": 7}}))
        case "other file":
            config.write_text(json.dumps({**text, "model_args": {"checkpoint_path": "x.pth"}}))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no folder", "config.json cannot be read"),
        ("cut weights", "model.safetensors cannot be read"),
        ("no weights", "model.safetensors cannot be read"),
        ("cut config", "config.json cannot be read"),
        ("other json", "config.json is not a JSON object"),
        ("unknown architecture", "architecture 'shallow_cnn_dreluu' is unknown; did you mean shallow_cnn_drelu"),
        ("other width", "is not a complete shallow_cnn_drelu .*size mismatch"),
        ("unknown argument", "is not a complete shallow_cnn_drelu .*colour"),
        ("other file", "model_args contains checkpoint_path"),
    ],
)
def test_the_error_names_a_broken_folder(trained, what, message):
    _, folder = trained
    spoil(folder, what)
    with pytest.raises(InputError, match=message) as caught:
        load_folder(folder)
    assert "\n" not in str(caught.value)


# Errors before any work


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"placement": "haed"}, "placement 'haed' is unknown; did you mean head"),
        ({"activation": "dreul"}, "activation 'dreul' is unknown; did you mean drelu"),
        ({"activation": "pslu"}, "activation 'pslu' is unknown; did you mean pssilu"),
        ({"width": 0}, "width 0 is not a number of units. Use an integer of at least 1"),
        ({"cap": -1.0}, "cap -1.0 is not a finite number above 0"),
    ],
)
def test_unknown_values_are_refused_before_anything_is_built(kwargs, message, monkeypatch):
    monkeypatch.setattr("drelu_timm.models.variants.Variant.build", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(InputError, match=message):
        create("resnet18_drelu", **kwargs)


@pytest.mark.skipif(not timm.is_model("qwen3_vit_88m_enc"), reason="this timm has no encoders without a classifier")
def test_an_encoder_without_a_classifier_is_refused():
    with pytest.raises(
        InputError, match=r"qwen3_vit_88m_enc_drelu: placement 'head' needs a classifier.*nearest is qwen3"
    ):
        timm.create_model("qwen3_vit_88m_enc_drelu")


# timm's and torch's tools


def test_normalized():
    model = create("shallow_cnn_drelu", in_chans=2, img_size=8).eval()
    x = torch.rand(3, 2, 8, 8)
    whole = normalized(model, mean=(0.5, 0.25), std=(0.1, 0.2))
    expected = model((x - torch.tensor([0.5, 0.25]).view(1, 2, 1, 1)) / torch.tensor([0.1, 0.2]).view(1, 2, 1, 1))
    assert torch.allclose(whole(x), expected)
    assert whole.model is model
    assert list(dict(whole.named_children())) == ["normalize", "model"]


def test_normalized_takes_the_models_own_statistics():
    whole = normalized(create("resnet18_drelu"))
    assert whole.normalize.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    grey = normalized(create("resnet18_drelu", in_chans=1))
    assert grey.normalize.mean.flatten().tolist() == pytest.approx([(0.485 + 0.456 + 0.406) / 3])


def test_normalized_refuses_images_with_other_channels():
    with pytest.raises(InputError, match="images have 1 channels, but the model takes 3"):
        normalized(create("resnet18_drelu"))(torch.rand(1, 1, 96, 96))


def test_optimizer_groups_exclude_caps_from_weight_decay():
    model = create("resnet18_drelu", width=6)
    groups = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=1e-4).param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decay[id(model.fc.activation.cap)] == 0
    assert decay[id(model.fc.dense.weight)] == 1e-4
    assert len(decay) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["resnet18_drelu", "vit_tiny_patch16_224_drelu", "dense_drelu", "shallow_cnn_drelu"])
def test_layer_decay(name):
    model = create(name)
    groups = create_optimizer_v2(model, "adamw", lr=0.1, layer_decay=0.5).param_groups
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert scale[id(next(cap_layers(model)).cap)] == 1.0 == max(scale.values())
    assert min(scale.values()) < 1.0


def test_gradient_checkpointing():
    model = create("resnet18_drelu")
    model.set_grad_checkpointing()
    model(torch.rand(2, 3, 96, 96)).sum().backward()
    assert model.conv1.weight.grad is not None
    with pytest.raises(InputError, match="Dense has no gradient checkpointing"):
        create("dense_drelu").set_grad_checkpointing()


def test_resolve_model_data_config():
    ours, base = timm.create_model("resnet50_drelu.a1_in1k"), timm.create_model("resnet50.a1_in1k")
    assert timm.data.resolve_model_data_config(ours) == timm.data.resolve_model_data_config(base)


def test_deepcopy_is_independent(toy_model):
    twin = copy.deepcopy(toy_model)
    twin.reset_classifier(2)
    learn_caps(twin)
    assert toy_model.num_classes == 3
    assert toy_model(torch.rand(1, 1, 8, 8)).shape == (1, 3)
    assert twin(torch.rand(1, 1, 8, 8)).shape == (1, 2)
    assert not torch.equal(toy_model.fc.activation.cap, twin.fc.activation.cap)


def test_compiles_without_a_graph_break():
    model = create("resnet18_drelu").eval()
    x = torch.rand(1, 3, 32, 32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert torch.allclose(compiled, model(x), atol=1e-5)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_ddp(toy_model, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(toy_model)
        model(torch.rand(2, 1, 8, 8)).sum().backward()
        assert isinstance(toy_model.fc.activation, DReLU)
        assert toy_model.fc.activation.cap.grad is not None
    finally:
        torch.distributed.destroy_process_group()


TRAIN_SCRIPT = os.environ.get("TIMM_TRAIN_SCRIPT", "")


@pytest.mark.skipif(not TRAIN_SCRIPT, reason="TIMM_TRAIN_SCRIPT names no train.py of timm, which its wheel leaves out")
def test_timms_own_training_script(tmp_path):
    for split in ("train", "validation"):
        for label in ("dark", "light"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for index in range(4):
                Image.new("L", (96, 96), 200 * (label == "light") + index).convert("RGB").save(folder / f"{index}.png")
    flags = (
        "--device-modules drelu_timm --model resnet18_drelu --num-classes 2 --img-size 96 --batch-size 4 --epochs 1 "
        "--device cpu --workers 1 --opt adam --lr 1e-3 --model-kwargs width=16 --experiment run"
    )
    command = [sys.executable, TRAIN_SCRIPT, "--data-dir", tmp_path / "images", "--output", tmp_path, *flags.split()]
    subprocess.run(command, check=True, capture_output=True)
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=True)
    assert checkpoint["state_dict"]["fc.activation.cap"].shape == (16,)
