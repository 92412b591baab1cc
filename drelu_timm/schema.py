"""Schema of a JSON file: a dataclass whose annotations state what each field may hold."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from .errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Constraint:
    """What a value must be, and how errors call it."""

    holds: Callable[[Any], bool]
    words: str


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def one_of(values: Sequence[str], what: str) -> Constraint:
    """Constrain a text to one of some values."""
    return Constraint(lambda value: isinstance(value, str) and value in values, f"{what} ({', '.join(values)})")


Text = Annotated[str, Constraint(lambda value: isinstance(value, str) and value != "", "a text")]
Count = Annotated[int, Constraint(lambda value: _is_whole(value) and value > 0, "a count above 0")]
Whole = Annotated[int, Constraint(_is_whole, "a whole number")]
Share = Annotated[float, Constraint(lambda value: _is_number(value) and 0 <= value <= 1, "a share between 0 and 1")]
_BASES = {
    str: Constraint(lambda value: isinstance(value, str), "a text"),
    int: Constraint(lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    float: Constraint(_is_number, "a number"),
    bool: Constraint(lambda value: isinstance(value, bool), "true or false"),
    dict: Constraint(lambda value: isinstance(value, dict), "an object"),
    tuple: Constraint(lambda value: isinstance(value, list), "a list"),
}


def load(cls: type[T], content: Any, path: Path) -> T:
    """Make a dataclass of a JSON object; fields that it does not have are left out.

    A class method ``from_json(content, path)`` of a dataclass, at any depth, is used where there is one.

    Args:
        cls: The dataclass. Fields without a default are required. A field may be annotated by a type, by a `Constraint`
            with `Annotated`, or by a tuple, a mapping, an optional or another dataclass of such.
        content: What a JSON file holds.
        path: The file, for errors.

    Raises:
        InputError: A required field is missing, or a field holds something else; names the file and the field.
    """
    names = [field.name for field in fields(cls) if field.default is MISSING and field.default_factory is MISSING]  # pyright: ignore[reportArgumentType]
    if missing := [name for name in names if not isinstance(content, dict) or name not in content]:
        raise InputError(f"{path} lacks {', '.join(missing)}: it is cut, or of another version; make it anew")
    hints = _hints(cls)
    return cls(**{name: _loaded(hints[name], content[name], path, name) for name in hints if name in content})


def dump(value: Any) -> Any:
    """Return the JSON content of a dataclass, or of what a field of one holds; a method ``to_json`` is used if any."""
    if is_dataclass(value):
        own = getattr(value, "to_json", None)
        return own() if own else {field.name: dump(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: dump(of_it) for name, of_it in value.items()}
    return [dump(one) for one in value] if isinstance(value, (tuple, list)) else value


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _loaded(kind: Any, value: Any, path: Path, name: str, or_null: str = "") -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        kind, check = inner
        origin, inner = get_origin(kind), get_args(kind)
    elif NoneType in inner:
        (kind,) = [one for one in inner if one is not NoneType]
        return None if value is None else _loaded(kind, value, path, name, " or null")
    else:
        check = _BASES[dict if is_dataclass(kind) else origin or kind]
    if not check.holds(value):
        raise InputError(f"{path}: {name} is {repr(value)[:80]}, not {check.words}{or_null}; make it anew")
    if origin is tuple:
        return tuple(_loaded(inner[0], one, path, name) for one in value)
    if origin is dict:
        return {key: _loaded(inner[1], one, path, key) for key, one in value.items()}
    if is_dataclass(kind):
        own = getattr(kind, "from_json", None)
        return own(value, path) if own else load(kind, value, path)  # pyright: ignore[reportArgumentType]
    return tuple(value) if isinstance(value, list) else value
