"""The tables of a report, as data frames: the paper's in its own layout with what they lack beside, and all rows."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..attacks.suites import ATTACKS, SUITES
from .averages import HELD_OUT, Average, Lines
from .comparability import incomparable, unequal
from .outcomes import Group
from .paper import COLUMNS, CW_BOUND, EPS, SQUARE_COLUMNS, net_name, read_paper, table_number

NONE = "–"
HEADINGS = {
    **COLUMNS,
    **SQUARE_COLUMNS,
    "autoattack": "AutoAttack",
    "worst": "Worst case",
    HELD_OUT: "Held-out PGD",
    "masking": "Masking",
    "images": "Test images",
    "seeds": "Seeds",
}
_QUANTILE = 1.96  # of the normal distribution, for 95 %
_MEASURES = "Accuracies in %, mean ± standard deviation (n - 1) over seeds; no ± is one seed."
_RANKS = "In parentheses: the rank within a net, 1 the highest."
_WORST = (
    "Worst case: the images that nothing broke, no attack and no probe for masking, in any evaluation at this radius. "
    "Masking: the verdict on the white-box accuracies, the worst of several seeds and of all evaluations."
)


@dataclass(frozen=True)
class Table:
    """A table as it is shown and as numbers.

    Attributes:
        name: Of its files.
        title: Above it.
        caption: What has to be known to read it.
        cells: Text, as shown.
        values: The numbers, a row each as in ``cells``.
    """

    name: str
    title: str
    caption: str
    cells: pd.DataFrame
    values: pd.DataFrame


def paper_table(lines: Lines) -> Table:
    """A table as the paper's 1 to 4 and 6 to 8, with AutoAttack, worst case, verdict, test images and seeds beside."""
    group, shown = lines.group, lines.shown
    number = papers_number(group)
    values = _values(shown, [*COLUMNS, "autoattack", "worst"], ranked=[*COLUMNS, "worst"])
    caption = [
        _MEASURES,
        _RANKS,
        _unranked(values),
        _carlini_wagner(shown),
        _WORST,
        *_about_worst(shown),
        "The paper's tables end at CW_L2.",
        *_other_eps(group),
    ]
    if len(shown) < len(lines.all):
        caption.append("Other balancers and placements are in the table of all rows.")
    return Table(
        name=f"table-{number}-{slug(group)}" if number else f"table-{slug(group)}",
        title=f"Table {number}: {group}" if number else str(group),
        caption="\n\n".join([_text(caption), *lines.remarks]),
        cells=_cells(values, len(lines.seeds)),
        values=values,
    )


def all_rows(lines: Lines) -> Table:
    """Every line of a group under every attack: all balancers, placements and activations."""
    known = {attack for one in lines.all for outcome in one.outcomes for attack in outcome.at.accuracy}
    order = [*COLUMNS, *ATTACKS, *(column for suite in SUITES.values() for column in suite)]
    attacks = [column for column in dict.fromkeys([*order, *sorted(known)]) if column in known]
    values = _values(lines.all, [HELD_OUT, "clean", *attacks, "worst"])
    held_out = f"{HEADINGS[HELD_OUT]}: under the inner attack of the training, on training images that were held out."
    return Table(
        name=f"rows-{slug(lines.group)}",
        title=f"All rows: {lines.group}",
        caption=_text([_MEASURES, held_out, _carlini_wagner(lines.all), _WORST, *_about_worst(lines.all)]),
        cells=_cells(values, len(lines.seeds)),
        values=values,
    )


def square_tables(groups: Iterable[Lines]) -> list[Table]:
    """Tables as the paper's 5 and 9: clean and Square by dataset; datasets that these lack are kept apart."""
    tables: dict[tuple[Any, ...], list[Lines]] = {}
    for lines in groups:
        group = lines.group
        number = papers_number(group, square=True)
        if any(one.mean("square") for one in lines.shown):
            key = (number, group.norm, group.eps, group.generated, None if number else group)
            tables.setdefault(key, []).append(lines)
    return [_square_table(number, same) for (number, *_), same in tables.items()]


def _square_table(number: int | None, groups: Sequence[Lines]) -> Table:
    columns = [*SQUARE_COLUMNS, "worst"]
    cells, values, about, balancers = [], [], [], []
    for lines in groups:
        title = lines.group.title
        own = _values(lines.shown, columns, ranked=columns)
        about += [f"{title}: {sentence}" for sentence in (_unranked(own), *_about_worst(lines.shown)) if sentence]
        own["training"] = [lines.label(one) for one in lines.shown]
        values.append(own.set_index(["net", "training"]).add_prefix(f"{title} "))
        cells.append(_cells(own, len(lines.seeds)).set_index(["Model", "Training"]).add_prefix(f"{title} "))
        balancers += [
            f"{title}, {net_name(one.first.net)}: {lines.label(one)} is {one.training}."
            for one in lines.shown
            if lines.label(one) != one.training
        ]
    first = groups[0].group
    where = f"{first.norm}, eps {first.eps}" + (", with generated images" if first.generated else "")
    other_eps = [sentence for lines in groups for sentence in _other_eps(lines.group)]
    return Table(
        name=f"table-{number}-square-{slug(where)}" if number else f"table-square-{slug(first)}",
        title=f"Table {number}: Square, {where}" if number else f"Square: {first}",
        caption="\n\n".join([_text([_MEASURES, _RANKS, _WORST, *about, *other_eps]), *balancers]),
        cells=pd.concat(cells, axis=1).fillna(NONE).reset_index(),
        values=pd.concat(values, axis=1).reset_index(),
    )


def against_paper(lines: Lines) -> Table | None:
    """Every number that both have, the paper's beside ours; None where the paper has none of these.

    Where the paper's balancer was not run, the chosen one stands in.
    """
    rows = _beside_paper(lines)
    if not rows:
        return None
    values = pd.DataFrame(rows).astype({"std": float, "difference": float})
    caption = [
        _MEASURES,
        "Differences in percentage points, ours less the paper's, whose numbers are means of three nets; in "
        "parentheses the rank that it prints.",
        _sampling_error(values),
        "That a number agrees says nothing of robustness: the worst case and the verdict do. How our nets were trained "
        "is said in a section of its own.",
        _carlini_wagner(lines.all),
        *_about_worst(lines.all),
    ]
    return Table(
        name=f"against-paper-{slug(lines.group)}",
        title=f"Beside the paper: {lines.group}",
        caption=_text(caption),
        cells=_cells_beside_paper(values),
        values=values,
    )


def _beside_paper(lines: Lines) -> list[dict[str, Any]]:
    """A row for each number that the paper prints and its counterpart here."""
    group, printed = lines.group, read_paper()
    tables = [papers_number(group, square=square) for square in (False, True)]
    return [
        {
            "table": line.table,
            "net": line.net,
            "training": one.training,
            "paper training": line.training,
            "column": line.column,
            "ours": mean.mean,
            "std": mean.std,
            "paper": line.accuracy,
            "paper rank": line.rank,
            "difference": None if line.column == "cw-l2" else mean.mean - line.accuracy,
            "worst": worst.mean,
            "worst at most": worst.at_most,
            "masking": one.verdict,
            "images": min(mean.n_examples),
            "seeds": mean.n_seeds,
        }
        for line in printed[printed["table"].isin(tables) & (printed["dataset"] == group.dataset)].itertuples()
        for one in _counterparts(line, lines)
        if (mean := one.mean(str(line.column))) and (worst := one.mean("worst"))
    ]


def _sampling_error(values: pd.DataFrame) -> str:
    """A sentence on how far an accuracy may be off because the test images are few."""
    images = sorted(values["images"].unique())
    errors = ", ".join(f"{100 * _QUANTILE * (0.25 / count) ** 0.5:.1f} on {count}" for count in images)
    return f"The test images alone make an accuracy uncertain by up to (95 %, at 50 %) {errors}."


def _cells_beside_paper(values: pd.DataFrame) -> pd.DataFrame:
    """`_beside_paper` as text."""
    trainings = zip(values["training"], values["paper training"], strict=True)
    return pd.DataFrame(
        {
            "Table": values["table"].astype(str),
            "Model": values["net"].map(net_name),
            "Training": [ours if _is(ours, paper) else f"{ours} (paper: {paper})" for ours, paper in trainings],
            "Attack": values["column"].map(HEADINGS),
            "Ours": [_cell(mean, std) for mean, std in zip(values["ours"], values["std"], strict=True)],
            "Paper": [
                _cell(printed, rank=rank) for printed, rank in zip(values["paper"], values["paper rank"], strict=True)
            ],
            "Difference": [_signed(difference) for difference in values["difference"]],
            "Our worst case": [
                f"{'≤ ' if at_most else ''}{worst:.2f}"
                for worst, at_most in zip(values["worst"], values["worst at most"], strict=True)
            ],
            "Masking": values["masking"],
            "Test images": values["images"].astype(str),
            "Seeds": values["seeds"].astype(str),
        }
    )


def papers_number(group: Group, *, square: bool = False) -> int | None:
    """Which of the paper's tables holds a group's numbers; None where none does."""
    return table_number(group.dataset, norm=group.norm, eps=group.eps, generated=group.generated, square=square)


def seed_count(n: int, of: int) -> str:
    """How many seeds a line has of those that the lines of its group have together: "3", or "2 of 3"."""
    return str(n) if n == of else f"{n} of {of}"


def slug(name: object) -> str:
    """A heading as part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", str(name).lower()).strip("-")


def _values(averages: Sequence[Average], columns: Sequence[str], ranked: Sequence[str] = ()) -> pd.DataFrame:
    """A row a line: net, training, and for each column its mean, and `` std``, `` seeds`` and `` rank`` of it.

    Ranks only where a net's rows can be compared.
    """
    rows = []
    for one in averages:
        row: dict[str, Any] = {"net": one.first.net, "training": one.training}
        for column in columns:
            mean = one.mean(column)
            row[column] = mean and mean.mean
            row[f"{column} std"] = mean and mean.std
            if column in ranked:
                row[f"{column} rank"] = None
            row[f"{column} seeds"] = mean.n_seeds if mean else 0
            if column == "worst":
                row["worst at most"] = bool(mean and mean.at_most)
        images = " to ".join(dict.fromkeys(str(count) for count in (min(one.n_examples), max(one.n_examples))))
        rows.append(row | {"masking": one.verdict, "images": images, "seeds": len(one.seeds)})
    values = pd.DataFrame(rows)
    for column in columns:
        values[[column, f"{column} std"]] = values[[column, f"{column} std"]].astype(float)
    unlike = incomparable(averages, ranked)
    for column in ranked:
        means = values[column].round(9)  # means that are equal but for rounding are ties
        ranks = means.groupby(values["net"]).rank(method="min", ascending=False)
        values[f"{column} rank"] = ranks.where([(net, column) not in unlike for net in values["net"]])
    return values


def _cells(values: pd.DataFrame, seeds: int) -> pd.DataFrame:
    """`_values` as text."""
    columns = [name.removesuffix(" std") for name in map(str, values) if name.endswith(" std")]
    text: dict[str, Any] = {"Model": values["net"].map(net_name), "Training": values["training"]}
    for column in columns:
        text[HEADINGS.get(column, column)] = [
            ("≤ " if row.get(f"{column} at most") else "")
            + _cell(row[column], row[f"{column} std"], row.get(f"{column} rank"), row[f"{column} seeds"], row["seeds"])
            for row in values.to_dict("records")
        ]
    text[HEADINGS["masking"]] = values["masking"]
    text[HEADINGS["images"]] = values["images"]
    text[HEADINGS["seeds"]] = [seed_count(n, seeds) for n in values["seeds"]]
    return pd.DataFrame(text)


def _cell(mean: float, std: float | None = None, rank: float | None = None, n: int = 1, of: int = 1) -> str:
    if pd.isna(mean):
        return NONE
    text = f"{mean:.2f}" if std is None or pd.isna(std) else f"{mean:.2f} ± {std:.2f}"
    if n != of:
        text += f" [n = {n}]"
    return text if rank is None or pd.isna(rank) else f"{text} ({rank:.0f})"


def _signed(difference: float) -> str:
    return NONE if pd.isna(difference) else f"{difference:+.2f}"


def _counterparts(line: Any, lines: Lines) -> list[Average]:
    """What is to be set beside a printed number: the lines of its balancer if there are any, else the shown ones."""
    same = [one for one in lines.all if one.first.net == line.net and one.first.training == line.training]
    return same or [one for one in lines.shown if one.first.net == line.net and one.first.method == line.method]


def _is(ours: str, paper: str) -> bool:
    return ours == paper or ours.startswith(f"{paper}, ")


def _carlini_wagner(averages: Sequence[Average]) -> str:
    budgets = {outcome.at.cw_budget for one in averages for outcome in one.outcomes} - {None}
    if not budgets:
        return ""
    radii = " or ".join(f"{budget:.3g}" for budget in sorted(filter(None, budgets)))
    return (
        "CW_L2 looks for the nearest adversarial image and knows no ball: its accuracy is that at an L2 distance of "
        f"{radii} (for Linf the corners of the ball), so it is not comparable with the other columns, may lie below "
        f"the worst case, and differs from the paper's bound of {CW_BOUND}, whose units are not said."
    )


def _unranked(values: pd.DataFrame) -> str:
    """A sentence on the columns of `_values`, but for the worst case, that a net has without ranks; "" for none."""
    listed = [
        f"{net_name(str(net))} x {HEADINGS[column]}"
        for net, rows in values.groupby("net", sort=False)
        for column in {**COLUMNS, **SQUARE_COLUMNS}
        if f"{column} rank" in rows and rows[column].notna().any() and rows[f"{column} rank"].isna().all()
    ]
    if not listed:
        return ""
    return (
        "No rank where not all rows of a net, or not all seeds of a row, have an accuracy under the same settings on "
        f"as many test images: {', '.join(listed)}."
    )


def _about_worst(averages: Sequence[Average]) -> list[str]:
    """Where worst cases are upper bounds, and where they cannot be compared."""
    bounds = [
        f"{net_name(one.first.net)} {one.training}" for one in averages if (mean := one.mean("worst")) and mean.at_most
    ]
    at_most = (
        "≤: the worst case is at most this, the lowest of several evaluations, as not all have their rows an example: "
        f"{', '.join(bounds)}."
    )
    return [sentence for sentence in (at_most if bounds else "", unequal(averages)) if sentence]


def _text(sentences: Iterable[str]) -> str:
    return " ".join(filter(None, sentences))


def _other_eps(group: Group) -> list[str]:
    printed = EPS.get(group.dataset)
    if printed is None or (group.norm, group.eps) == ("Linf", printed):
        return []
    return [f"The paper's numbers for {group.title} are at Linf, eps {printed}."]
