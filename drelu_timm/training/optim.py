"""The optimiser with its parameter groups, the learning-rate schedule, and averages over processes."""

from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer, lr_scheduler

from ..errors import InputError
from ..models.drelu import drelu_layers
from .config import TrainConfig

BY_STEP = (lr_scheduler.CosineAnnealingLR, lr_scheduler.OneCycleLR)
Scheduler = lr_scheduler.CosineAnnealingLR | lr_scheduler.OneCycleLR | lr_scheduler.ReduceLROnPlateau


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """timm's optimiser of that name; biases, norms, caps and what timm's model names are spared weight decay.

    Caps have their own rate.

    Args:
        model: Takes [0, 1] images; its ``.model`` is the timm model.
        config: Resolved.

    Raises:
        InputError: timm has no optimiser of that name.
    """
    caps = [layer.cap for layer in drelu_layers(model)]
    known = {id(cap) for cap in caps}
    # Where nothing decays the groups stay what they were before names were asked for: their order is that of a state.
    named = _spared_by_name(model) if config.weight_decay else ()
    others = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in known}
    spared = {name for name, parameter in others.items() if parameter.ndim <= 1 or name in named}
    groups = [
        {"params": [p for name, p in others.items() if name not in spared], "weight_decay": config.weight_decay},
        {"params": [p for name, p in others.items() if name in spared], "weight_decay": 0.0},
        {"params": caps, "weight_decay": 0.0, "lr": config.cap_lr},
    ]
    groups = [group for group in groups if group["params"]]
    try:
        optimizer = create_optimizer_v2(groups, opt=config.optimizer, lr=config.lr)
    except (AssertionError, ValueError) as error:
        raise InputError(
            f"--optimizer {config.optimizer!r} is no optimiser of timm; adam, adamw and sgd are"
        ) from error
    if getattr(optimizer, "is_second_order", False):
        raise InputError(f"--optimizer {config.optimizer} needs second derivatives, which training does not give it")
    return optimizer


def _spared_by_name(model: nn.Module) -> set[str]:
    """Names of the parameters that timm's model wants no decay on, such as position embeddings."""
    bare: Any = model.model
    return {f"model.{name}" for name in bare.no_weight_decay()} if hasattr(bare, "no_weight_decay") else set()


def make_scheduler(optimizer: Optimizer, config: TrainConfig, steps_per_epoch: int) -> Scheduler | None:
    """torch's scheduler for ``config.schedule``: stepped every step (`BY_STEP`) or every epoch (plateau).

    timm's own plateau scheduler passes torch an argument that it no longer takes, and does not save its patience.
    """
    steps = config.epochs * steps_per_epoch
    if config.schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if config.schedule == "onecycle":
        highest = [group["lr"] for group in optimizer.param_groups]
        cycled = "momentum" in optimizer.defaults or "betas" in optimizer.defaults
        warmup = config.warmup if config.warmup * steps > 1.5 else 0.0  # torch divides by the steps after the first
        return lr_scheduler.OneCycleLR(
            optimizer, highest, total_steps=max(steps, 2), pct_start=warmup, cycle_momentum=cycled
        )
    if config.schedule == "plateau":
        # As Keras has it, where the paper's come from: 5 epochs that are not lower by 1e-4; torch waits for one more.
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=4, threshold=1e-4, threshold_mode="abs")
    return None


def average_statistics(model: nn.Module, accelerator: Accelerator) -> None:
    """Average BatchNorm's running statistics, which each process keeps from its own part of a batch.

    After every step, since the inner attack reads them: every process then attacks the same net, and the state that
    one process saves is that of all.
    """
    if accelerator.num_processes == 1:
        return
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    _average([buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()], accelerator)


def average_gradients(model: nn.Module, accelerator: Accelerator) -> None:
    """Average the gradients over the processes, where no distributed wrapper does it."""
    if accelerator.num_processes > 1:
        _average([p.grad for p in model.parameters() if p.grad is not None], accelerator)


@torch.no_grad()
def _average(tensors: list[Tensor], accelerator: Accelerator) -> None:
    """Average tensors over the processes in place, all in one message."""
    if not tensors:
        return
    flat = accelerator.reduce(torch.cat([tensor.flatten() for tensor in tensors]), "mean")
    assert isinstance(flat, Tensor)
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
