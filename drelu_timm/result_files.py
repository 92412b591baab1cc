"""The files of an evaluated run, read with a check of each: a file that cannot be used is named, and what to do."""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError
from .runs import read_json

VERDICTS = ("sound", "undecided", "masked")  # from good to bad
_ACCURACIES = ("eps", "clean", "accuracy", "worst", "verdict", "zero_gradient_share")


def read_checked(path: Path, fields: Sequence[str]) -> dict[str, Any]:
    """A JSON object with these fields.

    Raises:
        InputError: It is cut short, or of another version.
    """
    content = read_json(path)
    check_has(path, content, fields)
    return content


def check_has(path: Path, content: Any, fields: Sequence[str]) -> None:
    """Raise where a part of a file is no JSON object, or lacks fields."""
    missing = [name for name in fields if not isinstance(content, dict) or name not in content]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}: it is cut, or of another version; make it anew")


def check_accuracies(path: Path, at: Any) -> None:
    """Raise where what a file says at one radius cannot be accuracies and a verdict."""
    check_has(path, at, _ACCURACIES)
    check_has(path, at["verdict"], ("verdict",))
    if at["verdict"]["verdict"] not in VERDICTS:
        raise InputError(f"{path} has no verdict on gradient masking ({', '.join(VERDICTS)}); evaluate anew")
    if not isinstance(at["accuracy"], dict):
        raise InputError(f"{path}: accuracy is {at['accuracy']!r}, not one an attack; evaluate anew")
    shares = {"clean": at["clean"], "worst": at["worst"], **at["accuracy"]}
    for name, share in shares.items():
        if not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise InputError(f"{path}: {name} is {share!r}, not a share between 0 and 1; evaluate anew")


def read_held_out(run: Path) -> float | None:
    """Accuracy in [0, 1] on held-out images of the epoch that was kept, of the averaged weights if there are any.

    Returns:
        None without a log.

    Raises:
        InputError: A log that is cut short.
    """
    log = run / "log.jsonl"
    if not log.is_file():
        return None
    try:
        epochs = {line["epoch"]: line for line in map(json.loads, log.read_text().splitlines())}
        kept = epochs[epochs[max(epochs)]["best_epoch"]]
        return kept.get("held_out_ema", kept["held_out"])["pgd"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{log} is no whole log of a training ({error!r}); train anew") from error


def read_survivors(sources: Iterable[Path], n_examples: int) -> np.ndarray | None:
    """Which test images [N] nothing broke in any of the evaluations, by their rows an example: 1 or 0.

    Args:
        sources: The result files, which the rows lie beside.
        n_examples: N.

    Returns:
        None where the rows of an evaluation were left out.

    Raises:
        InputError: A file of rows that is cut short, or of another version.
    """
    survivors = np.ones(n_examples, dtype=np.int64)
    for source in sources:
        path = source.with_suffix(".csv")
        if not path.is_file():
            return None
        with path.open(newline="") as file:
            broken_by = [row.get("broken_by") for row in csv.DictReader(file)]
        if len(broken_by) != n_examples or None in broken_by:
            raise InputError(
                f"{path} has {len(broken_by)} rows, or no column broken_by, for {n_examples} test images: it is cut, "
                "or of another version; evaluate anew"
            )
        survivors &= [by == "" for by in broken_by]
    return survivors
