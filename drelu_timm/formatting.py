"""Numbers as text in names and tables."""

from typing import Any


def written(value: Any) -> str:
    """Format a setting for a file name or a table; different numbers give different strings."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).lower()
    short = f"{value:g}"
    return short if float(short) == value else repr(value).removesuffix(".0")
