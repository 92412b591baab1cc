"""An evaluated run as RobustBench files it: its ``model_info`` entry."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema

from ..errors import InputError
from ..schema import dump
from .measured import Measured, percent

# Made from the 188 entries that RobustBench's repository holds at revision 78fcc9e for Linf and L2: the same fields,
# types and formats. It is stricter than 19 of them: every accuracy has its two decimals, "reported" too.
SCHEMA = Path(__file__).with_name("model_info.schema.json")


def model_info(measured: Measured) -> dict[str, Any]:
    """The entry that RobustBench keeps under ``model_info/<dataset>/<threat>/<key>.json``, field by field as it does.

    ``unreliable`` says that the gradients are masked; ``external``, by which RobustBench ranks, is there where
    AutoAttack's number is not the worst case.
    """
    paper = measured.paper
    external = {} if measured.external is None else {"external": percent(measured.external)}
    return {
        "link": paper.link,
        "name": paper.title,
        "authors": paper.authors,
        # RobustBench counts real images only: generated ones go into the footnote.
        "additional_data": is_pretrained(measured) or begun_elsewhere(measured) is not None,
        "number_forward_passes": 1,
        "dataset": measured.dataset,
        "venue": paper.venue,
        "architecture": architecture(measured),
        "eps": measured.threat_model.written,
        "clean_acc": percent(measured.point.clean),
        "reported": percent(measured.point.worst),
        "autoattack_acc": percent(measured.autoattack),
        **external,
        "footnote": _footnote(measured),
        "unreliable": measured.verdict == "masked",
    }


def architecture(measured: Measured) -> str:
    """The timm architecture, and what stands in the place of a D-ReLU where that is something else."""
    train = measured.config["train"]
    options = [train.get("placement"), train.get("activation")]
    said = ", ".join(option for option in options if option)
    return train["model"] + (f" ({said})" if said else "")


def is_pretrained(measured: Measured) -> bool:
    """Whether the training, or one that it was begun from, had timm's ImageNet weights."""
    return any(config["train"].get("pretrained") for config in measured.trainings)


def begun_elsewhere(measured: Measured) -> str | None:
    """A sentence on the other datasets that the net it was begun from was trained on; None where there are none."""
    own = _data(measured.config)
    others = [config["dataset_title"] for config in measured.trainings if _data(config) != own]
    return f"It was begun from a net trained on {' and '.join(dict.fromkeys(others))}." if others else None


def _data(config: dict[str, Any]) -> tuple[str, ...]:
    """What tells the dataset of a training from others; of folders it is their name."""
    dataset = config["train"]["dataset"]
    return (dataset, config["dataset_title"]) if dataset == "folder" else (dataset,)


def generated_images(measured: Measured) -> str | None:
    """A sentence on generated images in the training, or in one that it was begun from; None where there were none."""
    for config in measured.trainings:
        if fraction := config["train"].get("generated_fraction"):
            count = config.get("generated", {}).get("images")
            images = f"{_short(count)} synthetic images" if count else "synthetic images"
            return f"It uses additional {images} in training ({fraction:.0%} of every batch)."
    return None


def told_of_data(measured: Measured) -> list[str]:
    """The sentences on what it was trained on beside its dataset; none where it was trained on that alone."""
    return [sentence for sentence in (begun_elsewhere(measured), generated_images(measured)) if sentence]


def _short(count: int) -> str:
    """A number as RobustBench's footnotes have it: 1M, 20M; 5,000."""
    return f"{count // 1_000_000}M" if count % 1_000_000 == 0 else f"{count:,}"


def _footnote(measured: Measured) -> str:
    sentences = [*told_of_data(measured), measured.sample, f"Gradient-masking verdict: {measured.verdict}."]
    if measured.external is not None:
        sentences.append(
            f"{percent(measured.external)}% robust accuracy is the worst case, image by image, of {measured.attacks}."
        )
    return " ".join(sentences)


def check_entry(entry: Mapping[str, Any]) -> None:
    """Raise what RobustBench's own entries would not hold, every field of it at once.

    Raises:
        InputError: Fields that are missing, that RobustBench does not have, or whose form is another.
    """
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    errors = sorted(validator.iter_errors(dict(entry)), key=lambda error: list(error.path))
    if errors:
        said = "; ".join(f"{'.'.join(map(str, error.path)) or 'entry'}: {error.message}" for error in errors)
        raise InputError(f"the entry is none that RobustBench could file ({said}); mend what these come from")


def card_record(measured: Measured) -> dict[str, Any]:
    """What lies beside a card: RobustBench's entry, and in ``measured`` what it and the card are made from."""
    return {**model_info(measured), "measured": {**dump(measured), "recipe": measured.recipe}}
