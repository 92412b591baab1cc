"""Placement "head", the paper's: a dense layer with D-ReLU before the output layer (its Figure 10)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from inspect import signature
from typing import Any

from torch import Tensor, nn

from ..errors import InputError, one_line
from .activations import make_activation
from .inference import TimmModel
from .surgery import OverridesInstances, mix_in, paths, replace


class DReLUHead(nn.Module):
    """Dense layer, activation and output layer in place of a model's classifier.

    Its ``in_features`` are the dense layer's; its ``out_features``, weight and bias are the output layer's.

    Args:
        classifier: The Linear or 1x1 Conv2d that is replaced; the two new layers are of the same kind.
        width: Units of the dense layer.
        activation: Activation of these units.
    """

    __jit_unused_properties__ = ("in_features", "out_features", "in_channels", "out_channels", "weight", "bias")
    in_features = property(lambda self: self.dense.in_features)
    out_features = property(lambda self: self.output.out_features)
    in_channels = property(lambda self: self.dense.in_channels)
    out_channels = property(lambda self: self.output.out_channels)
    weight = property(lambda self: self.output.weight)
    bias = property(lambda self: self.output.bias)

    def __init__(self, classifier: nn.Linear | nn.Conv2d, width: int, activation: nn.Module):
        super().__init__()
        self.dense = _layer_like(classifier, classifier.weight.shape[1], width)
        self.activation = activation.to(classifier.weight.device, classifier.weight.dtype)
        self.output: nn.Module = _layer_like(classifier, width, classifier.weight.shape[0])
        self.pre_logits = False

    def __setattr__(self, name: str, value: Any) -> None:
        # A property's setter would not do: nn.Module registers a parameter before it looks for one.
        if name in ("weight", "bias"):
            if isinstance(self.output, nn.Identity):
                raise AttributeError(f"a head without classes has no {name}. Reset it to some classes first.")
            setattr(self.output, name, value)
        else:
            super().__setattr__(name, value)

    def reset(self, num_classes: int) -> None:
        """Replace the output layer by a new one for ``num_classes``; 0 for the output of the activation."""
        width = self.dense.weight.shape[0]
        self.output = _layer_like(self.dense, width, num_classes) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., num_classes], or [B, C, H, W] to [B, num_classes, H, W] for a Conv2d."""
        x = self.activation(self.dense(x))
        return x if self.pre_logits else self.output(x)


def _layer_like(layer: nn.Linear | nn.Conv2d, in_features: int, out_features: int) -> nn.Linear | nn.Conv2d:
    placement = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return nn.Linear(in_features, out_features, **placement)
    return nn.Conv2d(in_features, out_features, 1, **placement)


class WithDReLUHead:
    """timm's classifier methods for a model whose classifiers are `DReLUHead`; mixed into the model's class.

    If the user has replaced the heads by a layer, the methods are timm's.
    """

    drelu_heads: list[str]  # paths of the heads: two in distilled and two-branch models; TorchScript takes no tuple
    drelu_head_arguments: dict[str, Any]  # of `_put_heads`
    base_head_hidden_size: int | None
    head_hidden_size: int | None
    num_classes: int

    def get_classifier(self) -> Any:
        """Return the output layer, or a tuple of them for a model with two heads."""
        outputs = [head.output for head in _heads(self).values()]
        if not outputs:
            return super().get_classifier()  # pyright: ignore[reportAttributeAccessIssue]
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """Replace the output layers by new ones; the dense layers and the learned caps stay.

        With ``num_classes=0`` the model returns the output of the D-ReLU, [B, width]. With ``num_classes=0`` and
        ``global_pool=""`` it returns the base's unpooled features and has no heads; another reset makes new ones.

        Args:
            num_classes: Number of outputs; 0 for no output layer.
            *args: Further arguments of the base's method: ``global_pool``.
            **kwargs: As ``args``.

        Raises:
            InputError: A ``global_pool`` that gives the dense layer another number of inputs. The model is unchanged.
        """
        heads = _heads(self)
        unpooled = is_unpooled(num_classes, *args, **kwargs)
        # Without heads: the user has replaced one by a layer, or asks for what the model already is.
        model: TimmModel = self
        other = any(_is_layer(module) for name, module in model.named_modules() if name in self.drelu_heads)
        if unpooled or (not heads and (other or (num_classes == 0 and not (args or kwargs)))):
            _reset_base(self, num_classes, *args, **kwargs)
            return
        if not heads:
            _reset_base(self, max(num_classes, 1), *args, **kwargs)
            _put_heads(self, classifier_names(self, self.drelu_heads), **self.drelu_head_arguments)
        elif args or kwargs:
            _change_pool(_structural_copy(self), *args, **kwargs)  # first on a copy: an error changes nothing
            _change_pool(self, *args, **kwargs)
        for head in _heads(self).values():
            head.reset(num_classes)
        self.num_classes = num_classes

    @OverridesInstances
    def forward_head(self: Any, *args: Any, pre_logits: bool = False, **kwargs: Any) -> Tensor:
        """Map features to logits; with ``pre_logits`` or ``num_classes=0`` to the output of the D-ReLU."""
        if len(args) == 2:
            args, pre_logits = args[:1], args[1]
        base: Any = super()
        if not _heads(self):
            return base.forward_head(*args, pre_logits=pre_logits, **kwargs)
        with _without_output(self) if pre_logits or self.num_classes == 0 else nullcontext():
            return base.forward_head(*args, **kwargs)


class KeepsHead:
    """Mixin for a module around a head, which timm would fuse with the classifier into one Linear."""

    def fuse(self) -> Any:
        """Return the module unchanged: what follows the dense layer is not linear."""
        return self


def is_unpooled(num_classes: int, global_pool: Any = None, *args: Any, **kwargs: Any) -> bool:
    """Return whether the arguments of a model or of ``reset_classifier`` are timm's idiom for unpooled features."""
    return num_classes == 0 and global_pool == ""


@contextmanager
def _without_output(model: TimmModel) -> Iterator[None]:
    """Let the heads return the output of their D-ReLU."""
    heads, num_classes = _heads(model).values(), model.num_classes
    try:
        model.num_classes = max(num_classes, 1)  # some timm models skip a head of 0 classes (efficientvim)
        for head in heads:
            head.pre_logits = True
        yield
    finally:
        model.num_classes = num_classes
        for head in heads:
            head.pre_logits = False


def add_head(
    model: TimmModel, classifiers: Sequence[str], width: int, activation: str, cap: float, *, unpooled: bool = False
) -> list[str]:
    """Replace the classifiers by `DReLUHead`; return the paths of the new output layers.

    An ``unpooled`` model has no classifiers now, and gets heads when it is reset to some classes.
    """
    mix_in(model, WithDReLUHead)
    model.drelu_heads = list(classifiers)
    model.drelu_head_arguments = {"width": width, "activation": activation, "cap": cap}
    if not unpooled:
        _put_heads(model, classifiers, **model.drelu_head_arguments)
    return [f"{name}.output" for name in classifiers]


def _put_heads(model: TimmModel, classifiers: Sequence[str], width: int, activation: str, cap: float) -> None:
    for name in classifiers:
        classifier = model.get_submodule(name)
        assert isinstance(classifier, nn.Linear | nn.Conv2d)
        # A Linear acts on the last dimension of an input of any rank.
        channel_dim = -1 if isinstance(classifier, nn.Linear) else 1
        replace(model, name, DReLUHead(classifier, width, make_activation(activation, width, cap, channel_dim)))
        model.get_submodule(_around(name)[0]).train(model.training)  # timm 1.0.9 leaves its new layers in train mode
        for around in _around(name)[:-1]:
            module = model.get_submodule(around)
            if hasattr(module, "fuse") and not isinstance(module, KeepsHead):
                mix_in(module, KeepsHead)
    model.drelu_heads = list(classifiers)
    # timm's reset_classifier sizes its classifier by the base's value, so it is restored before that runs.
    model.base_head_hidden_size = getattr(model, "head_hidden_size", None)
    model.head_hidden_size = width


def _around(name: str) -> list[str]:
    """Return the paths of all modules along a path: for a.b.c they are a, a.b and a.b.c."""
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _heads(model: TimmModel) -> dict[str, DReLUHead]:
    modules = dict(model.named_modules())
    # No assignment expression here: torch.compile cannot trace one in a comprehension.
    return {name: modules[name] for name in model.drelu_heads if isinstance(modules.get(name), DReLUHead)}


def _structural_copy(model: TimmModel) -> Any:
    """Return a copy of the module tree that shares every tensor."""
    tensors = [*model.parameters(), *model.buffers()]
    return deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _reset_base(model: TimmModel, num_classes: int, *args: Any, **kwargs: Any) -> None:
    """Call timm's reset_classifier, which removes the heads."""
    reset = super(WithDReLUHead, model).reset_classifier  # pyright: ignore[reportAttributeAccessIssue]
    if len(model.drelu_heads) > 1 and "distillation" in signature(reset).parameters:
        kwargs.setdefault("distillation", True)  # otherwise repvit's second head is lost
    if _heads(model):
        model.head_hidden_size = model.base_head_hidden_size
    try:
        reset(num_classes, *args, **kwargs)
    except AssertionError as error:
        raise InputError(
            f"global_pool {_shown(args, kwargs)} is not possible with num_classes={num_classes} ({one_line(error)}). "
            "Leave out global_pool."
        ) from error


def _change_pool(model: TimmModel, *args: Any, **kwargs: Any) -> None:
    """Let timm's reset_classifier change the pooling, then put the heads back in place of its new classifiers."""
    heads = _heads(model)
    width = model.head_hidden_size
    before = {name: model.get_submodule(name) for head in heads for name in _around(head)}
    _reset_base(model, 1, *args, **kwargs)
    for name, head in heads.items():
        given, taken = (layer.weight.shape[1] for layer in (model.get_submodule(name), head.dense))
        if given != taken:
            raise InputError(
                f"global_pool {_shown(args, kwargs)} gives the classifier {given} inputs, but the dense layer before "
                f"the D-ReLU has {taken}. Set global_pool when you create the model."
            )
    # Also the modules around a head, such as repvit's BatchNorm, unless they contain the pooling.
    for name in sorted(before, key=len):
        if model.get_submodule(name) is not before[name] and not hasattr(before[name], "global_pool"):
            replace(model, name, before[name])
    model.base_head_hidden_size, model.head_hidden_size = model.head_hidden_size, width


def _shown(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return ", ".join(repr(value) for value in (*args, *kwargs.values()))


def classifier_names(model: TimmModel, classifier: str | Sequence[str] | None) -> list[str]:
    """Return the paths of the classifier layers as the cfg names them; empty if there are none.

    The result of ``get_classifier`` is added if the cfg omits a head (levit_384_s8) or names none.
    """
    modules = dict(model.named_modules())
    names = paths(classifier)
    given = _given_classifier(model)
    given = given if isinstance(given, tuple | list) else () if names else (given,)
    for top in [name for name, module in modules.items() if any(module is head for head in given)]:
        layers = [name for name in modules if _inside(name, top) and _is_layer(modules[name])]
        if not any(_inside(name, top) for name in names):
            names += layers[-1:]
    return names if all(_is_layer(modules.get(name)) for name in names) else []


def _given_classifier(model: TimmModel) -> Any:
    try:
        return model.get_classifier()
    except AttributeError:  # encoders have no such method, and resnet50_clip's fails in timm 1.0.9
        return None


def _inside(name: str, top: str) -> bool:
    return name == top or name.startswith(f"{top}.")


def _is_layer(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)
