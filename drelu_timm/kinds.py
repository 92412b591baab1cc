"""What the fields of a JSON file may hold, checked with the file, the field and the value named."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError


@dataclass(frozen=True)
class Kind:
    """Whether a value is of the kind, and what it is called."""

    holds: Callable[[Any], bool]
    words: str


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def one_of(values: Sequence[str], what: str) -> Kind:
    """One of some texts."""
    return Kind(lambda value: isinstance(value, str) and value in values, f"{what} ({', '.join(values)})")


def or_null(kind: Kind) -> Kind:
    """That kind, or nothing."""
    return Kind(lambda value: value is None or kind.holds(value), f"{kind.words} or null")


TEXT = Kind(lambda value: isinstance(value, str) and value != "", "a text")
COUNT = Kind(lambda value: is_whole(value) and value > 0, "a count above 0")
NUMBER = Kind(_is_number, "a number")
SHARE = Kind(lambda value: _is_number(value) and 0 <= value <= 1, "a share between 0 and 1")
LIST = Kind(lambda value: isinstance(value, list) and value != [], "a list with something in it")
ANYTHING = Kind(lambda value: True, "there")
OBJECT = Kind(lambda value: isinstance(value, dict), "an object")


def check_fields(
    path: Path, content: Any, kinds: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None
) -> None:
    """Raise where a part of a file is no JSON object, lacks fields, or holds something else in one."""
    missing = [name for name in kinds if not isinstance(content, dict) or name not in content]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}: it is cut, or of another version; make it anew")
    for name, kind in {**kinds, **(optional or {})}.items():
        if name in content and not kind.holds(content[name]):
            raise InputError(f"{path}: {name} is {repr(content[name])[:80]}, not {kind.words}; make it anew")
