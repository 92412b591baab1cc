"""Training as users start it, in processes of its own."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from safetensors.torch import load_file

from drelu_timm.training.config import TrainConfig

# Where trainings are compared weight by weight. Adam makes whole steps even of gradients that are nothing but rounding,
# which every processor does in its own way, and none of a wrong factor of the gradient.
SGD = {"optimizer": "sgd", "lr": 0.05}
SMALL = {"n_train": 256, "batch_size": 32, "epochs": 2, "steps": 2, "width": 16}


def config(path: Path, **settings) -> TrainConfig:
    """A training on digits that takes a second."""
    return TrainConfig(**{"model": "dense_drelu", "dataset": "digits", "output_dir": path, **SMALL, **settings})


def log(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def weights(path: Path, folder: str = "model") -> dict[str, torch.Tensor]:
    return load_file(path / folder / "model.safetensors")


def assert_same_weights(one: Path, other: Path, folder: str = "model") -> None:
    """The same weights up to the rounding of sums, which are taken in another order by several processes."""
    torch.testing.assert_close(weights(other, folder), weights(one, folder), rtol=1e-5, atol=1e-5)


def image_folder(path: Path) -> dict:
    """Settings for two classes of coloured images, written as files, 40 to train on and 40 to test on."""
    colours = np.random.default_rng(0).integers(0, 156, (2, 2, 20, 8, 8, 3), dtype=np.uint8)
    for split, classes in zip(("train", "test"), colours, strict=True):
        for shade, (name, images) in enumerate(zip("ab", classes, strict=True)):
            (path / split / name).mkdir(parents=True)
            for i, image in enumerate(images):
                Image.fromarray(image + np.uint8(100 * shade)).save(path / split / name / f"{i}.png")
    return {"dataset": "folder", "data_dir": path, "img_size": 8, "batch_size": 8, "n_train": None}


def flags(settings: TrainConfig) -> list[str]:
    """The command line of a config."""
    parts = []
    for name, value in vars(settings).items():
        if value is True:
            parts.append(f"--{name}")
        elif value not in (None, False, "", ()):
            parts += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return parts


def launch(
    *arguments: str, processes: int = 1, program: Sequence[str] = ("-m", "drelu_timm"), **options
) -> subprocess.Popen:
    """Start `drelu-timm`; several processes by torch.distributed.run, which `accelerate launch` calls too."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), *program, *arguments]
    # As many threads as here, where weights are compared to the bit: sums depend on it.
    threads = torch.get_num_threads() if processes == 1 else 1
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **options.pop("environment", {})}
    return subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )


def kill_with_workers(pid: int) -> None:
    """SIGKILL to a process and all that it has started; a launcher's workers have sessions of their own."""
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
