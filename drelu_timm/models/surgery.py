"""Changes to a built timm model: a stem for small images, placements "stem" and "all", methods from a mixin."""

import copyreg
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial, wraps
from inspect import get_annotations
from posixpath import commonpath
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DReLUWarning, InputError
from .activations import make_activation
from .inference import TimmModel, frozen

PROBE_SIDE = 32  # pixels of the images that a small-image stem must be able to process
SMALL_SIDE = 64  # pixels up to which an ImageNet stem discards most of an image

# By name, because timm has up to three classes for one function. Gates (Sigmoid, Hardsigmoid, Tanh, Softmax) stay.
# fmt: off
REPLACED = frozenset((
    "CELU", "ELU", "GELU", "GELUTanh", "HardMish", "HardMishMe", "HardSwish", "HardSwishMe", "Hardswish", "LeakyReLU",
    "Mish", "MishMe", "PReLU", "QuickGELU", "RReLU", "ReLU", "ReLU6", "SELU", "SiLU", "SquaredReLU", "StarReLU",
    "Swish", "SwishMe",
))
# fmt: on


def paths(names: str | Sequence[str] | None) -> list[str]:
    """Return a cfg's entry for its classifier or first convolution (a path, several, or None) as a list."""
    return [names] if isinstance(names, str) else list(names or ())


def height_and_width(img_size: int | Sequence[int]) -> tuple[int, int]:
    """Return an image size as (H, W), given one number for both or a pair."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return height, width


def replace(model: TimmModel, name: str, module: nn.Module) -> None:
    """Replace the module at the path ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def mix_in(model: TimmModel, mixin: type) -> None:
    """Give one model the methods of a mixin; other models of its class keep theirs."""
    model.__class__ = _mixed(mixin, type(model))


class _Mixed(type):
    """Metaclass of the classes that `mix_in` creates, so that pickle can recreate them.

    They have the name of the base's class, under which pickle would find the base.
    """


@cache
def _mixed(mixin: type, cls: type) -> type:
    # TorchScript reads constant attributes (torch.jit.Final) from the annotations of one class only. Annotations of
    # further bases are left out: TorchScript cannot convert all of them, for example `nn.Module`'s.
    annotations = get_annotations(cls) | get_annotations(mixin)
    namespace = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__annotations__": annotations}
    return _Mixed(cls.__name__, (mixin, cls), namespace)


copyreg.pickle(_Mixed, lambda cls: (_mixed, cls.__bases__))


class OverridesInstances:
    """Decorator for a method of a mixin that calls ``super()``, which ``torch.jit.script`` cannot compile.

    Looked up on the class, as TorchScript does, the method is the base's; on an instance it is the decorated one.
    """

    def __init__(self, method: Callable[..., Any]):
        self.method = method

    def __set_name__(self, owner: type, name: str):
        self.owner, self.name = owner, name

    def __get__(self, instance: Any, cls: type) -> Callable[..., Any]:
        if instance is None:
            return getattr(super(self.owner, cls), self.name)
        return partial(self.method, instance)  # not MethodType, which torch.compile cannot trace


def _run_on_blank(model: TimmModel, size: Sequence[int]) -> None:
    """Run the model in eval mode on one image [1, C, H, W] of zeros, on its device and in its dtype."""
    parameter = next(model.parameters())
    with frozen(model), torch.no_grad():
        model(torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype))


def add_stem(
    model: TimmModel, first_convs: Sequence[str], in_chans: int, width: int, activation: str, cap: float
) -> list[str]:
    """Insert a 3x3 convolution and an activation before the first convolutions; return the paths of the new ones.

    The model is built for images of ``width`` channels, so that timm itself has adapted its first convolutions.
    Parallel branches of one block get one new convolution, before the block.
    """
    names = _shared_block(model, first_convs)
    for name in names:
        base = model.get_submodule(name)
        conv = next(module for module in base.modules() if isinstance(module, nn.Conv2d))
        depth = conv.in_channels // width  # above 1 for space-to-depth before the first convolution (tresnet)
        stem = nn.Sequential()
        stem.add_module("conv", nn.Conv2d(in_chans * depth, width * depth, 3, padding=1))
        stem.add_module("activation", make_activation(activation, width * depth, cap))
        stem.to(conv.weight.device, conv.weight.dtype).add_module("base", base)
        replace(model, name, stem)
    new = [f"{name}.conv" for name in names]
    if hasattr(model, "_traits"):  # timm 1.0.31 reads the first convolution from it
        model._traits = {**model._traits, "first_conv": tuple(new)}
    return new


def _shared_block(model: TimmModel, names: Sequence[str]) -> list[str]:
    """Return the one module that contains all of ``names`` if it is a block that is called, otherwise ``names``."""
    common = commonpath(name.replace(".", "/") for name in names).replace("/", ".")
    called = common and not isinstance(model.get_submodule(common), nn.ModuleList)
    return [common] if called else list(names)


def replace_activations(model: TimmModel, input_size: Sequence[int], activation: str, cap: float) -> int:
    """Replace every activation module by one with a cap per channel; return the number of modules.

    A forward pass on a blank image finds the number of channels and their dimension. A module used at several widths
    gets one shared cap, and so does a module that the pass does not reach. Activations that a model calls as
    functions cannot be replaced, and gates (sigmoid, tanh, softmax) stay. ``input_size`` is (C, H, W).
    """
    found = {name: module for name, module in model.named_modules() if _is_activation(module)}
    channels = _channels(model, list(found.values()), input_size)
    parameter = next(model.parameters())
    for name, module in found.items():
        seen = channels[module]
        num_features, channel_dim = seen.pop() if len(seen) == 1 else (1, None)
        new = make_activation(activation, num_features, cap, channel_dim)
        new._forward_hooks = module._forward_hooks  # of timm's `features_only`
        new._forward_pre_hooks = module._forward_pre_hooks
        replace(model, name, new.to(parameter.device, parameter.dtype))
    return len(found)


def _is_activation(module: nn.Module) -> bool:
    return any(cls.__name__ in REPLACED for cls in type(module).__mro__)


def _channels(
    model: TimmModel, activations: Sequence[nn.Module], input_size: Sequence[int]
) -> dict[nn.Module, set[tuple[int, int | None]]]:
    """Return for each activation the (number of channels, channel_dim) of its inputs."""
    seen: dict[nn.Module, set[tuple[int, int | None]]] = {module: set() for module in activations}
    last: list[Tensor] = []  # output of the latest layer that acts on the last dimension

    def note_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        last[:] = [output]

    def note_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        channels_last = any(x is output or x._base is output for output in last)
        channel_dim = -1 if x.ndim == 4 and channels_last else None
        dim = 1 if x.ndim == 4 and not channels_last else -1
        seen[module].add((x.shape[dim], channel_dim))

    layers = [module for module in model.modules() if type(module).__name__ in ("Linear", "LayerNorm")]
    hooks = [layer.register_forward_hook(note_output) for layer in layers]
    hooks += [module.register_forward_pre_hook(note_input) for module in activations]
    try:
        _run_on_blank(model, input_size)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def adapt_to_small_images(model: TimmModel, first_convs: Sequence[str], input_size: Sequence[int]) -> None:
    """Adapt the first layer of a model to small images.

    A single overlapping first convolution of stride 2 (resnet, densenet, efficientnet, regnet, ...) becomes 3x3 with
    stride 1, and the pooling directly behind the stem is removed. In front of another first layer (patches, several
    branches), or if the model still cannot process 32 pixels (inception), images are upsampled to ``input_size``,
    (C, H, W), for which the model is built.
    """
    if max(input_size[-2:]) <= SMALL_SIDE:
        return
    if len(first_convs) == 1 and _shrink_stem(model, first_convs[0], input_size[0]):
        return
    mix_in(model, Upsampled)
    model.upsample = nn.Upsample(size=tuple(input_size[-2:]), mode="bilinear")


def _shrink_stem(model: TimmModel, first_conv: str, in_chans: int) -> bool:
    """Change the stem if possible; otherwise leave the model unchanged and return False."""
    conv = model.get_submodule(first_conv)
    over_image = isinstance(conv, nn.Conv2d) and conv.in_channels == in_chans
    if not (over_image and 2 >= conv.stride[0] < conv.kernel_size[0]):  # windows must overlap for a stride of 1
        return False
    pool = _stem_pool(model, first_conv)
    before = (conv.kernel_size, conv.stride, conv.padding, conv.weight)
    pool_before = model.get_submodule(pool) if pool else None
    if conv.stride[0] == 2:
        _shrink(conv)
        if pool:
            replace(model, pool, nn.Identity())
    try:
        _run_on_blank(model, (in_chans, PROBE_SIDE, PROBE_SIDE))
    except (RuntimeError, AssertionError):
        conv.kernel_size, conv.stride, conv.padding, conv.weight = before
        if pool and pool_before is not None:
            replace(model, pool, pool_before)
        return False
    return True


def _shrink(conv: nn.Conv2d) -> None:
    """Make a convolution 3x3 with stride 1: the center of its kernel, scaled to keep a new layer's variance."""
    margin = (conv.kernel_size[0] - 3) // 2
    center = conv.weight.detach()[:, :, margin : margin + 3, margin : margin + 3] * (conv.kernel_size[0] / 3)
    conv.weight = nn.Parameter(center.clone())
    conv.kernel_size, conv.stride = (3, 3), (1, 1)
    conv.padding = (1, 1) if any(conv.padding) else (0, 0)


def _stem_pool(model: TimmModel, first_conv: str) -> str | None:
    """Return the path of the pooling directly behind the stem: the first after its convolution, and not deeper."""
    behind = False
    for name, module in model.named_modules():
        behind = behind or name == first_conv
        if behind and name.count(".") <= first_conv.count(".") and _is_pool(module):
            return name
    return None


def _is_pool(module: nn.Module) -> bool:
    """Return whether a module is a pooling, or a pooling followed by a blur."""
    pools = any(isinstance(part, nn.MaxPool2d | nn.AvgPool2d) for part in module.modules())
    return pools and not list(module.parameters())


class Upsampled:
    """Mixin for a model that upsamples its images first."""

    upsample: nn.Upsample

    def __init_subclass__(cls):
        if Upsampled in cls.__bases__:  # not for a further mixin, whose base upsamples already
            for name in ("forward", "forward_features", "forward_intermediates"):
                if hasattr(cls, name):
                    setattr(cls, name, _upsampling(getattr(cls, name)))

    def __prepare_scriptable__(self) -> Any:
        raise InputError(
            f"torch.jit.script cannot compile {type(self).__name__} with upsampling in front. "
            "Use torch.jit.trace or torch.export.export."
        )


def _upsampling(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that upsamples its images [B, C, H, W] first."""

    @wraps(method)  # torch.fx reads the arguments of the model's own method
    def upsampling(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, _upsample(x, self.upsample.size), *args, **kwargs)

    return upsampling


def _upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if tuple(x.shape[-2:]) == size else F.interpolate(x, size, mode="bilinear")


torch.fx.wrap("_upsample")  # one node in a traced graph, where the shape of x is not known


def warn_of_small_images(
    model: TimmModel, first_convs: Sequence[str], made_for: Sequence[int], image_size: Sequence[int], stride: int = 1
) -> None:
    """Warn if a model made for large images (H, W) is to be used on images of at most 64 pixels.

    A first convolution of at most ``stride`` suits the images.
    """
    if not max(image_size) <= SMALL_SIDE < min(made_for):
        return
    # The whole block, because placement "stem" adds convolutions before the first ones.
    blocks = [model.get_submodule(name.removesuffix(".conv")) for name in first_convs]
    convs = [module for block in blocks for module in block.modules() if isinstance(module, nn.Conv2d)]
    if max((conv.stride[0] for conv in convs), default=1) > stride:
        height, width = image_size
        warnings.warn(
            f"{model.pretrained_cfg['architecture']} starts with an ImageNet stem, which discards most of "
            f"{height}x{width} images. Create it with small_images=True.",
            DReLUWarning,
            stacklevel=2,
        )
