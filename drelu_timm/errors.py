"""Errors that the user can fix, each one line, and the class of our warnings."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Input that cannot be used. The command line prints the message, which is one line, and exits with 2."""


class DReLUWarning(UserWarning):
    """Category of all warnings of this package, so that users can filter them."""


def unknown(what: str, value: str, allowed: Iterable[str]) -> InputError:
    """Return the error for a name that is not allowed, with the nearest allowed names.

    Args:
        what: Flag or field, such as ``--dataset``.
        value: The name.
        allowed: All allowed names.
    """
    allowed = sorted(allowed)
    names = {name.lstrip("-"): name for name in allowed}  # the dashes would make any two flags similar
    near = [names[name] for name in get_close_matches(value.lstrip("-"), names, n=3)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"allowed: {', '.join(allowed[:20])}"
    return InputError(f"{what} {value!r} is unknown; {hint}")


def one_line(error: Exception) -> str:
    """Return the message of an exception as one line of at most 300 characters; its type if it has no message."""
    return " ".join(str(error).split())[:300] or type(error).__name__
