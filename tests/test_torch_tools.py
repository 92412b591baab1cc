"""Generic tools of torch and timm work with the `_drelu` variants."""

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

from drelu_timm import DReLU, InputError, normalized
from drelu_timm.models.drelu import cap_layers
from drelu_timm.models.head import DReLUHead

# One CNN, one transformer, two heads in distilled models, the heads inside other modules, a 1x1 convolution, ours.
MODELS = {
    "resnet10t": {},
    "vit_tiny_patch16_224": {"depth": 1},
    "deit_tiny_distilled_patch16_224": {"depth": 1},
    "repvit_m0_9": {},
    "dla46_c": {},
    "shallow_cnn": {},
}
SMALL = ["shallow_cnn", "vit_tiny_patch16_224"]


def create(name: str, **kwargs) -> nn.Module:
    """Return a variant in eval mode with units at 0, below and above their caps, and with a negative cap."""
    torch.manual_seed(0)
    model = timm.create_model(
        f"{name}_drelu", **{"num_classes": 5, "width": 7, **MODELS.get(name, {}), **kwargs}
    ).eval()
    with torch.no_grad():
        for head in [module for module in model.modules() if isinstance(module, DReLUHead)]:
            head.dense.weight.mul_(0.01)
            head.dense.bias.copy_(torch.linspace(-3.0, 6.0, 7))
            head.activation.cap.copy_(torch.tensor([1.0, 1.0, 1.0, -0.5, 20.0, 1.0, 20.0]))
    return model


def base(name: str, **kwargs) -> nn.Module:
    return timm.create_model(name, **{"num_classes": 5, **MODELS[name], **kwargs}).eval()


def images(model: nn.Module, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, *model.pretrained_cfg["input_size"], generator=generator)


@torch.no_grad()
def same_output(other: nn.Module, model: nn.Module, x: torch.Tensor | None = None) -> bool:
    x = images(model) if x is None else x
    return torch.allclose(other(x), model(x), atol=1e-5)


def same_gradients(other: nn.Module, model: nn.Module) -> bool:
    gradients = []
    for each in (other, model):
        x = images(model).requires_grad_()
        caps = [parameter for name, parameter in each.named_parameters() if name.endswith(".cap")]
        gradients.append(torch.autograd.grad(each(x).square().sum(), (x, *caps)))
    assert all(gradient.any() for gradient in gradients[0])
    return all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(*gradients, strict=True))


# Pickle


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def sent(model: nn.Module) -> nn.Module:
    """Return a copy by the pickling of torch.multiprocessing."""
    return pickle.loads(ForkingPickler.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("copied", [pickled, sent, saved, copy.deepcopy, copy.copy])
def test_copies_have_the_class_of_the_model(name, copied):
    model = create(name)
    other = copied(model)
    assert type(other) is type(model)
    assert vars(other).keys() == vars(model).keys()
    assert same_output(other, model)
    if copied is not copy.copy:  # which shares the modules
        other.reset_classifier(3)
        assert other.num_classes == 3
        assert model.num_classes == 5
        assert len(list(cap_layers(other))) == len(list(cap_layers(model)))


def test_two_mixins_and_a_normalization_are_pickled():
    model = create("convnext_atto", small_images=True)
    other = pickled(normalized(model))
    x = torch.rand(1, 3, 32, 32)
    assert type(other.model) is type(model)
    assert same_output(other, normalized(model), x)
    assert same_output(other.model, model, torch.rand(1, 3, 224, 224))


# Graphs


@pytest.mark.parametrize("name", MODELS)
def test_fx_traces_and_keeps_the_gradients(name):
    model = create(name)
    graph = torch.fx.symbolic_trace(model)
    assert same_output(graph, model)
    assert same_gradients(graph, model)


def test_fx_traces_a_small_model_with_normalization_and_upsampling():
    model = create("convnext_atto", small_images=True)
    x = torch.rand(1, 3, 32, 32)
    graph = torch.fx.symbolic_trace(normalized(model))
    assert same_output(graph, normalized(model), x)
    with pytest.raises(InputError, match="images have 1 channels, but the model takes 3"):
        graph(torch.rand(1, 1, 32, 32))


@pytest.mark.parametrize("placement", ["head", "stem", "all"])
@pytest.mark.parametrize(
    ("name", "kwargs"), [("resnet10t", {"feature_cls": "fx"}), ("legacy_xception", {}), ("tresnet_m", {})]
)
def test_features_only_with_every_method_of_timm(name, kwargs, placement):
    net = create(name, features_only=True, placement=placement, width=32, **kwargs)
    plain = timm.create_model(name, features_only=True, **kwargs).eval()
    x = torch.rand(1, *plain.pretrained_cfg["input_size"])
    assert [feature.shape for feature in net(x)] == [feature.shape for feature in plain(x)]
    assert any(cap_layers(net)) == (placement != "head")


def test_feature_extractor_of_torchvision():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = create("resnet10t")
    x = images(model)
    features = extraction.create_feature_extractor(model, ["layer4", "fc.dense", "fc.output"])(x)
    assert torch.equal(features["fc.output"], model(x))
    assert features["fc.dense"].shape == (2, 7)
    assert torch.equal(features["layer4"], model.forward_features(x))


def test_torchscript_finds_the_constants_of_the_base():
    """Without the base's constant, TorchScript compiles a branch of fastvit that is never taken."""
    assert type(timm.create_model("fastvit_t8_drelu")).__annotations__["fork_feat"] == torch.jit.Final[bool]


@pytest.mark.parametrize("name", MODELS)
def test_torchscript(name):
    model = create(name)
    for compiled in (torch.jit.script(model), torch.jit.trace(model, images(model))):
        file = io.BytesIO()
        torch.jit.save(compiled, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        assert same_output(loaded, model)
        assert same_gradients(loaded, model)
    assert model.forward_head(model.forward_features(images(model)), pre_logits=True).shape == (2, 7)


def test_torchscript_of_a_normalized_model():
    model = normalized(create("shallow_cnn"))
    x = torch.rand(2, 1, 28, 28)
    assert same_output(torch.jit.script(model), model, x)
    with pytest.raises(Exception, match="images have 3 channels, but the model takes 1"):
        torch.jit.script(model)(torch.rand(2, 3, 28, 28))


def test_torchscript_of_upsampling_is_refused_and_traced():
    model = create("convnext_atto", small_images=True)
    with pytest.raises(InputError, match=r"cannot compile ConvNeXt with upsampling in front\. Use torch\.jit\.trace"):
        torch.jit.script(normalized(model))
    x = torch.rand(1, 3, 32, 32)
    assert same_output(torch.jit.trace(model, x), model, x)


@pytest.mark.parametrize("name", SMALL)
def test_export(name):
    model = create(name)
    assert same_output(torch.export.export(model, (images(model),)).module(), model)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(name, dynamo, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    model = create(name)
    x = images(model)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=dynamo)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(out), model(x), atol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SMALL)
def test_compile(name, backend):
    model = create(name)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert same_output(compiled, model)
    assert same_gradients(compiled, model)


# torch.func and derivatives


def test_derivatives_of_a_model():
    model = create("shallow_cnn").double()
    x = images(model, 1).double()
    backward = torch.autograd.functional.jacobian(model, x)
    vectorized = torch.autograd.functional.jacobian(model, x, vectorize=True)
    assert torch.allclose(vectorized, backward)
    direction = torch.rand_like(x)
    _, forward = torch.func.jvp(model, (x,), (direction,))
    assert torch.allclose(forward, (backward * direction).sum((-4, -3, -2, -1)))


def test_gradients_per_example():
    model = create("shallow_cnn")
    x = images(model, 3)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict, example: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, example[None]).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for index, example in enumerate(x):
        one = torch.func.grad(loss)(parameters, example)
        assert all(torch.allclose(gradients[name][index], one[name], atol=1e-6) for name in one)


# timm's classifier


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "repvit_m0_9", "dla46_c"])
def test_unpooled_features_equal_the_bases(name):
    model, plain = create(name), base(name)
    plain.load_state_dict(model.state_dict(), strict=False)
    model.reset_classifier(0, "")
    plain.reset_classifier(0, "")
    x = images(model)
    assert torch.equal(model(x), plain(x))
    assert torch.equal(model.forward_head(model.forward_features(x), pre_logits=True), plain(x))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert model.head_hidden_size == plain.head_hidden_size
    assert (model.num_classes, isinstance(model.get_classifier(), DReLUHead)) == (0, False)
    created = timm.create_model(f"{name}_drelu", num_classes=0, global_pool="", **MODELS[name]).eval()
    created.load_state_dict(base(name, num_classes=0, global_pool="").state_dict())
    created.load_state_dict(plain.state_dict())
    assert torch.equal(created(x), plain(x))


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "repvit_m0_9", "dla46_c"])
@pytest.mark.parametrize("num_classes", [4, 0])
def test_an_unpooled_model_gets_heads_again(name, num_classes):
    model = create(name)
    paths = model.drelu_heads
    model.reset_classifier(0, "")
    created = timm.create_model(f"{name}_drelu", num_classes=0, global_pool="", width=7, **MODELS[name]).eval()
    for unpooled in (model, created):
        unpooled.reset_classifier(0)  # still unpooled: no classifier to remove
        assert not list(cap_layers(unpooled))
        unpooled.reset_classifier(num_classes, "avg")
        assert unpooled.drelu_heads == paths
        assert unpooled(images(model)).shape == (2, num_classes or 7)
        assert unpooled.head_hidden_size == 7


def test_a_trained_variant_as_a_backbone(tmp_path):
    model = create("resnet10t")
    overlay = {"state_dict": model.state_dict(), "num_classes": 5}
    backbone = create(
        "resnet10t", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, global_pool="", width=7
    )
    x = images(model)
    assert torch.equal(backbone(x), model.forward_features(x))


@pytest.mark.parametrize("name", ["repvit_m0_9", "resnet10t", "dla46_c", "levit_128s", "crossvit_9_240"])
def test_a_change_of_the_pooling_keeps_heads_and_the_modules_around_them(name):
    model = create(name)
    before = copy.deepcopy(model.state_dict())
    model.reset_classifier(5, "avg")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before if ".output." not in key)


@pytest.mark.parametrize("name", ["repvit_m0_9", "levit_128s", "resnet10t"])
def test_reparameterized_models_give_the_same_output(name):
    model = create(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.running_mean)
    fused = timm.utils.reparameterize_model(model)
    assert same_output(fused, model)
    assert len(list(cap_layers(fused))) == len(list(cap_layers(model)))


def test_a_head_has_the_sizes_of_a_classifier():
    model = create("resnet10t")
    assert (model.fc.in_features, model.fc.out_features, model.fc.weight.shape) == (512, 5, (5, 7))
    assert model.fc.bias is model.fc.output.bias
    assert (create("dla46_c").fc.in_channels, create("dla46_c").fc.out_channels) == (256, 5)
    assert not hasattr(model.fc, "in_channels")
    model.reset_classifier(0)
    assert not hasattr(model.fc, "weight")


@pytest.mark.parametrize("name", ["resnet10t", "dla46_c"])
def test_the_weight_and_bias_of_a_head_are_assigned(name):
    model = create(name)
    head = next(module for module in model.modules() if isinstance(module, DReLUHead))
    names = [name for name, _ in model.named_parameters()]
    weight, bias = nn.Parameter(torch.ones_like(head.weight)), nn.Parameter(torch.full_like(head.bias, 2.0))
    head.weight, head.bias = weight, bias
    assert head.output.weight is head.weight is weight
    assert head.output.bias is head.bias is bias
    assert [name for name, _ in model.named_parameters()] == names
    head.reset(0)
    with pytest.raises(AttributeError, match="a head without classes has no weight"):
        head.weight = weight


def test_a_head_replaced_by_the_users_layer():
    model = create("resnet10t")
    model.fc = nn.Linear(model.fc.in_features, 3)
    assert model(images(model)).shape == (2, 3)
    assert model.get_classifier() is model.fc
    assert torch.equal(model.forward_head(model.forward_features(images(model))), model(images(model)))
    assert model.forward_head(model.forward_features(images(model)), pre_logits=True).shape == (2, 512)
    model.reset_classifier(4)
    assert isinstance(model.fc, nn.Linear) and model.fc.out_features == 4
    model.fc = nn.Identity()
    assert model(images(model)).shape == (2, 512)


def test_pruned_features_equal_the_bases():
    model, plain = create("vit_tiny_patch16_224", depth=2), base("vit_tiny_patch16_224", depth=2)
    plain.load_state_dict(model.state_dict(), strict=False)
    for each in (model, plain):
        each.prune_intermediate_layers(1, prune_head=True)
    assert torch.equal(model(images(model)), plain(images(model)))


@pytest.mark.skipif(not timm.is_model("naflexvit_base_patch16_gap"), reason="this timm has no NaFlexViT")
def test_patches_of_a_naflexvit_reach_its_head():
    model = create("naflexvit_base_patch16_gap", depth=1)
    patches, grid = torch.rand(2, 4, 768), torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).expand(2, 4, 2)
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    batch = {"patches": patches, "patch_coord": grid, "patch_valid": valid}
    out = model(batch)
    assert out.shape == (2, 5)
    assert not torch.equal(out, model({**batch, "patch_valid": torch.ones_like(valid)}))
    features = model.forward_features(**batch)
    assert torch.equal(model.forward_head(**features), out)
    assert model.forward_head(**features, pre_logits=True).shape == (2, 7)


# Calls, copies, devices and dtypes


@pytest.mark.parametrize("name", [*MODELS, "resnet18"])
def test_images_by_keyword(name):
    model = create(name)
    assert torch.equal(model(x=images(model)), model(images(model)))


def test_images_by_keyword_with_upsampling():
    model = create("convnext_atto", small_images=True)
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(model(x=x), model(x))
    assert torch.equal(model.forward_features(x=x), model.forward_features(x))


@pytest.mark.parametrize("placement", ["head", "stem", "all"])
@pytest.mark.parametrize("name", ["resnet10t", "shallow_cnn"])
def test_models_are_created_on_the_meta_device(name, placement):
    with torch.device("meta"):
        model = timm.create_model(f"{name}_drelu", placement=placement, small_images=True)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    model.to_empty(device="cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model = create("resnet10t", placement="all").to(dtype)
    assert model(images(model).to(dtype)).dtype == dtype


def test_channels_last_gives_the_same_output():
    model = create("resnet10t", placement="all")
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert same_output(other, model)


def test_averaged_weights():
    model = create("resnet10t")
    average = ModelEmaV3(model, decay=0.0)
    model.reset_classifier(5)
    average.update(model)
    assert same_output(average.module, model)


def test_dynamic_quantization():
    model = create("shallow_cnn")
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert isinstance(quantized.fc, DReLUHead)
    assert torch.allclose(quantized(images(model)), model(images(model)), atol=0.05)


def test_replicas():
    model = create("resnet10t")
    replica = model._replicate_for_data_parallel()
    assert type(replica) is type(model)
    assert same_output(replica, model)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_intermediates_equal_the_bases(name):
    model, plain = create(name), base(name)
    plain.load_state_dict(model.state_dict(), strict=False)
    x = images(model)
    (last, ours), (_, theirs) = model.forward_intermediates(x, indices=1), plain.forward_intermediates(x, indices=1)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert torch.equal(model.forward_head(last), model(x))


def test_every_d_relu_is_in_one_group_of_the_optimizer():
    model = create("vit_tiny_patch16_224")
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert sum(isinstance(module, DReLU) for module in model.modules()) == 1
