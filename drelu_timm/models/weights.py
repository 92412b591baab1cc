"""Model folders in the form of timm and the Hugging Face Hub, and checks that pretrained weights are available."""

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from safetensors import SafetensorError
from timm.models import load_state_dict
from timm.models._hub import HF_WEIGHTS_NAME, _get_safe_alternatives, load_state_dict_from_hf
from timm.models._pretrained import PretrainedCfg
from torch import Tensor, nn

from ..errors import InputError, one_line, unknown
from ..files import put_in_place, read_json
from .inference import TimmModel, channels_of

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename")  # fields of a cfg that locate its weights
# Arguments of timm.create_model itself, which a folder from elsewhere must not set.
FACTORY_ARGUMENTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")

# Classes of httpx, requests and huggingface_hub, which have only Exception in common. Timeouts and errors of the server
# are not among them: they may be temporary, and huggingface_hub tries again.
_NO_CONNECTION = ("ConnectError", "ConnectionError", "OfflineModeIsEnabled")


def save_folder(
    model: TimmModel,
    folder: str | Path,
    *,
    model_args: dict[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model as a timm / Hugging Face folder: ``model.safetensors`` and ``config.json``.

    ``load_folder`` reads it with any timm. After ``import drelu_timm``, so do ``timm.create_model("local-dir:...")`` of
    the newest timm and ``transformers.TimmWrapperForImageClassification.from_pretrained``.

    Args:
        model: A model from ``timm.create_model``.
        folder: Created atomically.
        model_args: Arguments of ``timm.create_model`` for the model; `_drelu` variants record theirs.
        weights: By default ``model.state_dict()``; a sharded model's weights have to be gathered.

    Raises:
        InputError: The folder exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already. Choose a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    given = model.state_dict() if weights is None else weights
    saved = {name: tensor.detach().cpu().contiguous() for name, tensor in given.items()}
    config = _config(model, {**getattr(model, "_model_args", {}), **(model_args or {})})
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as parent:
        temporary = Path(parent) / folder.name  # one level down, because the clean-up removes the parent
        temporary.mkdir()
        safetensors.torch.save_file(saved, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        put_in_place(temporary, folder)


def _config(model: TimmModel, model_args: dict[str, Any]) -> dict[str, Any]:
    """Return what timm's ``save_for_hf`` writes, with all arguments for every version of timm."""
    elsewhere = (*SOURCES, "source", "custom_load", "label_offset")  # would refer to other weights than the folder's
    cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in elsewhere}
    cfg = {**cfg, "num_classes": model.num_classes, "input_size": (channels_of(model), *cfg["input_size"][1:])}
    return {
        "architecture": cfg.pop("architecture"),
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        # Without num_classes, which transformers' TimmWrapper passes in addition to model_args.
        "model_args": {key: value for key, value in model_args.items() if key != "num_classes"},
        "pretrained_cfg": cfg,
    }


def load_folder(folder: str | Path) -> nn.Module:
    """Load the model of a folder that `save_folder` or timm wrote, with every weight and learned cap as saved.

    Raises:
        InputError: A missing or truncated file, an unknown architecture, or weights that do not fit.
    """
    folder = Path(folder)
    return load_saved(read_json(folder / CONFIG), folder / WEIGHTS, folder / CONFIG)


def load_saved(config: dict[str, Any], weights: Path, where: Path) -> nn.Module:
    """Create the model of a config and load a safetensors file; ``where`` is the file of the config, for errors.

    Raises:
        InputError: An incomplete config, an unknown architecture, or weights that do not fit.
    """
    _check_config(config, where)
    architecture = config["architecture"]
    if not timm.is_model(architecture):
        raise unknown(f"{where}: architecture", architecture, timm.list_models())
    try:
        tensors = safetensors.torch.load_file(weights)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{weights} cannot be read ({one_line(error)}). Save the model again.") from error
    cfg = {**config["pretrained_cfg"], "num_classes": config["num_classes"]}
    try:
        arguments = {**config.get("model_args", {}), "num_classes": config["num_classes"]}
        model = timm.create_model(architecture, pretrained_cfg=cfg, **arguments)
        model.load_state_dict(tensors)
    except InputError:
        raise
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise InputError(
            f"{weights} is not a complete {architecture} as described in {where} ({one_line(error)}). "
            "Save the model again."
        ) from error
    return model


def _check_config(config: dict[str, Any], where: Path) -> None:
    needed = {"architecture": str, "num_classes": int, "pretrained_cfg": dict}
    if any(not isinstance(config.get(key), kind) for key, kind in needed.items()):
        raise InputError(f"{where} is not the config of a model. It must have {', '.join(needed)}.")
    model_args = config.get("model_args", {})
    if not isinstance(model_args, dict):
        raise InputError(f"{where}: model_args {model_args!r} is not an object. Use an object, or leave it out.")
    forbidden = [key for key in model_args if key in FACTORY_ARGUMENTS]
    if forbidden:
        raise InputError(f"{where}: model_args contains {', '.join(forbidden)}, which would read other files.")


# timm 1.0.9 unpickles any object in a checkpoint unless weights_only is set; newer ones have it as their default.
UNPICKLES = not signature(load_state_dict).parameters["weights_only"].default


def preloaded(cfg: PretrainedCfg) -> PretrainedCfg:
    """Return a cfg with the weights of its file, or of the Hub file that it names, loaded without unpickling objects.

    Raises:
        InputError: A file that cannot be loaded.
    """
    if cfg.state_dict or cfg.custom_load or cfg.source == "local-dir":  # a custom_load reads NumPy arrays
        return cfg
    try:
        if cfg.file:
            return replace(cfg, state_dict=load_state_dict(cfg.file, weights_only=True))
        if UNPICKLES and cfg.hf_hub_id and cfg.hf_hub_filename:
            return replace(cfg, state_dict=load_state_dict_from_hf(cfg.hf_hub_id, cfg.hf_hub_filename, True))
    except Exception as error:  # every format and every damage has its own
        where = cfg.file or f"{cfg.hf_hub_id}/{cfg.hf_hub_filename}"
        raise InputError(
            f"the weights of {where} cannot be loaded: {type(error).__name__} {one_line(error)}"
        ) from error
    return cfg


def check_weights(
    architecture: str, cfg: PretrainedCfg, *, called: str | None = None, cache_dir: str | Path | None = None
) -> None:
    """Check in seconds, before any work, that timm can get the pretrained weights of a cfg.

    Without a network timm tries two files for 24 seconds each, and its error names neither the model nor a remedy.

    Args:
        architecture: Name of the timm architecture of the weights, without a tag.
        cfg: Pretrained cfg of the model, resolved.
        called: Name of the model in errors, e.g. a flag and its value; by default the architecture with its tag.
        cache_dir: Folder of the Hub's cache; None for huggingface_hub's own.

    Raises:
        InputError: The cfg has no weights, or they are on the Hub, which cannot be reached, and not in the cache.
    """
    called = called or (f"{architecture}.{cfg.tag}" if cfg.tag else architecture)
    if not (cfg.has_weights or cfg.state_dict):
        raise InputError(f"{called} has no pretrained weights. Leave out pretrained=True or --pretrained.")
    if cfg.state_dict or cfg.file or not cfg.hf_hub_id:
        return
    file = cfg.hf_hub_filename or HF_WEIGHTS_NAME
    reason = out_of_reach(cfg.hf_hub_id, (*_get_safe_alternatives(file), file), cache_dir=cache_dir)
    if reason is not None:
        raise InputError(
            f"{called}: no pretrained weights ({reason}). {how_to_get(cfg.hf_hub_id)}; or, in Python, name a local "
            f"file: pretrained_cfg_overlay=dict(architecture={architecture!r}, file='FILE')."
        )


def out_of_reach(
    repo: str, files: Iterable[str], *, revision: str | None = None, cache_dir: str | Path | None = None
) -> str | None:
    """Return why none of the files of a repository is available; None if one is cached or the Hub answers.

    ``repo`` is "ORG/NAME" or, in timm's form, "ORG/NAME@REVISION".
    """
    repo, _, tagged = repo.partition("@")
    revision = revision or tagged or None
    files = list(files)
    if any(isinstance(try_to_load_from_cache(repo, file, cache_dir, revision), str) for file in files):
        return None
    try:
        HfApi().file_exists(repo, files[0], revision=revision)
    except Exception as error:
        if type(error).__name__ in _NO_CONNECTION:
            cache = cache_dir or constants.HF_HUB_CACHE
            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else one_line(error)
            return f"{repo} is not in {cache}, and {constants.ENDPOINT} cannot be reached: {why}"
    return None


def how_to_get(repo: str) -> str:
    """Return advice for a model repository that cannot be reached."""
    return (
        f"Check the network; or run `hf download {repo}` on a machine with a network, copy its Hub cache to "
        f"{constants.HF_HUB_CACHE} and set HF_HUB_OFFLINE=1"
    )
