"""What goes wrong on the user's side, said in one line: the flag or file, the value, what is allowed, the fix."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Input that cannot be used; the message is one line, and the command line prints it and exits with 2."""


class DReLUWarning(UserWarning):
    """Every warning of this package, so that users and tests can filter ours and nobody else's."""


def unknown(what: str, value: str, allowed: Iterable[str]) -> InputError:
    """The error for a name that is not in a table, with the nearest names that are.

    Args:
        what: The flag or field, e.g. ``--dataset``.
        value: What was given.
        allowed: Every name that would have worked.
    """
    allowed = sorted(allowed)
    names = {name.lstrip("-"): name for name in allowed}  # any two flags are alike in their dashes
    near = [names[name] for name in get_close_matches(value.lstrip("-"), names, n=3)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"allowed: {', '.join(allowed[:20])}"
    return InputError(f"{what} {value!r} is unknown; {hint}")


def one_line(error: Exception) -> str:
    """What an exception says, for the middle of a one-line message: at most 300 characters, its type if it is mute."""
    return " ".join(str(error).split())[:300] or type(error).__name__
