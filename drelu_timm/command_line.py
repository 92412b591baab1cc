"""How every verb reads its flags, for which a frozen dataclass stands, and how it says a time."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, make_dataclass
from typing import Annotated, Any, TypeVar

import tyro

Config = TypeVar("Config")

# What an unset flag does its text says; "(default: None)" behind it would say less.
_UNSET = ("None", "", "''", "False")
_HINT = tyro.conf.arg(help_behavior_hint=lambda default: "" if default in _UNSET else f"(default: {default})")


def read_flags(config: type[Config], verb: str, argv: Sequence[str], default: Config | None = None) -> Config:
    """The config that a command line gives; both ``--batch-size`` and ``--batch_size`` are understood.

    Args:
        config: A dataclass with a docstring below every field. If it is put together of others, the help shows each of
            these as a group of its own.
        verb: Name of the verb, for the help.
        argv: The flags.
        default: Values of flags that are not given, where they are not those of the dataclass.
    """
    groups = [base for base in reversed(config.__mro__) if is_dataclass(base) and base is not config]
    parts = [_hinted(part) for part in groups or [config]]
    shown = _together(config, parts) if groups else parts[0]
    given: dict[str, Any] = {}
    if default is not None:
        values = [part(**{each.name: getattr(default, each.name) for each in fields(part)}) for part in parts]
        given["default"] = shown(*values) if groups else values[0]
    flags = tyro.cli(
        shown,
        prog=f"drelu-timm {verb}",
        args=argv,
        **given,
        config=(tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName),
    )
    read = vars(flags).values() if groups else [flags]
    return config(**{name: value for part in read for name, value in vars(part).items()})


def flag(name: str) -> str:
    """A field's name as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def written_flags(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[list[str]]:
    """The flags that give a config's settings, each with its values; those at their defaults are left out."""
    flags = []
    for name, value in settings.items():
        if value == defaults.get(name) or (value in ([], ()) and not defaults.get(name)):
            continue
        values = value if isinstance(value, list | tuple) else [] if value is True else [value]
        flags.append([flag(name), *map(str, values)])
    return flags


def duration(seconds: float) -> str:
    """Return seconds for the eye: 42 s, 12 min, 3.4 h, 2.5 days."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _hinted(config: type) -> type:
    """The same dataclass, with a help that shows a default only where there is something to show."""
    members = [(each.name, Annotated[each.type, _HINT], each) for each in fields(config)]
    return make_dataclass(config.__name__, members, bases=(config,), frozen=True, namespace={"__doc__": config.__doc__})


def _together(config: type, groups: Sequence[type]) -> type:
    """A dataclass that holds one of each group: tyro makes of it the groups of a help."""
    members = [(group.__name__.lower(), tyro.conf.OmitArgPrefixes[group]) for group in groups]
    return make_dataclass("Flags", members, frozen=True, namespace={"__doc__": config.__doc__})
