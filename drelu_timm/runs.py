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
from dataclasses import dataclass, field, replace
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
from .schema import Count, Text, field_types, load, parse
from .training.config import TrainConfig

_REQUIRED_SETTINGS = ("model", "dataset", "norm", "eps", "seed", "objective", "monitor")
_PACKAGES = ("drelu-timm", "torch", "timm", "accelerate", "pyautoattack", "foolbox", "robustbench")


@dataclass(frozen=True)
class _Config:
    """Schema of config.json, without the settings in ``train``, which `TrainConfig` describes."""

    train: dict[str, Any]
    in_chans: Count
    img_size: Count
    num_classes: Count | None = None
    dataset_title: Text | None = None
    classes: tuple[str, ...] = ()
    launch: dict[str, Any] = field(default_factory=dict)
    generated: dict[str, Any] | None = None
    init_from: dict[str, Any] | None = None
    init_from_digest: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str = ""
    command: str = ""
    git_revision: str | None = None


def read_config(path: Path) -> dict[str, Any]:
    """Read a run's config.json and check the types of its fields. Fields of other versions are ignored.

    Raises:
        InputError: The file is missing or is cut short, a field that every verb needs is missing, or a field has
            another type. The line names the file and the field.
    """
    content = read_json(path)
    config = load(_Config, content, path)
    types = field_types(TrainConfig)
    if missing := [name for name in _REQUIRED_SETTINGS if config.train.get(name) is None]:
        raise InputError(f"{path}: train has no {', '.join(missing)}. Restore the file, or train again.")
    for name in types.keys() & config.train.keys():
        parse(types[name], config.train[name], f"{path}: train.{name}")
    return content


@dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
        path: The directory.
        config: Content of its config.json.
        weights: "model" for the weights of the best epoch, "last" for the last epoch.
    """

    path: Path
    config: dict[str, Any]
    weights: str = "model"

    @classmethod
    def open(cls, path: Path | str) -> "Run":
        """Open a run directory, or ``RUN/last`` for the model of its last epoch.

        Raises:
            InputError: The folder has no config.json, or `read_config` refuses it.
        """
        path = Path(path)
        if path.name == "last" and (path.parent / "config.json").is_file():
            return replace(cls.open(path.parent), weights="last")
        config = path / "config.json"
        if not config.is_file():
            raise InputError(f"{path} is not a run directory (it has no config.json). Use a folder written by train.")
        return cls(path, read_config(config))

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
