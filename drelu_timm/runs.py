"""The run directory, which `train` writes and all other verbs read.

config.json   resolved flags, dataset, versions, hardware, command
log.jsonl     one line per epoch
state/        checkpoints, from which `train --resume` continues
model/        model of the best epoch as a timm / Hugging Face folder; the averaged weights if there are any
last/         the same for the last epoch
results/      evaluations at one eps: .json, .csv, and the adversarial images as .adversarial.safetensors
sweeps/       evaluations at several eps: .json, .csv and .png
"""

import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .doctor import installed_version
from .errors import InputError
from .files import read_json
from .hashing import sha256_of
from .models.inference import normalized
from .models.weights import WEIGHTS, load_folder

_PACKAGES = ("drelu-timm", "torch", "timm", "accelerate", "pyautoattack", "foolbox", "robustbench")


@dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
        path: The directory.
        config: Content of its config.json.
        weights: "model" for the weights of the best epoch, "last" for those of the last epoch.
    """

    path: Path
    config: dict[str, Any]
    weights: str = "model"

    @classmethod
    def open(cls, path: Path | str) -> "Run":
        """Open a run directory, or ``RUN/last`` for the model of its last epoch.

        Raises:
            InputError: There is no config.json in the folder, or it cannot be read.
        """
        path = Path(path)
        if path.name == "last" and (path.parent / "config.json").is_file():
            return replace(cls.open(path.parent), weights="last")
        config = path / "config.json"
        if not config.is_file():
            raise InputError(f"{path} is not a run directory (it has no config.json). Use a folder written by train.")
        return cls(path, read_json(config))

    @property
    def model_folder(self) -> Path:
        """The timm / Hugging Face folder of the trained model.

        Raises:
            InputError: The training has not ended.
        """
        folder = self.path / self.weights
        if not folder.is_dir():
            raise InputError(f"{self.path} has no trained model yet. Finish its training with train --resume.")
        return folder

    @property
    def results_folder(self) -> Path:
        """Folder of the evaluations of these weights."""
        return (self.path if self.weights == "model" else self.path / self.weights) / "results"

    @cached_property
    def model_digest(self) -> str:
        """SHA-256 of the weights file; results state the one of the weights that they are for."""
        return sha256_of(self.model_folder / WEIGHTS)

    def load_model(self) -> nn.Module:
        """Return the trained model in eval mode; it takes images [B, C, H, W] in [0, 1] and returns logits [B, K]."""
        return normalized(load_folder(self.model_folder)).eval()


def environment() -> dict[str, Any]:
    """Return the versions, hardware, command and git revision, as they are stored with every result."""
    versions = {package: version for package in _PACKAGES if (version := installed_version(package))}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "hardware": _hardware(),
        "command": shlex.join(["drelu-timm", *sys.argv[1:]]),
        "git_revision": _git_revision(),
    }


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} x {_processor()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _git_revision() -> str | None:
    """Return the revision of the checkout that this package runs from; None for an installed package."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
