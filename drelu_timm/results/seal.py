"""Seal of a result, and the check of a result against the files next to it.

The check derives again everything that follows from the files: accuracies from the rows, the worst case from their
union, the verdict from its numbers, the adversarial images that must exist. What cannot be derived is sealed: each link
of a chain of digests covers the link before and one more part.

A seal detects accidents and casual edits. It is not a signature: anyone who edits a file can compute the links again.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from ..attacks.threat_model import ThreatModel
from ..data.images import Images, as_float
from ..errors import InputError
from ..files import read_json
from ..hashing import digest, sha256_of
from .examples import ADVERSARIAL, Adversarial, Rows, read_adversarial, read_rows
from .result import Result, Seal

_AGAIN = "Restore the files, or delete the result and evaluate again."


def seal(result: Result, *, images: str, rows: str) -> Seal:
    """Return the seal of a result that is about to be written.

    Args:
        result: The complete result.
        images: Digest of the test images and labels, see `images_digest`.
        rows: sha256 of the CSV file.
    """
    content = json.loads(json.dumps(result.to_json()))  # as it will be read: tuples become lists
    parts, link = _parts(content) | {"images": images, "rows": rows}, ""
    links: dict[str, str] = {}
    for name in _NAMES:
        links[name] = link = _link(link, name, parts[name])
    return Seal(**links)


def images_digest(images: Images) -> str:
    """Return a sha256 over the pixels and labels of a test set."""
    return digest([images.images, images.labels])


def check_result(result: Result, test: Images | None = None) -> bool:
    """Check a result that was read, the rows and the adversarial images next to it, and its seal, against each other.

    Args:
        result: Result of `read_result`. Files next to it that are missing are not checked.
        test: The test set, if it is loaded: then labels, images and distances are checked as well.

    Returns:
        Whether the result has a seal; results of version 0.1.0 have none.

    Raises:
        InputError: The first contradiction, by file and name.
    """
    all_rows = {point.eps: read_rows(result, point.eps) for point in result.points}
    rows = all_rows[result.points[-1].eps]
    if test is not None and rows is not None:
        _check_labels(result, rows, test)
    if not result.is_sweep and rows is not None and result.file.with_suffix(ADVERSARIAL).is_file():
        _check_adversarial(result, rows, read_adversarial(result), test)
    if result.seal is not None:
        _check_links(result, result.seal, test)
    return result.seal is not None


def _check_labels(result: Result, rows: Rows, test: Images) -> None:
    n = result.n_examples
    if n > len(test) or not torch.equal(rows.labels, test.labels[:n].cpu()):
        raise InputError(
            f"{result.file.with_suffix('.csv')} has other labels than the test images of {test.title}. Give their "
            "folder by --data-dir."
        )


def _check_adversarial(result: Result, rows: Rows, adversarial: Adversarial, test: Images | None) -> None:
    path = result.file.with_suffix(ADVERSARIAL)
    fooled = ((rows.predictions == rows.labels) & ~rows.survivors).nonzero().squeeze(1)
    if len(fooled) != len(adversarial.index) or not torch.equal(fooled, adversarial.index):
        differing = sorted({*fooled.tolist()} ^ {*adversarial.index.tolist()}) or adversarial.index.tolist()
        raise InputError(
            f"{path} and the rows in {result.file.with_suffix('.csv').name} differ in which examples fooled the model "
            f"(example {differing[0]} first). {_AGAIN}"
        )
    if test is not None and len(fooled):
        threat_model = ThreatModel.parse(result.norm, result.point.eps)
        clean = as_float(test.images[fooled.to(test.images.device)]).cpu()
        if clean.shape != adversarial.images.shape:
            raise InputError(
                f"{path} has images of {list(adversarial.images.shape[1:])}, {test.title} of {list(clean.shape[1:])}. "
                f"{_AGAIN}"
            )
        outside = (~threat_model.contains(adversarial.images, clean)).nonzero().squeeze(1)
        if len(outside):
            raise InputError(
                f"{path} has {len(outside)} images outside of {threat_model} (example {fooled[outside[0]]} first). "
                f"{_AGAIN}"
            )


def _check_links(result: Result, stored: Seal, test: Images | None) -> None:
    parts, csv = _parts(read_json(result.file)), result.file.with_suffix(".csv")
    if test is not None:
        parts["images"] = images_digest(test[: result.n_examples])
    if csv.is_file():
        parts["rows"] = sha256_of(csv)
    link = ""
    for name in _NAMES:
        if name in parts and _link(link, name, parts[name]) != getattr(stored, name):
            raise InputError(f"{result.file}: {_WORDS[name]} changed after the evaluation, by its seal. {_AGAIN}")
        link = getattr(stored, name)


_WORDS = {
    "weights": "its model_digest",
    "images": "the test images",
    "settings": "its settings",
    "rows": "the .csv file",
    "result": "its content",
}
_NAMES = tuple(_WORDS)  # in the order of the chain


def _parts(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the parts of a seal that are in the JSON content of a result."""
    content = {name: value for name, value in content.items() if name != "seal"}
    points = content.get("curve", [content])
    asked = {name: content.get(name) for name in ("dataset", "norm", "eps", "suite", "n_examples", "seed", "precision")}
    settings = [asked, *(point.get("settings") for point in points)]
    return {
        "weights": str(content.get("model_digest")),
        "settings": json.dumps(settings, sort_keys=True),
        "result": json.dumps(content, sort_keys=True),
    }


def _link(before: str, name: str, part: str) -> str:
    return hashlib.sha256("\n".join((before, name, part)).encode(errors="surrogatepass")).hexdigest()
