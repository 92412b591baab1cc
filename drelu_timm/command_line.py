"""How every verb reads its flags: a frozen dataclass becomes the flags, their types, defaults and help."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, make_dataclass
from typing import Any, TypeVar

import tyro

Config = TypeVar("Config")


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
    given: dict[str, Any] = {} if default is None else {"default": _grouped(default, groups) if groups else default}
    flags = tyro.cli(
        _flags(config, groups) if groups else config,
        prog=f"drelu-timm {verb}",
        args=argv,
        **given,
        config=(tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName),
    )
    if not groups:
        return flags
    return config(**{name: value for group in vars(flags).values() for name, value in vars(group).items()})


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


def _flags(config: type, groups: Sequence[type]) -> type:
    """A dataclass that holds one of each group: tyro makes of it the groups of a help."""
    members = [(group.__name__.lower(), tyro.conf.OmitArgPrefixes[group]) for group in groups]
    return make_dataclass("Flags", members, frozen=True, namespace={"__doc__": config.__doc__})


def _grouped(config: Any, groups: Sequence[type]) -> Any:
    """A config's values as `_flags` holds them."""
    members = [group(**{field.name: getattr(config, field.name) for field in fields(group)}) for group in groups]
    return _flags(type(config), groups)(*members)
