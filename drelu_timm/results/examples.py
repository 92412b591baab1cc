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
        by: Name of the attack; "clean" for an example that is wrong as it is, "" for one that stayed robust. What
            only a probe for masking found is by "probe <attack> at <eps>".
        steps: [N], the gradients or queries that it took; NaN where not known.
        margin: [N], logit of the label minus the largest other one, on the image that fooled the model; for an example
            that stayed robust, the smallest on any image that an attack gave.
        seed: What keyed the randomness of that attack on that example; None where nothing fooled the model.
    """

    by: list[str]
    steps: Tensor
    margin: Tensor
    seed: list[int | None]


@dataclass(frozen=True)
class Rows:
    """What was found on each example at one eps.

    Attributes:
        labels: [N].
        predictions: [N], of the clean images.
        robust: For each attack, or column of several, [N]: right on the clean image and on what the attack returned.
        survivors: [N], whether nothing fooled the model, neither an attack of the suite nor a probe for masking.
        broken: What did; None of rows read from a file.
    """

    labels: Tensor
    predictions: Tensor
    robust: dict[str, Tensor]
    survivors: Tensor
    broken: Broken | None = None

    @property
    def shares(self) -> dict[str, float]:
        """Accuracies in [0, 1]: "clean", that of each attack, "worst"."""
        flags = {"clean": self.predictions == self.labels, **self.robust, "worst": self.survivors}
        return {name: share(flag) for name, flag in flags.items()}


def share(flags: Tensor) -> float:
    """Return the share in [0, 1] of the flags that are set; 0 of none."""
    return float(flags.double().mean()) if len(flags) else 0.0


def csv_text(rows: Rows) -> str:
    """Return the CSV of one eps, a row per example.

    Index, label, clean prediction; for each attack 1 for robust or 0 for broken; the attack that fooled the model
    first, the steps that this took where known, the margin of the label's logit then, and the seed of its randomness.
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
    """Return the CSV of a sweep, a row per example: index, label, clean prediction, the smallest eps that broke it.

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
    """Read the rows next to a result, at one of its eps; None where there is no such file.

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
        raise InputError(f"{path} cannot be read as CSV ({one_line(error)}); evaluate anew") from error
    if len(table) != result.n_examples or any(row.get(last) is None for row in table):
        raise InputError(
            f"{path} has {len(table)} rows, or no column {last}, for {result.n_examples} test images: it is cut, or of "
            "another version; evaluate anew"
        )
    if [row.get("index") for row in table] != [str(index) for index in range(len(table))]:
        raise InputError(f"{path} does not name the test images in their order; evaluate anew")
    try:
        rows = _rows(table, point, sweep=result.is_sweep)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no whole table of an evaluation ({error!r}); evaluate anew") from error
    if abs(share(rows.survivors) - point.worst) > ROUNDING:
        raise InputError(f"{result.path} has another worst case than the rows beside it; evaluate anew")
    return rows


def _rows(table: Sequence[Mapping[str, str]], point: EpsResult, *, sweep: bool) -> Rows:
    def stayed_robust(row: Mapping[str, str], attack: str) -> bool:
        if not sweep:
            return row["broken_by"] == "" if attack == "worst" else int(row[attack]) == 1
        # The smallest eps that broke the example is above this one; 0.1 and 1/10 are the same.
        return row[attack] == "" or radius_of(row[attack]) > point.radius + ROUNDING

    def flags(attack: str) -> Tensor:
        return torch.tensor([stayed_robust(row, attack) for row in table])

    labels, predictions = (torch.tensor([int(row[name]) for row in table]) for name in ("label", "clean_prediction"))
    robust = {attack: flags(attack) for attack in point.accuracy if attack in table[0]}
    return Rows(labels, predictions, robust, flags("worst"))


def read_survivors(results: Iterable[Result], n_examples: int, eps: str) -> Tensor | None:
    """Return on which of the first N test images nothing fooled the model in any of the evaluations, bool [N].

    Args:
        results: Evaluations of the same weights on the first test images, N or another number of them.
        n_examples: N.
        eps: One that all of them have.

    Returns:
        None where the rows of an evaluation were left out.

    Raises:
        InputError: As `read_rows` does.
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
    """For each example that is classified right and on which the model was fooled, the first image that did it.

    Attributes:
        index: int64 [M], positions of these examples among all, ascending.
        images: float32 [M, C, H, W] in [0, 1], inside the threat model, as they were judged.
    """

    index: Tensor
    images: Tensor

    def save(self, path: Path, identity: Mapping[str, Any]) -> str:
        """Write "index" and "images" as safetensors, atomically; the same content gives the same bytes.

        Args:
            path: Of the file.
            identity: What the images were found on and how. It is one JSON text in the metadata ("identity"), since
                safetensors writes several metadata fields in an order that changes.

        Returns:
            sha256 of the file.
        """
        with atomic_file(path) as beside:
            tensors = {"index": self.index, "images": self.images}
            save_file(tensors, beside, metadata={"identity": json.dumps(dict(identity))})
            return sha256_of(beside)


def read_adversarial(result: Result) -> Adversarial:
    """Read the images next to a result.

    Raises:
        InputError: The file is missing, or its sha256 is not the one in the result.
    """
    path = result.file.with_suffix(ADVERSARIAL)
    if not path.is_file() or sha256_of(path) != result.adversarial_sha256:
        raise InputError(
            f"{path} is not there, or not what the evaluation wrote (by its sha256); delete the result and evaluate "
            "anew"
        )
    return Adversarial(**load_file(path))
