"""What of a model cannot be trained: found before the first step, said in a line."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import InputError, one_line
from ..models.caps import check_cap_penalty
from ..models.drelu import drelu_layers
from ..models.intervals import certified
from .config import TrainConfig


def check_model(model: nn.Module, images: Tensor, config: TrainConfig, num_processes: int) -> None:
    """Try a model and what the flags ask of it.

    Args:
        model: Takes [0, 1] images; it is left in eval mode.
        images: [B, C, H, W], some of those that it will be trained on.
        config: The flags.
        num_processes: Who share a batch.

    Raises:
        InputError: A model that cannot run on images of this size, that has no caps to weigh, whose BatchNorm would
            see one image at once, or, for IBP, that has an operation without interval bounds.
    """
    _try(model, images, config)
    _check_caps(model, config)
    _check_batchnorm(model, config, num_processes)
    if config.objective == "ibp":
        certified(model, images, torch.zeros(len(images), dtype=torch.long), config.bounded_eps)


def _check_caps(model: nn.Module, config: TrainConfig) -> None:
    if config.cap_weight and not any(drelu_layers(model)):
        raise InputError(f"--cap-weight {config.cap_weight:g}: the model has no D-ReLU whose caps it could weigh")
    check_cap_penalty(config.cap_penalty, model)


def _check_batchnorm(model: nn.Module, config: TrainConfig, num_processes: int) -> None:
    at_once = config.batch_size // (num_processes * config.grad_accum_steps)
    if at_once == 1 and any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise InputError(
            f"--batch-size {config.batch_size} leaves one image at once, of which BatchNorm takes no statistics; "
            "give a larger one"
        )


def _try(model: nn.Module, images: Tensor, config: TrainConfig) -> None:
    """A forward pass before any work.

    Raises:
        InputError: The model cannot run on images of this size.
    """
    try:
        with torch.no_grad():
            model.eval()(images)
    except (RuntimeError, AssertionError, ValueError) as error:
        size = "x".join(map(str, images.shape[2:]))
        raise InputError(
            f"--model {config.model} cannot run on {size} images ({one_line(error)}); try --small-images"
        ) from error
