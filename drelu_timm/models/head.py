"""The paper's placement: a dense layer with D-ReLU before the output layer (its Figure 10)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from .activations import make_activation
from .surgery import TimmModel, mix_in, paths, replace


class DReLUHead(nn.Module):
    """Dense layer, activation, output layer, in the place of a model's classifier.

    Args:
        classifier: The Linear or 1x1 Conv2d that it replaces; the two new layers are of its kind.
        width: Units of the dense layer.
        activation: Applied to them.
    """

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
        """[..., in_features] to [..., num_classes]; [B, C, H, W] likewise where the classifier is a convolution.

        Raises:
            InputError: Unpooled feature maps before a Linear.
        """
        if isinstance(self.dense, nn.Linear) and x.shape[-1] != self.dense.in_features:
            raise InputError(
                f"the dense layer before the D-ReLU takes {self.dense.in_features} features, not {tuple(x.shape)}; "
                "leave global_pool as it is, and call forward_features for feature maps"
            )
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
    """timm's classifier methods for a model whose classifiers are `DReLUHead`; mixed into the model's own class."""

    drelu_heads: tuple[str, ...]  # paths of the heads: two in distilled and two-branch models
    num_classes: int

    def get_classifier(self) -> Any:
        """The output layer, or a tuple of them in a model with two heads."""
        outputs = [head.output for head in _heads(self)]
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """Put fresh output layers in place; the dense layers and the learned caps stay.

        With ``num_classes=0`` the model's output is that of the D-ReLU, [B, width].

        Args:
            num_classes: Size of the output; 0 for none.
            *args: What else the model's own method takes: ``global_pool``.
            **kwargs: Likewise.

        Raises:
            InputError: A ``global_pool`` that gives the dense layer another number of inputs; nothing is changed.
        """
        if args or kwargs:
            _change_pool(_structural_copy(self), *args, **kwargs)  # a trial, so that an error leaves all as it was
            _change_pool(self, *args, **kwargs)
        for head in _heads(self):
            head.reset(num_classes)
        self.num_classes = num_classes

    def forward_head(self, x: Any, pre_logits: bool = False, **kwargs: Any) -> Tensor:
        """Features to logits; ``pre_logits`` stops at the D-ReLU's output, as ``num_classes=0`` does."""
        if pre_logits or self.num_classes == 0:
            with _without_output(self):
                return super().forward_head(x, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return super().forward_head(x, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def _without_output(model: TimmModel) -> Iterator[None]:
    """Stop at the D-ReLUs; some of timm's models would leave out a whole head of 0 classes (efficientvim)."""
    heads, num_classes = _heads(model), model.num_classes
    try:
        model.num_classes = max(num_classes, 1)
        for head in heads:
            head.pre_logits = True
        yield
    finally:
        model.num_classes = num_classes
        for head in heads:
            head.pre_logits = False


def add_head(model: TimmModel, classifiers: Sequence[str], width: int, activation: str, cap: float) -> list[str]:
    """Replace the classifiers by `DReLUHead`; returns the paths of the new output layers."""
    for name in classifiers:
        classifier = model.get_submodule(name)
        assert isinstance(classifier, nn.Linear | nn.Conv2d)
        # A Linear acts on the last dimension, whatever the rank of its input.
        channel_dim = -1 if isinstance(classifier, nn.Linear) else 1
        head = DReLUHead(classifier, width, make_activation(activation, width, cap, channel_dim))
        replace(model, name, head)
    mix_in(model, WithDReLUHead)
    model.drelu_heads = tuple(classifiers)
    # timm's own reset_classifier sizes its classifier by this, so it has to be there when that runs.
    model.base_head_hidden_size = getattr(model, "head_hidden_size", None)
    model.head_hidden_size = width
    return [f"{name}.output" for name in classifiers]


def _heads(model: TimmModel) -> list[DReLUHead]:
    return [model.get_submodule(name) for name in model.drelu_heads]


def _structural_copy(model: TimmModel) -> Any:
    """A copy of the module tree that shares every tensor."""
    tensors = [*model.parameters(), *model.buffers()]
    return deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _change_pool(model: TimmModel, *args: Any, **kwargs: Any) -> None:
    """Let timm's own reset_classifier change the pooling, then put the heads back over its fresh classifiers."""
    heads = _heads(model)
    width, model.head_hidden_size = model.head_hidden_size, model.base_head_hidden_size
    try:
        super(WithDReLUHead, model).reset_classifier(1, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
    except AssertionError as error:
        raise InputError(f"global_pool {_shown(args, kwargs)} cannot go before a classifier: {error}") from error
    model.head_hidden_size = width
    for name, head in zip(model.drelu_heads, heads, strict=True):
        needed, there = _in_features(model.get_submodule(name)), _in_features(head.dense)
        if needed != there:
            raise InputError(
                f"global_pool {_shown(args, kwargs)} gives the classifier {needed} inputs, but the dense layer before "
                f"the D-ReLU has {there}; give that pooling when the model is created"
            )
        replace(model, name, head)


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
