"""Flags of every verb, and how a command line becomes the config that the verb's ``main`` takes.

Nothing here imports torch or timm, so that a help or a mistyped flag is answered at once. The flags of train and
evaluate are in `training.config` and `evaluation.config`, as these packages work with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from .command_line import read_flags
from .evaluation.config import EvaluateConfig
from .training.config import TrainConfig
from .training.trainings import read_trainings


@dataclass(frozen=True)
class DemoConfig:
    """Train, attack and export three nets on scikit-learn's digits, in under two minutes on two cores."""

    output_dir: Path = Path("runs/demo")
    """Folder for the runs, the picture and the exported model; a demo that was stopped goes on where it was."""


@dataclass(frozen=True)
class ExportConfig:
    """Turn an evaluated run into RobustBench's entry, a timm / Hugging Face folder, a model card and a recipe."""

    run: tyro.conf.Positional[Path]
    """Run directory, evaluated by a suite that holds AutoAttack (--suite standard)."""
    key: str
    """RobustBench's name of the model: authors, year, first word of the title, and what tells its models apart."""
    dataset: str | None = None
    """RobustBench's name of the dataset, for a run on a folder of its images: imagenet."""
    norm: str | None = None
    """Norm of the entry, Linf or L2; by default the training's."""
    eps: str | None = None
    """Radius of the entry, such as 8/255; by default the training's."""
    results: str | None = None
    """Name of the evaluation; by default the one with AutoAttack, then most examples and attacks, at that norm, eps."""
    n_examples: int | None = None
    """Refuse an evaluation of fewer test images than this."""
    seeds: tuple[Path, ...] = ()
    """Runs that differ by their seed only, evaluated likewise; the card tells the spread."""
    output_dir: Path | None = None
    """Folder to write, which must not be there yet; by default RUN/export/KEY."""
    data_dir: Path | None = None
    """Where the dataset lies; by default where training found it."""
    benchmark_examples: int = 32
    """Test images on which RobustBench's own benchmark is run for comparison; 0 for none."""
    as_masked: bool = False
    """Export a model whose gradients are masked: as unreliable, ranked by its worst case."""
    push: str | None = None
    """Upload hub/ to this repository of the Hugging Face Hub, ORG/NAME; without a token only say what would be."""

    paper: Path | None = None
    """TOML file with title, authors, link and venue, in the place of the four flags below; flags win."""
    title: str | None = None
    """Title of the paper about the model."""
    authors: str | None = None
    """Its authors, separated by commas."""
    link: str | None = None
    """Where to read it."""
    venue: str | None = None
    """Where it was published, such as "ICLR 2026", "arXiv, Mar 2026" or "N/A"."""


@dataclass(frozen=True)
class SweepConfig:
    """Train and evaluate every cell of a grid: the paper's tables and figures, or your own."""

    grid: tyro.conf.Positional[str]
    """A TOML file, or the name of a grid that comes with the package:
    paper-mnist, paper-cifar10, paper-cifar100, paper-tiny-imagenet,
    paper-edm-cifar10, paper-edm-cifar100, paper-edm-tiny-imagenet, paper-placement, paper-eps, activations.
    With -smoke appended, a version that takes minutes on two cores."""
    output_dir: Path | None = None
    """Folder for the run directories; by default runs/ and the grid's name."""
    data_dir: Path = Path("data")
    """Folder of the datasets; MNIST and CIFAR are downloaded to it."""
    generated: tuple[Path, ...] = ()
    """Generated images, for grids that use some: .npz files, as for train."""
    jobs: int | None = None
    """Number of cells that run at once on this machine; by default 1."""
    dry_run: bool = False
    """Print the cells with their cost and their commands, and write nothing."""
    num_processes: int = 1
    """Processes per cell, one GPU each; several are started by accelerate launch."""
    mixed_precision: str = "no"
    """no or bf16, for accelerate launch."""
    cluster: str = ""
    """slurm: one job per cell, through submitit; by default the cells run on this machine."""
    partition: str = ""
    """With --cluster slurm: the partition. Other options of sbatch are read from the environment (SBATCH_ACCOUNT)."""
    hours: float | None = None
    """With --cluster slurm: time limit of a job, which is then queued again and resumes; by default 24."""


@dataclass(frozen=True)
class ReportConfig:
    """Tables with worst case and masking verdict, statistics and figures of evaluated runs, from result files only."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, or folders that hold them at any depth. Runs that differ in their seed only are averaged."""
    output_dir: Path | None = None
    """Where the report goes; by default report/ in the first of RUNS. An earlier report there is replaced."""
    against_paper: bool = False
    """Set every number beside the one that the D-ReLU paper prints, with the difference."""


CONFIGS: dict[str, type] = {
    "demo": DemoConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "sweep": SweepConfig,
    "report": ReportConfig,
}


def read(verb: str, argv: Sequence[str]) -> Any:
    """Return the config that the flags of a verb give, for train one or several; ``--help`` prints them and exits.

    Args:
        verb: In `CONFIGS`.
        argv: What follows the verb.

    Raises:
        InputError: An unknown flag, or for train a preset or a file of settings that cannot be used.
    """
    return read_trainings(argv) if verb == "train" else read_flags(CONFIGS[verb], verb, argv)
