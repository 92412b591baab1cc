"""The model that a training starts from: made, loaded with starting weights, and checked before the first step."""

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.datasets import DATASETS
from ..data.images import Images
from ..errors import InputError, one_line
from ..models.caps import check_cap_penalty
from ..models.drelu import cap_layers
from ..models.inference import normalized
from ..models.intervals import certified, initialize_for_ibp
from ..models.surgery import paths, warn_of_small_images
from ..models.weights import check_weights, load_folder
from ..runs import Run, read_config
from .config import TrainConfig, model_options, variant_base
from .ibp import bounded_eps

_START_DIGEST = "init_from_digest"  # in config.json


def check_pretrained(config: TrainConfig) -> None:
    """Look for the weights that ``--pretrained`` asks for, before any data is read.

    Raises:
        InputError: There are none, or they cannot be downloaded.
    """
    cfg = timm.get_pretrained_cfg(config.model)
    if config.pretrained and cfg is not None:  # a robust model has no cfg, and finds its files itself
        base = variant_base(config.model) or config.model.partition(".")[0]
        check_weights(base, cfg, called=f"--pretrained: {config.model}")


def create_model(config: TrainConfig, data: Images) -> nn.Module:
    """Return the config's model for the images' size, channels and classes; it takes [0, 1] images.

    Raises:
        InputError: The weights to start from are missing or do not fit.
    """
    _, channels, *size = data.images.shape
    arguments = model_options(config)
    if timm.models.get_pretrained_cfg_value(config.model, "fixed_input_size") and not config.small_images:
        arguments["img_size"] = size[0]
    arguments |= {"num_classes": len(data.classes), "in_chans": channels}
    try:
        model = timm.create_model(config.model, pretrained=config.pretrained, **arguments)
    except (OSError, RuntimeError) as error:
        if not config.pretrained:
            raise
        raise InputError(
            f"--pretrained: the weights of {config.model} are not available ({one_line(error)})."
        ) from error
    # The warning recommends --small-images, which plain timm models do not take.
    if variant_base(config.model) and not config.small_images and "img_size" not in arguments:
        first_convs = paths(model.pretrained_cfg["first_conv"])
        warn_of_small_images(model, first_convs, model.pretrained_cfg["input_size"][1:], size)
    model._model_args = getattr(model, "_model_args", arguments)  # timm 1.0.9 does not record a plain model's
    dataset = DATASETS[config.dataset]
    mean, std = (dataset.mean, dataset.std) if dataset.mean else data.mean_std()
    model.pretrained_cfg.update(input_size=(channels, *size), num_classes=len(data.classes), mean=mean, std=std)
    if config.init_from is not None:
        weights = load_folder(Run.open(config.init_from).model_folder).state_dict()
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise InputError(
                f"--init-from {config.init_from} does not fit --model {config.model} ({one_line(error)}). "
                "Use a run of the same model."
            ) from error
    if config.ibp_init:
        initialize_for_ibp(model)
    return normalized(model)


def recorded_start(start: Run) -> dict[str, Any]:
    """Return what config.json records of the run that another one starts from: its config and its weights' sha256."""
    return {"init_from": start.config, _START_DIGEST: start.model_digest}


def check_start(config: TrainConfig) -> None:
    """Compare the weights that a run started from with the weights that its ``init_from`` has now.

    Nothing is compared where the run has not started, did not record a digest, or where its start has been deleted.

    Raises:
        InputError: They differ.
    """
    assert config.output_dir is not None
    path = config.output_dir / "config.json"
    if config.init_from is None or not path.exists():
        return
    before = read_config(path).get(_START_DIGEST)
    try:
        now = Run.open(config.init_from).model_digest
    except (InputError, OSError):
        return
    if before not in (None, now):
        raise InputError(
            f"--resume of {config.output_dir}: the weights of --init-from {config.init_from} have changed since the "
            f"run started (sha256 {before[:12]} before, {now[:12]} now). Restore them, or use another --output-dir."
        )


def check_model(model: nn.Module, images: Tensor, config: TrainConfig, num_processes: int) -> None:
    """Run a model once, and check that the flags fit it.

    Args:
        model: Takes [0, 1] images; it is left in eval mode.
        images: [B, C, H, W], some of the training images.
        config: The flags.
        num_processes: Processes that share a batch.

    Raises:
        InputError: The model cannot run on images of this size, has no caps to penalize, has an operation without
            interval bounds (for IBP), or its BatchNorm would see single images.
    """
    try:
        with torch.no_grad():
            model.eval()(images)
    except (RuntimeError, AssertionError, ValueError) as error:
        size = "x".join(map(str, images.shape[2:]))
        raise InputError(
            f"--model {config.model} cannot run on {size} images ({one_line(error)}). Try --small-images."
        ) from error
    if config.cap_weight and not any(cap_layers(model)):
        raise InputError(f"--cap-weight {config.cap_weight:g} needs a model with D-ReLUs. Leave it out.")
    check_cap_penalty(config.cap_penalty, model)
    if config.objective == "ibp":
        certified(model, images, torch.zeros(len(images), dtype=torch.long), bounded_eps(config))
    images_per_pass = config.batch_size // (num_processes * config.grad_accum_steps)
    if images_per_pass == 1 and any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise InputError(
            f"--batch-size {config.batch_size} leaves one image per forward pass, too few for BatchNorm. "
            "Use a larger batch."
        )
