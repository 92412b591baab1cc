"""Schemas of JSON and TOML files: the annotations of a dataclass state what each of its fields may hold."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import InputError, unknown

T = TypeVar("T")


@dataclass(frozen=True)
class Constraint:
    """Condition on a value of the right type, for `Annotated`.

    Attributes:
        holds: The condition.
        words: What the value must be, as errors state it.
    """

    holds: Callable[[Any], bool]
    words: str


def one_of(values: Sequence[str], what: str) -> Constraint:
    """Return the constraint that a string is one of some values."""
    return Constraint(lambda value: value in values, f"{what} ({', '.join(values)})")


Text = Annotated[str, Constraint(bool, "text in quotes, not empty")]
Count = Annotated[int, Constraint(lambda value: value > 0, "a whole number above 0")]
Whole = Annotated[int, Constraint(lambda value: value >= 0, "a whole number, 0 or above")]
Share = Annotated[float, Constraint(lambda value: 0 <= value <= 1, "a number from 0 to 1")]

# The types that a JSON or TOML parser returns for each type of a field, and the words for the latter in errors.
# Types are compared exactly, because bool is a subclass of int.
_READ_AS: dict[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), "text in quotes"),
    Path: ((str,), "a path in quotes"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
    dict: ((dict,), "a table of names and values"),
    tuple: ((list,), "a list"),
    NoneType: ((NoneType,), "null"),
}


def load(cls: type[T], content: Any, what: Path | str, separator: str = ": ") -> T:
    """Return a dataclass with the values of a JSON object or TOML table. Names that are not its fields are ignored.

    A class method ``from_json(content, what)`` of a dataclass in a field is used where there is one.

    Args:
        cls: Dataclass. Fields without a default are required. Annotations may be str, Path, int, float, bool, Any,
            Literal, tuple[X, ...], dict[str, X], a dataclass, a union of these, or Annotated with a `Constraint`.
        content: What the file holds.
        what: File, for errors.
        separator: Text between ``what`` and a field's name in errors.

    Raises:
        InputError: A required field is missing, or a field has another type or value. One line with file and field.
    """
    if type(content) is not dict:
        raise _wrong(what, content, _READ_AS[dict][1])
    required = [field.name for field in fields(cls) if field.default is MISSING and field.default_factory is MISSING]  # pyright: ignore[reportArgumentType]
    if missing := [name for name in required if name not in content]:
        raise InputError(f"{what} has no {', '.join(missing)}. The file is cut or of another version; create it again.")
    hints = field_types(cls)
    return cls(
        **{name: parse(hints[name], content[name], f"{what}{separator}{name}") for name in hints if name in content}
    )


def load_table(types: Mapping[str, Any], content: Any, what: str) -> dict[str, Any]:
    """Return the values of a table in which every name may be missing, and names that are not fields are refused.

    Args:
        types: Annotation of each field, such as `field_types` returns.
        content: What the file holds.
        what: File and table, for errors.

    Raises:
        InputError: As `load`, or an unknown name.
    """
    if type(content) is not dict:
        raise _wrong(what, content, _READ_AS[dict][1])
    for name in content:
        if name not in types:
            raise unknown(what, name, types)
    return {name: parse(types[name], value, f"{what} {name}") for name, value in content.items()}


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Return the annotation of each field of a dataclass."""
    return get_type_hints(cls, include_extras=True)


def parse(hint: Any, value: Any, what: str, words: str = "") -> Any:
    """Return a value of a JSON or TOML file as the type that an annotation states.

    Integers become floats where the annotation is float, strings become paths, lists become tuples.

    Args:
        hint: Annotation; see `load`.
        value: What the file holds.
        what: File and field, for errors.
        words: What the value must be, as errors state it; by default the words for its type.

    Raises:
        InputError: The value has another type, or a constraint does not hold.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        parsed = parse(inner[0], value, what, inner[1].words)
        return _checked(inner[1].holds(parsed), parsed, value, what, inner[1].words)
    if origin in (Union, UnionType):
        hint = next((one for one in inner if type(value) in _READ_AS[_kind(one)][0]), None)
        allowed = words or " or ".join(_READ_AS[_kind(one)][1] for one in inner if one is not NoneType)
        return parse(_checked(hint is not None, hint, value, what, allowed), value, what, words)
    read_as, kind_words = _READ_AS[_kind(hint)]
    words = words or kind_words
    _checked(type(value) in read_as, value, value, what, words)
    if origin is Literal:
        return _checked(value in inner, value, value, what, f"one of {', '.join(inner)}")
    if origin is tuple:
        return tuple(parse(inner[0], one, f"{what}[{number}]") for number, one in enumerate(value))
    if origin is dict:
        return {name: parse(inner[1], one, f"{what}.{name}") for name, one in value.items()}
    if is_dataclass(hint):
        own = getattr(hint, "from_json", None)
        return own(value, what) if own else load(hint, value, what, ".")  # pyright: ignore[reportArgumentType]
    if hint is float:
        return _checked(_is_finite(value), value, value, what, words) * 1.0
    if hint is Path:  # a NUL makes every function of os fail with a ValueError
        return Path(_checked("\0" not in value, value, value, what, words))
    return value


def _kind(hint: Any) -> Any:
    """Return the key of `_READ_AS` for an annotation."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _kind(inner[0])
    return str if origin is Literal else dict if is_dataclass(hint) else origin or hint


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that is too large for a float
        return False


def _checked(holds: bool, result: Any, value: Any, what: str, words: str) -> Any:
    if not holds:
        raise _wrong(what, value, words)
    return result


def _wrong(what: Path | str, value: Any, words: str) -> InputError:
    try:
        shown = repr(value)[:80]
    except (ValueError, RecursionError):  # an integer of more digits than Python prints, or lists 1,000 deep
        shown = f"of type {type(value).__name__}"
    return InputError(f"{what} is {shown}. It must be {words}.")


def dump(value: Any) -> Any:
    """Return the JSON content of a dataclass, or of a value in one; its method ``to_json`` is used if it has one."""
    if is_dataclass(value):
        own = getattr(value, "to_json", None)
        return own() if own else {field.name: dump(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: dump(one) for name, one in value.items()}
    return [dump(one) for one in value] if isinstance(value, (tuple, list)) else value
