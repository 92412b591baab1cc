"""Numbers and texts as they are written into names, tables and documents.

Text from outside (titles, model names, evidence, paths) passes the escape function of its format where it is written.
Shell commands use `shlex.quote`, YAML `yaml.safe_dump`, TOML `tomli_w`.
"""

import html
import re
from typing import Any

_LATEX = str.maketrans(
    {
        **{character: rf"\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "≤": r"$\le$",
        "–": "--",
    }
)


def written(value: Any) -> str:
    """Format a setting for a file name or a table; different numbers give different strings."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).lower()
    short = f"{value:g}"
    return short if float(short) == value else repr(value).removesuffix(".0")


def one_line_text(text: object) -> str:
    """Return a text with all of its white space, line breaks included, as single spaces."""
    return " ".join(str(text).split())


def escape_html(text: object) -> str:
    """Escape a text for HTML, between tags or in a quoted attribute."""
    return html.escape(str(text), quote=True)


def escape_markdown(text: object) -> str:
    r"""Escape a text for a line, a heading or a table cell of Markdown; no part of it is taken as markup or HTML.

    Line breaks become spaces. Underscores are not escaped, since GitHub takes those within words literally.
    """
    text = re.sub(r"&(?=#?\w+;)", "&amp;", one_line_text(text)).replace("<", "&lt;")
    text = re.sub(r"([\\`*\[\]|])", r"\\\1", text)
    # What would start a heading, a quotation, a list or a rule at the start of a line.
    return re.sub(r"^(#+(?=\s|$)|>|[-+](?=\s|$)|[-=]{2,}|\d+(?=[.)]\s))", _escaped_start, text)


def _escaped_start(match: re.Match[str]) -> str:
    start = match.group()
    return f"{start}\\" if start.isdigit() else f"\\{start}"


def markdown_code(text: object) -> str:
    """Return a text as a code span of Markdown; a longer run of backticks than any in the text encloses it."""
    text = one_line_text(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def escape_latex(text: object) -> str:
    """Escape a text for LaTeX, outside math mode; line breaks become spaces."""
    return one_line_text(text).translate(_LATEX)
