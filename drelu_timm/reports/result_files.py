"""The files of an evaluated run, read with a check of each: a file that cannot be used is named, and what to do."""

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ..attacks.threat_model import Norm, ThreatModel
from ..errors import InputError, one_line
from ..evaluation.masking import VERDICTS
from ..files import read_json
from .naming import Flags, radius_written
from .points import Point, point_of


@dataclass(frozen=True)
class ResultFile:
    """A result file, checked.

    Attributes:
        path: The file.
        content: What it holds.
        points: At each of its radii; one but for a sweep.
    """

    path: Path
    content: dict[str, Any]
    points: tuple[Point, ...]

    @property
    def n_examples(self) -> int:
        """Test images."""
        return self.content["n_examples"]

    @property
    def suite(self) -> str:
        """Of attacks."""
        return self.content.get("suite") or "not known"

    @property
    def measured_with(self) -> str:
        """Hardware and versions in a line."""
        versions = (f"{package} {version}" for package, version in (self.content.get("versions") or {}).items())
        hardware = self.content.get("hardware") or "hardware not known"
        return f"{hardware}; {', '.join(versions) or 'versions not known'}"


def read_config(path: Path) -> tuple[Flags, Flags | None]:
    """The flags that a run was trained with, and those of the run that it went on from, if any.

    Each with its radius in one spelling, and with a digest of the generated images under "generated".

    Raises:
        InputError: It is cut short, or of another version.
    """
    config = read_json(path)
    _check(path, config, {"train": _OBJECT, "dataset_title": _TEXT})
    start = config.get("init_from")
    return _read_flags(path, config), None if start is None else _read_flags(path, start)


def read_result(path: Path) -> ResultFile:
    """A result file, of one radius or of several.

    Raises:
        InputError: It is cut short, of another version, or holds something else than accuracies and verdicts.
    """
    content = read_json(path)
    _check(path, content, _RESULT, _RESULT_OPTIONAL)
    several = path.parent.name == "sweeps"
    if several:
        _check(path, content, {"curve": _LIST})
    else:
        _check(path, content, {"eps": _RADIUS})
    points = content["curve"] if several else [content]
    for at in points:
        _check_point(path, at)
    try:
        return ResultFile(path, content, tuple(point_of(at, content["n_examples"]) for at in points))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} holds what no evaluation writes ({one_line(error)}); evaluate anew") from error


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
        epochs = {line["epoch"]: line for line in map(json.loads, log.read_text(encoding="utf-8").splitlines())}
        kept = epochs[epochs[max(epochs)]["best_epoch"]]
        held_out = kept.get("held_out_ema", kept["held_out"])["pgd"]
        if not _SHARE.holds(held_out):
            raise ValueError(f"pgd is {held_out!r}")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{log} is no whole log of a training ({error!r}); train anew") from error
    return held_out


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
        try:
            with path.open(newline="", encoding="utf-8") as file:
                broken_by = [row.get("broken_by") for row in csv.DictReader(file)]
        except (OSError, ValueError, csv.Error) as error:
            raise InputError(f"{path} cannot be read as CSV ({one_line(error)}); evaluate anew") from error
        if len(broken_by) != n_examples or None in broken_by:
            raise InputError(
                f"{path} has {len(broken_by)} rows, or no column broken_by, for {n_examples} test images: it is cut, "
                "or of another version; evaluate anew"
            )
        survivors &= [by == "" for by in broken_by]
    return survivors


# What a field may hold


@dataclass(frozen=True)
class _Kind:
    """Whether a value is of the kind, and what it is called."""

    holds: Callable[[Any], bool]
    words: str


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def _is_radius(value: Any) -> bool:
    try:
        return isinstance(value, str) and ThreatModel.parse("Linf", value).eps >= 0
    except InputError:
        return False


def _one_of(values: Sequence[str], what: str) -> _Kind:
    return _Kind(lambda value: isinstance(value, str) and value in values, f"{what} ({', '.join(values)})")


def _or_null(kind: _Kind) -> _Kind:
    return _Kind(lambda value: value is None or kind.holds(value), f"{kind.words} or null")


_TEXT = _Kind(lambda value: isinstance(value, str) and value != "", "a text")
_COUNT = _Kind(lambda value: _is_whole(value) and value > 0, "a count above 0")
_NUMBER = _Kind(_is_number, "a number")
_SHARE = _Kind(lambda value: _is_number(value) and 0 <= value <= 1, "a share between 0 and 1")
_RADIUS = _Kind(_is_radius, 'a radius as text, such as "8/255"')
_LIST = _Kind(lambda value: isinstance(value, list) and value != [], "a list with something in it")
_OBJECT = _Kind(lambda value: isinstance(value, dict), "an object")
_BY_ATTACK = _Kind(lambda value: isinstance(value, dict), "one an attack")

_FLAGS = {
    "model": _TEXT,
    "dataset": _TEXT,
    "seed": _Kind(_is_whole, "a whole number"),
    "objective": _one_of(("natural", "at", "trades", "mart"), "an objective"),
    "beta": _NUMBER,
    "awp_gamma": _NUMBER,
    "eps": _RADIUS,
    "activation": _or_null(_TEXT),
    "placement": _or_null(_TEXT),
    "cap_weight": _NUMBER,
    "cap_penalty": _TEXT,
    "generated_fraction": _NUMBER,
}
_RESULT = {
    "dataset": _TEXT,
    "dataset_title": _TEXT,
    "norm": _one_of(get_args(Norm), "a norm"),
    "n_examples": _COUNT,
    "model_digest": _TEXT,
}
_RESULT_OPTIONAL = {"suite": _or_null(_TEXT), "hardware": _or_null(_TEXT), "versions": _or_null(_OBJECT)}
_POINT = {
    "eps": _RADIUS,
    "clean": _SHARE,
    "accuracy": _BY_ATTACK,
    "worst": _SHARE,
    "verdict": _OBJECT,
    "zero_gradient_share": _SHARE,
}
_POINT_OPTIONAL = {"settings": _BY_ATTACK, "sequences": _OBJECT, "cw_l2": _or_null(_OBJECT)}
_VERDICT = {"verdict": _one_of(VERDICTS, "a verdict on gradient masking")}
_CW_L2 = {"accuracy_at_budget": _SHARE, "budget": _NUMBER}


def _check(path: Path, content: Any, kinds: Mapping[str, _Kind], optional: Mapping[str, _Kind] | None = None) -> None:
    """Raise where a part of a file is no JSON object, lacks fields, or holds something else in one."""
    missing = [name for name in kinds if not isinstance(content, dict) or name not in content]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}: it is cut, or of another version; make it anew")
    for name, kind in {**kinds, **(optional or {})}.items():
        if name in content and not kind.holds(content[name]):
            raise InputError(f"{path}: {name} is {repr(content[name])[:80]}, not {kind.words}; make it anew")


def _check_point(path: Path, at: Any) -> None:
    _check(path, at, _POINT, _POINT_OPTIONAL)
    _check(path, at["verdict"], _VERDICT)
    _check(path, at["accuracy"], dict.fromkeys(at["accuracy"], _SHARE))
    settings, sequences = at.get("settings", {}), at.get("sequences", {})
    _check(path, settings, dict.fromkeys(settings, _OBJECT))
    _check(path, sequences, dict.fromkeys(sequences, _OBJECT))
    for stages in sequences.values():
        _check(path, stages, dict.fromkeys(stages, _SHARE))
    if at.get("cw_l2") is not None:
        _check(path, at["cw_l2"], _CW_L2)


def _read_flags(path: Path, config: Any) -> Flags:
    _check(path, config, {"train": _OBJECT}, {"generated": _or_null(_OBJECT)})
    flags, generated = config["train"], config.get("generated")
    _check(path, flags, _FLAGS)
    if generated is not None:
        _check(path, generated, {"digest": _TEXT})
    digest = None if generated is None else generated["digest"][:12]
    return {**flags, "eps": radius_written(flags["eps"]), "generated": digest}
