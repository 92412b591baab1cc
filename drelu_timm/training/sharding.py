"""FSDP: weights, gradients and optimiser state shared out over the processes, for models that one GPU cannot train.

Asked for by `accelerate launch`, see scripts/fsdp.yaml. torch shards the model in place, so that the bare module of the
inner attack is the sharded one; each of its forward passes is a meeting of all processes.
"""

import os

from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp.api import StateDictType

from ..errors import InputError
from .config import TrainConfig


def sharding() -> FullyShardedDataParallelPlugin | None:
    """What the launch says of FSDP; None where it does not ask for it.

    Raises:
        InputError: FSDP of version 1.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return None
    if os.environ.get("FSDP_VERSION") != "2":
        raise InputError("FSDP: fsdp_version 1 flattens caps and weights into one; give fsdp_version 2")
    from torch.distributed.fsdp import MixedPrecisionPolicy  # torch 2.2 has none

    # Accelerate's policy for bf16 rounds the images too, and averages gradients in it; the trainer has autocast.
    return FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the accelerator shards the model that it prepares."""
    return accelerator.distributed_type == DistributedType.FSDP


def check_sharding(config: TrainConfig, accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Refuse what this training cannot do under FSDP.

    Args:
        config: Of the training.
        accelerator: As it was launched.
        plugin: From `sharding`.

    Raises:
        InputError: No GPUs, other settings than those of scripts/fsdp.yaml, or a flag that wants whole weights.
    """
    if not is_sharded(accelerator):
        raise InputError(
            "FSDP: Accelerate shards models on GPUs alone, and would train without it here; launch without FSDP"
        )
    if plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise InputError(
            f"FSDP: states of {StateDictType(plugin.state_dict_type).name} are read by pickle; give "
            "fsdp_state_dict_type FULL_STATE_DICT"
        )
    if os.environ.get("FSDP_OFFLOAD_PARAMS") == "true":
        raise InputError("FSDP: the penalty on caps is computed on the GPU; give fsdp_offload_params false")
    if config.ema_decay:
        raise InputError(
            f"--ema-decay {config.ema_decay:g} cannot average sharded weights; leave it out, or launch without FSDP"
        )
    if config.objective == "ibp":
        raise InputError("--objective ibp does not run under FSDP, which gathers weights for tensors without bounds")
