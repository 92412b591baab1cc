"""Synthetic run directories with the files of train and evaluate, without training and without weights."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TRAIN = {
    "model": "dense_drelu",
    "dataset": "mnist",
    "data_dir": "data",
    "generated": [],
    "generated_fraction": 0.0,
    "init_from": None,
    "preset": None,
    "objective": "natural",
    "beta": 6.0,
    "awp_gamma": 0.0,
    "norm": "Linf",
    "eps": "0.1",
    "placement": None,
    "activation": None,
    "cap_weight": 0.1,
    "cap_penalty": "squared",
    "cap_lr": 0.1,
    "epochs": 10,
    "seed": 0,
}
TITLES = {"mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "digits": "Digits"}
RELU = {"activation": "relu", "cap_weight": 0.0}
ATTACKS = {"fgsm": 0.93, "pgd": 0.9, "apgd-ce": 0.89, "apgd-dlr": 0.88, "cw-l2": 0.95, "square": 0.85}


def write_run(
    path: Path,
    *,
    held_out: float | None = 0.5,
    start: dict[str, Any] | None = None,
    digest: str | None = None,
    **train: Any,
) -> Path:
    """Write config.json and log.jsonl; ``start`` are flags of the run it started from, ``digest`` is of its images."""
    path.mkdir(parents=True)
    train = TRAIN | train
    config = {"train": train, "dataset_title": TITLES[train["dataset"]]}
    if digest is not None:
        config["generated"] = {"images": 10, "digest": digest}
    if start is not None:
        config["init_from"] = {"run": "runs/start", "train": TRAIN | start}
    write_json(path / "config.json", config)
    if held_out is not None:
        epochs = [{"epoch": 1, "held_out": {"pgd": 0.0}}, {"epoch": 2, "held_out": {"pgd": held_out}, "best_epoch": 2}]
        (path / "log.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
    return path


def write_result(
    run: Path,
    *,
    suite: str = "paper",
    accuracy: dict[str, float] | None = None,
    worst: float | None = None,
    verdict: str = "sound",
    n_examples: int = 20,
    rows: bool = True,
    **result: Any,
) -> Path:
    """Write results/<suite>-Linf-<eps>.json of a run, and its rows per example.

    By default the worst case is 0.8, or the lowest accuracy.
    """
    if worst is None:
        worst = min([0.8, *(accuracy or {}).values()])
    train = json.loads((run / "config.json").read_text())["train"]
    content = {
        **about(train, suite, n_examples),
        **point(accuracy=ATTACKS if accuracy is None else accuracy, worst=worst, verdict=verdict),
        **result,
    }
    path = run / "results" / f"{suite}-Linf-{content['eps'].replace('/', '_')}.json"
    write_json(path, content)
    if rows:
        survivors = round(worst * n_examples)
        write_rows(path.with_suffix(".csv"), ["" if index < survivors else "pgd" for index in range(n_examples)])
    return path


def write_sweep(run: Path, points: Sequence[dict[str, Any]], n_examples: int = 10, suite: str = "quick") -> Path:
    """Write sweeps/<suite>-Linf.json of a run, from the smallest eps, and its rows per example."""
    train = json.loads((run / "config.json").read_text())["train"]
    content = {
        **about(train, suite, n_examples),
        "eps": [at["eps"] for at in points],
        "curve": points,
    }
    path = run / "sweeps" / f"{suite}-Linf.json"
    write_json(path, content)
    broken_at = [
        next((at["eps"] for at in points if index >= round(at.get("worst", 1) * n_examples)), "")
        for index in range(n_examples)
    ]
    write_columns(path.with_suffix(".csv"), {**examples(n_examples), "worst": broken_at})
    return path


def about(train: dict[str, Any], suite: str, n_examples: int) -> dict[str, Any]:
    """Return the fields of a result file that do not depend on eps."""
    return {
        "model": train["model"],
        "dataset": train["dataset"],
        "dataset_title": TITLES[train["dataset"]],
        "norm": "Linf",
        "suite": suite,
        "n_examples": n_examples,
        "seed": 0,
        "precision": "float32",
        "transfer_from": None,
        "model_digest": "0" * 64,
        "hardware": "2 x Processor",
        "versions": {"drelu-timm": "0.1.0", "torch": "2.0.0"},
        "git_revision": None,
    }


def point(
    *, eps: str = "0.1", clean: float = 0.95, accuracy: dict[str, float] = ATTACKS, worst: float, verdict: str = "sound"
) -> dict[str, Any]:
    """Return the fields of a result file at one eps; only a given accuracy is below the worst case."""
    if accuracy is ATTACKS:
        accuracy = {attack: max(value, worst) for attack, value in ATTACKS.items()}
    return {
        "eps": eps,
        "clean": max(clean, worst),
        "accuracy": accuracy,
        "worst": worst,
        "settings": {attack: {"steps": 40} for attack in accuracy},
        "sequences": {},
        "zero_gradient_share": 0.0,
        "cw_l2": {"median_l2": 1.0, "budget": 2.8, "accuracy_at_budget": 0.3} if "cw-l2" in accuracy else None,
        "verdict": {"verdict": verdict, "evidence": [], "numbers": {}},
        "seconds": 1.0,
    }


def write_rows(path: Path, broken_by: Sequence[str]) -> None:
    """Write the rows per example next to a result."""
    write_columns(path, {**examples(len(broken_by)), "broken_by": broken_by})


def examples(n: int) -> dict[str, Sequence[Any]]:
    """Return the columns that all rows have."""
    return {"index": range(n), "label": [0] * n, "clean_prediction": [0] * n}


def write_columns(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([tuple(columns), *zip(*columns.values(), strict=True)])


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
