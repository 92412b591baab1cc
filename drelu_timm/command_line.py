"""How every verb reads its flags: a frozen dataclass becomes the flags, their types, defaults and help."""

from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

Config = TypeVar("Config")


def read_flags(config: type[Config], verb: str, argv: Sequence[str], default: Config | None = None) -> Config:
    """The config that a command line gives; both ``--batch-size`` and ``--batch_size`` are understood.

    Args:
        config: A dataclass with a docstring below every field.
        verb: Name of the verb, for the help.
        argv: The flags.
        default: Values of flags that are not given, where they are not those of the dataclass.
    """
    given: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(
        config,
        prog=f"drelu-timm {verb}",
        args=argv,
        **given,
        config=(tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName),
    )
