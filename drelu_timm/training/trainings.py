"""The trainings that a command line asks for: flags win over a file (--config), which wins over a preset.

The file is a recipe in TOML, or the config.json of a run. In a recipe the table [train] holds the settings of one
training, with the names of the flags. Several tables [[train]] are trained in order, each from the weights of the one
before it:

    [[train]]                      # written to runs/x-stage1
    model = "dense_drelu"
    dataset = "mnist"
    [[train]]                      # written to runs/x
    model = "dense_drelu"
    dataset = "mnist"
    objective = "at"
    output_dir = "runs/x"

Flags apply to all of them, except that --output-dir names the last one and --init-from the start of the first. The
tables [[evaluate]] and [export] of a published recipe document the flags of these verbs. How the processes are launched
is not part of a training: a run's config.json records it under "launch", a published recipe in its comment.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import tyro

from ..command_line import group, read_flags
from ..errors import InputError, unknown
from ..files import read_json, read_toml
from ..schema import field_types, load_table
from .config import TrainConfig, given_settings, run_directory

TABLES = ("train", "evaluate", "export")  # of a recipe

Table = dict[str, Any]


@dataclass(frozen=True)
class _TrainFlags(TrainConfig):
    """Train a timm model and write a run directory."""

    config: Path | None = field(default=None, metadata=group("file", "Settings from a file; flags win over it."))
    """Recipe in TOML with the settings in a table [train], or in several [[train]] that are trained in order, each from
    the weights of the one before; or the config.json of a run, to repeat it in another output folder."""


def read_trainings(argv: Sequence[str]) -> list[TrainConfig]:
    """Return the configs of the trainings that the flags of ``drelu-timm train`` ask for, in order.

    Raises:
        InputError: A missing preset or file, or an entry of the file that is not allowed.
    """
    early = _early_flags(argv)
    tables = [{}] if early.config is None else read_train_tables(early.config)
    return _chained([_with_flags(argv, early, table) for table in tables])


def read_train_tables(path: Path) -> list[Table]:
    """Return the settings of each training in a recipe or in a run's config.json, with the types of `TrainConfig`.

    Raises:
        InputError: A missing file, or an entry that is not allowed; the line names file and field.
    """
    if path.suffix == ".json":
        return [given_settings(_checked(f"--config {path}: train", read_json(path).get("train")))]
    if path.suffix != ".toml":
        raise InputError(f"--config {path} must be a .toml file, or the config.json of a run")
    content = read_toml(path, "--config")
    for key in content:
        if key in field_types(TrainConfig):
            raise InputError(f"--config {path}: {key} is outside of a table. Put it below a line [train].")
        if key not in TABLES:
            raise unknown(f"--config {path}:", key, TABLES)
    tables = content.get("train")
    if isinstance(tables, dict):
        return [_checked(f"--config {path}: [train]", tables)]
    if not isinstance(tables, list) or not tables:
        raise InputError(f"--config {path} needs a table [train], or several [[train]]")
    names = [f"--config {path}: [[train]] {number}:" for number in range(1, len(tables) + 1)]
    for what, table in zip(names[:-1], tables[:-1], strict=True):
        _refuse(what, table, "output_dir", "the last [[train]] names the folder of all of them")
    for what, table in zip(names[1:], tables[1:], strict=True):
        _refuse(what, table, "init_from", "it starts from the [[train]] before it")
    return [_checked(what, table) for what, table in zip(names, tables, strict=True)]


def _early_flags(argv: Sequence[str]) -> Namespace:
    """Read the flags on which the defaults of the others depend; a missing value is reported by the full parser."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, nargs="?")
    for name in ("--preset", "--norm", "--eps"):
        parser.add_argument(name, nargs="?")
    return parser.parse_known_args(argv)[0]


def _with_flags(argv: Sequence[str], early: Namespace, table: Table) -> TrainConfig:
    """Read the flags, with defaults from a table of the file and from the preset that either names."""
    if early.norm not in (None, table.get("norm")):  # the file's eps belongs to the file's norm
        table = {name: value for name, value in table.items() if name != "eps"}
    preset = early.preset or table.get("preset")
    settings = {"model": tyro.MISSING, "dataset": tyro.MISSING, **table, "preset": preset}
    default = _TrainFlags(**settings) if preset is None else _TrainFlags.from_preset(preset, **settings)
    flags = read_flags(_TrainFlags, "train", argv, default)
    return TrainConfig(**{each.name: getattr(flags, each.name) for each in fields(TrainConfig)})


def _chained(configs: Sequence[TrainConfig]) -> list[TrainConfig]:
    """Start each training from the one before it, whose run directory is named after the last one's, if given."""
    last = configs[-1].output_dir
    chained = list(configs[:1])
    for number, config in enumerate(configs[1:], start=1):
        earlier = last.with_name(f"{last.name}-stage{number}") if last else run_directory(chained[-1])
        chained[-1] = replace(chained[-1], output_dir=earlier)
        chained.append(replace(config, init_from=earlier))
    return chained


def _checked(what: str, table: Any) -> Table:
    """Check the fields of a table, and convert their values to the types of `TrainConfig`."""
    return load_table(field_types(TrainConfig), table, what)


def _refuse(what: str, table: Any, name: str, reason: str) -> None:
    if isinstance(table, dict) and name in table:
        raise InputError(f"{what} {name} is not allowed; {reason}")
