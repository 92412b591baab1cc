"""Files for RobustBench's leaderboard: the ``model_info`` entry, the texts of the issue forms, and AutoAttack's log.

The forms are from https://github.com/RobustBench/robustbench/tree/master/.github/ISSUE_TEMPLATE.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema

from ..attacks.suites import ATTACKS, SUITES
from ..errors import InputError
from ..formatting import escape_markdown, markdown_code, one_line_text
from ..results.result import Result
from ..schema import dump
from .card import AUTOATTACK, Card, percent
from .recipes import made_with

# Made from the 188 entries for Linf and L2 in RobustBench's repository at revision 78fcc9e: the same fields, types and
# formats. It is stricter than 19 of them: every accuracy has two decimals, "reported" too.
SCHEMA = Path(__file__).with_name("model_info.schema.json")
ZOO = "https://github.com/RobustBench/robustbench/tree/master/robustbench/model_zoo/architectures"


def model_info(card: Card) -> dict[str, Any]:
    """Return RobustBench's entry, ``model_info/<dataset>/<norm>/<key>.json``, with its fields in its order.

    ``unreliable`` means masked gradients. ``external``, by which RobustBench ranks, is set where AutoAttack's accuracy
    is above the worst case.
    """
    external = {} if card.external is None else {"external": percent(card.external)}
    return {
        "link": card.paper.link,
        "name": card.paper.title,
        "authors": card.paper.authors,
        # RobustBench counts real images only: generated ones are a footnote.
        "additional_data": card.is_pretrained or bool(card.other_datasets),
        "number_forward_passes": 1,
        "dataset": card.dataset,
        "venue": card.paper.venue,
        "architecture": card.architecture,
        "eps": card.threat_model.written,
        "clean_acc": percent(card.point.clean),
        "reported": percent(card.point.worst),
        "autoattack_acc": percent(card.autoattack),
        **external,
        "footnote": _footnote(card),
        "unreliable": card.verdict == "masked",
    }


def _footnote(card: Card) -> str:
    sentences = [*card.other_datasets, *card.generated_images, card.sample]
    sentences.append(f"Gradient-masking verdict: {card.verdict}.")
    if card.external is not None:
        sentences.append(
            f"{percent(card.external)}% robust accuracy is the worst case, image by image, of {card.attacks}."
        )
    return " ".join(sentences)


def check_entry(entry: Mapping[str, Any]) -> None:
    """Check an entry against the schema of RobustBench's entries.

    Raises:
        InputError: Fields that are missing, unknown, or of another form; the error names all of them.
    """
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    errors = sorted(validator.iter_errors(dict(entry)), key=lambda error: list(error.path))
    if errors:
        wrong = "; ".join(f"{'.'.join(map(str, error.path)) or 'entry'}: {error.message}" for error in errors)
        raise InputError(f"RobustBench's entry would be invalid ({wrong}). Change the flags or --paper.")


def card_record(card: Card) -> dict[str, Any]:
    """Return the JSON of a card: RobustBench's entry and, under "measured", what `read_card` reads."""
    return {**model_info(card), "measured": {**dump(card), "recipe": card.recipe}}


def new_model(card: Card, repo: str | None) -> str:
    """Return RobustBench's form "New Model(s)", filled in.

    Args:
        card: Data of the model.
        repo: Its repository on the Hub; None before it is uploaded.
    """
    entry = model_info(card)
    address = f"https://huggingface.co/{repo}" if repo else "(address of hub/ or weights/ after the upload)"
    additional = " ".join(
        [f"{entry['additional_data']}.".lower(), *card.other_datasets, *card.generated_images]
    ).removesuffix(".")
    return f"""\
Title: [New Model] {card.key}

# Paper Information

- **Paper Title**: {escape_markdown(entry["name"])}
- **Paper URL**: {escape_markdown(entry["link"])}
- **Paper authors**: {escape_markdown(entry["authors"])}

# Leaderboard Claim(s)

## Model 1

- **Architecture**: {escape_markdown(entry["architecture"])}
- **Threat Model**: {card.norm}
- **eps**: {entry["eps"]}
- **Clean accuracy**: {entry["clean_acc"]}
- **Robust accuracy**: {percent(card.point.worst)}
- **Additional data**: {escape_markdown(additional)}
- **Evaluation method**: {escape_markdown(_method(card))}
- **Checkpoint and code**: {address}, sha256 of model.safetensors {card.weights.sha256}

# Model Zoo:

- [ ] I want to add my models to the Model Zoo (check if true)
- [x] I use an architecture that is included among those [here]({ZOO}) or in `timm`. If not, I added the link to the \
architecture implementation so that it can be added. ({markdown_code(card.architecture)}, in timm after \
`import drelu_timm`)
- [ ] I agree to release my model(s) under MIT license (check if true) **OR** under a custom license, located here: \
{card.license_terms}
"""


def _method(card: Card) -> str:
    sentences = [
        f"AutoAttack standard: {percent(card.autoattack)}.",
        f"Worst case, image by image, of {card.attacks}: {percent(card.point.worst)}.",
        f"Gradient masking: {card.verdict}.",
        card.sample,
        f"Attacks searched in {card.results.precision}; their images were judged in float32. "
        f"{made_with(card.results.environment)}.",
    ]
    return " ".join(sentences)


def is_external(card: Card) -> bool:
    """Return whether to submit an external evaluation: for adaptive attacks, or a worst case below AutoAttack's.

    Never for a copy of the board's images: an image within eps of the copy may be further from the original.
    """
    tried = card.attacks_tried
    adaptive = any(attack in ATTACKS and ATTACKS[attack].kind == "adaptive" for attack in tried)
    return (adaptive or card.external is not None) and not card.is_copy


def new_evaluation(card: Card, images: str, without_image: int) -> str:
    """Return RobustBench's form "New external evaluation(s)", filled in.

    Args:
        card: Data of the model.
        images: Name of the file of adversarial images.
        without_image: Number of images that fooled the model only in a sweep, which stores no images.
    """
    missing = f"; {without_image} found only in a sweep over eps also clean" if without_image else ""
    return f"""\
Title: [New evaluation] {card.key}

## Target model
+ **Model identifier(s):** {card.key}
+ **Leaderboard(s):** {card.dataset}, {card.threat_model}

## New evaluation
+ **Link to adversarial images:** (address of {images} after the upload: a tensor as large as the test set, in its \
order; images that stayed robust, are misclassified anyway, or were not evaluated are clean{missing})
+ **Robust accuracy:** {percent(card.point.worst)} (AutoAttack: {percent(card.autoattack)}). \
{escape_markdown(card.sample)}
+ **Author(s):** {escape_markdown(card.paper.authors)}
+ **Description of the method used:** for every image, the first that fooled the model of \
{escape_markdown(card.attacks)}. Gradient \
masking: {card.verdict}. {escape_markdown(" ".join(card.point.verdict.evidence))}
"""


def autoattack_log(result: Result) -> str:
    """Return the log that AutoAttack itself would write for an evaluation."""
    return "".join(f"{one_line_text(line)}\n" for line in _log(result))


def _log(result: Result) -> Iterator[str]:
    stages, point = SUITES["autoattack"][AUTOATTACK], result.point
    yield f"AutoAttack standard including {', '.join(stages)}; {result.norm}, eps {point.eps}"
    yield f"{result.n_examples} test images of {result.dataset_title}, seed {result.seed}"
    yield f"{made_with(result.environment)}; attacks search in {result.precision}, images are judged in float32"
    yield f"initial accuracy: {point.clean:.2%}"
    for attack, left in point.sequences[AUTOATTACK].items():
        yield f"robust accuracy after {attack.upper()}: {left:.2%}"
    yield f"robust accuracy: {point.accuracy[AUTOATTACK]:.2%}"
