"""Compare the paper's penalty on the caps with a scale-free one, for three training objectives.

    python scripts/cap_penalties.py --data-dir data --output-dir runs/cap-penalties

trains the dense model on MNIST (first 20,000 images, 10 epochs, 5 steps of the inner attack, Linf 0.1) once per row,
evaluates it (quick suite, first 1,000 test images), and prints a Markdown table. Finished runs are not repeated.
"""

import json
from itertools import product
from pathlib import Path
from typing import Any

import tyro

from drelu_timm.evaluate import evaluate
from drelu_timm.evaluation.config import EvaluateConfig
from drelu_timm.results.result import read_result
from drelu_timm.runs import Run, environment
from drelu_timm.train import train
from drelu_timm.training.config import TrainConfig

PENALTIES = [
    ("squared", 0.0),
    ("squared", 1e-2),
    ("squared", 1e-1),
    ("effective", 1e-3),
    ("effective", 1e-2),
    ("effective", 1e-1),
]
COLUMNS = (
    "mean cap",
    "largest",
    "mean effective",
    "active",
    "zero gradients",
    "clean",
    "APGD",
    "BPDA",
    "worst",
    "verdict",
)


def main(data_dir: Path = Path("data"), output_dir: Path = Path("runs/cap-penalties"), seed: int = 0) -> None:
    """Train, evaluate and print a table.

    Args:
        data_dir: Folder of MNIST; it is downloaded if missing.
        output_dir: Folder for one run directory per row.
        seed: Seed of training and attacks.
    """
    rows = [f"| trained | penalty | weight | {' | '.join(COLUMNS)} |"]
    rows.append(f"| --- | --- | ---: |{' ---: |' * (len(COLUMNS) - 1)} --- |")
    for objective, (penalty, weight) in product(("natural", "at", "trades"), PENALTIES):
        run = _trained(objective, penalty, weight, data_dir, output_dir, seed)
        name = penalty if weight else "none"
        rows.append(f"| {objective} | {name} | {weight:g} | {' | '.join(_cells(run))} |")
    facts = environment()
    print("\n".join(rows))
    print(f"\n{facts['hardware']}, torch {facts['versions']['torch']}, timm {facts['versions']['timm']}, seed {seed}")


def _trained(objective: str, penalty: str, weight: float, data_dir: Path, output_dir: Path, seed: int) -> Run:
    config = TrainConfig(
        "dense_drelu",
        "mnist",
        data_dir,
        output_dir=output_dir / f"{objective}-{penalty}-{weight:g}-seed{seed}",
        resume=True,
        objective=objective,
        cap_penalty=penalty,
        cap_weight=weight,
        cap_lr=1.0,
        steps=5,
        n_train=20000,
        seed=seed,
    )
    run = Run.open(train(config))
    if not run.results_folder.exists():
        evaluate(EvaluateConfig(run=str(run.path), n_examples=1000, seed=seed))
    return run


def _cells(run: Run) -> list[str]:
    entries = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    best = entries[entries[-1]["best_epoch"] - 1]
    (path,) = run.results_folder.glob("*.json")
    point = read_result(path).point
    head: Any = run.load_model().model.fc
    effective = (head.activation.cap * head.output.weight.norm(dim=0)).mean().item()
    shares = [best["units"]["active"], point.zero_gradient_share, point.clean]
    shares += [point.accuracy["apgd"], point.accuracy["bpda"], point.worst]
    caps = [best["caps"]["mean"], best["caps"]["max"], effective]
    return [*(f"{cap:.3g}" for cap in caps), *(f"{100 * share:.1f}" for share in shares), point.verdict.verdict]


if __name__ == "__main__":
    tyro.cli(main)
