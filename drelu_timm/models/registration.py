"""Registers `<arch>_drelu` with timm for every architecture that timm knows; importing this does it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import timm
from timm.models._pretrained import DefaultCfg
from timm.models._registry import _model_default_cfgs, _model_pretrained_cfgs
from torch import nn

from ..errors import unknown
from . import cnn7, nets, preact  # noqa: F401  (our own nets, which get their variants as timm's own do)
from .registry import register_model
from .surgery import paths
from .variants import build

default_cfgs: dict[str, DefaultCfg] = {}  # where timm's register_model looks for the cfgs of a module's entrypoints


def check_tag(what: str, name: str) -> None:
    """Raise where a name has a tag, as in ``resnet50.a1_in1k``, that its architecture has not.

    Args:
        what: The flag, for the error.
        name: Of an architecture that timm knows, with a tag or without.

    Raises:
        InputError: timm has the architecture with other tags.
    """
    architecture, _, tag = name.partition(".")
    known = [other for other in _model_pretrained_cfgs if other.startswith(f"{architecture}.")]
    if tag and known and name not in known:
        raise unknown(what, name, known)


def _register_all() -> None:
    for base in timm.list_models():
        if base in _model_default_cfgs:
            default_cfgs[f"{base}_drelu"] = _variant_cfg(base, _model_default_cfgs[base])
        register_model(_entrypoint(base))


def _variant_cfg(base: str, default: Any) -> DefaultCfg:
    """The base's cfgs, with the hub ids that timm completed at registration, and the variant's classifier."""
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


_register_all()
