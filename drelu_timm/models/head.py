"""The paper's placement: a dense layer with D-ReLU before the output layer (its Figure 10)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from inspect import signature
from typing import Any

from torch import Tensor, nn

from ..errors import InputError, one_line
from .activations import make_activation
from .surgery import OverridesInstances, TimmModel, mix_in, paths, replace


class DReLUHead(nn.Module):
    """Dense layer, activation, output layer, in the place of a model's classifier.

    Code that asks a classifier for its sizes or its weights gets those of the whole: the inputs of the dense layer, and
    the outputs and the weights of the output layer.

    Args:
        classifier: The Linear or 1x1 Conv2d that it replaces; the two new layers are of its kind.
        width: Units of the dense layer.
        activation: Applied to them.
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
        self.dense = _layer_like(classifier, _in_features(classifier), width)
        self.activation = activation.to(classifier.weight.device, classifier.weight.dtype)
        self.output: nn.Module = _layer_like(classifier, width, _out_features(classifier))
        self.pre_logits = False

    def reset(self, num_classes: int) -> None:
        """Put a fresh output layer of ``num_classes`` in place; 0 leaves the activation's output."""
        width = _out_features(self.dense)
        self.output = _layer_like(self.dense, width, num_classes) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., num_classes]; [B, C, H, W] likewise where the classifier is a convolution."""
        x = self.activation(self.dense(x))
        return x if self.pre_logits else self.output(x)


def _in_features(layer: nn.Linear | nn.Conv2d) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _out_features(layer: nn.Linear | nn.Conv2d) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _layer_like(layer: nn.Linear | nn.Conv2d, in_features: int, out_features: int) -> nn.Linear | nn.Conv2d:
    placement = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return nn.Linear(in_features, out_features, **placement)
    return nn.Conv2d(in_features, out_features, 1, **placement)


class WithDReLUHead:
    """timm's classifier methods for a model whose classifiers are `DReLUHead`; mixed into the model's own class.

    Where the caller has put a layer of their own in the place of the heads, they are timm's own.
    """

    drelu_heads: list[str]  # paths of the heads: two in distilled and two-branch models; TorchScript takes no tuple
    drelu_head_arguments: dict[str, Any]  # of `_put_heads`
    base_head_hidden_size: int | None
    head_hidden_size: int | None
    num_classes: int

    def get_classifier(self) -> Any:
        """The output layer, or a tuple of them in a model with two heads."""
        outputs = [head.output for head in _heads(self).values()]
        if not outputs:
            return super().get_classifier()  # pyright: ignore[reportAttributeAccessIssue]
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """Put fresh output layers in place; the dense layers and the learned caps stay.

        With ``num_classes=0`` the model's output is that of the D-ReLU, [B, width]. With ``num_classes=0`` and
        ``global_pool=""`` the heads go and the output is the base's unpooled features; another reset makes fresh ones.

        Args:
            num_classes: Size of the output; 0 for none.
            *args: What else the model's own method takes: ``global_pool``.
            **kwargs: Likewise.

        Raises:
            InputError: A ``global_pool`` that gives the dense layer another number of inputs; nothing is changed.
        """
        heads = _heads(self)
        unpooled = is_unpooled(num_classes, *args, **kwargs)
        nothing_asked = num_classes == 0 and not (args or kwargs)
        if unpooled or (not heads and (nothing_asked or _has_other_classifier(self))):
            _reset_base(self, num_classes, *args, **kwargs)
            return
        if not heads:
            _reset_base(self, max(num_classes, 1), *args, **kwargs)
            _put_heads(self, classifier_names(self, self.drelu_heads), **self.drelu_head_arguments)
        elif args or kwargs:
            _change_pool(_structural_copy(self), *args, **kwargs)  # a trial, so that an error leaves all as it was
            _change_pool(self, *args, **kwargs)
        for head in _heads(self).values():
            head.reset(num_classes)
        self.num_classes = num_classes

    @OverridesInstances
    def forward_head(self: Any, *args: Any, pre_logits: bool = False, **kwargs: Any) -> Tensor:
        """Features to logits; ``pre_logits`` stops at the D-ReLU's output, as ``num_classes=0`` does."""
        if len(args) == 2:
            args, pre_logits = args[:1], args[1]
        base: Any = super()
        if not _heads(self):
            return base.forward_head(*args, pre_logits=pre_logits, **kwargs)
        with _without_output(self) if pre_logits or self.num_classes == 0 else nullcontext():
            return base.forward_head(*args, **kwargs)


class KeepsHead:
    """A module around a head that timm would fuse with the classifier into one Linear; mixed into its own class."""

    def fuse(self) -> Any:
        """The module as it is: what follows the dense layer is not linear."""
        return self


def is_unpooled(num_classes: int, global_pool: Any = None, *args: Any, **kwargs: Any) -> bool:
    """Whether these arguments of a model, or of its reset_classifier, are timm's idiom for unpooled features."""
    return num_classes == 0 and global_pool == ""


def _has_other_classifier(model: TimmModel) -> bool:
    """Whether a layer of the caller's is in the place of a head."""
    modules = dict(model.named_modules())
    return any(_is_layer(modules.get(name)) for name in model.drelu_heads)


@contextmanager
def _without_output(model: TimmModel) -> Iterator[None]:
    """Stop at the D-ReLUs; some of timm's models would leave out a whole head of 0 classes (efficientvim)."""
    heads, num_classes = _heads(model).values(), model.num_classes
    try:
        model.num_classes = max(num_classes, 1)
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
    """Replace the classifiers by `DReLUHead`.

    Args:
        model: A timm model.
        classifiers: Their paths.
        width: Units of the dense layer.
        activation: A name in `activations.ACTIVATIONS`.
        cap: See `make_activation`.
        unpooled: The model has no classifiers now, and gets heads when it is reset to some.

    Returns:
        The paths of the new output layers.
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
        # A Linear acts on the last dimension, whatever the rank of its input.
        channel_dim = -1 if isinstance(classifier, nn.Linear) else 1
        replace(model, name, DReLUHead(classifier, width, make_activation(activation, width, cap, channel_dim)))
        model.get_submodule(_around(name)[0]).train(model.training)  # timm 1.0.9 leaves what it makes in train mode
        for around in _around(name)[:-1]:
            module = model.get_submodule(around)
            if hasattr(module, "fuse") and not isinstance(module, KeepsHead):
                mix_in(module, KeepsHead)
    model.drelu_heads = list(classifiers)
    # timm's own reset_classifier sizes its classifier by this, so it has to be there when that runs.
    model.base_head_hidden_size = getattr(model, "head_hidden_size", None)
    model.head_hidden_size = width


def _around(name: str) -> list[str]:
    """The paths of the modules that a path leads through, and itself: a.b.c gives a, a.b, a.b.c."""
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _heads(model: TimmModel) -> dict[str, DReLUHead]:
    modules = dict(model.named_modules())
    there = {name: modules.get(name) for name in model.drelu_heads}
    return {name: module for name, module in there.items() if isinstance(module, DReLUHead)}


def _structural_copy(model: TimmModel) -> Any:
    """A copy of the module tree that shares every tensor."""
    tensors = [*model.parameters(), *model.buffers()]
    return deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _reset_base(model: TimmModel, num_classes: int, *args: Any, **kwargs: Any) -> None:
    """Let timm's own reset_classifier run, which leaves no head."""
    reset = super(WithDReLUHead, model).reset_classifier  # pyright: ignore[reportAttributeAccessIssue]
    if len(model.drelu_heads) > 1 and "distillation" in signature(reset).parameters:
        kwargs.setdefault("distillation", True)  # or repvit's second head is gone for good
    if _heads(model):
        model.head_hidden_size = model.base_head_hidden_size
    try:
        reset(num_classes, *args, **kwargs)
    except AssertionError as error:
        raise InputError(
            f"global_pool {_shown(args, kwargs)} does not go with num_classes={num_classes}: "
            f"{one_line(error)}; leave global_pool as it is"
        ) from error


def _change_pool(model: TimmModel, *args: Any, **kwargs: Any) -> None:
    """Let timm's own reset_classifier change the pooling, then put the heads back over its fresh classifiers."""
    heads = _heads(model)
    width = model.head_hidden_size
    before = {name: model.get_submodule(name) for head in heads for name in _around(head)}
    _reset_base(model, 1, *args, **kwargs)
    for name, head in heads.items():
        needed, there = _in_features(model.get_submodule(name)), _in_features(head.dense)
        if needed != there:
            raise InputError(
                f"global_pool {_shown(args, kwargs)} gives the classifier {needed} inputs, but the dense layer before "
                f"the D-ReLU has {there}; give that pooling when the model is created"
            )
    # With the modules around a head, such as repvit's BatchNorm, unless the pooling is in them.
    for name in sorted(before, key=len):
        if model.get_submodule(name) is not before[name] and not hasattr(before[name], "global_pool"):
            replace(model, name, before[name])
    model.base_head_hidden_size, model.head_hidden_size = model.head_hidden_size, width


def _shown(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return ", ".join(repr(value) for value in (*args, *kwargs.values()))


def classifier_names(model: TimmModel, classifier: str | Sequence[str] | None) -> list[str]:
    """Paths of the classifier layers, as the cfg names them; empty if there are none.

    What `get_classifier` gives is added where the cfg forgets a head (levit_384_s8) or names none at all.
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
