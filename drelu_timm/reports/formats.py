"""Sections and tables of a report as HTML, Markdown, LaTeX and CSV."""

import base64
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jinja2 import Environment, StrictUndefined

from ..errors import InputError
from ..files import atomic_file
from ..formatting import escape_latex
from .tables import Table

_TEMPLATE = Path(__file__).with_name("page.html")
_MARKDOWN = str.maketrans({"|": r"\|", "\n": " "})


@dataclass(frozen=True)
class Section:
    """A heading and what stands beneath it, in this order.

    Attributes:
        title: The heading, and the picture's alternative text.
        text: Plain text; a blank line ends a paragraph.
        table: Its cells are shown as `str` gives them, missing ones empty; its index is not shown.
        picture: A PNG.
    """

    title: str
    text: str = ""
    table: pd.DataFrame | None = None
    picture: Path | None = None

    @property
    def paragraphs(self) -> list[str]:
        """The text's, without blank ones."""
        return [paragraph.strip() for paragraph in self.text.split("\n\n") if paragraph.strip()]

    @property
    def headings(self) -> list[str]:
        """Of the table's columns."""
        assert self.table is not None
        return [*map(str, self.table.columns)]

    @property
    def rows(self) -> Iterator[list[str]]:
        """The table's cells."""
        assert self.table is not None
        for row in self.table.itertuples(index=False, name=None):
            yield ["" if pd.isna(cell) else str(cell) for cell in row]

    @property
    def picture_base64(self) -> str:
        """What the picture's file holds.

        Raises:
            InputError: The picture cannot be read.
        """
        assert self.picture is not None
        try:
            return base64.b64encode(self.picture.read_bytes()).decode()
        except OSError as error:
            raise InputError(f"{self.picture} cannot be read ({error.strerror}); make the report anew") from error


def write_page(path: Path, sections: Sequence[Section], *, title: str) -> None:
    """Write sections as a page with a table of contents; nothing in them is taken as HTML.

    Args:
        path: The HTML file; a reader sees it whole or not at all.
        sections: In their order on the page.
        title: Of the page.

    Raises:
        InputError: A picture that cannot be read.
    """
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(_TEMPLATE.read_text(encoding="utf-8"))
    html = template.render(title=title, sections=sections)
    with atomic_file(path) as beside:
        beside.write_text(html, encoding="utf-8")


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
    cells = table.cells.map(escape_latex).rename(columns=escape_latex)
    return cells.to_latex(
        index=False,
        escape=False,
        caption=escape_latex(f"{table.title}. {table.caption}"),
        label=f"tab:{table.name}",
        position="htbp",
    )


def csv(table: Table) -> str:
    """The numbers, unrounded."""
    return table.values.to_csv(index=False, lineterminator="\n")
