"""Trained models under the names that timm and RobustBench look for, ``<key>_<dataset>_<norm>``.

A model is two files, config.json and model.safetensors; pickles are never read. They come from a local folder, an https
address or the Hugging Face Hub (`register_robust_model`), or are published with this package (`register_published`).
"""

import hashlib
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import timm
import torch.hub
from torch import nn

from ..errors import InputError, one_line
from ..files import atomic_file, read_json
from ..hashing import sha256_of
from ..models.inference import channels_of, normalized
from ..models.registry import list_as_pretrained, register_model
from ..models.weights import CONFIG, WEIGHTS, load_saved

HUB = "hf-hub:"
_LARGEST = {CONFIG: 1 << 20, WEIGHTS: 1 << 36}  # bytes that a download may have
INSTALLED = Path(__file__).parents[1] / "model_cards"
IN_CHECKOUT = Path(__file__).parents[2] / "model_cards"


@dataclass(frozen=True)
class SavedModel:
    """Files of a trained model on this machine.

    Attributes:
        config: Content of config.json.
        where: The file that the config is from; errors name it.
        weights: File in the safetensors format.
        sha256: Digest that the weights must have; None for any.
    """

    config: Any
    where: Path
    weights: Path
    sha256: str | None

    def load(self) -> nn.Module:
        """Load the model without its normalization.

        Raises:
            InputError: The weights are not the expected ones, or the files do not fit together.
        """
        if self.sha256 is not None:
            _check_digest(self.weights, self.sha256, "weights")
        return load_saved(self.config, self.weights, self.where)


# Both take timm's cache_dir, None for the default, and download files that are not cached yet.
Source = Callable[[Path | None], SavedModel]
Files = Callable[[Path | None], tuple[Path, Path]]  # paths of config.json and model.safetensors
_sources: dict[str, Source] = {}


def robust_model_name(key: str, dataset: str, norm: str) -> str:
    """Return the timm name that ``robustbench.utils.load_model(key, dataset, norm)`` asks for.

    Raises:
        InputError: The key has characters that RobustBench's keys do not have.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", key):
        raise InputError(
            f"--key {key!r} is not a RobustBench key. Use letters, digits, - and _ only, as in "
            "Author2026Title_ResNet-18 (timm reads what follows a dot as a tag)."
        )
    return f"{key}_{dataset}_{norm}".lower().replace("-", "_")


def register_robust_model(
    key: str,
    dataset: str,
    threat_model: str,
    source: Path | str,
    *,
    sha256: str | None = None,
    config_sha256: str | None = None,
) -> str:
    """Register an exported model with timm and RobustBench.

    Afterwards ``timm.create_model(name, pretrained=True)`` and ``robustbench.utils.load_model(key, dataset=dataset,
    threat_model=threat_model)`` return the model in eval mode, for images [B, C, H, W] in [0, 1]: a Sequential of
    ``normalize`` and ``model``. Registering a name again replaces its source.

    Args:
        key: RobustBench's name of the model, such as "Author2026Title_ResNet-18".
        dataset: Dataset as RobustBench spells it, such as "cifar10".
        threat_model: "Linf" or "L2".
        source: Location of config.json and model.safetensors: a folder; its address, "https://host/path"; or a model
            repository of the Hugging Face Hub, "hf-hub:ORG/NAME" or "hf-hub:ORG/NAME@REVISION". They are read when the
            model is created, and downloaded then if they are not in the cache of torch.hub or of the Hub.
        sha256: Digest of model.safetensors, checked before the weights are used. Required for downloads.
        config_sha256: Digest of config.json, which decides normalization and activation. Required for downloads.

    Returns:
        The name of the model in timm.

    Raises:
        InputError: The key, source or a digest is invalid, or timm has another model of that name.
    """
    return register(robust_model_name(key, dataset, threat_model), find_source(source, sha256, config_sha256))


def register(name: str, source: Source, *, has_weights: bool = True) -> str:
    """Register a source with timm under a name of `robust_model_name`, and return the name.

    Args:
        name: Name in timm. A name that `register` registered before gets the new source.
        source: Function that returns the files of the model.
        has_weights: Whether the source has weights. Only then ``timm.list_pretrained()`` lists the model.

    Raises:
        InputError: timm has another model of that name.
    """
    if name not in _sources:
        check_name_is_free(name)
        register_model(_entrypoint(name))
    if has_weights:
        list_as_pretrained(name)
    _sources[name] = source
    return name


def registered_cfg(name: str) -> dict[str, Any] | None:
    """Return timm's ``pretrained_cfg`` of a model that `register` registered; None for other names.

    Raises:
        InputError: The files of its source cannot be read or downloaded.
    """
    return _sources[name](None).config["pretrained_cfg"] if name in _sources else None


def check_name_is_free(name: str) -> None:
    """Raise InputError if timm has a model of that name that `register` did not register."""
    if name not in _sources and timm.is_model(name):
        raise InputError(f"--key: timm has a model {name!r} already. Choose another key.")


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    """Return the function that timm calls for a model.

    It refuses arguments that would change the trained model; timm's scripts pass some of them with the model's own
    values. It refuses pretrained=False, which would pass off untrained weights as the robust model.
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
            raise InputError(f"{name} is a trained model. Use timm.create_model({name!r}, pretrained=True).")
        model = _sources[name](cache_dir).load()
        if num_classes not in (None, model.num_classes):
            raise InputError(f"num_classes={num_classes}: {name} has {model.num_classes} classes. Leave it out.")
        if in_chans not in (None, channels_of(model)):
            raise InputError(f"in_chans={in_chans}: {name} takes {channels_of(model)} channels. Leave it out.")
        return normalized(model).eval()

    create.__name__ = name
    return create


# Sources


def find_source(place: Path | str, sha256: str | None, config_sha256: str | None) -> Source:
    """Return the source for the arguments of `register_robust_model`, checked without the network.

    Raises:
        InputError: The folder does not exist, an address, name or digest is invalid, or a digest is missing.
    """
    digests = {"sha256": sha256, "config_sha256": config_sha256}
    for name, digest in digests.items():
        if digest is not None and not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise InputError(f"{name} {digest!r} is not a SHA-256. Use the 64 digits, 0-9 and a-f, of sha256sum.")
    address = str(place)
    if address.startswith("http://"):
        raise InputError(f"{address}: files sent over http can be replaced on the way. Use the https:// address.")
    if address.startswith("https://"):
        files = partial(_web_files, _web_folder(address), sha256, config_sha256)
    elif address.startswith(HUB):
        files = _hub_repository(address)
    elif (Path(place) / CONFIG).is_file():
        return partial(_saved, lambda cache_dir: (Path(place) / CONFIG, Path(place) / WEIGHTS), sha256, config_sha256)
    else:
        raise InputError(
            f"{address} does not contain an exported model (no {CONFIG}). Use a folder made by drelu-timm export, its "
            f"https:// address, or {HUB}ORG/NAME."
        )
    if missing := [name for name, digest in digests.items() if digest is None]:
        raise InputError(f"{address}: a download needs {' and '.join(missing)}. See register.py of the export.")
    return partial(_saved, files, sha256, config_sha256)


def _saved(files: Files, sha256: str | None, config_sha256: str | None, cache_dir: Path | None) -> SavedModel:
    config, weights = files(cache_dir)
    if config_sha256 is not None:
        _check_digest(config, config_sha256, "settings")
    return SavedModel(read_json(config), config, weights, sha256)


def _web_folder(url: str) -> str:
    if urlsplit(url).query or urlsplit(url).fragment:
        raise InputError(f"{url} has a ? or #. Use the address of a folder, to which the files' names are appended.")
    return url.rstrip("/")


def _web_files(url: str, sha256: str | None, config_sha256: str | None, cache_dir: Path | None) -> tuple[Path, Path]:
    """Return the files of a web folder, downloaded if they are not cached."""
    # One folder for all three: the same weights may come with another config elsewhere, or later.
    name = hashlib.sha256(f"{url} {sha256} {config_sha256}".encode()).hexdigest()
    folder = Path(cache_dir or torch.hub.get_dir()) / "drelu_timm" / name
    for file, digest, content in ((CONFIG, config_sha256, "settings"), (WEIGHTS, sha256, "weights")):
        if not (folder / file).exists():
            _download(f"{url}/{file}", folder / file, digest, content)
    return folder / CONFIG, folder / WEIGHTS


class _HttpsOnly(HTTPRedirectHandler):
    """Follows redirects to https addresses only; urllib's own handler also follows them to http and ftp."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        if not newurl.startswith("https://"):
            raise URLError(f"it is redirected to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_open = build_opener(_HttpsOnly).open


def _download(url: str, file: Path, expected: str | None, content: str) -> None:
    """Write a file of an expected SHA-256; a different one, or one larger than `_LARGEST`, is not kept."""
    from tqdm import tqdm  # comes with huggingface_hub

    digest = hashlib.sha256()
    try:
        with atomic_file(file) as temporary, _open(url, timeout=60) as answer, temporary.open("wb") as out:
            with tqdm(desc=file.name, unit="B", unit_scale=True, disable=None, leave=False) as bar:
                while chunk := answer.read(1 << 20):
                    out.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
                    if out.tell() > _LARGEST[file.name]:  # not bar.n, which a disabled bar does not count
                        raise InputError(f"{url} is larger than {_LARGEST[file.name]:,} bytes. Check the address.")
            if (found := digest.hexdigest()) != expected:
                raise InputError(
                    f"{url} has other {content} than registered (sha256 {found}, not {expected}). Ask the publisher or "
                    "export the model again."
                )
    except InputError:
        raise
    except (OSError, ValueError, HTTPException) as error:
        raise InputError(
            f"{url} cannot be downloaded ({one_line(error)}). Check the address and the network."
        ) from error


def _hub_repository(place: str) -> Files:
    from . import hub

    repo, _, revision = place.removeprefix(HUB).partition("@")
    hub.check_name(repo, place)

    def files(cache_dir: Path | None) -> tuple[Path, Path]:
        config, weights = (hub.fetch(repo, revision or None, file, cache_dir) for file in (CONFIG, WEIGHTS))
        return config, weights

    return files


def _check_digest(file: Path, expected: str, content: str) -> None:
    try:
        found = sha256_of(file)
    except OSError as error:
        raise InputError(f"{file} cannot be read ({one_line(error)}). Download or export it again.") from error
    if found != expected:
        raise InputError(
            f"{file} has other {content} than registered (sha256 {found}, not {expected}). Delete it and download it "
            "again, or export the model again."
        )


# Models that are published with this package


def register_published(folder: Path | None = None) -> None:
    """Register every model that has a card, by the names of the card files; they are read when a model is created.

    Args:
        folder: Folder of the cards, ``<dataset>/<norm>/<key>.json``, with small weights next to them as
            ``<key>.safetensors``; by default the package's.
    """
    for card in _cards(folder):
        with suppress(InputError):  # a stray file or a name that is taken must not stop `import drelu_timm`
            name = robust_model_name(*_identity(card))
            register(name, partial(_published, card), has_weights=_weights(card).is_file())


def published_sha256(name: str) -> str | None:
    """Return the sha256 of the published weights of a name of `robust_model_name`; None without such a card."""
    for card in _cards():
        if robust_model_name(*_identity(card)) == name:
            return read_json(card).get("measured", {}).get("weights", {}).get("sha256")
    return None


def _cards(folder: Path | None = None) -> list[Path]:
    folder = folder or (INSTALLED if INSTALLED.is_dir() else IN_CHECKOUT)
    return sorted(folder.glob("*/*/*.json"))


def _identity(card: Path) -> tuple[str, str, str]:
    """Return key, dataset and norm, from the path of the card."""
    return card.stem, card.parents[1].name, card.parent.name


def _weights(card: Path) -> Path:
    return card.with_suffix(".safetensors")


def _published(card: Path, cache_dir: Path | None) -> SavedModel:
    """Return the files of a published model.

    Raises:
        InputError: The card is broken, or its weights are not published.
    """
    content = read_json(card)
    try:
        measured = content["measured"]
        config, recipe = measured["timm"], measured["recipe"]
        sha256, size = measured["weights"]["sha256"], measured["weights"]["bytes"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{card} is not the card of a model ({error!r}). Install drelu-timm again.") from error
    weights = _weights(card)
    if not weights.is_file():
        key, dataset, norm = _identity(card)
        raise InputError(
            f"{key}: its weights do not come with the package ({size:,} bytes, sha256 {sha256}). Make them with "
            f"drelu-timm train --config {recipe} and drelu-timm export, then call register_robust_model({key!r}, "
            f"{dataset!r}, {norm!r}, FOLDER), or pass the location of these weights with their sha256."
        )
    return SavedModel(config, card, weights, sha256)
