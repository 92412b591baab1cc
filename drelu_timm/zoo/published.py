"""The models whose cards come with this package, in RobustBench's tree: ``model_cards/<dataset>/<threat>/<key>.json``.

A net of a few hundred kB lies beside its card as ``<key>.safetensors``; of a larger one the card has the sha256 and the
recipe. Nothing here uses the network.
"""

from contextlib import suppress
from functools import partial
from pathlib import Path

from ..errors import InputError
from ..files import read_json
from .robust_models import register, robust_model_name
from .sources import SavedModel

INSTALLED = Path(__file__).parents[1] / "model_cards"
IN_CHECKOUT = Path(__file__).parents[2] / "model_cards"


def register_published(folder: Path | None = None) -> None:
    """Register every model that has a card, by the cards' file names alone; they are read when a model is created.

    Args:
        folder: Holds the cards; by default the package's own.
    """
    for card in _cards(folder):
        with suppress(InputError):  # a stray file or a name that is taken must not stop `import drelu_timm`
            name = robust_model_name(*_identity(card))
            register(name, partial(_published, card), has_weights=_weights(card).is_file())


def _identity(card: Path) -> tuple[str, str, str]:
    """Key, dataset and threat model, as the card's place says them."""
    return card.stem, card.parents[1].name, card.parent.name


def _weights(card: Path) -> Path:
    """The file of the card's weights, which exists only for small models."""
    return card.with_suffix(".safetensors")


def _cards(folder: Path | None = None) -> list[Path]:
    folder = folder or (INSTALLED if INSTALLED.is_dir() else IN_CHECKOUT)
    return sorted(folder.glob("*/*/*.json"))


def published_sha256(name: str) -> str | None:
    """sha256 of the weights that a card gives for a name of `robust_model_name`; None where there is no such card."""
    for card in _cards():
        if robust_model_name(*_identity(card)) == name:
            return read_json(card).get("measured", {}).get("weights", {}).get("sha256")
    return None


def _published(card: Path, cache_dir: Path | None) -> SavedModel:
    """The files of a published model.

    Raises:
        InputError: A broken card, or one without its weights.
    """
    content = read_json(card)
    try:
        measured = content["measured"]
        config, recipe = measured["timm"], measured["recipe"]
        sha256, size = measured["weights"]["sha256"], measured["weights"]["bytes"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{card} is no model's card ({error!r}); install drelu-timm again") from error
    weights = _weights(card)
    if not weights.is_file():
        key, dataset, threat_model = _identity(card)
        raise InputError(
            f"{key}: its weights do not come with the package ({size:,} bytes, sha256 {sha256}); make them by "
            f"drelu-timm train --config {recipe} and drelu-timm export, then register_robust_model({key!r}, "
            f"{dataset!r}, {threat_model!r}, FOLDER), or give the place of these very ones and their sha256"
        )
    return SavedModel(config, card, weights, sha256)
