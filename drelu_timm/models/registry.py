"""timm's registry of models, and how the models of this package are listed in it."""

from collections.abc import Callable
from typing import Any, TypeVar

import timm
from timm.models._registry import _model_has_pretrained, _model_to_module, _model_with_tags, _module_to_models
from torch import nn

MODULE = "drelu_timm"  # what timm.list_models(module=...) and timm.list_modules() call this package

Entrypoint = TypeVar("Entrypoint", bound=Callable[..., nn.Module])


def register_model(entrypoint: Entrypoint) -> Entrypoint:
    """Register an entrypoint with timm in the module ``drelu_timm``, not listed as pretrained.

    Use it as timm's decorator of the same name. timm takes the last part of ``__module__`` as the module ("nets",
    "registration"), and lists a model as pretrained if its cfg names weights. The cfg of a variant names those of its
    base, which leave the head untrained: a script over ``timm.list_pretrained()`` must not take it for trained.

    Args:
        entrypoint: Function that timm calls with ``pretrained`` and further arguments. Its ``__name__`` is the model's.
    """
    timm.models.register_model(entrypoint)
    name = entrypoint.__name__
    _move(name, MODULE)
    _model_has_pretrained.difference_update((name, *_model_with_tags[name]))
    return entrypoint


def list_as_pretrained(name: str) -> None:
    """Let ``timm.list_pretrained()`` and ``timm.is_model_pretrained`` know a registered model that has no cfg.

    Args:
        name: A model whose every weight is loaded by ``pretrained=True``.
    """
    _model_with_tags[name] = [name]  # timm.list_pretrained() lists these names only
    _model_has_pretrained.add(name)


def _move(name: str, module: str) -> None:
    """List a registered model under another module."""
    models: Any = _module_to_models[_model_to_module[name]]
    models.discard(name)
    if not models:
        del _module_to_models[_model_to_module[name]]  # timm.list_modules() would list it
    _model_to_module[name] = module
    _module_to_models[module].add(name)
