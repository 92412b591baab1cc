"""`drelu-timm demo`: train, evaluate and export on scikit-learn's digits, with the verbs that real work uses.

It compares three models that differ in one setting each: a ReLU model, the same with D-ReLU, and that with TRADES.
"""

from math import isnan, nan
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from .evaluate import evaluate
from .evaluation.config import EvaluateConfig
from .export import export
from .files import check_output_folder
from .flags import DemoConfig, ExportConfig
from .results.plotting import CLEAN, POINTS, VERDICT_COLORS, WORST_CASE, accuracy_axes, save_figure
from .results.result import Result, read_result
from .train import train
from .training.config import TrainConfig

KEY = "Demo2026Digits_Dense"
PAPER: dict[str, Any] = {"title": "D-ReLU with TRADES, a demonstration", "authors": "N/A", "venue": "N/A"}
PAPER["link"] = "https://doi.org/10.3390/math12223551"  # the paper on D-ReLU
# The same for all three. This cap_lr takes the caps from 100 to the paper's final values in the few steps of the demo.
COMMON: dict[str, Any] = {"dataset": "digits", "model": "dense_drelu", "eps": "0.2", "epochs": 80, "cap_lr": 1.0}
MODELS: dict[str, dict[str, Any]] = {
    "ReLU, natural": {"activation": "relu"},
    "D-ReLU, natural": {"cap_weight": 0.1},
    "D-ReLU, TRADES": {"cap_weight": 0.1, "objective": "trades", "beta": 6.0},
}
FOLDERS = dict(zip(MODELS, ("relu", "drelu", "drelu-trades"), strict=True))
COLUMNS = {"clean": "clean", "pgd": "PGD", "autoattack": "AutoAttack", "bpda": "BPDA", "worst": "worst"}
EXPLANATION = (
    "\nAccuracy in % under each attack, all with the same eps. PGD follows the gradient. AutoAttack is what the "
    "RobustBench leaderboard runs. BPDA passes the gradient through the caps, where it is exactly zero. "
    "[bold]Worst[/bold] counts an example as robust only if no attack fooled the model on it: only this is a robust "
    "accuracy. Zero grad.: share of the examples on which the input gradient is exactly zero. Verdict: whether attacks "
    "that do not depend on the gradient find hardly more than gradient attacks (sound) or much more (masked).\n"
)


def main(config: DemoConfig) -> None:
    """Run the demo."""
    demo(config)


def demo(config: DemoConfig) -> Path:
    """Train, evaluate and export, then print the results and where they are.

    Returns:
        The folder with everything.
    """
    check_output_folder(config.output_dir, FOLDERS.values(), "--output-dir")
    console = Console()
    results = {}
    for title, settings in MODELS.items():
        console.rule(title)
        run = config.output_dir / FOLDERS[title]
        train(TrainConfig(output_dir=run, resume=True, **{**COMMON, **settings}))
        results[title] = read_result(evaluate(EvaluateConfig(run=str(run), suite="standard")))
    console.rule("Export")
    exported = _export(config.output_dir / FOLDERS["D-ReLU, TRADES"])
    picture = config.output_dir / "demo.png"
    draw(results, picture)
    console.rule("Results")
    console.print(table(results))
    console.print(EXPLANATION)
    (entry,) = exported.glob("model_info/*/*/*.json")
    for what, path in {
        "runs, with all results": config.output_dir,
        "picture": picture,
        "exported model and its card": exported / "hub" / "README.md",
        "checks of the export": exported / "CHECKS.md",
        "RobustBench entry": entry,
    }.items():
        console.print(f"  {what + ':':29}{path}", soft_wrap=True)
    return config.output_dir


def _export(run: Path) -> Path:
    output_dir = run / "export" / KEY
    return output_dir if output_dir.exists() else export(ExportConfig(run=run, key=KEY, **PAPER))


def _accuracies(result: Result) -> list[float]:
    """Return the accuracies of the columns in percent; NaN for BPDA on a model without caps."""
    point = result.point
    accuracies = {**point.accuracy, "clean": point.clean, "worst": point.worst}
    return [100 * accuracies.get(column, nan) for column in COLUMNS]


def table(results: dict[str, Result]) -> Table:
    """Return a table with a row per model: accuracies in percent, share of zero gradients, verdict."""
    table = Table(title=_title(results), box=SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("trained", no_wrap=True)
    for column in [*COLUMNS.values(), "zero grad."]:
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for name, result in results.items():
        verdict = result.point.verdict.verdict
        percentages = [*_accuracies(result), 100 * result.point.zero_gradient_share]
        cells = ["-" if isnan(percentage) else f"{percentage:.1f}" for percentage in percentages]
        table.add_row(name, *cells, f"[{VERDICT_COLORS[verdict]}]{verdict}")
    return table


def draw(results: dict[str, Result], path: Path) -> None:
    """Draw the accuracies as bars, a group per model."""
    figure, axes = accuracy_axes(_title(results))
    figure.set_size_inches(8, 4.2)
    axes.set(ylim=(0, 105), axisbelow=True)  # room for the label above a bar
    axes.grid(visible=False, axis="x")
    colors = [CLEAN["color"], *(color for color, _ in POINTS[: len(COLUMNS) - 2]), WORST_CASE["color"]]
    width = 0.8 / len(COLUMNS)
    for i, (column, color) in enumerate(zip(COLUMNS.values(), colors, strict=True)):
        heights = [_accuracies(result)[i] for result in results.values()]
        places = [group + (i - (len(COLUMNS) - 1) / 2) * width for group in range(len(results))]
        bars = axes.bar(places, heights, width, color=color, label=column)
        axes.bar_label(bars, ["" if isnan(height) else f"{height:.0f}" for height in heights], fontsize=8)
        for place in (place for place, height in zip(places, heights, strict=True) if isnan(height)):
            axes.text(place, 1, "not run", fontsize=8, rotation=90, ha="center", va="bottom")
    axes.set_xticks(range(len(results)), [f"{name}\n({r.point.verdict})" for name, r in results.items()])
    figure.legend(loc="outside lower center", ncols=len(COLUMNS), frameon=False)
    save_figure(figure, path)


def _title(results: dict[str, Result]) -> str:
    first = next(iter(results.values()))
    return f"{first.dataset_title}, {first.norm}, eps {first.eps}, {first.n_examples} test images"
