"""Registration with timm: `<arch>_drelu` for every architecture that timm knows. Importing this module does it."""

import pickle
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import timm
import torch
from timm.models import _factory
from timm.models._pretrained import DefaultCfg
from timm.models._registry import (
    _model_default_cfgs,
    _model_has_pretrained,
    _model_pretrained_cfgs,
    _model_to_module,
    _model_with_tags,
    _module_to_models,
)
from torch import nn

from ..errors import InputError, one_line, unknown
from . import architectures, certifiable
from .surgery import paths
from .variants import build
from .weights import UNPICKLES

MODULE = "drelu_timm"  # in timm.list_models(module=...) and timm.list_modules()

default_cfgs: dict[str, DefaultCfg] = {}  # timm's register_model reads a module's cfgs from this name


def register_model(entrypoint: Callable[..., nn.Module]) -> None:
    """Register an entrypoint with timm in the module ``drelu_timm``, not listed as pretrained."""
    timm.models.register_model(entrypoint)
    _list_as_ours(entrypoint.__name__)


def _list_as_ours(name: str) -> None:
    """List a registered model in the module ``drelu_timm``, and not as pretrained."""
    # timm takes the last part of the entrypoint's __module__, e.g. "registry".
    models: Any = _module_to_models[_model_to_module[name]]
    models.discard(name)
    if not models:
        del _module_to_models[_model_to_module[name]]  # otherwise timm.list_modules() lists it
    _model_to_module[name] = MODULE
    _module_to_models[MODULE].add(name)
    # timm lists a model as pretrained if its cfg has weights. A variant's cfg has its base's weights, with which
    # the head is untrained: a script over timm.list_pretrained() must not use it as a trained model.
    _model_has_pretrained.difference_update((name, *_model_with_tags[name]))


def list_as_pretrained(name: str) -> None:
    """Add a registered model without a cfg to ``timm.list_pretrained()`` and ``timm.is_model_pretrained``."""
    _model_with_tags[name] = [name]  # timm.list_pretrained() reads these names only
    _model_has_pretrained.add(name)


def check_tag(what: str, name: str) -> None:
    """Check the tag of a name such as ``resnet50.a1_in1k``; ``what`` is the flag, for the error.

    Raises:
        InputError: timm has the architecture, but not with this tag.
    """
    architecture, _, tag = name.partition(".")
    known = [other for other in _model_pretrained_cfgs if other.startswith(f"{architecture}.")]
    if tag and known and name not in known:
        raise unknown(what, name, known)


def _variant_cfg(base: str, default: Any) -> DefaultCfg:
    """Return the base's cfgs, with the hub ids that timm added at registration and the variant's classifier."""
    cfgs = {}
    for tag in default.tags:
        cfg = _model_pretrained_cfgs[f"{base}.{tag}" if tag else base]
        outputs = [f"{name}.output" for name in paths(cfg.classifier)]
        classifier = outputs[0] if len(outputs) == 1 else tuple(outputs) or None
        cfgs[tag] = replace(cfg, architecture=f"{base}_drelu", classifier=classifier)
    return replace(default, cfgs=cfgs)


def _entrypoint(base: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build(base, pretrained=pretrained, **kwargs)

    create.__name__ = create.__qualname__ = f"{base}_drelu"
    create.__module__ = __name__
    create.__doc__ = f"{base} with D-ReLU; see `drelu_timm.models.variants.build`."
    return create


def _is_ours(model: nn.Module) -> bool:
    """Return whether a model is of this package, possibly inside `normalized`."""
    cfgs = [getattr(part, "pretrained_cfg", None) or {} for part in (model, getattr(model, "model", None))]
    return any(_model_to_module.get(cfg.get("architecture", "")) == MODULE for cfg in cfgs)


def _without_unpickling(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return timm's ``load_checkpoint`` with ``weights_only=True`` for our models."""

    @wraps(load)
    def load_checkpoint(model: nn.Module, checkpoint_path: str, *args: Any, **kwargs: Any) -> Any:
        if not _is_ours(model):
            return load(model, checkpoint_path, *args, **kwargs)
        try:
            with torch.serialization.safe_globals([Namespace]):  # the arguments in a checkpoint of timm's train.py
                return load(model, checkpoint_path, *args, weights_only=True, **kwargs)
        except pickle.UnpicklingError as error:
            raise InputError(
                f"checkpoint_path {checkpoint_path} does not contain only weights ({one_line(error)}). "
                "Save its state_dict as safetensors."
            ) from error

    return load_checkpoint


if UNPICKLES:
    # create_model calls it by this name after our entrypoint has returned.
    _factory.load_checkpoint = _without_unpickling(_factory.load_checkpoint)
for _name in (*architectures.default_cfgs, *certifiable.default_cfgs):
    _list_as_ours(_name.partition(".")[0])
for _base in timm.list_models():
    if _base in _model_default_cfgs:
        default_cfgs[f"{_base}_drelu"] = _variant_cfg(_base, _model_default_cfgs[_base])
    register_model(_entrypoint(_base))
