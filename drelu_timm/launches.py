"""How processes are launched: through ``accelerate launch``, or without it."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch

from .errors import InputError

# How long processes wait for each other. NCCL's own ten minutes end a launch whose other processes still work as they
# should: on the last batch of a long attack, or on a folder of images that one of them has to decode.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Launch:
    """How a training or an evaluation is started.

    Attributes:
        num_processes: Processes that share it, a GPU each where there are GPUs.
        mixed_precision: "no" or "bf16".
        on_cpu: Whether there are no GPUs, which accelerate has to be told.
    """

    num_processes: int = 1
    mixed_precision: str = "no"
    on_cpu: bool = False

    @property
    def flags(self) -> list[str]:
        """The flags of ``accelerate launch``; none where the command can be started without it."""
        if (self.num_processes, self.mixed_precision) == (1, "no"):
            return []
        # Without GPUs accelerate starts a single process, unless it is told --multi_gpu.
        where = ["--multi_gpu"] if self.num_processes > 1 else ["--cpu"] if self.on_cpu else []
        return ["--num_processes", str(self.num_processes), *where, "--mixed_precision", self.mixed_precision]


def is_first_process() -> bool:
    """Return whether this is the process that prints, known before accelerate is started: the only one, or rank 0."""
    return os.environ.get("RANK", "0") == "0"


def launched_on_cpu() -> bool:
    """Whether several processes were launched on a machine without a GPU, which Accelerate has to be told.

    Otherwise each of them takes itself for the only one.

    Raises:
        InputError: ``accelerate launch`` was asked for several processes and started one, as it does without a GPU.
    """
    if torch.cuda.is_available():
        return False
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and "ACCELERATE_USE_CPU" in os.environ:
        raise InputError(
            "accelerate launch --num_processes starts one process only on a machine without GPUs; "
            "add --multi_gpu, which starts all of them there too"
        )
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
