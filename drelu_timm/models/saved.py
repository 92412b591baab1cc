"""A model as a folder of files, in timm's and the Hub's form: its config and its weights."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import InputError, one_line, unknown
from ..files import put_in_place
from .normalize import channels_of
from .surgery import TimmModel

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
# Entries of a saved cfg that would point away from the folder's own weights.
SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "label_offset")
# Arguments of timm.create_model itself, which a folder from elsewhere must not set.
FACTORY_ARGUMENTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


def save_folder(
    model: TimmModel,
    folder: str | Path,
    *,
    model_args: dict[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model as a timm / Hugging Face folder: ``model.safetensors`` and ``config.json``.

    ``load_folder`` reads it with any timm, and, after ``import drelu_timm``, ``timm.create_model("local-dir:...")`` of
    the newest timm and ``transformers.TimmWrapperForImageClassification.from_pretrained``.

    Args:
        model: A model from ``timm.create_model``.
        folder: Made here, whole or not at all.
        model_args: Arguments of ``timm.create_model`` that the model was made with; `_drelu` variants know theirs.
        weights: By default the model's own, ``model.state_dict()``; of a sharded model they have to be gathered.

    Raises:
        InputError: The folder holds something already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already; give a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    given = model.state_dict() if weights is None else weights
    saved = {name: tensor.detach().cpu().contiguous() for name, tensor in given.items()}
    config = _config(model, {**getattr(model, "_model_args", {}), **(model_args or {})})
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as parent:
        beside = Path(parent) / folder.name  # a level down, so that the rename takes it away from the clean-up
        beside.mkdir()
        safetensors.torch.save_file(saved, beside / WEIGHTS, metadata={"format": "pt"})
        (beside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        put_in_place(beside, folder)


def _config(model: TimmModel, model_args: dict[str, Any]) -> dict[str, Any]:
    """What timm's own ``save_for_hf`` writes, with all arguments whatever the version of timm."""
    cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in SOURCES}
    cfg = {**cfg, "num_classes": model.num_classes, "input_size": (channels_of(model), *cfg["input_size"][1:])}
    return {
        "architecture": cfg.pop("architecture"),
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        # Not a second num_classes: transformers' TimmWrapper passes model_args next to its own.
        "model_args": {key: value for key, value in model_args.items() if key != "num_classes"},
        "pretrained_cfg": cfg,
    }


def load_folder(folder: str | Path) -> nn.Module:
    """The model of a folder that `save_folder` or timm wrote, with every weight and learned cap as saved.

    Raises:
        InputError: A file that is missing or cut short, an unknown architecture, or weights that do not fit.
    """
    folder = Path(folder)
    return load_saved(read_config(folder / CONFIG), folder / WEIGHTS, folder / CONFIG)


def load_saved(config: Any, weights: Path, where: Path) -> nn.Module:
    """The model of a config and a weights file, which need not lie in one folder.

    Args:
        config: What a config.json holds.
        weights: In the safetensors format.
        where: The file that the config is from; errors name it.

    Raises:
        InputError: A config that lacks something, an unknown architecture, or weights that do not fit.
    """
    _check_config(config, where)
    architecture = config["architecture"]
    if not timm.is_model(architecture):
        raise unknown(f"{where}: architecture", architecture, timm.list_models())
    try:
        tensors = safetensors.torch.load_file(weights)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{weights} cannot be read ({one_line(error)}); save the model again") from error
    cfg = {**config["pretrained_cfg"], "num_classes": config["num_classes"]}
    try:
        arguments = {**config.get("model_args", {}), "num_classes": config["num_classes"]}
        model = timm.create_model(architecture, pretrained_cfg=cfg, **arguments)
        model.load_state_dict(tensors)
    except InputError:
        raise
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise InputError(
            f"{weights} does not hold a whole {architecture} as {where} describes it ({one_line(error)}); save it again"
        ) from error
    return model


def read_config(path: Path) -> Any:
    """What a config.json holds; `load_saved` checks it.

    Raises:
        InputError: A file that is missing or cut short.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}); give a folder that save_folder wrote") from error


def _check_config(config: Any, where: Path) -> None:
    needed = {"architecture": str, "num_classes": int, "pretrained_cfg": dict}
    if not isinstance(config, dict) or any(not isinstance(config.get(key), kind) for key, kind in needed.items()):
        raise InputError(f"{where} is no model's config; it must have {', '.join(needed)}")
    if not isinstance(config.get("model_args", {}), dict):
        raise InputError(
            f"{where}: model_args {config['model_args']!r} are no arguments; give an object, or leave it out"
        )
    forbidden = [key for key in config.get("model_args", {}) if key in FACTORY_ARGUMENTS]
    if forbidden:
        raise InputError(f"{where}: model_args may not hold {', '.join(forbidden)}; they would read other files")
