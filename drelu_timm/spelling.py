"""The one spelling of a number in names and tables."""

from typing import Any


def written(value: Any) -> str:
    """A setting in a name; other numbers give other texts."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).lower()
    short = f"{value:g}"
    return short if float(short) == value else repr(value).removesuffix(".0")
