"""The model that a training begins with."""

from pathlib import Path

import timm
from torch import nn

from ..data.datasets import DATASETS
from ..data.images import Images
from ..errors import InputError, one_line
from ..models.intervals import initialize_for_ibp
from ..models.normalize import normalized
from ..models.saved import load_folder
from ..models.small_images import warn_of_small_images
from ..models.surgery import paths
from ..models.weights import check_weights
from ..runs import Run
from .config import TrainConfig, model_options


def check_pretrained(config: TrainConfig) -> None:
    """Look for the weights that ``--pretrained`` asks for, before any data is read.

    Raises:
        InputError: There are none, or they cannot be fetched.
    """
    cfg = timm.get_pretrained_cfg(config.model)
    if config.pretrained and cfg is not None:  # a robust model has no cfg, and looks for its files itself
        base = config.model.partition(".")[0].removesuffix("_drelu")
        check_weights(base, cfg, called=f"--pretrained: {config.model}")


def create_model(config: TrainConfig, data: Images) -> nn.Module:
    """The config's model for the images' size, channels and classes; it takes [0, 1] images.

    Raises:
        InputError: Arguments that the architecture does not take, or that cannot run on images of this size.
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
            f"--pretrained: there are no weights of {config.model} to be had ({one_line(error)})"
        ) from error
    # Only for a variant: plain timm models do not take small_images.
    is_variant = config.model.partition(".")[0].endswith("_drelu")
    if is_variant and not config.small_images and "img_size" not in arguments:
        first_convs = paths(model.pretrained_cfg["first_conv"])
        warn_of_small_images(model, first_convs, model.pretrained_cfg["input_size"][1:], size)
    model._model_args = getattr(model, "_model_args", arguments)  # timm 1.0.9 does not record a plain model's
    dataset = DATASETS[config.dataset]
    mean, std = (dataset.mean, dataset.std) if dataset.mean else data.mean_std()
    model.pretrained_cfg.update(input_size=(channels, *size), num_classes=len(data.classes), mean=mean, std=std)
    if config.init_from is not None:
        _initialise(model, config.init_from)
    if config.ibp_init:
        initialize_for_ibp(model)
    return normalized(model)


def _initialise(model: nn.Module, init_from: Path) -> None:
    """Load the trained weights of a run.

    Raises:
        InputError: No run with a trained model, or weights that do not fit.
    """
    weights = load_folder(Run.open(init_from).model_folder).state_dict()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"--init-from {init_from} does not fit --model ({one_line(error)}); train the same model"
        ) from error
