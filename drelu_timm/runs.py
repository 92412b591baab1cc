"""The run directory: what `train` writes once, and all that later stages read.

config.json   everything the run was made with: resolved flags, dataset, versions, hardware, command
log.jsonl     a line an epoch
state/        what `train --resume` goes on from
model/        the best epoch's model as a timm / Hugging Face folder, of the averaged weights if there are any
last/         the last epoch's
results/      an evaluation: a .json, a .csv, and the images that broke the model as .adversarial.safetensors
sweeps/       an evaluation at several radii: a .json, a .csv and a .png
"""

import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .digests import sha256_of
from .errors import InputError
from .files import read_json
from .models.inference import normalized
from .models.weights import WEIGHTS, load_folder


@dataclass(frozen=True)
class Run:
    """A run directory that exists.

    Attributes:
        path: The directory.
        config: What its config.json holds.
        weights: "model" for the best epoch's, "last" for the last one's.
    """

    path: Path
    config: dict[str, Any]
    weights: str = "model"

    @classmethod
    def open(cls, path: Path | str) -> "Run":
        """Read a run directory, or ``RUN/last`` for its last epoch's model.

        Raises:
            InputError: No such folder, no config.json in it, or a broken one.
        """
        path = Path(path)
        if path.name == "last" and (path.parent / "config.json").is_file():
            return replace(cls.open(path.parent), weights="last")
        config = path / "config.json"
        if not config.is_file():
            raise InputError(f"{path} is no run directory (it has no config.json); give a folder made by train")
        return cls(path, read_json(config))

    @property
    def model_folder(self) -> Path:
        """The trained model's timm / Hugging Face folder.

        Raises:
            InputError: The training has not ended yet.
        """
        folder = self.path / self.weights
        if not folder.is_dir():
            raise InputError(f"{self.path} has no trained model yet; end its training by train --resume")
        return folder

    @property
    def results_folder(self) -> Path:
        """Where evaluations of these weights lie."""
        return (self.path if self.weights == "model" else self.path / self.weights) / "results"

    @cached_property
    def model_digest(self) -> str:
        """sha256 of the weights file: what a result says it was measured on."""
        return sha256_of(self.model_folder / WEIGHTS)

    def load_model(self) -> nn.Module:
        """The trained model in eval mode; it takes [0, 1] images [B, C, H, W] and returns logits [B, K]."""
        return normalized(load_folder(self.model_folder)).eval()


def environment() -> dict[str, Any]:
    """Versions, hardware, command and git revision: what a figure has to be read with."""
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": _hardware(),
        "command": shlex.join(["drelu-timm", *sys.argv[1:]]),
        "git_revision": _git_revision(),
    }


def _versions() -> dict[str, str]:
    packages = ["drelu-timm", "torch", "timm", "accelerate", "pyautoattack", "foolbox", "robustbench"]
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} x {_processor()}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_revision() -> str | None:
    """The revision of the checkout this package runs from; None for an installed package."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
