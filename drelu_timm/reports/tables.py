"""Tables of a report as data frames: the paper's layout with the worst case and verdict, and all rows."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..attacks.suites import ATTACKS, SUITES
from .evaluated_runs import Group
from .methods import HEADINGS, HELD_OUT, GroupMethods, Method
from .paper import COLUMNS, CW_BOUND, EPS, SQUARE_COLUMNS, model_name, read_paper, table_number
from .statistics import attack_differences, incomparable

NONE = "–"
_FIRST = ["Model", "Training", "Clean", "Worst case", "Verdict"]  # columns that come before the attacks
_QUANTILE = 1.96  # of the normal distribution, for 95 %
_UNITS = "Accuracies in %, mean ± standard deviation (n - 1) over seeds; a value without ± is of one seed."
_RANKS = "In parentheses: rank among the methods of a model, 1 is the highest."
_WORST = (
    "Worst case: share of the test images on which no attack and no probe for masking fooled the model, in any "
    "evaluation at this eps. Verdict: whether the white-box accuracies are sound or masked, the worst of all seeds and "
    "evaluations. ≤: an upper bound, because the verdict is not sound or rows of an evaluation are missing."
)


@dataclass(frozen=True)
class Table:
    """Table as text and as numbers.

    Attributes:
        name: Name of its files, without suffix.
        title: Title.
        caption: What a reader needs to know to read it.
        cells: Text, as shown; columns without any value are dropped.
        values: Numbers, with the same rows and all columns.
    """

    name: str
    title: str
    caption: str
    cells: pd.DataFrame
    values: pd.DataFrame


def paper_table(methods: GroupMethods) -> Table:
    """Return a table like the paper's 1 to 4 and 6 to 8, with worst case, verdict, AutoAttack, images and seeds."""
    group, shown = methods.group, methods.shown
    number = papers_number(group)
    values = _values(shown, [*COLUMNS, "autoattack", "worst", *_certified(shown)], ranked=[*COLUMNS, "worst"])
    caption = [
        _UNITS,
        _RANKS,
        _columns_without_ranks(values),
        _about_carlini_wagner(shown),
        _WORST,
        attack_differences(shown),
        *_other_eps(group),
    ]
    if len(shown) < len(methods.all):
        caption.append("Other cap weights and placements are in the table of all rows.")
    return Table(
        name=f"table-{number}-{slug(group)}" if number else f"table-{slug(group)}",
        title=f"Table {number}: {group}" if number else str(group),
        caption="\n\n".join([_joined(caption), *methods.remarks]),
        cells=_cells(values, len(methods.seeds)),
        values=values,
    )


def all_rows(methods: GroupMethods) -> Table:
    """Return a table of every method of a group under every attack: all cap weights, placements and activations."""
    known = {attack for method in methods.all for run in method.runs for attack in run.combined.accuracy}
    order = [*COLUMNS, *ATTACKS, *(column for suite in SUITES.values() for column in suite)]
    attacks = [column for column in dict.fromkeys([*order, *sorted(known)]) if column in known]
    values = _values(methods.all, [HELD_OUT, "clean", *attacks, "worst", *_certified(methods.all)])
    held_out = f"{HEADINGS[HELD_OUT]}: under the inner attack of the training, on held-out training images."
    caption = [_UNITS, held_out, _about_carlini_wagner(methods.all), _WORST, attack_differences(methods.all)]
    return Table(
        name=f"rows-{slug(methods.group)}",
        title=f"All rows: {methods.group}",
        caption=_joined(caption),
        cells=_cells(values, len(methods.seeds)),
        values=values,
    )


def square_tables(groups: Iterable[GroupMethods]) -> list[Table]:
    """Return tables like the paper's 5 and 9: clean and Square by dataset. Datasets that these lack have their own."""
    tables: dict[tuple[Any, ...], list[GroupMethods]] = {}
    for methods in groups:
        group = methods.group
        number = papers_number(group, square=True)
        if any(method.mean("square") for method in methods.shown):
            key = (number, group.norm, group.eps, group.generated, None if number else group)
            tables.setdefault(key, []).append(methods)
    return [_square_table(number, same) for (number, *_), same in tables.items()]


def _square_table(number: int | None, groups: Sequence[GroupMethods]) -> Table:
    columns = [*SQUARE_COLUMNS, "worst"]
    cells, values, remarks, names = [], [], [], []
    for methods in groups:
        title = methods.group.title
        own = _values(methods.shown, columns, ranked=columns)
        sentences = (_columns_without_ranks(own), attack_differences(methods.shown))
        remarks += [f"{title}: {sentence}" for sentence in sentences if sentence]
        # Without the cap weight, which may differ between datasets, if the table has several.
        short = [methods.short_name(method) if len(groups) > 1 else method.training for method in methods.shown]
        own["training"] = short
        values.append(own.set_index(["net", "training"]).add_prefix(f"{title} "))
        cells.append(_cells(own, len(methods.seeds)).set_index(["Model", "Training"]).add_prefix(f"{title} "))
        names += [
            f"{title}, {model_name(method.architecture)}: {name} is {method.training}."
            for name, method in zip(short, methods.shown, strict=True)
            if name != method.training
        ]
    first = groups[0].group
    where = f"{first.norm}, eps {first.eps}" + (", with generated images" if first.generated else "")
    other_eps = [sentence for methods in groups for sentence in _other_eps(methods.group)]
    return Table(
        name=f"table-{number}-square-{slug(where)}" if number else f"table-square-{slug(first)}",
        title=f"Table {number}: Square, {where}" if number else f"Square: {first}",
        caption=_joined([_UNITS, _RANKS, _WORST, *remarks, *other_eps, *names]),
        cells=pd.concat(cells, axis=1).fillna(NONE).reset_index(),
        values=pd.concat(values, axis=1).reset_index(),
    )


def against_paper(methods: GroupMethods) -> Table | None:
    """Return every number that both have, the paper's next to ours; None if the paper has none of these.

    Where the paper's cap weight was not run, the chosen one is used.
    """
    rows = _pairs_with_paper(methods)
    if not rows:
        return None
    values = pd.DataFrame(rows).astype({"std": float, "difference": float})
    images = sorted(values["images"].unique())
    errors = " or ".join(f"{100 * _QUANTILE * (0.25 / count) ** 0.5:.1f} points ({count} images)" for count in images)
    caption = [
        _UNITS,
        "Differences in percentage points, ours minus the paper's, whose numbers are means of three models; in "
        "parentheses the rank that it prints.",
        f"The choice of the test images alone makes an accuracy of 50 % uncertain by {errors}, at 95 %.",
        "Agreement with the paper does not show robustness; the worst case and the verdict do.",
        _about_carlini_wagner(methods.all),
    ]
    return Table(
        name=f"against-paper-{slug(methods.group)}",
        title=f"Compared with the paper: {methods.group}",
        caption=_joined(caption),
        cells=_cells_against_paper(values),
        values=values,
    )


def _pairs_with_paper(methods: GroupMethods) -> list[dict[str, Any]]:
    """Return a row for each number that the paper prints and its counterpart here."""
    group, printed = methods.group, read_paper()
    tables = [papers_number(group, square=square) for square in (False, True)]
    return [
        {
            "table": line.table,
            "net": line.model,
            "training": method.training,
            "paper training": line.training,
            "column": line.column,
            "ours": mean.mean,
            "std": mean.std,
            "paper": line.accuracy,
            "paper rank": line.rank,
            "difference": None if line.column == "cw-l2" else mean.mean - line.accuracy,
            "worst": worst.mean,
            "worst at most": worst.at_most,
            "masking": method.verdict,
            "images": min(mean.n_examples),
            "seeds": mean.n_seeds,
        }
        for line in printed[printed["table"].isin(tables) & (printed["dataset"] == group.dataset)].itertuples()
        for method in _counterparts(line, methods)
        if (mean := method.mean(str(line.column))) and (worst := method.mean("worst"))
    ]


def _counterparts(line: Any, methods: GroupMethods) -> list[Method]:
    """Return what to compare with a printed number: the methods with its cap weight if any, else the shown ones."""
    same = [m for m in methods.all if m.architecture == line.model and m.first.training == line.training]
    return same or [m for m in methods.shown if m.architecture == line.model and m.first.method == line.method]


def _cells_against_paper(values: pd.DataFrame) -> pd.DataFrame:
    rows = values.to_dict("records")

    def training(row: dict[str, Any]) -> str:
        ours, paper = row["training"], row["paper training"]
        return ours if ours == paper or ours.startswith(f"{paper}, ") else f"{ours} (paper: {paper})"

    return pd.DataFrame(
        {
            "Table": str(row["table"]),
            "Model": model_name(row["net"]),
            "Training": training(row),
            "Attack": HEADINGS[row["column"]],
            "Ours": _cell(row["ours"], row["std"]),
            "Paper": _cell(row["paper"], rank=row["paper rank"]),
            "Difference": NONE if pd.isna(row["difference"]) else f"{row['difference']:+.2f}",
            "Our worst case": f"{at_most(row['worst at most'], row['masking'])}{row['worst']:.2f}",
            "Verdict": row["masking"],
            "Test images": str(row["images"]),
            "Seeds": str(row["seeds"]),
        }
        for row in rows
    )


def papers_number(group: Group, *, square: bool = False) -> int | None:
    """Return which table of the paper has a group's numbers; None if none has."""
    return table_number(group.dataset, norm=group.norm, eps=group.eps, generated=group.generated, square=square)


def at_most(rows_missing: bool, verdict: str) -> str:
    """Return the sign before a worst case that is only an upper bound, else ""."""
    return "" if verdict.startswith("sound") and not rows_missing else "≤ "


def seed_count(n: int, of: int) -> str:
    """Return how many of the seeds of its group a method has: "3", or "2 of 3"."""
    return str(n) if n == of else f"{n} of {of}"


def slug(name: object) -> str:
    """Return a heading as part of a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", str(name).lower()).strip("-")


def _certified(methods: Sequence[Method]) -> list[str]:
    """Return the column of certified accuracies, if there are any."""
    return ["certified"] if any(method.mean("certified") for method in methods) else []


def _values(methods: Sequence[Method], columns: Sequence[str], ranked: Sequence[str] = ()) -> pd.DataFrame:
    """Return a row per method: model, training, and for each column its mean, `` std``, `` seeds`` and `` rank``.

    Ranks are given only where the methods of a model are comparable.
    """
    rows = []
    for method in methods:
        row: dict[str, Any] = {"net": method.architecture, "training": method.training}
        for column in columns:
            mean = method.mean(column)
            row[column] = mean and mean.mean
            row[f"{column} std"] = mean and mean.std
            if column in ranked:
                row[f"{column} rank"] = None
            row[f"{column} seeds"] = mean.n_seeds if mean else 0
            if column == "worst":
                row["worst at most"] = bool(mean and mean.at_most)
        images = " to ".join(dict.fromkeys(str(count) for count in (min(method.n_examples), max(method.n_examples))))
        rows.append(row | {"masking": method.verdict, "images": images, "seeds": len(method.seeds)})
    values = pd.DataFrame(rows)
    for column in columns:
        values[[column, f"{column} std"]] = values[[column, f"{column} std"]].astype(float)
    unlike = incomparable(methods, ranked)
    for column in ranked:
        means = values[column].round(9)  # means that differ only by rounding are ties
        ranks = means.groupby(values["net"]).rank(method="min", ascending=False)
        values[f"{column} rank"] = ranks.where([(net, column) not in unlike for net in values["net"]])
    return values


def _cells(values: pd.DataFrame, n_seeds: int) -> pd.DataFrame:
    """Return `_values` as text, with what matters most first."""
    columns = [name.removesuffix(" std") for name in map(str, values) if name.endswith(" std")]
    text: dict[str, Any] = {"Model": values["net"].map(model_name), "Training": values["training"]}
    for column in columns:
        cells = [
            (at_most(row["worst at most"], row["masking"]) if column == "worst" else "")
            + _cell(row[column], row[f"{column} std"], row.get(f"{column} rank"), row[f"{column} seeds"], row["seeds"])
            for row in values.to_dict("records")
        ]
        if set(cells) != {NONE}:
            text[HEADINGS.get(column, column)] = cells
    text[HEADINGS["masking"]] = values["masking"]
    text[HEADINGS["images"]] = values["images"]
    text[HEADINGS["seeds"]] = [seed_count(n, n_seeds) for n in values["seeds"]]
    return pd.DataFrame({name: text[name] for name in dict.fromkeys([*_FIRST, *text])})


def _cell(mean: float, std: float | None = None, rank: float | None = None, n: int = 1, of: int = 1) -> str:
    if pd.isna(mean):
        return NONE
    text = f"{mean:.2f}" if std is None or pd.isna(std) else f"{mean:.2f} ± {std:.2f}"
    if n != of:
        text += f" [n = {n}]"
    return text if rank is None or pd.isna(rank) else f"{text} ({rank:.0f})"


# Sentences of captions


def _about_carlini_wagner(methods: Sequence[Method]) -> str:
    budgets = {run.combined.cw_budget for method in methods for run in method.runs} - {None}
    if not budgets:
        return ""
    radii = " or ".join(f"{budget:.3g}" for budget in sorted(filter(None, budgets)))
    return (
        "CW_L2 searches for the nearest adversarial image, not inside the threat model: its accuracy is at an L2 "
        f"distance of {radii} (for Linf the corners of the epsilon ball). It is not comparable with the other columns, "
        f"may be below the worst case, and differs from the paper's bound of {CW_BOUND}, which has no stated units."
    )


def _columns_without_ranks(values: pd.DataFrame) -> str:
    """Return a sentence on the columns of `_values`, except the worst case, in which a model has no ranks, or ""."""
    listed = [
        f"{model_name(str(net))} x {HEADINGS[column]}"
        for net, rows in values.groupby("net", sort=False)
        for column in {**COLUMNS, **SQUARE_COLUMNS}
        if f"{column} rank" in rows and rows[column].notna().any() and rows[f"{column} rank"].isna().all()
    ]
    if not listed:
        return ""
    return (
        "No ranks where not all methods of a model, or not all seeds of a method, have an accuracy under the same "
        f"settings on the same number of test images: {', '.join(listed)}."
    )


def _other_eps(group: Group) -> list[str]:
    printed = EPS.get(group.dataset)
    if printed is None or (group.norm, group.eps) == ("Linf", printed):
        return []
    return [f"The paper's numbers for {group.title} are at Linf, eps {printed}."]


def _joined(sentences: Iterable[str]) -> str:
    return " ".join(filter(None, sentences))
