"""Values of a configuration that come from a file, checked against the types of the dataclass that they are for."""

from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from .errors import InputError

_WORDS = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}


def typed(what: str, value: Any, hint: Any) -> Any:
    """Return a value of a TOML or JSON file as the type that a field has.

    Whole numbers become floats where those are meant, texts become paths, and lists become tuples.

    Args:
        what: File and field, for the error.
        value: What the file holds.
        hint: Annotation of the field: a type, a type or None, or a tuple of one type.

    Raises:
        InputError: The value is of another type.
    """
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise InputError(f"{what} = {_shown(value)} must be a list")
        return tuple(typed(what, one, get_args(hint)[0]) for one in value)
    kinds = get_args(hint) or (hint,)
    if type(value) is int and float in kinds:
        return float(str(value))  # an int that is too large for a float becomes inf here, not an OverflowError
    if type(value) is str and Path in kinds and "\0" not in value:
        return Path(value)
    if type(value) not in kinds:
        words = [_WORDS[kind] for kind in kinds if kind is not NoneType]
        raise InputError(f"{what} = {_shown(value)} must be {' or '.join(words)}")
    return value


def _shown(value: Any) -> str:
    return repr(value)[:80]
