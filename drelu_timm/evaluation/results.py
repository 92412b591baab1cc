"""What is saved and shown of an evaluation: summaries for JSON, rows for CSV, tables for the eye."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isnan
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from ..attacks.suites import ATTACKS
from .curves import verdict_at
from .evaluation import Evaluation

VERDICT_COLOURS = {"sound": "green", "masked": "red", "undecided": "yellow"}


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """What is saved of an evaluation, beside its rows."""
    return {
        "eps": evaluation.threat_model.written,
        "settings": evaluation.settings,
        "clean": evaluation.clean,
        "accuracy": evaluation.accuracy,
        "worst": evaluation.worst,
        "sequences": evaluation.sequences,
        "zero_gradient_share": evaluation.zero_gradient_share,
        "cw_l2": asdict(evaluation.cw_l2) if evaluation.cw_l2 else None,
        "verdict": asdict(evaluation.verdict),
        "seconds": round(evaluation.seconds, 1),
        "attack_seconds": {attack: round(seconds, 1) for attack, seconds in evaluation.attack_seconds.items()},
    }


def rows(evaluation: Evaluation) -> str:
    """A row an example, as CSV.

    Index, label, clean prediction; for each attack 1 for robust or 0 for broken; the attack that broke it first, the
    steps that this took where known, the margin of the label's logit then, and the seed of its randomness.
    """
    broken = evaluation.broken
    columns = {
        "index": range(len(evaluation.labels)),
        "label": evaluation.labels.tolist(),
        "clean_prediction": evaluation.predictions.tolist(),
        **{attack: robust.int().tolist() for attack, robust in evaluation.robust.items()},
        "broken_by": broken.by,
        "steps": ["" if isnan(steps) else int(steps) for steps in broken.steps.tolist()],
        "margin": [f"{margin:.6g}" for margin in broken.margin.tolist()],
        "seed": ["" if seed is None else seed for seed in broken.seed],
    }
    return _csv(columns)


def sweep_rows(evaluations: Sequence[Evaluation]) -> str:
    """A row an example, as CSV: index, label, clean prediction, the smallest radius at which each attack broke it."""
    first = evaluations[0]
    columns = {
        "index": range(len(first.labels)),
        "label": first.labels.tolist(),
        "clean_prediction": first.predictions.tolist(),
    }
    for attack in [*first.robust, "worst"]:
        smallest = [""] * len(first.labels)
        for evaluation in reversed(evaluations):
            robust = evaluation.survivors if attack == "worst" else evaluation.robust[attack]
            for example in (~robust).nonzero().squeeze(1).tolist():
                smallest[example] = evaluation.threat_model.written
        columns[attack] = smallest
    return _csv(columns)


def _csv(columns: Mapping[str, Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


def show(results: dict[str, Any], title: str) -> None:
    """Print the accuracies with the verdict and its evidence beneath them."""
    table = Table("attack", "kind", "accuracy")
    table.add_row("none (clean)", "", _percent(results["clean"]))
    for name, accuracy in results["accuracy"].items():
        table.add_row(name, ATTACKS[name].kind if name in ATTACKS else "sequence", _percent(accuracy))
    table.add_section()
    table.add_row("worst case", "", _percent(results["worst"]), style="bold")
    table.add_row("zero input gradients", "", _percent(results["zero_gradient_share"]))
    console = Console()
    console.print(title, style="italic")
    console.print(table)
    if cw := results["cw_l2"]:
        median = cw["median_l2"]
        needs = "breaks fewer than half" if median is None else f"needs a median L2 distance of {median:.3f}"
        console.print(f"cw-l2 {needs}; accuracy at L2 {cw['budget']:.3f}: {_percent(cw['accuracy_at_budget'])}")
    _show_verdict(console, "verdict on the white-box accuracies", results)


def show_curve(results: dict[str, Any], title: str) -> None:
    """Print the accuracies for every radius, a row each, with the verdict behind them."""
    curve = results["curve"]
    table = Table("eps", caption="accuracy in %", box=SIMPLE)
    for column in ("clean", *curve[0]["accuracy"], "worst"):
        table.add_column(column, justify="right", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for at in curve:
        accuracies = [at["clean"], *at["accuracy"].values(), at["worst"]]
        table.add_row(at["eps"], *(f"{100 * accuracy:.1f}" for accuracy in accuracies), verdict_at(at))
    console = Console()
    console.print(title, style="italic")
    console.print(table)
    _show_verdict(console, f"verdict at {curve[-1]['eps']}", curve[-1])


def _show_verdict(console: Console, title: str, results: dict[str, Any]) -> None:
    console.print(f"{title}: [bold]{results['verdict']['verdict']}[/bold]")
    for sentence in results["verdict"]["evidence"]:
        console.print(Padding(sentence, (0, 0, 0, 2)), highlight=False)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
