"""Trainings that tests start in separate processes."""

import atexit
import contextlib
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path

import numpy as np
import psutil
import torch
from held import hold_first_process
from PIL import Image
from safetensors.torch import load_file
from torch.distributed import TCPStore

from drelu_timm.training.config import TrainConfig

# For trainings that are compared weight by weight. Adam takes full steps even for gradients that are nothing but
# rounding errors, which differ between processors, and its steps hide a wrong factor of the gradient.
SGD = {"optimizer": "sgd", "lr": 0.05}
# The server of `Launched`: the start of a process costs 4 s, nearly all of it for these imports.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["drelu_timm.train", "drelu_timm.evaluate", "drelu_timm.export", "sklearn.datasets"])
# A step of a training, as an event at which to hold it.
STEP = "accelerate.optimizer:AcceleratedOptimizer.step"
SMALL = {"n_train": 256, "batch_size": 32, "epochs": 2, "steps": 2, "width": 16}


def config(path: Path, **settings) -> TrainConfig:
    """A training on digits that takes a second."""
    return TrainConfig(**{"model": "dense_drelu", "dataset": "digits", "output_dir": path, **SMALL, **settings})


def log(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def weights(path: Path, folder: str = "model") -> dict[str, torch.Tensor]:
    return load_file(path / folder / "model.safetensors")


def assert_same_weights(one: Path, other: Path, folder: str = "model") -> None:
    """Check that weights are equal up to the rounding of sums, whose order depends on the number of processes."""
    torch.testing.assert_close(weights(other, folder), weights(one, folder), rtol=1e-5, atol=1e-5)


def image_folder(path: Path) -> dict:
    """Write images of two classes, 40 for training and 40 for testing; return the settings that read them."""
    pixels = np.random.default_rng(0).integers(0, 156, (2, 2, 20, 8, 8, 3), dtype=np.uint8)
    for split, classes in zip(("train", "test"), pixels, strict=True):
        for shade, (name, images) in enumerate(zip("ab", classes, strict=True)):
            (path / split / name).mkdir(parents=True)
            for i, image in enumerate(images):
                Image.fromarray(image + np.uint8(100 * shade)).save(path / split / name / f"{i}.png")
    return {"dataset": "folder", "data_dir": path, "img_size": 8, "batch_size": 8, "n_train": None}


def flags(settings: TrainConfig) -> list[str]:
    """Return the command line of a config."""
    parts = []
    for name, value in vars(settings).items():
        if value is True:
            parts.append(f"--{name}")
        elif value not in (None, False, "", ()):
            parts += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return parts


class Launched:
    """Processes of one launch, forked from a server that has imported torch; used as `subprocess.Popen` is.

    Each runs a module as `python -m` does, with the environment and folder of this process, in its own session. Several
    of them are one launch of torch.distributed: if one fails, the others are killed, as the launcher does.

    Args:
        arguments: Of the command line.
        processes: Their number.
        program: Name of the module.
        environment: Variables in addition to this process's.
        before: Called in each process first; it is pickled.
    """

    def __init__(
        self,
        *arguments: str,
        processes: int = 1,
        program: str = "drelu_timm",
        environment: Mapping[str, str] | None = None,
        before: Callable[[], object] | None = None,
    ):
        self._folder = tempfile.TemporaryDirectory()
        self._printed = [str(Path(self._folder.name) / name) for name in ("stdout", "stderr")]
        shared = {**os.environ, **(environment or {})}
        if processes > 1:
            # A store of this process, like the launcher's agent's: it finds a free port itself.
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port)}
            agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
            shared |= {**world, **master, **agent}
        self._processes = []
        for rank in range(processes):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            work = program, arguments, {**shared, **ranks}, self._printed, before
            self._processes.append(SERVER.Process(target=_work, args=work))
            self._processes[-1].start()
        atexit.register(self.kill)  # else this process waits at its end for processes of a test that failed

    @property
    def pid(self) -> int:
        """Number of the first process, and of its group."""
        return self._processes[0].pid

    @property
    def returncode(self) -> int | None:
        """0, or the first code of a process that failed; None while any runs."""
        codes = [process.exitcode for process in self._processes]
        return None if None in codes else next(filter(None, codes), 0)

    def poll(self) -> int | None:
        """Return the returncode."""
        return self.returncode

    def wait(self) -> int:
        """Wait for the end of all processes."""
        running = {process.sentinel: process for process in self._processes}
        while running:
            for sentinel in connection.wait(list(running)):
                process = running.pop(sentinel)
                process.join()
                if process.exitcode not in (0, 75):  # after 75 the others end as well, by the same SIGTERM
                    self.kill()
        atexit.unregister(self.kill)
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        """Wait for the end of all processes; return what they printed to stdout and stderr."""
        self.wait()
        stdout, stderr = (Path(file).read_text() for file in self._printed)
        return stdout, stderr

    def terminate(self) -> None:
        """Send SIGTERM to each process."""
        for process in self._processes:
            process.terminate()

    def kill(self) -> None:
        """Send SIGKILL to each process."""
        for process in self._processes:
            process.kill()


def _work(
    program: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    printed: Sequence[str],
    before: Callable[[], object] | None,
) -> None:
    """Run a module in a process that was just forked."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for stream, file in enumerate(printed, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if before is not None:
        before()
    hold_first_process()
    sys.argv[1:] = arguments
    runpy.run_module(program, run_name="__main__", alter_sys=True)


def become_a_colleague() -> None:
    """Become another user, in the group of this one."""
    os.setgroups([])
    os.setgid(os.getgid())
    os.setuid(65534)
    os.umask(0o002)


def train_by_processes(settings: TrainConfig, processes: int = 1, **options) -> str:
    """Train to the end in separate processes; return what they printed."""
    process = Launched("train", *flags(settings), processes=processes, **options)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    return printed


def start_torchrun(
    *arguments: str, processes: int = 2, program: str = "drelu_timm", environment: Mapping[str, str] | None = None
) -> subprocess.Popen:
    """Start processes by torch.distributed.run, which `accelerate launch` calls too."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", program]
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), **(environment or {})},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def train_by_torchrun(settings: TrainConfig, processes: int) -> None:
    """Train to the end by the real launcher."""
    process = start_torchrun("train", *flags(settings), processes=processes)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def held_at(function: str, call: int, reached: Path) -> dict[str, str]:
    """Environment in which the first process of a launch is held, see `held.hold`."""
    return {"HELD_AT": f"{function} {call} {reached}"}


def wait_for(reached: Path, process: "Launched | subprocess.Popen") -> None:
    """Wait for a file that a process creates."""
    while not reached.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def kill_with_workers(pid: int) -> None:
    """SIGKILL to a process and all that it has started; a launcher's workers have sessions of their own."""
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
