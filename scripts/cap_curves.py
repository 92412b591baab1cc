"""Show how fast the caps shrink, with the paper's learning rate for all weights and with a separate one for the caps.

Prints one row per run (its final state and its evaluation) and draws the mean cap over the steps:

    python scripts/cap_curves.py runs/caps/paper runs/caps/own-rate

scripts/caps.sh makes the runs that scripts/README.md shows.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import tyro
from matplotlib.figure import Figure

from drelu_timm.files import atomic_file, read_json
from drelu_timm.models.variants import Options
from drelu_timm.runs import Run

COLUMNS = (
    "learning rates",
    "steps",
    "mean cap",
    "largest",
    "zero",
    "active",
    "capped",
    "clean",
    "PGD",
    "worst",
    "verdict",
)


def main(runs: Annotated[tuple[Path, ...], tyro.conf.Positional], picture: Path = Path("model_cards/caps.png")) -> None:
    """Print a table of the caps of several runs, and draw their curves.

    Args:
        runs: Trained and evaluated run directories.
        picture: File for the curves.
    """
    curves = {str(path): _curve(Run.open(path)) for path in runs}
    print(f"| run | {' | '.join(COLUMNS)} |")
    print(f"| --- |{' ---: |' * (len(COLUMNS) - 1)} --- |")
    for path, curve in curves.items():
        print(_row(Run.open(path), curve))
    _draw(curves, picture)
    print(f"\nwrote {picture}")


def _curve(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]


def _row(run: Run, curve: list[dict[str, Any]]) -> str:
    (path,) = run.results_folder.glob("*.json")
    result, last = read_json(path), curve[-1]
    shares = [f"{100 * last['units'][name]:.1f}" for name in ("zero", "active", "capped")]
    figures = [f"{100 * value:.1f}" for value in (result["clean"], result["accuracy"]["pgd"], result["worst"])]
    caps = [f"{last['caps'][name]:.2g}" for name in ("mean", "max")]
    train = run.config["train"]
    cells = [
        run.path.name,
        f"{train['lr']:g}, caps {train['cap_lr']:g}",
        f"{last['steps']:,}",
        *caps,
        *shares,
        *figures,
    ]
    return f"| {' | '.join(cells)} | {result['verdict']['verdict']} |"


def _draw(curves: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (path, curve), style in zip(curves.items(), ("o-", "s--", "^:"), strict=False):
        train = Run.open(path).config["train"]
        steps, caps = zip(*((entry["steps"], entry["caps"]["mean"]) for entry in curve), strict=True)
        label = f"{Path(path).name}: caps from {train['cap'] or Options.cap:g}, at learning rate {train['cap_lr']:g}"
        axes.plot(steps, caps, style, markersize=4, markevery=max(1, len(steps) // 20), label=label)
    axes.set(xscale="log", yscale="log", xlabel="optimizer steps", ylabel="mean cap after each epoch")
    figure.legend(loc="outside upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_file(picture) as beside:
        figure.savefig(beside, format=picture.suffix[1:] or "png", dpi=150)


if __name__ == "__main__":
    tyro.cli(main)
