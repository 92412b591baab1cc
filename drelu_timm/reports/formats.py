"""Tables and sections of a report as Markdown, LaTeX and CSV."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from .page import Section
from .tables import Table

_MARKDOWN = str.maketrans({"|": r"\|", "\n": " "})
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


def markdown_table(cells: pd.DataFrame) -> str:
    """A pipe table."""
    rows = [cells.columns, ["---"] * len(cells.columns), *cells.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(str(cell).translate(_MARKDOWN) for cell in row)} |" for row in rows)


def markdown(sections: Iterable[Section], folder: Path, *, title: str) -> str:
    """Sections one below the other.

    Args:
        sections: Their pictures lie below ``folder``.
        folder: Where the Markdown file will lie.
        title: Above all.
    """
    parts = [f"# {_in_a_line(title)}"]
    for section in sections:
        parts.append(f"## {_in_a_line(section.title)}")
        parts += map(_in_a_line, section.paragraphs)
        parts += [markdown_table(section.table)] if section.table is not None else []
        if section.picture is not None:
            parts.append(f"![{_in_a_line(section.title)}]({section.picture.relative_to(folder).as_posix()})")
    return "\n\n".join(parts) + "\n"


def _in_a_line(text: str) -> str:
    """A title or a paragraph as one line, in which nothing is taken as HTML."""
    return " ".join(text.split()).replace("<", "&lt;")


def latex(table: Table) -> str:
    r"""A table of the package booktabs, to be read by ``\input``; the preamble says ``\usepackage{booktabs}``."""
    cells = table.cells.map(_escaped).rename(columns=_escaped)
    return cells.to_latex(
        index=False,
        escape=False,
        caption=_escaped(f"{table.title}. {table.caption}"),
        label=f"tab:{table.name}",
        position="htbp",
    )


def csv(table: Table) -> str:
    """The numbers, unrounded."""
    return table.values.to_csv(index=False, lineterminator="\n")


def _escaped(text: str) -> str:
    return " ".join(str(text).split()).translate(_LATEX)
