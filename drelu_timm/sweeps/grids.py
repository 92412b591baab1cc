"""Grids of trainings with their evaluations: the product of the axes in a TOML file.

    title = "Balancers on MNIST"
    source = "where its settings are from, and which of them are our choice"
    [train]                        # fields of `training.config.TrainConfig`, for every cell; a list is an axis
    dataset = "mnist"
    seed = [0, 1, 2]
    [[evaluate]]                   # fields of `evaluation.config.EvaluateConfig`, for every cell; one or several
    suite = "standard"
    [[net]]                        # an axis whose alternatives set several fields at once, over those of [train]
    name = "dense"
    model = "dense_drelu"
    [[method]]                     # another; its fields win over those of [[net]]
    name = "natural"
    activation = "relu"
    [[method]]
    name = "at"
    activation = "relu"
    objective = "at"
    init_from = "natural"          # starts from the weights of the cell that differs in the method alone
    [[method]]
    name = "drelu"
    cap_weight = [0.0, 0.001]      # an axis within one alternative
    [smoke]                        # NAME-smoke, which takes minutes:
    net = ["dense"]                # the alternatives to keep; without this line, all;
    [smoke.train]                  # fields that replace the grid's own, wherever it sets them;
    epochs = 1
    [[smoke.evaluate]]             # evaluations that replace the grid's own
    n_examples = 20

A cell is named by its alternatives and its value on every axis that is a list: ``dense-drelu-cap_weight0.001-seed0``.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any

from ..attacks.threat_model import ThreatModel
from ..errors import InputError, unknown
from ..evaluation.config import EvaluateConfig, attacked_in, check_flags, result_path
from ..files import read_toml
from ..results.plotting import require_matplotlib
from ..schema import Constraint, field_types, load_table
from ..training.config import TrainConfig, resolve
from .cell import Cell

FOLDER = Path(__file__).with_name("grids")
SMOKE = "-smoke"
AXES = ("net", "method")
_TABLES = ("title", "source", "train", "evaluate", *AXES, "smoke")
_MOST_CELLS = 10_000  # a larger product is a mistake, and takes minutes to list
# Fields that belong to the machine are flags of the sweep.
_TRAIN = {field.name for field in fields(TrainConfig)} - {"data_dir", "generated", "output_dir", "resume", "init_from"}
_EVALUATE = {field.name for field in fields(EvaluateConfig)} - {"run", "data_dir"}
_AXIS = Constraint(bool, "one value, or a list of values")  # not an empty list, which leaves no cell
# A folder that does not exist, because the flags of a cell are checked also where its folder is in use.
_NOWHERE = Path(os.devnull).with_name("drelu-timm-no-such-run")

Table = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """Content of a grid's file, checked except for the values of single cells.

    Attributes:
        name: Name of the file, with ``-smoke`` appended for the short version.
        title: One line about the grid.
        source: Where its settings are from.
        train: Fields of `TrainConfig`; a list is an axis.
        evaluate: Fields of `EvaluateConfig`, one table per evaluation.
        net: Alternatives, each with a name.
        method: Alternatives, each with a name.
    """

    name: str
    title: str
    source: str
    train: Table
    evaluate: tuple[Table, ...]
    net: tuple[Table, ...] = ()
    method: tuple[Table, ...] = ()

    def cells(self, output_dir: Path, *, data_dir: Path, generated: Sequence[Path] = ()) -> list[Cell]:
        """Return every cell, with its run directory in ``output_dir``.

        Args:
            output_dir: Folder of the sweep.
            data_dir: Folder of the datasets.
            generated: Generated images, for the cells that use some.

        Raises:
            InputError: No cells or too many, two of one name, or one whose flags `train` or `evaluate` would refuse.
                (What depends on the images or on other models is checked when the cell runs.)
        """
        count = self._count()
        if not 0 < count <= _MOST_CELLS:
            raise InputError(f"{self.name} has {count:,} cells. Every list needs a value; {_MOST_CELLS:,} is the most.")
        points = list(self._points())
        cells: dict[str, Cell] = {}
        for point in points:
            if point.name in cells:
                raise InputError(f"{self.name} has two cells called {point.name}. Give them other names or values.")
            start = self._start(point, points)
            settings = {**point.settings, "data_dir": data_dir, "output_dir": output_dir / point.name, "resume": True}
            if start is not None:
                settings["init_from"] = output_dir / start
            try:
                cells[point.name] = self._cell(point.name, settings, tuple(generated), start)
            except InputError as error:
                raise InputError(f"{self.name}, cell {point.name}: {error}") from error
        return list(cells.values())

    def _count(self) -> int:
        """Return the number of cells, without listing them."""
        return sum(prod(map(len, axes.values())) for _, _, axes in self._products())

    def _products(self) -> Iterator[tuple[Table, Table, dict[str, tuple[Any, ...]]]]:
        """Return, for each pair of alternatives, their names by axis, all fields, and those fields that are axes."""
        for net, method in product(self.net or ({},), self.method or ({},)):
            own = {**net, **method}
            table = own | {key: value for key, value in self.train.items() if key not in own}
            table.pop("name", None)
            names = {axis: one["name"] for axis, one in zip(AXES, (net, method), strict=True) if one}
            yield names, table, {key: value for key, value in table.items() if isinstance(value, tuple)}

    def _points(self) -> Iterator["_Point"]:
        for names, table, axes in self._products():
            for values in product(*axes.values()):
                chosen = dict(zip(axes, values, strict=True))
                yield _Point({**names, **chosen}, {**table, **chosen})

    def _start(self, point: "_Point", points: Sequence["_Point"]) -> str | None:
        """Return the name of the cell whose weights another one starts from."""
        method = point.settings.get("init_from")
        if method is None:
            return None
        wanted = {**point.coordinates, "method": method}
        fit = [other.name for other in points if all(wanted.get(k, v) == v for k, v in other.coordinates.items())]
        if len(fit) != 1:
            raise InputError(
                f'{self.name}, cell {point.name}: init_from = "{method}" fits {len(fit)} cells '
                f"({', '.join(fit[:3]) or 'none'}). It must fit the one that differs in the method alone."
            )
        return fit[0]

    def _cell(self, name: str, settings: Table, generated: tuple[Path, ...], start: str | None) -> Cell:
        if missing := {"model", "dataset"} - settings.keys():
            raise InputError(f"it has no {' and no '.join(sorted(missing))}. Set it in [train] or [[net]].")
        preset = settings.pop("preset", None)
        config = TrainConfig(**settings) if preset is None else TrainConfig.from_preset(preset, **settings)
        if config.generated_fraction:  # of the grid, or of its preset
            config = replace(config, generated=generated)
        resolved = resolve(replace(config, output_dir=_NOWHERE, resume=False))
        evaluations = tuple(EvaluateConfig(run=str(config.output_dir), **table) for table in self.evaluate)
        _check_evaluations(evaluations, resolved.threat_model)
        return Cell(name, config, evaluations, start)


def _check_evaluations(evaluations: Sequence[EvaluateConfig], trained: ThreatModel) -> None:
    """Refuse flags that `evaluate` would refuse, and two evaluations whose results would have the same file."""
    paths = set()
    for evaluation in evaluations:
        check_flags(evaluation)
        threat_models = attacked_in(evaluation, trained)
        if len(threat_models) > 1:
            require_matplotlib()
        path = result_path(Path("results"), evaluation.suite, threat_models)
        if path in paths:
            raise InputError(f"two [[evaluate]] would write {path}. Give them other suites, norms or radii.")
        paths.add(path)


@dataclass(frozen=True)
class _Point:
    """Point of the product.

    Attributes:
        coordinates: Name of the alternative, or the value, on every axis.
        settings: All fields of `TrainConfig` that are set; ``init_from`` names a method.
    """

    coordinates: Table
    settings: Table

    @property
    def name(self) -> str:
        return "-".join(map(_written, self.coordinates, self.coordinates.values())).replace("/", "_") or "cell"


def _written(axis: str, value: Any) -> str:
    """Return a coordinate for a name: text unchanged, other values after the name of their axis."""
    if isinstance(value, str):
        return value
    return f"{axis}{value:g}" if isinstance(value, float) else f"{axis}{value}"


def shipped() -> list[str]:
    """Return the names of the grids in the package, without their short versions."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_grid(name: str) -> Grid:
    """Read a grid of the package, or a TOML file; with ``-smoke`` appended, its short version.

    Raises:
        InputError: No such grid, a file that is not TOML, or unknown or impossible content.
    """
    which = name.removesuffix(SMOKE)
    path = FOLDER / f"{which}.toml" if which in shipped() else Path(which)
    if not path.is_file():
        if path.suffix == ".toml":
            raise InputError(f"GRID {which} does not exist. Use a TOML file or one of {', '.join(shipped())}.")
        raise unknown("GRID", name, [*shipped(), *(grid + SMOKE for grid in shipped())])
    content = read_toml(path, "GRID")
    _check_tables(path, content)
    smoke = content.pop("smoke", None)
    if which == name:
        return _grid(path.stem, content)
    if smoke is None:
        raise InputError(f"GRID {path} has no table [smoke], which defines the short version. Add it, or omit -smoke.")
    return _grid(path.stem + SMOKE, _shortened(path, content, smoke))


def _grid(name: str, content: Table) -> Grid:
    values: Table = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    return Grid(name, **values)


def _check_tables(path: Path, content: Table) -> None:
    """Refuse unknown tables and fields, and values of a wrong type."""
    for key in content:
        if key not in _TABLES:
            raise unknown(f"GRID {path}:", key, _TABLES)
    for key, kind in {"title": str, "source": str, "train": dict, "evaluate": list}.items():
        if not isinstance(content.get(key), kind) or not content[key]:
            form = {str: f'{key} = "..."', dict: f"[{key}]", list: f"[[{key}]]"}[kind]
            raise InputError(f"GRID {path} needs {form}, not empty.")
    _check_fields(path, "[train]", content["train"], TrainConfig, _TRAIN)
    _check_array(path, "evaluate", content["evaluate"])
    for key in AXES:
        _check_array(path, key, content.get(key, []))
    _check_starts(path, content.get("method", []))
    smoke = content.get("smoke", {})
    if not isinstance(smoke, dict):
        raise InputError(f"GRID {path}: smoke must be a table, [smoke]")
    for key in smoke:
        if key not in (*AXES, "train", "evaluate"):
            raise unknown(f"GRID {path}: [smoke]", key, (*AXES, "train", "evaluate"))
    if smoke.get("evaluate") == []:
        raise InputError(f"GRID {path}: [smoke] evaluate = [] leaves no evaluation. Add one, or omit the line.")
    _check_fields(path, "[smoke.train]", smoke.get("train", {}), TrainConfig, _TRAIN)
    _check_array(path, "evaluate", smoke.get("evaluate", []))


def _check_array(path: Path, key: str, tables: Any) -> None:
    """Check an array of tables: evaluations, or the alternatives of an axis."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InputError(f"GRID {path}: {key} must be one or several tables, each with the header [[{key}]]")
    for table in tables:
        if key == "evaluate":
            _check_fields(path, "[[evaluate]]", table, EvaluateConfig, _EVALUATE)
            continue
        name = table.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
            raise InputError(f"GRID {path}: [[{key}]] needs a name of letters, digits and . _ + -, not {name!r}")
        allowed = {"name", *_TRAIN, *(["init_from"] if key == "method" else [])}
        _check_fields(path, f"[[{key}]] {name}:", table, TrainConfig, allowed)


def _check_fields(path: Path, where: str, table: Any, config: type, allowed: set[str]) -> None:
    """Refuse unknown fields and values of another type, and give the values the types of the fields."""
    types = {key: field_types(config)[key] for key in allowed - {"name", "init_from"}}
    if config is TrainConfig:
        types |= {key: types[key] | Annotated[tuple[types[key], ...], _AXIS] for key in types}
        types |= dict.fromkeys(allowed - types.keys(), Any)  # the names, which the callers check
    table |= load_table(types, table, f"GRID {path}: {where}")


def _check_starts(path: Path, methods: Sequence[Mapping[str, Any]]) -> None:
    """Refuse an ``init_from`` that names no method, or a circle of them."""
    starts = {method["name"]: method.get("init_from") for method in methods}
    for name, start in starts.items():
        chain = [name]
        while start is not None:
            if not isinstance(start, str) or start not in starts:
                raise unknown(f"GRID {path}: init_from of [[method]] {chain[-1]}:", str(start), starts)
            if start in chain:
                raise InputError(f"GRID {path}: init_from goes in a circle: {' -> '.join([*chain, start])}")
            chain.append(start)
            start = starts[start]


def _shortened(path: Path, content: Table, smoke: Table) -> Table:
    """Return the content of a grid with the changes of its table [smoke]."""
    train = content["train"]
    for key, value in smoke.get("train", {}).items():
        tables = [train, *(table for axis in AXES for table in content.get(axis, []))]
        for table in [table for table in tables if key in table] or [train]:
            table[key] = value
    for axis in set(AXES) & smoke.keys():
        names = [table["name"] for table in content.get(axis, [])]
        kept = smoke[axis] if isinstance(smoke[axis], list) else [smoke[axis]]
        for name in kept:
            if name not in names:
                raise unknown(f"GRID {path}: [smoke] {axis}", str(name), names)
        content[axis] = [table for table in content[axis] if table["name"] in kept]
    return content | {"evaluate": smoke.get("evaluate", content["evaluate"])}
