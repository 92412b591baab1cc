"""Models and settings of users: the numbers equal a plain module's, or an error of one line states why not."""

import contextlib
import functools
import random
import re
import types
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms.functional import normalize

from drelu_timm.attacks.pgd import PGD
from drelu_timm.attacks.square import Square
from drelu_timm.attacks.suites import SUITES
from drelu_timm.errors import DReLUWarning, InputError
from drelu_timm.evaluation.driver import Attacked
from drelu_timm.evaluation.evaluation import Evaluation, evaluate_model
from drelu_timm.models.inference import frozen

EPS = 0.05


class Net(nn.Module):
    """Normalises, convolves, pools; subclasses change one thing, and none changes the function that is computed."""

    def __init__(self):
        super().__init__()
        self.conv, self.deep = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(64, 5)

    def normalized(self, x):
        return (x - 0.5) / 0.25

    def flattened(self, x):
        return x.flatten(1)

    def forward(self, x):
        x = F.avg_pool2d(self.deep(self.conv(self.normalized(x)).relu()).relu(), 2)
        return self.head(self.flattened(x))


def made(kind=Net, **more):
    """A model of the class with the same weights as every other one."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = kind(**more)
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def one_attack():
    """A suite of a white-box and a black-box attack, named "two"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SUITES, "two", {"pgd": {"pgd": PGD()}, "square": {"square": Square(n_queries=60)}})
        yield


@pytest.fixture(scope="module")
def images():
    return torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def labels(images):
    """What the plain model gives, except for the first."""
    with torch.no_grad():
        labels = made()(images).argmax(dim=1)
    labels[0] = (labels[0] + 1) % 5
    return labels


@pytest.fixture(scope="module")
def plain(images, labels):
    """The evaluation of the plain model."""
    return measured(made(), images, labels)


def measured(model, images, labels, **options) -> Evaluation:
    return evaluate_model(model, images, labels, **{"eps": EPS, "suite": "two", "batch_size": 16, **options})


def numbers(result: Evaluation):
    """What must not depend on how a model is brought."""
    return result.clean, result.accuracy, result.worst, result.broken.by, str(result.verdict)


def test_the_plain_model_has_something_to_find(plain):
    assert plain.clean == 15 / 16
    assert 0.1 < plain.accuracy["pgd"] < plain.accuracy["square"] < plain.clean
    assert plain.model_dtype == "float32"
    assert not any("gradient reaches" in sentence for sentence in plain.verdict.evidence)


# Models that compute what the plain one does


class InPlace(Net):
    def normalized(self, x):
        return x.sub_(0.5).div_(0.25)


class NormalizeInPlace(Net):
    def normalized(self, x):
        return normalize(x, [0.5], [0.25], inplace=True)


class Views(Net):
    """Flattens as the CIFAR tutorial of PyTorch and TRADES' SmallCNN do: not possible in channels_last."""

    def flattened(self, x):
        return x.view(-1, 64)


class ViewsBackwards(Net):
    """As a hook written for the default layout: only the backward pass fails in channels_last."""

    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
            return gradient + 0 * ctx.saved_tensors[0].view(-1).mean()

    def flattened(self, x):
        return super().flattened(self.Same.apply(x))


class Standardized(Net):
    """Weight-standardised by `view`, which channels_last weights do not allow."""

    def forward(self, x):
        weight = self.deep.weight
        return super().forward(x) + 0 * weight.view(len(weight), -1).mean()


class Layouts(Net):
    """Gives other logits in channels_last, without an error."""

    def flattened(self, x):
        lying = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return x.flatten(1).flip(1) if lying else x.flatten(1)


class Squeezes(Net):
    """Loses the dimension of a batch of one."""

    def forward(self, x):
        return super().forward(x).squeeze()


class OnlyOfSixteen(Net):
    def flattened(self, x):
        return x.reshape(16, 64)


class OnlyOfOne(Net):
    def flattened(self, x):
        return x.reshape(1, 64)


class Output(Net):
    """Like outputs of transformers."""

    def forward(self, x):
        return types.SimpleNamespace(loss=None, logits=super().forward(x))


class Purifies(Net):
    """Takes a gradient inside, of a copy that is detached, and adds the result."""

    def normalized(self, x):
        points = x.detach().requires_grad_()
        energy = super().normalized(points).square().sum()
        (gradient,) = torch.autograd.grad(energy, points)
        return super().normalized(x) + 0 * gradient


class NeedsDefaults(Net):
    """Makes a tensor where it does not say of which dtype or device."""

    def forward(self, x):
        assert torch.ones(1).dtype == torch.get_default_dtype()
        return super().forward(x)


class OwnPrecision(Net):
    """Runs in float16 what it has in float16, and takes float32."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1, dtype=torch.float16))


def predicts(model, x, scale=1.0):
    return scale * model(x)


class Predictor:
    """No module, but holds some."""

    def __init__(self, model):
        self.models = {"a": model}

    def __call__(self, x):
        return self.models["a"](x)

    def logits(self, x):
        return self(x)


def exported(model, count, **options):
    return torch.export.export(model, (torch.rand(count, 1, 8, 8),), **options).module()


def any_batch():
    return {"dynamic_shapes": ({0: torch.export.Dim("batch", min=1, max=512)},)}


def in_inference_mode():
    with torch.inference_mode():
        return made()


SAME = {
    "in place": lambda: made(InPlace),
    "normalize(inplace)": lambda: made(NormalizeInPlace),
    "Hardtanh(inplace)": lambda: nn.Sequential(nn.Hardtanh(-1, 2, inplace=True), made()),
    "view": lambda: made(Views),
    "view in backward": lambda: made(ViewsBackwards),
    "weight.view": lambda: made(Standardized),
    "layout": lambda: made(Layouts),
    "in train mode": lambda: nn.Sequential(made(), nn.Dropout(0.9)).train(),
    "squeeze": lambda: made(Squeezes),
    "batches of 16": lambda: made(OnlyOfSixteen),
    "batches of 1": lambda: made(OnlyOfOne),
    ".logits": lambda: made(Output),
    "inner gradient": lambda: made(Purifies),
    "defaults": lambda: made(NeedsDefaults),
    "float16 buffer": lambda: made(OwnPrecision),
    "inference_mode weights": in_inference_mode,
    "lambda": lambda: (lambda model: lambda x: model(x))(made()),
    "partial": lambda: functools.partial(predicts, made(), scale=1.0),
    "partial keyword": lambda: functools.partial(lambda x, net: net(x), net=made()),
    "bound method": lambda: made().forward,
    "object": lambda: Predictor(made()),
    "object's method": lambda: Predictor(made()).logits,
    "export": lambda: exported(made(), 8, **any_batch()),
    "export of 16": lambda: exported(made(), 16),
    "export inside": lambda: nn.Sequential(exported(made(), 16), nn.Dropout(0.9)),
    "traced": lambda: torch.jit.trace(made(), torch.rand(2, 1, 8, 8)),
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Identity(), made())),
    "aot_eager": lambda: torch.compile(made(), backend="aot_eager"),
    "compiled function": lambda: torch.compile(made().forward, backend="aot_eager"),
    "DataParallel": lambda: nn.DataParallel(made()),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("name", SAME)
def test_a_brought_model_has_the_numbers_of_the_plain_one(name, images, labels, plain):
    model, given, answers = SAME[name](), images.clone(), labels.clone()
    result = measured(model, given, answers)
    assert numbers(result) == numbers(plain)
    assert torch.equal(given, images) and torch.equal(answers, labels)


def test_a_relu_in_place_on_the_images(images, labels):
    """Against the same without: its gradient is 0 where a pixel is 0."""
    given = images - 0.5
    given, kept = given.relu(), given.relu()
    result = measured(nn.Sequential(nn.ReLU(inplace=True), made()), given, labels)
    assert numbers(result) == numbers(measured(nn.Sequential(nn.ReLU(), made()), kept, labels))
    assert torch.equal(given, kept)


@pytest.mark.slow
def test_inductor(images, labels, plain):
    assert numbers(measured(torch.compile(made()), images, labels)) == numbers(plain)


def test_the_guard_of_gradients_hands_the_model_a_copy(images):
    points = images.clone().requires_grad_()
    Attacked(made(InPlace))(points)
    assert torch.equal(points, images)


def test_dropout_that_a_function_reaches_is_off_and_on_again(images, labels, plain):
    model = nn.Sequential(made(), nn.Dropout(0.9)).train()
    assert numbers(measured(lambda x: model(x), images, labels)) == numbers(plain)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("brought", [nn.Identity(), lambda x: x], ids=["module", "function"])
def test_a_second_model_is_brought_in_any_way_too(brought, images, labels):
    inner = made(InPlace)
    source = nn.Sequential(brought, inner) if isinstance(brought, nn.Module) else lambda x: inner(x)
    given = images.clone()
    result = measured(made(), given, labels, transfer_from=source)
    assert torch.equal(given, images)
    assert result.accuracy == measured(made(), images, labels, transfer_from=made()).accuracy


def test_a_function_over_other_weights_is_another_model(images, labels, tmp_path):
    net = made()

    def answers(weight):
        return lambda x: net(x) * weight

    measured(answers(np.float32(1)), images, labels, state=tmp_path)
    measured(answers(np.float32(1)), images, labels, state=tmp_path)
    with pytest.raises(InputError, match="another model"):
        measured(answers(np.float32(2)), images, labels, state=tmp_path)


# Callers


class Loud(Net):
    """Asks under which settings it is run."""

    def forward(self, x):
        assert not torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
        logits = super().forward(x)
        assert logits.dtype == torch.float32
        return logits


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def matmul_precision(precision):
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def settings():
    """What an evaluation must put back."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_anomaly_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.get_rng_state().tolist(),
        random.getstate(),
        str(np.random.get_state()),  # noqa: NPY002 (the state that libraries draw from)
    )


CALLERS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "device": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "medium": lambda: matmul_precision("medium"),
    "high": lambda: matmul_precision("high"),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", CALLERS)
def test_the_settings_of_the_caller_change_nothing_and_are_put_back(name, images, labels, plain):
    model = made(Loud)
    with CALLERS[name]():
        before = settings()
        result = measured(model, images, labels)
        assert settings() == before
        with pytest.raises(InputError):
            measured(model, images[..., 1:], labels)
        assert settings() == before
    assert numbers(result) == numbers(plain)


def test_a_model_runs_under_the_defaults_of_its_caller(images, labels, plain):
    seen, net = set(), made().double()

    def model(x):
        seen.add((torch.ones(1).dtype, torch.get_default_device().type))
        return net(x.double())

    with default_dtype(torch.float64), default_device("meta"):
        result = measured(model, images, labels)
    assert seen == {(torch.float64, "meta")}
    assert result.accuracy == plain.accuracy


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="newer settings of torch 2.9")
@pytest.mark.parametrize("where", ["", "cuda.matmul", "mkldnn.matmul", "cudnn.conv"])
def test_the_newer_settings_of_precision_are_put_back(where, images, labels, plain):
    backends: Any = functools.reduce(getattr, filter(None, where.split(".")), torch.backends)
    before = backends.fp32_precision
    backends.fp32_precision = "tf32"
    try:
        result = measured(made(Loud), images, labels)
        assert backends.fp32_precision == "tf32"
    finally:
        backends.fp32_precision = before
    assert numbers(result) == numbers(plain)


class Noisy(Net):
    def forward(self, x):
        logits = super().forward(x)
        return logits + 0.1 * torch.randn_like(logits)


def test_numbers_that_a_model_draws_are_keyed_by_the_seed(images, labels):
    first = measured(made(Noisy), images, labels)
    torch.rand(7)
    state = torch.get_rng_state()
    again = measured(made(Noisy), images, labels)
    assert torch.equal(torch.get_rng_state(), state)
    assert numbers(first) == numbers(again)
    assert str(first.verdict) != "sound"


def inference(x):
    with torch.inference_mode():
        return x.clone()


IMAGES = {
    "requires_grad": lambda x: x.clone().requires_grad_(),
    "result": lambda x: x.clone().requires_grad_() * 1,
    "inference": inference,
    "parameter": lambda x: nn.Parameter(x.clone()),
    "channels_last": lambda x: x.repeat(1, 2, 1, 1).contiguous(memory_format=torch.channels_last)[:, :1],
    "not contiguous": lambda x: x.repeat(1, 1, 1, 2)[..., :8],
    "tv_tensor": tv_tensors.Image,
    "float64": lambda x: x.double(),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_of_any_kind_give_the_numbers_of_plain_ones(name, images, labels, plain):
    given = IMAGES[name](images)
    result = measured(made(InPlace), given, tv_tensors.Mask(labels))
    assert numbers(result) == numbers(plain)
    assert torch.equal(given.detach().as_subclass(torch.Tensor).float(), images)
    assert type(result.labels) is torch.Tensor
    assert result.labels.data_ptr() != labels.data_ptr()


def test_one_image_repeated_in_memory(images, labels):
    repeated, answers = images[1:2].expand(8, -1, -1, -1), labels[1:2].expand(8)
    result = measured(made(InPlace), repeated, answers)
    assert numbers(result) == numbers(measured(made(), repeated.clone(), answers.clone()))
    assert torch.equal(repeated[0], images[1])


def test_uint8_images(labels, images):
    pixels = (images * 255).round().byte()
    result = measured(made(InPlace), pixels, labels)
    assert numbers(result) == numbers(measured(made(), pixels.float() / 255, labels))


# Models without a gradient


class NoGrad(Net):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Detaches(Net):
    def normalized(self, x):
        return super().normalized(x.detach())


class Preprocesses(Net):
    """In NumPy, which takes no tensor that requires a gradient."""

    def normalized(self, x):
        return torch.from_numpy((x.numpy() - 0.5) / 0.25)


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()


class NotDifferentiable(Net):
    def normalized(self, x):
        return NoBackward.apply(super().normalized(x))


class Unfrozen(Detaches):
    """Its logits require a gradient, but not the image's."""

    def forward(self, x):
        return super().forward(x) + torch.zeros(1, requires_grad=True)


WITHOUT_GRADIENT = {
    "no_grad": (NoGrad, r"is there a no_grad, detach or argmax\?"),
    "detach": (Detaches, r"is there a no_grad, detach or argmax\?"),
    "numpy": (Preprocesses, r"the model raises RuntimeError: Can't call numpy\(\)"),
    "backward": (NotDifferentiable, "its backward pass raises NotImplementedError"),
    "unfrozen": (Unfrozen, r"is there a no_grad, detach or argmax\?"),
}


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_a_model_without_a_gradient_is_evaluated_as_such(name, images, labels, plain):
    kind, reason = WITHOUT_GRADIENT[name]
    result = measured(made(kind), images, labels)
    assert result.clean == plain.clean
    assert result.accuracy["square"] == plain.accuracy["square"]
    assert result.accuracy["pgd"] > plain.accuracy["pgd"], "no more than a random start"
    assert result.zero_gradient_share == 1
    (note,) = (sentence for sentence in result.verdict.evidence if "No gradient reaches the input" in sentence)
    assert re.search(reason, note)
    assert str(result.verdict) != "sound"


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_model_is_evaluated(images, labels, plain, tmp_path):
    quantize = torch.ao.quantization.quantize_dynamic
    model = quantize(nn.Sequential(made()), {nn.Linear}, dtype=torch.qint8)
    result = measured(model, images, labels, state=tmp_path)
    assert abs(result.clean - plain.clean) <= 2 / 16
    assert any("No gradient reaches the input" in sentence for sentence in result.verdict.evidence)
    other = quantize(nn.Sequential(made()), {nn.Linear}, dtype=torch.qint8)
    measured(other, images, labels, state=tmp_path)
    changed = made()
    changed.head.weight.data *= 2
    with pytest.raises(InputError, match="another model"):
        measured(quantize(nn.Sequential(changed), {nn.Linear}, dtype=torch.qint8), images, labels, state=tmp_path)


# Models in another dtype, and masked classes


@pytest.mark.parametrize("name", ["float64", "bfloat16", "float16"])
def test_a_model_computes_in_its_own_dtype(name, images, labels, plain):
    seen = set()
    model = made().to(getattr(torch, name))
    model.register_forward_hook(lambda module, arguments, logits: seen.add(logits.dtype))
    given = images.clone()
    result = measured(model, given, labels)
    assert seen == {getattr(torch, name)}
    assert result.model_dtype == name
    assert any(f"The model computes in {name}" in sentence for sentence in result.verdict.evidence)
    assert torch.equal(given, images)
    assert result.adversarial is not None and result.adversarial.images.dtype == torch.float32
    tolerance = 0 if name == "float64" else 2 / 16
    assert abs(result.clean - plain.clean) <= tolerance
    assert abs(result.accuracy["pgd"] - plain.accuracy["pgd"]) <= tolerance


def test_large_logits_of_float64_keep_their_differences(images, labels, plain):
    model = made().double()
    result = measured(lambda x: 1e9 + model(x.double()), images, labels)
    assert (result.clean, result.accuracy) == (plain.clean, plain.accuracy)


class Masks(Net):
    """Of seven classes, two of which it never answers."""

    def forward(self, x):
        return F.pad(super().forward(x), (1, 1), value=-torch.inf)


def test_a_class_masked_by_minus_infinity_is_never_answered(images, labels, plain):
    result = measured(made(Masks), images, labels + 1)
    assert (result.clean, result.accuracy, result.worst) == (plain.clean, plain.accuracy, plain.worst)
    assert any("-inf" in sentence for sentence in result.verdict.evidence)
    assert 0 not in result.predictions and 6 not in result.predictions


# Refusals


class Raises(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


class Custom(Exception):
    pass


def single_output():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 1))


def meta():
    with torch.device("meta"):
        return Net()


REFUSED = {
    "one output": (single_output, r"the model has 1 output, .*Return one logit per class"),
    "tuple": (lambda: lambda x: (made()(x), x), r"the model returns tuple for 8 images\. .*lambda images: model\(ima"),
    "dict": (lambda: lambda x: {"out": made()(x), "aux": None}, "the model returns dict of out, aux for 8 images"),
    "dict of logits": (
        lambda: lambda x: {"loss": None, "logits": made()(x)},
        r"returns dict of loss, logits .* such as lambda images: model\(images\)\['logits'\]",
    ),
    "none": (lambda: lambda x: None, "the model returns NoneType for 8 images"),
    "shape": (lambda: lambda x: made()(x)[None], r"the model returns \[1, 8, 5\] for 8 images\. It must return logits"),
    "KeyError": (lambda: Raises(KeyError("layer")), r"the model cannot run on 1x8x8 images \(KeyError: 'layer'\)"),
    "Custom": (lambda: Raises(Custom("no\nlicence")), r"cannot run on 1x8x8 images \(Custom: no licence\)"),
    "mute": (lambda: Raises(StopIteration()), r"cannot run on 1x8x8 images \(StopIteration"),
    "lazy": (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(5)), r"a lazy layer without weights \(1.weight\)"),
    "meta": (meta, r"the model has weights without values, on the meta device \(conv.weight\)"),
    "name": (lambda: "resnet18", "the model is str. Pass a torch.nn.Module, or a function"),
    "state dict": (lambda: made().state_dict(), "the model is OrderedDict. Pass a torch.nn.Module"),
    "class": (lambda: Net, "the model is the class Net. Pass a torch.nn.Module"),
    "export of 5": (
        lambda: exported(made(), 5),
        r"cannot run on 1x8x8 images .*5.*Use images, or the only batch size, that it accepts",
    ),
    "wrong dtype": (lambda: nn.Embedding(3, 5), "the model cannot run on 1x8x8 images"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_evaluated_is_refused_in_one_line(name, images, labels):
    model, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as refused:
        measured(model(), images, labels * (name != "one output"))
    assert "\n" not in str(refused.value)


def test_what_a_model_raises_later_is_one_line_too(images, labels):
    calls, net = [], made()

    def model(x):
        calls.append(len(x))
        if len(calls) > 20:
            raise KeyError("later")
        return net(x)

    with pytest.raises(InputError, match=r"the model cannot run on 1x8x8 images \(KeyError: 'later'\)"):
        measured(model, images, labels)


def test_interrupts_are_not_caught(images, labels):
    with pytest.raises(KeyboardInterrupt):
        measured(Raises(KeyboardInterrupt()), images, labels)


@pytest.mark.parametrize("shape", [(4, 8, 8, 3), (4, 8, 8, 1)])
def test_images_with_channels_last_are_noticed(shape):
    pictures, answers = torch.rand(shape), torch.tensor([0, 1, 0, 1])
    size = pictures[0].numel()
    with pytest.warns(DReLUWarning, match=r"images \[4, 8, 8, .\] look like \[N, H, W, C\].*permute\(0, 3, 1, 2\)"):
        measured(nn.Sequential(nn.Flatten(), nn.Linear(size, 2)), pictures, answers)
    with pytest.raises(InputError, match=r"cannot run on 8x8x. images .*images.permute\(0, 3, 1, 2\)"):
        measured(nn.Sequential(nn.Conv2d(shape[3], 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), pictures, answers)


@pytest.mark.parametrize("shape", [(4, 3, 8, 3), (4, 1, 8, 1), (4, 2, 8, 8)])
def test_images_with_channels_first_are_not(shape):
    with warnings.catch_warnings():
        warnings.simplefilter("error", DReLUWarning)
        pictures = torch.rand(shape)
        model = nn.Sequential(nn.Flatten(), nn.Linear(pictures[0].numel(), 2))
        measured(model, pictures, torch.tensor([0, 1, 0, 1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.to_sparse(), "images are a tensor of torch.sparse_coo on cpu"),
        (lambda x: x.to("meta"), "images are a tensor of torch.strided on meta"),
        (lambda x: x[..., :0], r"images of shape \[16, 1, 8, 0\] have no pixels"),
        (lambda x: x.numpy(), "images are ndarray. Use a torch.Tensor"),
    ],
)
def test_images_that_cannot_be_used(change, message, images, labels):
    with pytest.raises(InputError, match=message):
        measured(made(), change(images), labels)


# The mode of a model


def test_a_shared_module_and_one_of_a_fixed_mode_are_put_back():
    shared = nn.Dropout(0.5).eval()
    fixed = exported(made(), 16)
    model = nn.Sequential(shared, nn.Sequential(shared, nn.Dropout(0.5)), fixed)
    model.training = True
    before = {id(module): module.training for module in model.modules()}
    with frozen(model):
        assert not any(module.training for module in model.modules())
    assert {id(module): module.training for module in model.modules()} == before


def test_what_eval_does_is_undone():
    """loralib adds its low-rank weights to the others in eval mode, and takes them away in train mode."""

    class Merges(nn.Linear):
        def train(self, mode=True):
            if mode != self.training:
                self.weight.data += -1 if mode else 1
            return super().train(mode)

    layer = Merges(2, 2)
    layer.weight.data.fill_(0.5)
    with frozen(nn.Sequential(nn.Identity(), layer).train()):
        assert layer.weight.unique().tolist() == [1.5]
    assert layer.weight.unique().tolist() == [0.5]


# What a stranger found


class Shifted(Net):
    """A part of the function is neither a weight nor in the repr."""

    def __init__(self, shift=0.5):
        super().__init__()
        self.shift = shift

    def normalized(self, x):
        return (x - self.shift) / 0.25


def test_a_state_of_a_model_that_only_computes_something_else_is_refused(images, labels, plain, tmp_path):
    first = measured(made(Shifted), images, labels, state=tmp_path / "state")
    assert numbers(first) == numbers(plain)
    with pytest.raises(InputError, match="outputs"):
        measured(made(Shifted, shift=0.1), images, labels, state=tmp_path / "state")


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def normalized(self, x):
        return super().normalized(self.norm(x))


def test_a_model_that_only_a_call_reaches_is_in_eval_mode(images, labels):
    model = made(Normed)
    expected = numbers(measured(model, images, labels))
    model.train()
    held = {"model": model}

    def averaged(x):
        return torch.stack([(lambda v: held["model"](v))(x) for _ in range(2)]).mean(0)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    hidden = types.SimpleNamespace(call=averaged)
    result = measured(lambda x: getattr(hidden, "ca" + "ll")(x), images, labels)
    assert numbers(result)[:3] == expected[:3]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Centred(Net):
    def forward(self, x):
        logits = super().forward(x)
        return logits - logits.mean(dim=0, keepdim=True)


class NoisyWithAMaskedClass(Net):
    def forward(self, x):
        logits = super().forward(x)
        return torch.cat([logits + 0.05 * torch.randn_like(logits), torch.full((len(x), 1), -1e9)], dim=1)


@pytest.mark.parametrize("kind", [Centred, NoisyWithAMaskedClass])
def test_a_model_that_depends_on_more_than_the_image_is_never_sound(kind, images, labels):
    result = measured(made(kind), images, labels)
    assert str(result.verdict) != "sound"
    assert any(
        "not deterministic or depends on the other images of a batch" in sentence
        for sentence in result.verdict.evidence
    )


def test_a_finite_mask_of_a_class_is_not_randomness(images, labels):
    class Masked(Net):
        def forward(self, x):
            return torch.cat([super().forward(x), torch.full((len(x), 1), -1e9)], dim=1)

    assert "A second forward pass gives the same logits." in measured(made(Masked), images, labels).verdict.evidence


def test_labels_and_images_that_are_something_else(images, labels):
    with pytest.raises(InputError, match=r"labels are torch.bool\. Use integers from 0 to classes - 1"):
        measured(made(), images, labels == 3)
    with pytest.raises(
        InputError, match=r"images are uint8 from 0 to 1\. Use uint8 from 0 to 255, or floats in \[0, 1\]"
    ):
        measured(made(), images.round().byte(), labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 32.0}, "batch_size 32.0 is not possible. Use an integer above 0"),
        ({"search_dtype": "bfloat16"}, "search_dtype 'bfloat16' is not possible. Use one of torch.float32, torch.bf"),
        ({"search_dtype": torch.float64}, "search_dtype torch.float64 is not possible"),
    ],
)
def test_options_of_another_kind_are_refused(options, message, images, labels):
    with pytest.raises(InputError, match=message):
        measured(made(), images, labels, **options)


def test_a_state_may_be_named_by_a_text_and_labels_be_uint16(images, labels, plain, tmp_path):
    result = measured(made(), images, labels.to(torch.uint16), state=str(tmp_path / "state"))
    assert numbers(result) == numbers(plain)
    assert any((tmp_path / "state").iterdir())
