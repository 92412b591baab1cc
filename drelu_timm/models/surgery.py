"""Changes to a built timm model: a convolution with D-ReLU behind the input, D-ReLU for every activation."""

import copyreg
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from inspect import get_annotations
from posixpath import commonpath
from typing import Any

import torch
from torch import Tensor, nn

from .activations import make_activation

TimmModel = Any  # an nn.Module with the attributes that timm gives its models, which nn.Module declares to be tensors

# By name, as timm has up to three classes for one function. Gates (Sigmoid, Hardsigmoid, Tanh, Softmax) stay.
# fmt: off
REPLACED = frozenset((
    "CELU", "ELU", "GELU", "GELUTanh", "HardMish", "HardMishMe", "HardSwish", "HardSwishMe", "Hardswish", "LeakyReLU",
    "Mish", "MishMe", "PReLU", "QuickGELU", "RReLU", "ReLU", "ReLU6", "SELU", "SiLU", "SquaredReLU", "StarReLU",
    "Swish", "SwishMe",
))
# fmt: on


def paths(names: str | Sequence[str] | None) -> list[str]:
    """What a cfg says of its classifier or first convolution (a path, several, none) as a list."""
    return [names] if isinstance(names, str) else list(names or ())


def replace(model: TimmModel, name: str, module: nn.Module) -> None:
    """Put a module at the path ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def mix_in(model: TimmModel, mixin: type) -> None:
    """Give this model's class the methods of a mixin; other models of the class keep theirs."""
    model.__class__ = _mixed(mixin, type(model))


class _Mixed(type):
    """Class of the classes that `mix_in` makes. They have the name of the base's class, by which pickle finds that."""


@cache
def _mixed(mixin: type, cls: type) -> type:
    # TorchScript reads which attributes are constants (torch.jit.Final) from the annotations of one class. Those of
    # further bases would not help: it cannot convert `nn.Module`, for example.
    annotations = get_annotations(cls) | get_annotations(mixin)
    namespace = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__annotations__": annotations}
    return _Mixed(cls.__name__, (mixin, cls), namespace)


copyreg.pickle(_Mixed, lambda cls: (_mixed, cls.__bases__))  # so they are pickled as the call that makes them


class OverridesInstances:
    """Decorator for a method of a mixin that calls ``super()``, which ``torch.jit.script`` cannot compile.

    Looked up on the class, where TorchScript looks, the method is the base's; on an instance it is the decorated one.
    """

    def __init__(self, method: Callable[..., Any]):
        self.method = method

    def __set_name__(self, owner: type, name: str):
        self.owner, self.name = owner, name

    def __get__(self, instance: Any, cls: type) -> Callable[..., Any]:
        if instance is None:
            return getattr(super(self.owner, cls), self.name)
        return partial(self.method, instance)  # not MethodType, which torch.compile cannot trace


@contextmanager
def probing(model: TimmModel) -> Iterator[None]:
    """Eval mode and no gradients, for a forward pass that leaves nothing behind."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def blank_image(model: TimmModel, size: Sequence[int]) -> Tensor:
    """One image [1, C, H, W] of zeros, on the model's device and in its dtype."""
    parameter = next(model.parameters())
    return torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype)


def add_stem(
    model: TimmModel, first_convs: Sequence[str], in_chans: int, width: int, activation: str, cap: float
) -> list[str]:
    """Put a 3x3 convolution and an activation before the first convolutions.

    Args:
        model: Built for images of ``width`` channels, so that timm itself has fitted its first convolutions to them.
        first_convs: Their paths. Parallel branches of one block get one new convolution, in front of the block.
        in_chans: Channels of the images.
        width: Channels of the new convolution.
        activation: A name in `activations.ACTIVATIONS`.
        cap: See `make_activation`.

    Returns:
        The paths of the new convolutions.
    """
    names = _shared_block(model, first_convs)
    for name in names:
        base = model.get_submodule(name)
        conv = next(module for module in base.modules() if isinstance(module, nn.Conv2d))
        # More than 1 where space is turned to depth before the first convolution (tresnet).
        depth = conv.in_channels // width
        stem = nn.Sequential()
        stem.add_module("conv", nn.Conv2d(in_chans * depth, width * depth, 3, padding=1))
        stem.add_module("activation", make_activation(activation, width * depth, cap))
        stem.to(conv.weight.device, conv.weight.dtype).add_module("base", base)
        replace(model, name, stem)
    if hasattr(model, "_traits"):  # where timm 1.0.31 looks for them
        model._traits = {**model._traits, "first_conv": tuple(f"{name}.conv" for name in names)}
    return [f"{name}.conv" for name in names]


def _shared_block(model: TimmModel, names: Sequence[str]) -> list[str]:
    """The one module that holds all of ``names``, if it is a block that is called; else ``names`` themselves."""
    common = commonpath(name.replace(".", "/") for name in names).replace("/", ".")
    called = common and not isinstance(model.get_submodule(common), nn.ModuleList)
    return [common] if called else list(names)


def replace_activations(model: TimmModel, input_size: Sequence[int], activation: str, cap: float) -> int:
    """Replace every activation module, with one cap a channel; the number of modules replaced.

    A forward pass on a blank image tells the number of channels and where they lie. A module used at several widths
    gets one shared cap, and so does one that the pass never reaches. Activations that a model calls as functions
    are out of reach, and gates (sigmoid, tanh, softmax) stay.

    Args:
        model: Any model of images.
        input_size: (C, H, W) of an image that it takes.
        activation: A name in `activations.ACTIVATIONS`.
        cap: See `make_activation`.
    """
    found = {name: module for name, module in model.named_modules() if _is_activation(module)}
    channels = _channels(model, list(found.values()), input_size)
    for name, module in found.items():
        seen = channels[module]
        num_features, channel_dim = seen.pop() if len(seen) == 1 else (1, None)
        new = make_activation(activation, num_features, cap, channel_dim)
        new._forward_hooks = module._forward_hooks  # those of timm's `features_only`
        new._forward_pre_hooks = module._forward_pre_hooks
        parameter = next(model.parameters())
        replace(model, name, new.to(parameter.device, parameter.dtype))
    return len(found)


def _is_activation(module: nn.Module) -> bool:
    return any(cls.__name__ in REPLACED for cls in type(module).__mro__)


def _channels(
    model: TimmModel, activations: Sequence[nn.Module], input_size: Sequence[int]
) -> dict[nn.Module, set[tuple[int, int | None]]]:
    """For each activation the (number of channels, channel_dim) of the inputs it gets."""
    seen: dict[nn.Module, set[tuple[int, int | None]]] = {module: set() for module in activations}
    last: list[Tensor] = []  # what the latest layer over the last dimension gave

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
        with probing(model):
            model(blank_image(model, input_size))
    finally:
        for hook in hooks:
            hook.remove()
    return seen
