"""`drelu-timm report`: tables, statistics and figures of evaluated runs, from their result files only.

    drelu-timm report runs/paper-mnist
    drelu-timm report runs/paper-mnist runs/more --against-paper --output-dir report

    report.html     all of it on one page that needs no network: look here first
    report.md       the same as Markdown
    tables/         every table as .md, .tex (needs the package booktabs) and .csv (numbers, unrounded)
    figures/        every figure as .png
    numbers.json    every accuracy with the files that it comes from

The same result files give the same files here, byte for byte.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from .errors import InputError
from .files import write_json, write_text
from .flags import ReportConfig
from .reports.averages import HELD_OUT, WHITE_BOX, Average, Lines, lines_of
from .reports.comparisons import papers_statistics, statistics
from .reports.folder import replaced
from .reports.formats import Section, csv, latex, markdown, markdown_table, write_page
from .reports.paper import SOURCE, net_name
from .reports.reading import Outcomes, read_outcomes
from .reports.sections import attacks, figures, opening, origin, over_eps, trainings
from .reports.tables import NONE, Table, against_paper, all_rows, paper_table, seed_count, square_tables


def main(config: ReportConfig) -> int:
    """Write the report and print where it is.

    Returns:
        1 where a file was broken and left out, else 0.
    """
    outcomes = report(config)
    folder = _output_dir(config)
    print(f"report in {folder}: look at {folder / 'report.html'} first")
    return 1 if outcomes.broken else 0


def report(config: ReportConfig) -> Outcomes:
    """Write the report that a config asks for, and print its main rows.

    Returns:
        What it was made from.

    Raises:
        InputError: Folders without an evaluation that could be read, or an output directory that cannot be used.
    """
    if not config.runs:
        raise InputError("RUNS is missing; give run directories, or folders that hold them")
    output_dir = _output_dir(config)
    outcomes = read_outcomes(config.runs)
    if not outcomes.found:
        raise InputError(" | ".join(["nothing to report", *outcomes.broken, *outcomes.notes]))
    groups = [lines_of(group, of_group) for group, of_group in outcomes.groups().items()]
    with replaced(output_dir) as folder:
        _write(config, folder, groups, outcomes)
    _show(groups, outcomes)
    return outcomes


def _output_dir(config: ReportConfig) -> Path:
    return config.output_dir or config.runs[0] / "report"


# What is written


def _write(config: ReportConfig, folder: Path, groups: Sequence[Lines], outcomes: Outcomes) -> None:
    main_tables = [paper_table(lines) for lines in groups]
    main_tables += square_tables(groups)
    beside = [against_paper(lines) for lines in groups] if config.against_paper else []
    full = [all_rows(lines) for lines in groups]
    tables = [*main_tables, *(table for table in beside if table), *full]
    for table in tables:
        _write_table(folder / "tables", table)

    sections = [opening(outcomes, groups), *(_section(table) for table in tables)]
    if config.against_paper:
        sections.append(Section("The paper", f"{SOURCE}." if any(beside) else "It has none of these numbers."))
    for lines in groups:
        sections += statistics(lines, folder / "figures", outcomes)
        sections += figures(lines, folder / "figures", outcomes)
    sections += over_eps(groups, folder / "figures")
    sections += papers_statistics(groups) if config.against_paper else []
    names = [f"tables/{table.name} (.md, .tex, .csv)" for table in tables]
    sections += [
        trainings(groups),
        attacks(groups),
        *origin(_relative(outcomes, config.runs), groups, ["numbers.json", *names]),
    ]

    title = f"Accuracy under attack: {'; '.join(str(lines.group) for lines in groups)}"
    write_text(folder / "report.md", markdown(sections, folder, title=title))
    write_page(folder / "report.html", sections, title=title)
    base = _base(config.runs)
    write_json(folder / "numbers.json", [record for lines in groups for record in _records(lines, base)])


def _write_table(folder: Path, table: Table) -> None:
    text = f"# {table.title}\n\n{markdown_table(table.cells)}\n\n{table.caption}\n"
    for suffix, content in ((".md", text), (".tex", latex(table)), (".csv", csv(table))):
        write_text(folder / f"{table.name}{suffix}", content)


def _section(table: Table) -> Section:
    return Section(table.title, table.caption, table.cells)


def _relative(outcomes: Outcomes, runs: Sequence[Path]) -> Outcomes:
    """The outcomes with paths in their texts as in numbers.json: a report says the same wherever it is made."""

    def relative(text: str) -> str:
        for run in runs:
            path = os.path.relpath(run.resolve(), _base(runs))
            inside = "" if path == os.curdir else f"{path}/"
            found = rf"(?<![\w./-]){re.escape(str(run))}(/|(?![\w.-]))"
            text = re.sub(found, lambda match, path=path, inside=inside: inside if match[1] else path, text)
        return text

    return replace(outcomes, broken=[*map(relative, outcomes.broken)], notes=[*map(relative, outcomes.notes)])


def _base(runs: Sequence[Path]) -> Path:
    """What paths in a report are relative to: RUNS, if that is one folder, else the folder that holds all of them."""
    return Path(os.path.commonpath([run.resolve() for run in runs]))


def _records(lines: Lines, base: Path) -> Iterator[dict[str, Any]]:
    """Every accuracy of a group, with the files that it comes from."""
    for one in lines.all:
        measured = sorted({attack for outcome in one.outcomes for attack in outcome.at.accuracy})
        for column in (HELD_OUT, "clean", *measured, "worst"):
            if mean := one.mean(column):
                yield {
                    "group": str(lines.group),
                    "net": one.first.net,
                    "training": one.training,
                    "column": column,
                    "mean": mean.mean,
                    "std": mean.std,
                    "n_seeds": mean.n_seeds,
                    "n_examples": None if column == HELD_OUT else mean.n_examples,
                    "sources": [Path(os.path.relpath(path.resolve(), base)).as_posix() for path in mean.sources],
                }


# What is printed


def _show(groups: Sequence[Lines], outcomes: Outcomes) -> None:
    """Print the main rows with their worst case and verdict, then notes and broken files."""
    console = Console()
    for lines in groups:
        console.print(f"{lines.group}: accuracy in %, mean over seeds", style="italic", highlight=False, markup=False)
        console.print(_main_rows(lines))
    if any(one.masked for lines in groups for one in lines.shown):
        console.print("Of masked rows the white-box accuracy is not robustness; the worst case is what is left.")
    for title, texts in (("note", outcomes.notes), ("broken, left out", outcomes.broken)):
        for text in texts:
            console.print(f"{title}: {text}", highlight=False, markup=False, soft_wrap=True)


def _main_rows(lines: Lines) -> RichTable:
    columns = {"clean": "clean", "white-box": WHITE_BOX, "AutoAttack": "autoattack", "worst": "worst"}
    table = RichTable(box=SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("net", "trained"):
        table.add_column(heading, overflow="fold")
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True, style="bold" if heading == "worst" else None)
    table.add_column("masking", overflow="fold")
    table.add_column("seeds", no_wrap=True)
    for one in lines.shown:
        accuracies = [_shown(one, column) for column in columns.values()]
        seeds = seed_count(len(one.seeds), len(lines.seeds))
        cells = (net_name(one.first.net), one.training, *accuracies, one.verdict, seeds)
        table.add_row(*map(Text, cells))  # as text, no bracket is markup
    return table


def _shown(one: Average, column: str) -> str:
    mean = one.mean(column)
    if mean is None:
        return NONE
    fewer = "" if mean.n_seeds == len(one.seeds) else f" [n = {mean.n_seeds}]"
    return f"{'≤ ' if mean.at_most else ''}{mean.mean:.2f}{fewer}"
