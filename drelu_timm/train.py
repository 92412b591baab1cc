"""`drelu-timm train`: the only training loop.

    drelu-timm train --model dense_drelu --dataset mnist --data-dir data --cap-weight 0.1
    accelerate launch --num_processes 4 -m drelu_timm train --model resnet50_drelu --dataset cifar10 --objective trades

Devices and precision belong to `accelerate launch`. All randomness is keyed by (seed, epoch, step), never by the number
of processes or by what ran before, so that a resumed run repeats the uninterrupted one.
"""

from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn

from .command_line import read_flags
from .data import DATASETS, Images, load_images
from .errors import InputError, one_line
from .models import load_folder, normalized
from .processes import launched_on_cpu
from .runs import Run, environment, write_json
from .train_config import TrainConfig, model_options, preset_in, resolve, saved
from .trainer import Trainer

__all__ = ["TrainConfig", "main", "train"]


def main(argv: Sequence[str]) -> None:
    """Read the flags over the preset that they name, train, and say what to do next."""
    config = read_flags(TrainConfig, "train", argv, preset_in(argv))
    run = train(config)
    if Accelerator().is_main_process:
        print(f"wrote {run / 'model'} and {run / 'log.jsonl'}; next: drelu-timm evaluate {run}")


def train(config: TrainConfig) -> Path:
    """Train as the config says; everything is checked before the first step.

    Returns:
        The run directory.

    Raises:
        InputError: Anything in the config that cannot be used, or a loss that is no number.
    """
    config = resolve(config)
    assert config.output_dir is not None
    # Buffers stay each process's own within an epoch: a broadcast between TRADES' two forwards would change, in place,
    # what the first one's backward needs. They are averaged at the end of every epoch.
    accelerator = Accelerator(
        cpu=launched_on_cpu(), kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)]
    )
    if config.batch_size % accelerator.num_processes:
        raise InputError(f"--batch-size {config.batch_size} is no multiple of {accelerator.num_processes} processes")
    if (config.output_dir / "model").is_dir():
        return config.output_dir
    with accelerator.main_process_first():  # which may have to download
        data = load_images(config.dataset, config.data_dir, "train", img_size=config.img_size)[: config.n_train]
    torch.manual_seed(config.seed)
    trainer = Trainer(config, data, create_model(config, data), accelerator)
    if accelerator.is_main_process:
        _describe(config, data)
    accelerator.wait_for_everyone()
    trainer.run()
    return config.output_dir


def _describe(config: TrainConfig, data: Images) -> None:
    """Write config.json, once, before the first step."""
    assert config.output_dir is not None
    path = config.output_dir / "config.json"
    if path.exists():
        return
    _, channels, height, _ = data.images.shape
    about = {"dataset_title": data.title, "num_classes": len(data.classes), "in_chans": channels, "img_size": height}
    write_json(path, {"train": saved(config), **about, **environment()})


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
    model._model_args = getattr(model, "_model_args", arguments)  # timm 1.0.9 does not record a plain model's
    dataset = DATASETS[config.dataset]
    mean, std = (dataset.mean, dataset.std) if dataset.mean else data.mean_std()
    model.pretrained_cfg.update(input_size=(channels, *size), num_classes=len(data.classes), mean=mean, std=std)
    if config.init_from is not None:
        _initialise(model, config.init_from)
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
