"""The files of an evaluated run, read with a check of each: a file that cannot be used is named, and what to do."""

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ..attacks.threat_model import Norm, radius_of, radius_written
from ..errors import InputError, one_line
from ..files import read_json
from ..kinds import COUNT, LIST, NUMBER, OBJECT, SHARE, TEXT, Kind, check_fields, one_of, or_null
from .masking import VERDICTS
from .points import Point, point_of

_ROUNDING = 1e-9  # of shares that are equal


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

    def at(self, eps: str) -> Point | None:
        """What it says at a radius, however that is written; None where it has none."""
        return next((point for point in self.points if radius_written(point.eps) == radius_written(eps)), None)

    @property
    def is_sweep(self) -> bool:
        """Whether it is over several radii."""
        return "curve" in self.content

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


def read_result(path: Path) -> ResultFile:
    """A result file, of one radius or of several.

    Raises:
        InputError: It is cut short, of another version, or holds something else than accuracies and verdicts.
    """
    content = read_json(path)
    check_fields(path, content, _RESULT, _RESULT_OPTIONAL)
    several = path.parent.name == "sweeps"
    if several:
        check_fields(path, content, {"curve": LIST})
    else:
        check_fields(path, content, {"eps": RADIUS})
    points = content["curve"] if several else [content]
    for at in points:
        _check_point(path, at)
    try:
        return ResultFile(
            path,
            content,
            tuple(point_of(at, content["n_examples"], content.get("precision") or "float32") for at in points),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} holds what no evaluation writes ({one_line(error)}); evaluate anew") from error


def best_sweep(sweeps: Iterable[ResultFile]) -> ResultFile | None:
    """The one on the most examples, then with the most radii; None of none."""
    return max(sweeps, key=lambda sweep: (sweep.n_examples, len(sweep.points)), default=None)


def read_survivors(files: Iterable[ResultFile], n_examples: int, eps: str) -> np.ndarray | None:
    """Which of the first test images [N] nothing broke in any of the evaluations, by their rows an example: 1 or 0.

    Args:
        files: Evaluations of the same weights on the first test images, N or another number of them.
        n_examples: N.
        eps: The radius.

    Returns:
        None where the rows of an evaluation were left out.

    Raises:
        InputError: A file of rows that is cut short, or of another version.
    """
    survivors = np.ones(n_examples, dtype=np.int64)
    for file in files:
        rows = _rows(file)
        if rows is None:
            return None
        withstood = np.array([_withstood(row, eps) for row in rows])
        point = file.at(eps)
        if point is not None and abs(withstood.mean() - point.worst) > _ROUNDING:
            raise InputError(f"{file.path} has another worst case than the rows beside it; evaluate anew")
        survivors[: len(withstood)] &= withstood[:n_examples]
    return survivors


def _rows(file: ResultFile) -> list[dict[str, str]] | None:
    """The rows an example beside a result file."""
    path, column = file.path.with_suffix(".csv"), "worst" if file.is_sweep else "broken_by"
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV ({one_line(error)}); evaluate anew") from error
    if len(rows) != file.n_examples or any(row.get(column) is None for row in rows):
        raise InputError(
            f"{path} has {len(rows)} rows, or no column {column}, for {file.n_examples} test images: it is cut, or of "
            "another version; evaluate anew"
        )
    if [row.get("index") for row in rows] != [str(index) for index in range(len(rows))]:
        raise InputError(f"{path} does not name the test images in their order; evaluate anew")
    return rows


def _withstood(row: dict[str, str], eps: str) -> bool:
    """Whether nothing broke an example at a radius; a sweep's row has the smallest at which something did."""
    if "broken_by" in row:
        return row["broken_by"] == ""
    return row["worst"] == "" or radius_of(row["worst"]) > radius_of(eps) + 1e-9  # 0.1 and 1/10 are one


# What a field may hold


def _is_radius(value: Any) -> bool:
    try:
        return isinstance(value, str) and radius_of(value) >= 0
    except InputError:
        return False


RADIUS = Kind(_is_radius, 'a radius as text, such as "8/255"')
_ATTACK = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_NO_ATTACKS = {"clean", "worst", "net", "training", "masking", "images", "seeds"}  # what else has a column in tables
_BY_ATTACK = Kind(lambda value: isinstance(value, dict), "one an attack")
_RESULT = {
    "dataset": TEXT,
    "dataset_title": TEXT,
    "norm": one_of(get_args(Norm), "a norm"),
    "n_examples": COUNT,
    "model_digest": TEXT,
}
_RESULT_OPTIONAL = {
    "suite": or_null(TEXT),
    "precision": or_null(TEXT),
    "hardware": or_null(TEXT),
    "versions": or_null(OBJECT),
}
_POINT = {
    "eps": RADIUS,
    "clean": SHARE,
    "accuracy": _BY_ATTACK,
    "worst": SHARE,
    "verdict": OBJECT,
    "zero_gradient_share": SHARE,
}
_POINT_OPTIONAL = {"settings": _BY_ATTACK, "sequences": OBJECT, "cw_l2": or_null(OBJECT)}
_VERDICT = {"verdict": one_of(VERDICTS, "a verdict on gradient masking")}
_CW_L2 = {"accuracy_at_budget": SHARE, "budget": NUMBER}


def _check_point(path: Path, at: Any) -> None:
    check_fields(path, at, _POINT, _POINT_OPTIONAL)
    check_fields(path, at["verdict"], _VERDICT)
    check_fields(path, at["accuracy"], dict.fromkeys(at["accuracy"], SHARE))
    settings, sequences = at.get("settings", {}), at.get("sequences", {})
    check_fields(path, settings, dict.fromkeys(settings, OBJECT))
    check_fields(path, sequences, dict.fromkeys(sequences, OBJECT))
    for stages in sequences.values():
        check_fields(path, stages, dict.fromkeys(stages, SHARE))
    if at.get("cw_l2") is not None:
        check_fields(path, at["cw_l2"], _CW_L2)
    names = {*at["accuracy"], *settings, *sequences}
    if strange := sorted(name for name in names if name in _NO_ATTACKS or not _ATTACK.fullmatch(name)):
        raise InputError(f"{path} names an attack {strange[0]!r}, which no suite does; evaluate anew")
    if at["worst"] > min([at["clean"], *at["accuracy"].values()]) + _ROUNDING:
        raise InputError(f"{path} has a worst case above another of its accuracies; evaluate anew")
