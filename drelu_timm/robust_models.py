"""Exported models under the names that timm and RobustBench look for, ``<key>_<dataset>_<threat>``."""

import re
from collections.abc import Callable
from pathlib import Path

import timm
from torch import nn

from .errors import InputError
from .models import load_folder, normalized

_folders: dict[str, Path] = {}


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


def register_robust_model(key: str, dataset: str, threat_model: str, folder: Path | str) -> str:
    """Let timm and RobustBench load an exported folder.

    Afterwards ``timm.create_model(name, pretrained=True)`` and ``robustbench.utils.load_model(key, dataset=dataset,
    threat_model=threat_model)`` give the model, in eval mode, for images [B, C, H, W] in [0, 1]: a Sequential of
    ``normalize`` and ``model``. Registering a name again moves it to the new folder.

    Args:
        key: RobustBench's name of the model, e.g. "Author2026Title_ResNet-18".
        dataset: As RobustBench spells it, e.g. "cifar10".
        threat_model: "Linf" or "L2".
        folder: Holds config.json and model.safetensors; read when the model is created.

    Returns:
        The name under which timm has it.

    Raises:
        InputError: A bad key, no such folder, or a name that timm has already for another model.
    """
    name = robust_model_name(key, dataset, threat_model)
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no exported model (no config.json); give a folder made by drelu-timm export")
    if name not in _folders:
        check_name_is_free(name)
        timm.models.register_model(_entrypoint(name))
    _folders[name] = folder
    return name


def check_name_is_free(name: str) -> None:
    """Raise where timm has a model of that name which `register_robust_model` did not put there.

    Raises:
        InputError: It has.
    """
    if name not in _folders and timm.is_model(name):
        raise InputError(f"--key: timm has a model {name!r} already; choose another key")


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    """What timm calls for the model.

    Arguments that would change a trained model are refused, and so is its name without its weights: fresh ones under it
    would pass for a robust model.
    """

    def create(
        pretrained: bool = False,
        *,
        num_classes: int | None = None,
        pretrained_cfg: object = None,
        pretrained_cfg_overlay: object = None,
        cache_dir: object = None,
    ) -> nn.Module:
        if not pretrained:
            raise InputError(f"{name} is a trained model: timm.create_model({name!r}, pretrained=True)")
        model = load_folder(_folders[name])
        if num_classes not in (None, model.num_classes):
            raise InputError(f"num_classes={num_classes}: {name} has {model.num_classes} classes; leave it out")
        return normalized(model).eval()

    create.__name__ = name
    return create
