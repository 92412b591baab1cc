"""Configs of the verbs: one frozen dataclass each, with one field per flag.

This module imports neither torch nor timm, so that help and errors in flags appear at once. The configs of train and
evaluate are in `training.config` and `evaluation.config`.
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
    """Train, attack and export three models on scikit-learn's digits, in under two minutes on two cores."""

    output_dir: Path = Path("runs/demo")
    """Folder for the runs, the figure and the exported model. A demo that was stopped resumes."""


@dataclass(frozen=True)
class ExportConfig:
    """Write an evaluated run as a RobustBench entry, a timm / Hugging Face folder, a model card and a recipe."""

    run: tyro.conf.Positional[Path]
    """Run directory that was evaluated with AutoAttack (--suite standard)."""
    key: str
    """RobustBench's name of the model: authors, year, first word of the title, and a suffix for each of its models."""
    dataset: str | None = None
    """RobustBench's name of the dataset, for a run on a folder of its images: imagenet."""
    norm: str | None = None
    """Norm of the entry, Linf or L2; by default the training's."""
    eps: str | None = None
    """Radius of the entry, such as 8/255; by default the training's."""
    results: str | None = None
    """Name of the evaluation; by default, of those at that norm and eps, one with AutoAttack and the most examples."""
    n_examples: int | None = None
    """Refuse an evaluation of fewer test images than this."""
    seeds: tuple[Path, ...] = ()
    """Runs that differ only in their seed, with the same evaluation; the card shows mean and standard deviation."""
    output_dir: Path | None = None
    """Folder to write, which must not exist; by default RUN/export/KEY."""
    data_dir: Path | None = None
    """Folder of the dataset; by default the one that the training used."""
    benchmark_examples: int = 32
    """Test images on which RobustBench's own benchmark is run for comparison; 0 for none."""
    as_masked: bool = False
    """Export a model whose gradients are masked: marked as unreliable, and ranked by its worst case."""
    push: str | None = None
    """Upload hub/ to this repository of the Hugging Face Hub, ORG/NAME; without a token, only list the files."""

    paper: Path | None = None
    """TOML file with title, authors, link and venue. The four flags below take precedence."""
    title: str | None = None
    """Title of the paper about the model."""
    authors: str | None = None
    """Authors of the paper, separated by commas."""
    link: str | None = None
    """Link to the paper."""
    venue: str | None = None
    """Venue of the paper, such as "ICLR 2026", "arXiv, Mar 2026" or "N/A"."""


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
    """Generated images, for grids that use them: .npz files, as for train."""
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
    """Write tables with worst case and masking verdict, statistics and figures of evaluated runs, from result files."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, or folders that contain them at any depth. Runs that differ only in their seed are averaged."""
    output_dir: Path | None = None
    """Folder of the report; by default report/ in the first of RUNS. An earlier report there is replaced."""
    against_paper: bool = False
    """Show next to every number the one that the D-ReLU paper prints, with the difference."""


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
