"""The processes of a training: Accelerate, FSDP, averages over processes, and errors that end all of them.

FSDP shards weights, gradients and optimizer state, for models that do not fit one GPU; see scripts/fsdp.yaml. torch
shards the model in place, so that the inner attack runs on the sharded module too. Each of its forward passes gathers
the weights from all processes, and has to be called by all of them.
"""

import os
from collections.abc import Callable

import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from torch import Tensor, nn
from torch.distributed.fsdp.api import StateDictType
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import InputError, one_line, unknown
from ..launch import PATIENCE, launched_on_cpu
from .config import TrainConfig


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return the `Accelerator` of this launch: its processes, their devices and their precision.

    Raises:
        InputError: The launch does not fit this training.
    """
    if config.log_with is not None:
        _check_tracker(config.log_with)
    plugin, on_cpu = fsdp_plugin(), launched_on_cpu()
    try:
        accelerator = Accelerator(
            cpu=on_cpu,
            log_with=config.log_with,
            project_dir=config.output_dir,
            fsdp_plugin=plugin,
            # Broadcasting buffers between the two forward passes of TRADES would change, in place, what the backward
            # pass of the first one needs. `average_statistics` averages them after every step instead.
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=PATIENCE),
            ],
        )
    except ValueError as error:
        raise InputError(f"accelerate cannot start with the settings of this launch ({one_line(error)}).") from error
    if plugin is not None:
        check_sharding(config, accelerator, plugin)
    _check_launch(config, accelerator)
    return accelerator


def _check_tracker(name: str) -> None:
    if name not in LOGGER_TYPE_TO_CLASS:
        raise unknown("--log-with", name, LOGGER_TYPE_TO_CLASS)
    if name not in [tracker.value for tracker in get_available_trackers()]:
        raise InputError(f"--log-with {name}: the package is not installed. Use pip install {name}.")


def _check_launch(config: TrainConfig, accelerator: Accelerator) -> None:
    if accelerator.mixed_precision not in ("no", "bf16"):
        # The attack does not scale its loss, and float16 gradients of images underflow to zero without it.
        raise InputError(
            f"--mixed_precision {accelerator.mixed_precision} would round the gradients of the inner attack to zero. "
            "Launch with bf16 or no."
        )
    if config.objective == "ibp" and accelerator.mixed_precision != "no":
        raise InputError(f"--mixed_precision {accelerator.mixed_precision} rounds interval bounds. Launch ibp with no.")
    if accelerator.gradient_accumulation_steps != 1:
        raise InputError("gradient_accumulation_steps of accelerate must be 1. Use --grad-accum-steps instead.")
    shares = accelerator.num_processes * config.grad_accum_steps
    if config.batch_size % shares:
        raise InputError(
            f"--batch-size {config.batch_size} is not a multiple of {shares} (processes: {accelerator.num_processes}, "
            f"--grad-accum-steps: {config.grad_accum_steps})."
        )
    if config.sync_bn and accelerator.device.type == "cpu":
        raise InputError("--sync-bn works on GPUs only. Leave it out.")


def fsdp_plugin() -> FullyShardedDataParallelPlugin | None:
    """Return the FSDP plugin that the launch asks for; None without FSDP.

    Raises:
        InputError: FSDP version 1.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return None
    if os.environ.get("FSDP_VERSION") != "2":
        raise InputError("FSDP: fsdp_version 1 flattens caps and weights into one tensor. Use fsdp_version 2.")
    from torch.distributed.fsdp import MixedPrecisionPolicy

    # Accelerate's own bf16 policy rounds the input images too, and averages gradients in bf16. Autocast does neither.
    return FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether the accelerator shards the model that it prepares."""
    return accelerator.distributed_type == DistributedType.FSDP


def check_sharding(config: TrainConfig, accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Raise where FSDP has no GPUs, has other settings than scripts/fsdp.yaml, or has a flag that needs whole weights.

    Raises:
        InputError: See above.
    """
    if not is_sharded(accelerator):
        raise InputError("FSDP: Accelerate shards models on GPUs only. Launch without FSDP.")
    if plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise InputError(
            f"FSDP: states of type {StateDictType(plugin.state_dict_type).name} are loaded with pickle. "
            "Use fsdp_state_dict_type FULL_STATE_DICT."
        )
    if os.environ.get("FSDP_OFFLOAD_PARAMS") == "true":
        raise InputError("FSDP: the penalty on caps is computed on the GPU. Use fsdp_offload_params false.")
    if config.ema_decay:
        raise InputError(
            f"--ema-decay {config.ema_decay:g} cannot average sharded weights. Leave it out, or launch without FSDP."
        )
    if config.objective == "ibp":  # FSDP finds the tensors that need gradients in a model's output, but not its bounds
        raise InputError("--objective ibp does not run under FSDP. Launch without FSDP.")


def average_statistics(model: nn.Module, accelerator: Accelerator) -> None:
    """Average BatchNorm's running statistics, which each process computes from its own part of a batch.

    This is called after every step: the inner attack of every process then uses the same model, and the state that one
    process saves holds for all of them.
    """
    if accelerator.num_processes == 1:
        return
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    _average([buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()], accelerator)


def average_gradients(model: nn.Module, accelerator: Accelerator) -> None:
    """Average the gradients over the processes, for a backward pass that bypasses the distributed wrapper."""
    if accelerator.num_processes > 1:
        _average([p.grad for p in model.parameters() if p.grad is not None], accelerator)


@torch.no_grad()
def _average(tensors: list[Tensor], accelerator: Accelerator) -> None:
    """Average tensors over the processes in place, in a single message."""
    if not tensors:
        return
    flat = reduced(torch.cat([tensor.flatten() for tensor in tensors]), accelerator, "mean")
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def reduced(values: Tensor, accelerator: Accelerator, reduction: str) -> Tensor:
    """Return the "sum" or the "mean" of a tensor over the processes, on the accelerator's device."""
    result = accelerator.reduce(values.to(accelerator.device), reduction)
    assert isinstance(result, Tensor)
    return result


def together(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Call ``action`` in every process, and raise in all of them if it fails in one; else they would wait forever.

    Raises:
        InputError: The action failed in another process. In the failing one, its own exception is raised.
    """
    error = None
    try:
        action()
    except Exception as raised:
        error = raised
    failed = reduced(torch.tensor(float(error is not None)), accelerator, "sum")
    if error is not None:
        raise error
    if failed:
        raise InputError("another process of this launch has stopped with an error. See its message.")
