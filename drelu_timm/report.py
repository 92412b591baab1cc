"""`drelu-timm report`: tables, statistics and figures of evaluated runs, made from their result files only.

    drelu-timm report runs/paper-mnist
    drelu-timm report runs/paper-mnist runs/more --against-paper --output-dir report

    report.html     everything on one page that needs no network: start here
    report.md       the same as Markdown
    tables/         every table as .md, .tex (needs the package booktabs) and .csv (numbers, not rounded)
    figures/        every figure as .png
    numbers.json    every accuracy with the files that it comes from

The same result files give the same report, byte for byte.
"""

import base64
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from .errors import InputError, one_line
from .files import atomic_folder, held, remove_leftovers, write_json, write_text
from .flags import ReportConfig
from .formatting import escape_html, escape_latex, escape_markdown
from .reports.evaluated_runs import EvaluatedRuns, read_evaluated_runs
from .reports.methods import HELD_OUT, WHITE_BOX, GroupMethods, Method, methods_of
from .reports.paper import SOURCE, model_name
from .reports.sections import (
    Section,
    attacks,
    figures,
    missing_as_lines,
    opening,
    origin,
    over_eps,
    papers_statistics,
    statistics,
    trainings,
)
from .reports.tables import NONE, Table, against_paper, all_rows, at_most, paper_table, seed_count, square_tables

_TEMPLATE = Path(__file__).with_name("reports") / "page.html"
_NUMBERS = "numbers.json"
_FILES = ("report.html", "report.md", _NUMBERS)
_FOLDERS = ("tables", "figures")
_SUFFIXES = (".csv", ".md", ".tex", ".png")  # of the files in them


def main(config: ReportConfig) -> int:
    """Write the report and print where it is.

    Returns:
        1 if a file was broken and left out, else 0.
    """
    runs = report(config)
    folder = _output_dir(config)
    print(f"report in {folder}: open {folder / 'report.html'}")
    return 1 if runs.broken else 0


def report(config: ReportConfig) -> EvaluatedRuns:
    """Write the report that a config asks for, and print its main rows.

    Returns:
        The runs that it was made from.

    Raises:
        InputError: Folders without an evaluation that can be read, or an output folder that cannot be used.
    """
    if not config.runs:
        raise InputError("RUNS is missing. Give run directories, or folders that contain them.")
    output_dir = _output_dir(config)
    _check_output_dir(output_dir)
    runs = read_evaluated_runs(config.runs)
    if not runs.found:
        raise InputError(" | ".join(["Nothing to report", *runs.broken, *runs.notes]))
    groups = [methods_of(group, of_group) for group, of_group in runs.groups().items()]
    with _replaced(output_dir) as folder:
        _write(config, folder, groups, runs)
    _print(groups, runs)
    return runs


# The output folder


def _output_dir(config: ReportConfig) -> Path:
    return (config.output_dir or config.runs[0] / "report").resolve()


def _check_output_dir(output_dir: Path) -> None:
    """Refuse a folder that has other files but no report.

    Raises:
        InputError: The folder cannot be used.
    """
    if not output_dir.name:
        raise InputError(f"--output-dir {output_dir} is the root folder. Use another.")
    try:
        empty = not output_dir.exists() or not any(output_dir.iterdir())
        if any((output_dir / name).is_symlink() for name in _FOLDERS):
            raise InputError(f"--output-dir {output_dir} has a link in the place of a folder. Use another.")
        if not empty and not all((output_dir / name).is_file() for name in _FILES):
            raise InputError(f"--output-dir {output_dir} has other files and no report. Use another.")
    except OSError as error:
        raise InputError(f"--output-dir {output_dir} cannot be written to ({one_line(error)}). Use another.") from error


@contextmanager
def _replaced(output_dir: Path) -> Iterator[Path]:
    """Yield a new folder whose files replace an earlier report's at the end; an error changes nothing.

    Other files in the folder are kept, except tables and figures of an earlier report.

    Raises:
        InputError: The folder cannot be written to, or another process writes to it.
    """
    flag, new = f"--output-dir {output_dir}", output_dir.with_name(f".{output_dir.name}.new")
    with held(output_dir.with_name(f".{output_dir.name}.lock"), flag):
        try:
            remove_leftovers(new.parent, new.name)
            shutil.rmtree(new, ignore_errors=True)
            with atomic_folder(new) as folder:
                yield folder
            if not output_dir.exists() or not any(output_dir.iterdir()):
                new.replace(output_dir)
                return
            for old in [path for name in _FOLDERS for path in (output_dir / name).glob("*")]:
                if old.is_file() and old.suffix in _SUFFIXES:
                    old.unlink()
            for path in sorted(new.rglob("*")):
                target = output_dir / path.relative_to(new)
                if path.is_dir():
                    target.mkdir(exist_ok=True)
                else:
                    path.replace(target)
            shutil.rmtree(new)
        except OSError as error:
            raise InputError(f"{flag} cannot be written to ({one_line(error)}). Use another.") from error


# What is written


def _write(config: ReportConfig, folder: Path, groups: Sequence[GroupMethods], runs: EvaluatedRuns) -> None:
    compared = [table for methods in groups if config.against_paper and (table := against_paper(methods))]
    main_tables = [*map(paper_table, groups), *square_tables(groups)]
    tables = [*main_tables, *compared, *map(all_rows, groups)]
    for table in tables:
        _write_table(folder / "tables", table)

    relative = _relative(runs, config.runs)
    sections = [opening(relative, groups), *(Section(table.title, table.caption, table.cells) for table in tables)]
    if config.against_paper:
        sections.append(Section("The paper", f"{SOURCE}." if compared else "It has none of these numbers."))
    for methods in groups:
        sections += statistics(methods, folder / "figures")
        sections += figures(methods, folder / "figures", runs)
    sections += over_eps(groups, folder / "figures")
    sections += papers_statistics(groups) if config.against_paper else []
    names = [f"tables/{table.name} (.md, .tex, .csv)" for table in tables]
    sections += [trainings(groups), attacks(groups)]
    sections = missing_as_lines(sections) + origin(_relative(runs, config.runs), groups, [_NUMBERS, *names])

    title = f"Accuracy under attack: {'; '.join(str(methods.group) for methods in groups)}"
    write_text(folder / "report.md", markdown(sections, folder, title=title))
    write_page(folder / "report.html", sections, title=title)
    base = _base(config.runs)
    write_json(folder / _NUMBERS, [record for methods in groups for record in _records(methods, base)])


def _write_table(folder: Path, table: Table) -> None:
    section = markdown([Section(table.title, table.caption, table.cells)], folder, title=table.title)
    for suffix, content in ((".md", section), (".tex", latex(table)), (".csv", csv(table))):
        write_text(folder / f"{table.name}{suffix}", content)


def _relative(runs: EvaluatedRuns, paths: Sequence[Path]) -> EvaluatedRuns:
    """Return the runs with the paths in their texts as in numbers.json, so that a report is the same everywhere."""

    def relative(text: str) -> str:
        for given in paths:
            path = os.path.relpath(given.resolve(), _base(paths))
            inside = "" if path == os.curdir else f"{path}/"
            found = rf"(?<![\w./-]){re.escape(str(given))}(/|(?![\w.-]))"
            text = re.sub(found, lambda match, path=path, inside=inside: inside if match[1] else path, text)
        return text

    names = ("broken", "notes", "unfinished")
    return replace(runs, **{name: [*map(relative, getattr(runs, name))] for name in names})


def _base(paths: Sequence[Path]) -> Path:
    """Return what paths in a report are relative to: RUNS if that is one folder, else their common folder."""
    return Path(os.path.commonpath([path.resolve() for path in paths]))


def _records(methods: GroupMethods, base: Path) -> Iterator[dict[str, Any]]:
    """Yield every accuracy of a group, with the files that it comes from."""
    for method in methods.all:
        measured = sorted({attack for run in method.runs for attack in run.combined.accuracy})
        for column in (HELD_OUT, "clean", *measured, "worst"):
            if mean := method.mean(column):
                yield {
                    "group": str(methods.group),
                    "net": method.architecture,
                    "training": method.training,
                    "column": column,
                    "mean": mean.mean,
                    "std": mean.std,
                    "n_seeds": mean.n_seeds,
                    "n_examples": None if column == HELD_OUT else mean.n_examples,
                    "sources": [Path(os.path.relpath(path.resolve(), base)).as_posix() for path in mean.sources],
                }


# Formats: each escapes every text where it is written


def write_page(path: Path, sections: Sequence[Section], *, title: str) -> None:
    """Write sections as an HTML page with a table of contents, atomically.

    Args:
        path: HTML file.
        sections: In their order on the page.
        title: Title of the page.

    Raises:
        InputError: A picture cannot be read.
    """
    environment = Environment(finalize=escape_html, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    write_text(path, template.render(title=title, sections=sections, rows=_unbroken, picture=_picture_base64))


def _rows(table: pd.DataFrame) -> Iterator[list[str]]:
    for row in table.itertuples(index=False, name=None):
        yield ["" if pd.isna(cell) else str(cell) for cell in row]


def _unbroken(table: pd.DataFrame) -> Iterator[list[str]]:
    """Yield the rows with spaces that keep a number, its sign and its deviation on one line."""
    for row in _rows(table):
        yield [cell.replace("≤ ", "≤\u00a0").replace(" ± ", "\u00a0±\u00a0") for cell in row]


def _picture_base64(picture: Path) -> str:
    try:
        return base64.b64encode(picture.read_bytes()).decode()
    except OSError as error:
        raise InputError(f"{picture} cannot be read ({error.strerror}). Make the report again.") from error


def markdown(sections: Iterable[Section], folder: Path, *, title: str) -> str:
    """Return sections as Markdown.

    Args:
        sections: Sections, with pictures inside ``folder``; a section of the same title as the page has no heading.
        folder: Folder of the Markdown file.
        title: Title of the page.
    """
    parts = [f"# {escape_markdown(title)}"]
    for section in sections:
        parts += [f"## {escape_markdown(section.title)}"] if section.title != title else []
        parts += [markdown_table(section.table)] if section.table is not None else []
        parts += map(escape_markdown, section.paragraphs)
        if section.picture is not None:
            parts.append(f"![{escape_markdown(section.title)}]({section.picture.relative_to(folder).as_posix()})")
    return "\n\n".join(parts) + "\n"


def markdown_table(cells: pd.DataFrame) -> str:
    """Return a pipe table."""
    rows = [[escape_markdown(cell) for cell in row] for row in (cells.columns, *_rows(cells))]
    rows.insert(1, ["---"] * len(cells.columns))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def latex(table: Table) -> str:
    r"""Return a table of the package booktabs for ``\input``; the preamble needs ``\usepackage{booktabs}``."""
    cells = table.cells.map(escape_latex).rename(columns=escape_latex)
    return cells.to_latex(
        index=False,
        escape=False,
        caption=escape_latex(f"{table.title}. {table.caption}"),
        label=f"tab:{table.name}",
        position="htbp",
    )


def csv(table: Table) -> str:
    """Return the numbers of a table, not rounded."""
    return table.values.to_csv(index=False, lineterminator="\n")


# What is printed


def _print(groups: Sequence[GroupMethods], runs: EvaluatedRuns) -> None:
    """Print the main rows with their worst case and verdict, then notes and broken files."""
    console = Console()
    for methods in groups:
        title = f"{methods.group}: accuracy in %, mean over seeds"
        console.print(title, style="italic", highlight=False, markup=False)
        console.print(_main_rows(methods))
    if any(method.worst_verdict == "masked" for methods in groups for method in methods.shown):
        console.print("The white-box accuracy of a masked row is not robustness; its worst case is an upper bound.")
    for title, texts in (("incomplete", runs.unfinished), ("note", runs.notes), ("broken, left out", runs.broken)):
        for text in texts:
            console.print(f"{title}: {text}", highlight=False, markup=False, soft_wrap=True)


def _main_rows(methods: GroupMethods) -> RichTable:
    columns = {"clean": "clean", "white-box": WHITE_BOX, "AutoAttack": "autoattack", "worst": "worst"}
    table = RichTable(box=SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("model", "training"):
        table.add_column(heading, overflow="fold")
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True, style="bold" if heading == "worst" else None)
    table.add_column("verdict", overflow="fold")
    table.add_column("seeds", no_wrap=True)
    for method in methods.shown:
        accuracies = [_accuracy(method, column) for column in columns.values()]
        seeds = seed_count(len(method.seeds), len(methods.seeds))
        cells = (model_name(method.architecture), method.training, *accuracies, method.verdict, seeds)
        table.add_row(*map(Text, cells))  # as text, since brackets would be markup
    return table


def _accuracy(method: Method, column: str) -> str:
    mean = method.mean(column)
    if mean is None:
        return NONE
    sign = at_most(mean.at_most, method.verdict) if column == "worst" else ""
    return f"{sign}{mean.mean:.2f}" + ("" if mean.n_seeds == len(method.seeds) else f" [n = {mean.n_seeds}]")
