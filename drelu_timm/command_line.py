"""Flags: how every verb reads them into its config, a frozen dataclass, and writes them into commands."""

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from copy import copy
from dataclasses import fields, make_dataclass
from typing import Annotated, Any, ClassVar, TypeVar

import tyro

from .errors import InputError, unknown

Config = TypeVar("Config")

_GROUP = "group of the help"
# The text of a flag states what happens without it, which "(default: None)" does not.
_UNSET = ("None", "", "''", "False")
_HINT = tyro.conf.arg(help_behavior_hint=lambda default: "" if default in _UNSET else f"(default: {default})")


def group(title: str, text: str) -> dict[str, Any]:
    """Return the metadata of the first field of a group in the help; the group ends where the next one starts.

    Args:
        title: Name of the group.
        text: One sentence about its flags.
    """
    return {_GROUP: (title, text)}


def read_flags(config: type[Config], verb: str, argv: Sequence[str], default: Config | None = None) -> Config:
    """Return the config that a command line gives. Words of a flag are joined by ``-`` or ``_``.

    Args:
        config: Dataclass with a docstring below every field; see `group` for groups in the help.
        verb: Name of the verb, for the help.
        argv: Flags.
        default: Values of missing flags, in place of the defaults of the dataclass.

    Raises:
        InputError: A flag that is unknown or missing, or a value of another type.
    """
    _check_names(config, argv)
    groups = _groups(config)
    parts = [_part(config, names, *heading) for heading, names in groups]
    shown = _together(config, parts) if len(parts) > 1 else parts[0]
    given: dict[str, Any] = {}
    if default is not None:
        values = [
            part(**{name: getattr(default, name) for name in names})
            for part, (_, names) in zip(parts, groups, strict=True)
        ]
        given["default"] = shown(*values) if len(parts) > 1 else values[0]
    flags = _parsed(shown, verb, argv, given)
    read = vars(flags).values() if len(parts) > 1 else [flags]
    return config(
        **{name: getattr(part, name) for part, (_, names) in zip(read, groups, strict=True) for name in names}
    )


def _parsed(shown: type, verb: str, argv: Sequence[str], given: Mapping[str, Any]) -> Any:
    """Call tyro, and turn its error, a box of several lines, into one line."""
    markers = (tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName)
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(shown, prog=f"drelu-timm {verb}", args=argv, **given, config=markers)
    except SystemExit as exit_:
        if not exit_.code:  # of --help
            raise
        error = " ".join(_first_part(box.getvalue())).rstrip(".")
        raise InputError(f"{error}. drelu-timm {verb} --help shows all options.") from None


def _first_part(box: str) -> list[str]:
    """Return the lines of a box of tyro between its first two rules, without the texts of options."""
    parts: list[list[str]] = [[]]
    for line in box.replace("│", " ").splitlines():
        if re.search("[─-]{3}", line):
            parts.append([])
        elif line.strip():
            parts[-1].append(line)
    first = parts[min(1, len(parts) - 1)]
    indents = [len(line) - len(line.lstrip()) for line in first]  # 4 more for an option, 8 more for its text
    return [line.strip() for line, indent in zip(first, indents, strict=True) if indent < indents[0] + 8]


def _check_names(config: type, argv: Sequence[str]) -> None:
    """Refuse a flag that the dataclass has no field for."""
    allowed = ["--help", *(flag(each.name) for each in fields(config))]
    for name in (word.partition("=")[0] for word in argv):
        if name.startswith("--") and name.replace("_", "-") not in allowed:
            raise unknown("flag", name, allowed)


def flag(name: str) -> str:
    """Return the flag of a field."""
    return f"--{name.replace('_', '-')}"


def written_flags(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[list[str]]:
    """Return the flags with their values for the settings of a config, without the flags at their defaults."""
    flags = []
    for name, value in settings.items():
        if value == defaults.get(name) or (value in ([], ()) and not defaults.get(name)):
            continue
        values = value if isinstance(value, list | tuple) else [] if value is True else [value]
        flags.append([flag(name), *map(str, values)])
    return flags


def duration(seconds: float) -> str:
    """Format seconds for reading: 42 s, 12 min, 3.4 h, 2.5 days, 195 years."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    days = seconds / 86400
    return f"{days:.1f} days" if days < 2 * 365 else f"{days / 365.25:,.0f} years"


def _groups(config: type) -> list[tuple[tuple[str, str], list[str]]]:
    """Return title, text and field names of each group; a config without groups is one, with its own name and text."""
    groups: list[tuple[tuple[str, str], list[str]]] = []
    for each in fields(config):
        if _GROUP in each.metadata or not groups:
            groups.append((each.metadata.get(_GROUP, (config.__name__, config.__doc__)), []))
        groups[-1][1].append(each.name)
    return groups


def _part(config: type, names: Sequence[str], title: str, text: str) -> type:
    """Make a dataclass of some fields of a config, whose help shows only defaults that are values.

    It inherits from the config, because tyro reads the docstrings of the fields from the source of that class. The
    other fields become class variables, which tyro ignores.
    """
    members = [
        # A copy, because `make_dataclass` writes the new annotation into the field that it is given.
        (each.name, Annotated[each.type, _HINT], copy(each)) if each.name in names else (each.name, ClassVar[Any])
        for each in fields(config)
    ]
    return make_dataclass(title, members, bases=(config,), frozen=True, namespace={"__doc__": text})


def _together(config: type, parts: Sequence[type]) -> type:
    """Make a dataclass with one field per part: tyro makes each of them a group of the help."""
    members = [(part.__name__, tyro.conf.OmitArgPrefixes[part]) for part in parts]
    return make_dataclass("Flags", members, frozen=True, namespace={"__doc__": config.__doc__})
