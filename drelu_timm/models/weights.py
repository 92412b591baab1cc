"""Whether weights on the Hugging Face Hub can be had: found before any work, in seconds, without retries."""

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from timm.models._hub import HF_WEIGHTS_NAME, _get_safe_alternatives
from timm.models._pretrained import PretrainedCfg

from ..errors import InputError, one_line

# httpx's, requests' and huggingface_hub's own, which have no other class in common than Exception. Timeouts and errors
# of the server are not among them: those may pass, and huggingface_hub tries again.
_NO_CONNECTION = ("ConnectError", "ConnectionError", "OfflineModeIsEnabled")


def check_weights(
    architecture: str, cfg: PretrainedCfg, *, called: str | None = None, cache_dir: str | Path | None = None
) -> None:
    """Raise where timm would not get the pretrained weights of a cfg.

    Without a network timm itself tries two files for 24 seconds each, and reports neither the model nor a remedy.

    Args:
        architecture: Name of the timm architecture whose weights they are, without a tag.
        cfg: Pretrained cfg of the model, resolved.
        called: What errors call the model, e.g. a flag and its value; by default the architecture with its tag.
        cache_dir: Folder of the Hub's cache; None for huggingface_hub's own.

    Raises:
        InputError: The cfg names no weights, or weights on the Hub that are neither in the cache nor within reach.
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
    """Return why no file of a model repository can be had; None if one is in the cache or the Hub answers.

    Args:
        repo: "ORG/NAME", or as timm writes it, "ORG/NAME@REVISION".
        files: Names of the files, any of which would do.
        revision: Branch, tag or commit.
        cache_dir: Folder of the Hub's cache; None for huggingface_hub's own.
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
    """Return what to do about a model repository that is out of reach."""
    return (
        f"Check the network; or run `hf download {repo}` where there is one, copy its Hub cache to "
        f"{constants.HF_HUB_CACHE} and set HF_HUB_OFFLINE=1"
    )
