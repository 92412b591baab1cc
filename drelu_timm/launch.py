"""How processes are launched (with or without ``accelerate launch``) and stopped (by SIGTERM, on preemption)."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from .errors import InputError

# How long processes wait for each other. NCCL's own ten minutes end a launch whose other processes are still busy with
# the last batch of a long attack, or with decoding a folder of images.
PATIENCE = timedelta(days=1)
_BY_LAUNCHER = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again


class Preempted(Exception):
    """SIGTERM arrived and the state is saved; the command line prints the message and exits with code 75."""


@contextmanager
def noticed_sigterm() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether SIGTERM has arrived; the signal no longer ends the process.

    SLURM, Kubernetes and spot instances send it before they take a machine away. Only the main thread can handle
    signals; in another thread SIGTERM keeps its usual effect.
    """
    arrived = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield arrived.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: arrived.set())
    try:
        yield arrived.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class Launch:
    """How a training or an evaluation is started.

    Attributes:
        num_processes: Processes that share it, one per GPU where there are GPUs.
        mixed_precision: "no" or "bf16".
        on_cpu: Whether there are no GPUs, which changes the flags that accelerate needs.
    """

    num_processes: int = 1
    mixed_precision: str = "no"
    on_cpu: bool = False

    @property
    def flags(self) -> list[str]:
        """Flags of ``accelerate launch``; empty where the command can be started without it."""
        if (self.num_processes, self.mixed_precision) == (1, "no"):
            return []
        # Without GPUs, accelerate starts a single process unless --multi_gpu is given.
        where = ["--multi_gpu"] if self.num_processes > 1 else ["--cpu"] if self.on_cpu else []
        return ["--num_processes", str(self.num_processes), *where, "--mixed_precision", self.mixed_precision]


def is_first_process() -> bool:
    """Return whether this process is the only one or rank 0; works before accelerate is started."""
    return os.environ.get("RANK", "0") == "0"


def launched_on_cpu() -> bool:
    """Return whether several processes were launched on a machine without a GPU.

    `Accelerator` needs ``cpu=True`` then; without it, each process believes that it is the only one.

    Raises:
        InputError: ``accelerate launch`` was asked for several processes and started one, as it does without a GPU, or
            WORLD_SIZE was set without a launcher.
    """
    import torch  # the command line imports this module for `Preempted`, and starts without torch

    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1" and not (world_size.isdecimal() and all(os.environ.get(name) for name in _BY_LAUNCHER)):
        raise InputError(
            f"WORLD_SIZE is {world_size}, but no launcher has set {', '.join(_BY_LAUNCHER)}. "
            "Use accelerate launch or torchrun, or unset WORLD_SIZE."
        )
    if torch.cuda.is_available():
        return False
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and "ACCELERATE_USE_CPU" in os.environ:
        raise InputError(
            "accelerate launch --num_processes starts only one process on a machine without GPUs. "
            "Add --multi_gpu, which starts all of them there too."
        )
    return int(world_size) > 1
