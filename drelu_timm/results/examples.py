"""Examples of an evaluation: the CSV with a row per example, and the adversarial images, next to a result."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..attacks.threat_model import radius_of
from ..errors import InputError, one_line
from ..files import atomic_file
from ..hashing import sha256_of
from .result import ROUNDING, EpsResult, Result

ADVERSARIAL = ".adversarial.safetensors"  # the suffix of the file with the images, in place of the result's .json


@dataclass(frozen=True)
class Broken:
    """What fooled the model on each example first, in the order of the suite.

    Attributes:
        by: Name of the attack, or "probe <attack> at <eps>" for a probe for masking; "clean" for an example that is
            wrong without an attack, "" for one that stayed robust.
        steps: [N], gradients or queries until then; NaN where not known.
        margin: [N], logit of the label minus the largest other one, on the image that fooled the model; for an example
            that stayed robust, the smallest on any image that an attack returned.
        seed: Seed of that attack on that example; None where nothing fooled the model.
    """

    by: list[str]
    steps: Tensor
    margin: Tensor
    seed: list[int | None]


@dataclass(frozen=True)
class Rows:
    """Results per example at one eps.

    Attributes:
        labels: [N].
        predictions: [N], classes of the clean images.
        robust: By attack, or column of several, [N]: correct on the clean image and on what the attack returned.
        survivors: [N], whether neither an attack of the suite nor a probe for masking fooled the model.
        broken: What fooled the model; None for rows read from a file.
    """

    labels: Tensor
    predictions: Tensor
    robust: dict[str, Tensor]
    survivors: Tensor
    broken: Broken | None = None

    @property
    def shares(self) -> dict[str, float]:
        """Accuracies in [0, 1]: "clean", under each attack, "worst"."""
        flags = {"clean": self.predictions == self.labels, **self.robust, "worst": self.survivors}
        return {name: share(flag) for name, flag in flags.items()}


def share(flags: Tensor) -> float:
    """Return the share in [0, 1] of the flags that are set; 0 without flags."""
    return float(flags.double().mean()) if len(flags) else 0.0


def csv_text(rows: Rows) -> str:
    """Return the CSV of one eps, a row per example.

    Its columns are the index, label and clean prediction; 1 for robust or 0 for broken per attack; and the fields of
    `Broken`.
    """
    broken = rows.broken
    assert broken is not None
    return _csv(
        {
            **_examples(rows),
            **{attack: robust.int().tolist() for attack, robust in rows.robust.items()},
            "broken_by": broken.by,
            "steps": ["" if isnan(steps) else int(steps) for steps in broken.steps.tolist()],
            "margin": [f"{margin:.6g}" for margin in broken.margin.tolist()],
            "seed": ["" if seed is None else seed for seed in broken.seed],
        }
    )


def sweep_csv_text(rows: Mapping[str, Rows]) -> str:
    """Return the CSV of a sweep, a row per example, with the smallest eps per attack that fooled the model.

    Args:
        rows: By eps, from the smallest.
    """
    first = next(iter(rows.values()))
    columns = _examples(first)
    for attack in [*first.robust, "worst"]:
        smallest = [""] * len(first.labels)
        for eps, at in reversed(list(rows.items())):
            robust = at.survivors if attack == "worst" else at.robust[attack]
            for example in (~robust).nonzero().squeeze(1).tolist():
                smallest[example] = eps
        columns[attack] = smallest
    return _csv(columns)


def _examples(rows: Rows) -> dict[str, Sequence[Any]]:
    count = range(len(rows.labels))
    return {"index": count, "label": rows.labels.tolist(), "clean_prediction": rows.predictions.tolist()}


def _csv(columns: Mapping[str, Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


def read_rows(result: Result, eps: str) -> Rows | None:
    """Read the rows next to a result, at one of its eps; None if the file is missing.

    Raises:
        InputError: The file is cut short, of another version, or of another worst case than the result.
    """
    path, point = result.file.with_suffix(".csv"), result.at(eps)
    assert point is not None
    if not path.is_file():
        return None
    last = "worst" if result.is_sweep else "broken_by"
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            table = list(csv.DictReader(lines))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV ({one_line(error)}). Evaluate again.") from error
    if len(table) != result.n_examples or any(row.get(last) is None for row in table):
        raise InputError(
            f"{path} has {len(table)} rows, or no column {last}, for {result.n_examples} test images: it is cut short, "
            "or of another version. Evaluate again."
        )
    if [row.get("index") for row in table] != [str(index) for index in range(len(table))]:
        raise InputError(f"{path} does not list the test images in order. Evaluate again.")
    try:
        rows = _rows(table, point, sweep=result.is_sweep)
    except (InputError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{path} is not a table of an evaluation ({error!r}). Evaluate again.") from error
    _check_rows(path, result, rows, point)
    return rows


def _check_rows(path: Path, result: Result, rows: Rows, point: EpsResult) -> None:
    """Check the rows against the accuracies of the result, and the columns of each row against each other."""
    if abs(share(rows.survivors) - point.worst) > ROUNDING:
        raise InputError(f"{result.path} has another worst case than the rows next to it. Evaluate again.")
    if not rows.robust or rows.robust.keys() != point.accuracy.keys():
        return  # rows without a column per attack, of earlier versions
    for name, accuracy in {"clean": point.clean, **point.accuracy}.items():
        if abs(rows.shares[name] - accuracy) > ROUNDING:
            raise InputError(
                f"{path} has another {name} accuracy than {result.path}. Delete the result and evaluate again."
            )
    correct, robust = rows.predictions == rows.labels, torch.stack([*rows.robust.values()])
    impossible = rows.survivors & ~(correct & robust.all(0)) | robust.any(0) & ~correct
    if impossible.any():
        raise InputError(
            f"{path}: example {int(impossible.nonzero()[0])} is robust in one column and not in another. Evaluate "
            "again."
        )


def _rows(table: Sequence[Mapping[str, str]], point: EpsResult, *, sweep: bool) -> Rows:
    def stayed_robust(row: Mapping[str, str], attack: str) -> bool:
        if not sweep:
            return row["broken_by"] == "" if attack == "worst" else int(row[attack]) == 1
        # Compared as numbers: 0.1 and 1/10 are the same eps.
        return row[attack] == "" or radius_of(row[attack]) > point.radius + ROUNDING

    def flags(attack: str) -> Tensor:
        return torch.tensor([stayed_robust(row, attack) for row in table])

    labels, predictions = (torch.tensor([int(row[name]) for row in table]) for name in ("label", "clean_prediction"))
    robust = {attack: flags(attack) for attack in point.accuracy if attack in table[0]}
    return Rows(labels, predictions, robust, flags("worst"))


def read_survivors(results: Iterable[Result], n_examples: int, eps: str) -> Tensor | None:
    """Return on which of the first N test images no evaluation fooled the model, bool [N]; None if rows are missing.

    Args:
        results: Evaluations of the same weights on the first test images, N or another number of them.
        n_examples: N.
        eps: One that all of them have.

    Raises:
        InputError: See `read_rows`.
    """
    survivors = torch.ones(n_examples, dtype=torch.bool)
    for result in results:
        rows = read_rows(result, eps)
        if rows is None:
            return None
        survivors[: len(rows.survivors)] &= rows.survivors[:n_examples]
    return survivors


@dataclass(frozen=True)
class Adversarial:
    """The first image that fooled the model, for each correctly classified example that is not robust.

    Attributes:
        index: int64 [M], positions of these examples among all, ascending.
        images: float32 [M, C, H, W] in [0, 1], inside the threat model, as they were judged.
    """

    index: Tensor
    images: Tensor

    def save(self, path: Path, identity: Mapping[str, Any]) -> str:
        """Write "index" and "images" as safetensors, atomically; the same content gives the same bytes.

        Args:
            path: File to write.
            identity: `Result.identity` of the evaluation, written as JSON text into the metadata.

        Returns:
            sha256 of the file.
        """
        with atomic_file(path) as beside:
            tensors = {"index": self.index, "images": self.images}
            # One field: safetensors writes several metadata fields in an order that changes.
            save_file(tensors, beside, metadata={"identity": json.dumps(dict(identity))})
            return sha256_of(beside)


def read_adversarial(result: Result) -> Adversarial:
    """Read the images next to a result.

    Raises:
        InputError: The file is missing or malformed, or its sha256 is not the one in the result.
    """
    path = result.file.with_suffix(ADVERSARIAL)
    if not path.is_file() or sha256_of(path) != result.adversarial_sha256:
        raise InputError(
            f"{path} is missing, or not what the evaluation wrote (by its sha256). Delete the result and evaluate "
            "again."
        )
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}). Delete the result and evaluate again.") from error
    index, images = tensors.get("index"), tensors.get("images")
    if index is None or index.dtype != torch.int64 or index.ndim != 1 or (index.diff() <= 0).any():
        raise InputError(f"{path} has no ascending index of examples. Delete the result and evaluate again.")
    if images is None or images.dtype != torch.float32 or images.ndim != 4 or len(images) != len(index):
        raise InputError(
            f"{path} has no float32 image for each example in its index. Delete the result and evaluate again."
        )
    if not ((images >= 0) & (images <= 1)).all():  # NaN fails too
        raise InputError(f"{path} has pixels outside of [0, 1]. Delete the result and evaluate again.")
    return Adversarial(index, images)
