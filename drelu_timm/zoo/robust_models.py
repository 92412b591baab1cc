"""Trained models under the names that timm and RobustBench look for, ``<key>_<dataset>_<threat>``."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from torch import nn

from ..errors import InputError
from ..models.inference import channels_of, normalized
from ..models.registry import list_as_pretrained, register_model
from .sources import Source, find_source

_sources: dict[str, Source] = {}


def robust_model_name(key: str, dataset: str, threat_model: str) -> str:
    """The timm name that ``robustbench.utils.load_model(key, dataset, threat_model)`` asks for.

    Raises:
        InputError: A key with other characters than RobustBench's keys have.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", key):
        raise InputError(
            f"--key {key!r} is no RobustBench key; use letters, digits, - and _ only, as in Author2026Title_ResNet-18 "
            "(timm reads what follows a dot as a tag)"
        )
    return f"{key}_{dataset}_{threat_model}".lower().replace("-", "_")


def register_robust_model(
    key: str,
    dataset: str,
    threat_model: str,
    source: Path | str,
    *,
    sha256: str | None = None,
    config_sha256: str | None = None,
) -> str:
    """Let timm and RobustBench load an exported model.

    Afterwards ``timm.create_model(name, pretrained=True)`` and ``robustbench.utils.load_model(key, dataset=dataset,
    threat_model=threat_model)`` give the model, in eval mode, for images [B, C, H, W] in [0, 1]: a Sequential of
    ``normalize`` and ``model``. Registering a name again moves it to the new source.

    Args:
        key: RobustBench's name of the model, e.g. "Author2026Title_ResNet-18".
        dataset: As RobustBench spells it, e.g. "cifar10".
        threat_model: "Linf" or "L2".
        source: Where config.json and model.safetensors are: a folder; its address, "https://host/path"; or a model
            repository of the Hugging Face Hub, "hf-hub:ORG/NAME" or "hf-hub:ORG/NAME@REVISION". They are read when the
            model is created, and fetched then if need be, into the cache of torch.hub or of the Hub.
        sha256: Of model.safetensors, compared before the weights are used; an https address needs it.
        config_sha256: Of config.json, compared before it is read: normalisation and activation make the model too.

    Returns:
        The name under which timm has it.

    Raises:
        InputError: A bad key, source or digest, or a name that timm has already for another model.
    """
    return register(robust_model_name(key, dataset, threat_model), find_source(source, sha256, config_sha256))


def register(name: str, source: Source, *, has_weights: bool = True) -> str:
    """Let timm create a model from a source, under a name of `robust_model_name`, which is returned.

    Args:
        name: Name for timm. A name that `register` put there before gets the new source.
        source: Function that fetches the files of the model.
        has_weights: Whether the source has them. Only then ``timm.list_pretrained()`` lists the model.

    Raises:
        InputError: A name that timm has already for another model.
    """
    if name not in _sources:
        check_name_is_free(name)
        register_model(_entrypoint(name))
    if has_weights:
        list_as_pretrained(name)
    _sources[name] = source
    return name


def registered_cfg(name: str) -> dict[str, Any] | None:
    """timm's ``pretrained_cfg`` of a model that `register` put there, without its weights; None for other names.

    Raises:
        InputError: A source whose files are not to be had.
    """
    return _sources[name](None).config["pretrained_cfg"] if name in _sources else None


def check_name_is_free(name: str) -> None:
    """Raise where timm has a model of that name which `register` did not put there.

    Raises:
        InputError: It has.
    """
    if name not in _sources and timm.is_model(name):
        raise InputError(f"--key: timm has a model {name!r} already; choose another key")


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    """What timm calls for the model.

    Arguments that would change a trained model are refused; timm's scripts give some of them with the model's own
    values. So is its name without its weights: fresh ones under it would pass for a robust model.
    """

    def create(
        pretrained: bool = False,
        *,
        num_classes: int | None = None,
        in_chans: int | None = None,
        pretrained_cfg: object = None,
        pretrained_cfg_overlay: object = None,
        cache_dir: Path | None = None,
    ) -> nn.Module:
        if not pretrained:
            raise InputError(f"{name} is a trained model: timm.create_model({name!r}, pretrained=True)")
        model = _sources[name](cache_dir).load()
        if num_classes not in (None, model.num_classes):
            raise InputError(f"num_classes={num_classes}: {name} has {model.num_classes} classes; leave it out")
        if in_chans not in (None, channels_of(model)):
            raise InputError(f"in_chans={in_chans}: {name} takes {channels_of(model)} channels; leave it out")
        return normalized(model).eval()

    create.__name__ = name
    return create
