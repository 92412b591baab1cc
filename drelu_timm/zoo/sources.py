"""Where a trained model comes from: a local folder, the URL of one, or a repository of the Hugging Face Hub.

Two files each, config.json and model.safetensors; nothing else is read, and never a pickle.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch.hub
from torch import nn

from ..digests import sha256_of
from ..errors import InputError, one_line
from ..files import read_json
from ..models.weights import CONFIG, WEIGHTS, load_saved

HUB = "hf-hub:"


@dataclass(frozen=True)
class SavedModel:
    """A trained model in files on this machine.

    Attributes:
        config: What its config.json holds.
        where: The file that the config is from.
        weights: In the safetensors format.
        sha256: That the weights file must have; None for any.
    """

    config: Any
    where: Path
    weights: Path
    sha256: str | None

    def load(self) -> nn.Module:
        """The model, for normalised images.

        Raises:
            InputError: Other weights than expected, or files that make no model.
        """
        if self.sha256 is not None:
            _check_digest(self.weights, self.sha256, "weights")
        return load_saved(self.config, self.weights, self.where)


# Fetches a model's files where they are not here yet; None stands for the cache folder of the library that does it.
Source = Callable[[Path | None], SavedModel]


def find_source(place: Path | str, sha256: str | None, config_sha256: str | None) -> Source:
    """What `register_robust_model` takes as a source, checked as far as that goes without the network.

    Raises:
        InputError: No such folder, a URL without sha256 or of http, or what is no name, address or digest at all.
    """
    for name, digest in {"sha256": sha256, "config_sha256": config_sha256}.items():
        if digest is not None and not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise InputError(f"{name} {digest!r} is no SHA-256; give 64 digits, 0-9 and a-f, as sha256sum prints them")
    if isinstance(place, str) and place.startswith("http://"):
        raise InputError(f"{place}: what comes over http may be anybody's; give its https:// address")
    if isinstance(place, str) and place.startswith("https://"):
        return _web_source(place, sha256, config_sha256)
    if isinstance(place, str) and place.startswith(HUB):
        return _hub_source(place, sha256, config_sha256)
    folder = Path(place)
    if not (folder / CONFIG).is_file():
        raise InputError(
            f"{folder} holds no exported model (no {CONFIG}); give a folder made by drelu-timm export, "
            f"the https:// address of one, or {HUB}ORG/NAME"
        )
    return lambda cache_dir: _saved(folder / CONFIG, folder / WEIGHTS, sha256, config_sha256)


def _saved(config: Path, weights: Path, sha256: str | None, config_sha256: str | None) -> SavedModel:
    if config_sha256 is not None:
        _check_digest(config, config_sha256, "settings")
    return SavedModel(read_json(config), config, weights, sha256)


def _web_source(url: str, sha256: str | None, config_sha256: str | None) -> Source:
    if sha256 is None:
        raise InputError(f"{url}: weights from the web need their sha256; export wrote it beside them, in SHA256SUMS")
    if urlsplit(url).query or urlsplit(url).fragment:
        raise InputError(f"{url}: give the address of a folder, without ? and #; the files' names are put behind it")
    return partial(_fetched, url.rstrip("/"), sha256, config_sha256)


def _fetched(url: str, sha256: str, config_sha256: str | None, cache_dir: Path | None) -> SavedModel:
    """The files of a web folder, downloaded where they are not in the cache."""
    # A folder for all of these: the same weights may come with another config elsewhere, or later.
    name = hashlib.sha256(" ".join(filter(None, (url, sha256, config_sha256))).encode()).hexdigest()
    folder = Path(cache_dir or torch.hub.get_dir()) / "drelu_timm" / name
    if not (folder / CONFIG).exists():
        _download(f"{url}/{CONFIG}", folder / CONFIG, config_sha256, "settings")
        try:
            read_json(folder / CONFIG)
        except InputError:  # cut short, or a web page: it must not stay in the cache
            (folder / CONFIG).unlink(missing_ok=True)
            raise
    if not (folder / WEIGHTS).exists():
        _download(f"{url}/{WEIGHTS}", folder / WEIGHTS, sha256, "weights")
    return _saved(folder / CONFIG, folder / WEIGHTS, sha256, config_sha256)


def _download(url: str, file: Path, sha256: str | None, held: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), hash_prefix=sha256)
    except RuntimeError as error:
        raise InputError(
            f"{url} holds other {held} than were registered, and they were not kept ({one_line(error)}); "
            "ask who published them, or evaluate and export the model anew"
        ) from error
    except (OSError, ValueError, HTTPException) as error:
        raise InputError(f"{url} cannot be fetched ({one_line(error)}); check the address and the network") from error


def _hub_source(place: str, sha256: str | None, config_sha256: str | None) -> Source:
    from . import hub

    repo, _, revision = place.removeprefix(HUB).partition("@")
    hub.check_name(repo, place)

    def fetch(cache_dir: Path | None) -> SavedModel:
        config, weights = (hub.fetch(repo, revision or None, file, cache_dir) for file in (CONFIG, WEIGHTS))
        return _saved(config, weights, sha256, config_sha256)

    return fetch


def _check_digest(file: Path, expected: str, held: str) -> None:
    try:
        found = sha256_of(file)
    except OSError as error:
        raise InputError(f"{file} cannot be read ({one_line(error)}); fetch or export it again") from error
    if found != expected:
        raise InputError(
            f"{file} holds other {held} than were registered: sha256 {expected} expected, {found} found; "
            "delete it and fetch it again, or evaluate and export the model anew"
        )
