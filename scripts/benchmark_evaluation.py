"""Benchmark AutoAttack standard in drelu_timm and in pyautoattack's own driver, on the same model and images.

    python scripts/benchmark_evaluation.py RUN --n-examples 256
    python scripts/benchmark_evaluation.py RUN --rows original standard      # only these rows

RUN is the argument of `drelu-timm evaluate`; the row "processes" needs a run directory. A small CNN takes a minute:

    drelu-timm train --model shallow_cnn_drelu --activation relu --dataset cifar10 --data-dir DATA --objective at \
        --steps 1 --epochs 3 --n-train 10000 --output-dir runs/small

Rows, each on all threads (set OMP_NUM_THREADS to change their number):

    original        pyautoattack.AutoAttack.run_standard_evaluation, the reference for the others
    original again  the same with another seed: two runs of the original differ by a few examples
    standard        the four attacks of the suite "standard", driven by drelu_timm in float32
    bfloat16        the same, searching in bfloat16 and judging in float32
    quick           the complete suite "quick", with the probes for the verdict
    processes       `drelu-timm evaluate` by one process of one thread, then by two

Each row is appended to a file of JSON lines once it is measured, and is not measured again: a benchmark that was
stopped resumes with the missing rows.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from pyautoattack import AutoAttack
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from drelu_timm.attacks.suites import find_suite
from drelu_timm.attacks.threat_model import ThreatModel
from drelu_timm.data.datasets import DATASETS
from drelu_timm.data.images import to_float
from drelu_timm.data.readers import load_images
from drelu_timm.errors import InputError
from drelu_timm.evaluation.checkpoint import Checkpoint
from drelu_timm.evaluation.driver import Driver
from drelu_timm.evaluation.evaluation import evaluate_model
from drelu_timm.evaluation.named_model import find_model
from drelu_timm.models.inference import channels_last, frozen
from drelu_timm.runs import environment

Row = Literal["original", "original again", "standard", "bfloat16", "quick", "processes"]
ALL: tuple[Row, ...] = ("original", "original again", "standard", "bfloat16", "quick", "processes")


@dataclass(frozen=True)
class BenchmarkConfig:
    """Measure the speed of the evaluation relative to AutoAttack's own driver, and whether they agree."""

    run: tyro.conf.Positional[str]
    """Run directory, or the name of a timm or RobustBench model."""
    rows: tuple[Row, ...] = ALL
    """Rows to measure, in this order."""
    norm: str = "Linf"
    """Linf or L2."""
    eps: str = "8/255"
    """Radius in units of a [0, 1] pixel."""
    n_examples: int = 256
    """Maximum number of test images, from the first."""
    batch_size: int = 128
    """Images per pass, the same for all rows."""
    seed: int = 0
    """Seed of all randomness; the second run of the original uses the next one."""
    dataset: str | None = None
    """Dataset whose test set is attacked; by default the run's."""
    data_dir: Path | None = None
    """Folder of the dataset; by default the run's."""
    output: Path = Path("benchmark_evaluation.jsonl")
    """File for the rows."""


@dataclass(frozen=True)
class Subjects:
    """Model and images that every row attacks.

    Attributes:
        model: In eval mode.
        images: Float [N, C, H, W] in [0, 1], on the model's device.
        labels: [N].
        threat_model: Norm and eps.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    threat_model: ThreatModel


def load(config: BenchmarkConfig) -> Subjects:
    """Load the model, on the fastest device, and the images."""
    named = find_model("RUN", config.run, dataset=config.dataset, norm=config.norm)
    dataset = config.dataset or named.defaults.get("dataset")
    if dataset not in DATASETS:
        raise InputError(f"--dataset {dataset!r} is not a dataset. Allowed: {', '.join(DATASETS)}")
    data_dir = config.data_dir or named.defaults.get("data_dir")
    images = load_images(dataset, data_dir, "test", img_size=named.img_size, in_chans=named.in_chans)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = images[: config.n_examples].to(device)
    threat_model = ThreatModel.parse(config.norm, config.eps)
    return Subjects(named.load().eval().to(device), to_float(images.images), images.labels, threat_model)


def original(config: BenchmarkConfig, subjects: Subjects, seed: int) -> dict[str, Any]:
    """Measure pyautoattack's driver, and the seconds of each of its attacks."""
    model, images, labels, ball = subjects.model, subjects.images, subjects.labels, subjects.threat_model
    attack = AutoAttack(model, norm=ball.norm, eps=ball.eps, seed=seed, device=images.device)
    seconds: dict[str, float] = {}
    singles = {"apgd-ce": attack.apgd, "apgd-t": attack.apgd_targeted, "fab-t": attack.fab, "square": attack.square}
    for name, single in singles.items():
        single.perturb = partial(timed, seconds, name, single.perturb)
    started = time.monotonic()
    adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=config.batch_size)
    total = time.monotonic() - started
    robust = right(model, images, labels, config.batch_size) & right(model, adversarial, labels, config.batch_size)
    return {"seconds": total, "robust": robust.int().tolist(), "by_attack": seconds}


def timed(seconds: dict[str, float], name: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a call, and add its seconds under its name."""
    started = time.monotonic()
    result = call(*arguments)
    seconds[name] = seconds.get(name, 0.0) + time.monotonic() - started
    return result


def standard(config: BenchmarkConfig, subjects: Subjects, search_dtype: torch.dtype) -> dict[str, Any]:
    """Measure the same four attacks in our driver."""
    model, images, labels = subjects.model, subjects.images, subjects.labels
    seconds: dict[str, float] = {}
    started = time.monotonic()
    with frozen(model), channels_last(model):
        balls, memory = [subjects.threat_model], Checkpoint(len(labels))
        driver = Driver(model, images, labels.cpu(), balls, config.seed, config.batch_size, memory, search_dtype)
        left = right(model, images, labels, config.batch_size).long()
        with torch.no_grad():
            num_classes = model(images[:1]).shape[1]
        for name, attack in find_suite("autoattack", num_classes)["autoattack"].items():
            outcome = timed(seconds, name, driver.attack, name, attack, left)
            left = torch.minimum(left, outcome.broken_at)
    return {"seconds": time.monotonic() - started, "robust": left.tolist(), "by_attack": seconds}


def quick(config: BenchmarkConfig, subjects: Subjects) -> dict[str, Any]:
    """Measure the suite quick, with its verdict."""
    evaluation = evaluate_model(
        subjects.model,
        subjects.images,
        subjects.labels,
        norm=config.norm,
        eps=config.eps,
        suite="quick",
        seed=config.seed,
        batch_size=config.batch_size,
    )
    return {
        "seconds": evaluation.seconds,
        "robust": evaluation.survivors.int().tolist(),
        "verdict": str(evaluation.verdict),
    }


def processes(config: BenchmarkConfig) -> dict[str, Any]:
    """Measure one process of one thread, then two, on copies of the run without results."""
    alone, together = (launch(config, count) for count in (1, 2))
    return together | {"seconds_alone": alone["seconds"]}


def launch(config: BenchmarkConfig, count: int) -> dict[str, Any]:
    """Run `drelu-timm evaluate` in several processes and return its seconds, without the start of Python."""
    command = ["torchrun", "--standalone", "--nproc_per_node", str(count)]
    flags = {
        "--suite": "autoattack",
        "--norm": config.norm,
        "--eps": config.eps,
        "--n-examples": config.n_examples,
        "--batch-size": config.batch_size,
        "--seed": config.seed,
        "--dataset": config.dataset,
        "--data-dir": config.data_dir,
    }
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        shutil.copytree(config.run, run, ignore=shutil.ignore_patterns("results", "sweeps", "state"))
        command += ["-m", "drelu_timm", "evaluate", str(run)]
        command += [str(part) for flag, value in flags.items() if value is not None for part in (flag, value)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        (path,) = (run / "results").glob("*.json")
        with path.with_suffix(".csv").open() as file:
            robust = [int(row["autoattack"]) for row in csv.DictReader(file)]
        return {"seconds": json.loads(path.read_text())["seconds"], "robust": robust}


@torch.no_grad()
def right(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    """Return on which images [N, C, H, W] the model predicts the label [N], on the CPU."""
    batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return torch.cat([model(batch).argmax(dim=1) == batch_labels for batch, batch_labels in batches]).cpu()


def measured(config: BenchmarkConfig) -> dict[str, dict[str, Any]]:
    """Return the rows in the file for this config, by name."""
    lines = config.output.read_text().splitlines() if config.output.exists() else []
    records = [json.loads(line) for line in lines]
    return {record["row"]: record for record in records if record["config"] == identity(config)}


def identity(config: BenchmarkConfig) -> dict[str, Any]:
    """Return what rows must have in common to be compared."""
    return {name: str(value) for name, value in asdict(config).items() if name not in ("rows", "output")} | {
        "threads": str(torch.get_num_threads())
    }


def show(records: dict[str, dict[str, Any]]) -> None:
    """Return a table of all rows, with the examples on which they differ from the original, and the time per attack."""
    console = Console()
    reference = records.get("original")
    table = Table("row", "seconds", "times as fast", "robust", "differing")
    for name, record in records.items():
        faster, differing = "", ""
        if reference:
            faster = f"{reference['seconds'] / record['seconds']:.2f}"
            differing = str(sum(a != b for a, b in zip(record["robust"], reference["robust"], strict=True)))
        if "seconds_alone" in record:
            faster = f"{record['seconds_alone'] / record['seconds']:.2f} x one"
        accuracy = f"{100 * sum(record['robust']) / len(record['robust']):.1f} %"
        table.add_row(name, f"{record['seconds']:.1f}", faster, accuracy, differing)
    console.print(table)
    shares = {name: record["by_attack"] for name, record in records.items() if "by_attack" in record}
    table = Table("seconds by attack", *shares)
    for attack in ("apgd-ce", "apgd-t", "fab-t", "square"):
        table.add_row(attack, *(f"{seconds.get(attack, 0.0):.1f}" for seconds in shares.values()))
    console.print(table)


def main(config: BenchmarkConfig) -> None:
    """Measure the rows that are not in the file yet, and print all rows."""
    if "processes" in config.rows and not (Path(config.run) / "config.json").is_file():
        raise InputError(
            f"RUN {config.run!r} is not a run directory, which the row processes needs. Leave it out of --rows."
        )
    subjects = load(config)
    measure: dict[Row, Callable[[], dict[str, Any]]] = {
        "original": lambda: original(config, subjects, config.seed),
        "original again": lambda: original(config, subjects, config.seed + 1),
        "standard": lambda: standard(config, subjects, torch.float32),
        "bfloat16": lambda: standard(config, subjects, torch.bfloat16),
        "quick": lambda: quick(config, subjects),
        "processes": lambda: processes(config),
    }
    here = environment()
    print(f"{here['hardware']}, {torch.get_num_threads()} threads, {here['versions']}")
    records = measured(config)
    for row in config.rows:
        if row in records:
            continue
        print(f"measuring {row}", flush=True)
        records[row] = {"row": row, "config": identity(config), **measure[row](), **here}
        with config.output.open("a") as file:
            file.write(json.dumps(records[row]) + "\n")
    show(records)


if __name__ == "__main__":
    try:
        main(tyro.cli(BenchmarkConfig, description=__doc__))
    except InputError as error:
        sys.exit(str(error))
