"""`drelu-timm train`: check the launch and the settings, read the data, create the model, and train it.

    drelu-timm train --model dense_drelu --dataset mnist --data-dir data --cap-weight 0.1
    accelerate launch --num_processes 4 -m drelu_timm train --model resnet50_drelu --dataset cifar10 --objective trades
    drelu-timm train --config recipe.toml --seed 1
    drelu-timm train --config runs/x/config.json --output-dir runs/x-again

Devices and precision are flags of `accelerate launch`. All randomness is keyed by (seed, epoch, step), so that a
resumed run equals an uninterrupted one.
"""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from .command_line import flag
from .data.datasets import DATASETS
from .data.generated import GeneratedImages
from .data.images import Images
from .data.readers import load_images
from .files import write_json
from .launch import is_first_process
from .runs import Run, environment
from .training.config import TrainConfig, check_output, resolve, run_directory, saved
from .training.distributed import make_accelerator
from .training.model import check_pretrained, check_start, create_model, recorded_start
from .training.presets import PRESETS
from .training.state import held_for_training, read_progress, write_in_main
from .training.trainer import Trainer


def main(configs: Sequence[TrainConfig]) -> None:
    """Run the trainings in order; print what each one wrote and what to do next."""
    for config in configs:
        resolve(config)  # finds a mistake in a later training before the first one starts
    for number, config in enumerate(configs, start=1):
        if config.preset is not None and is_first_process():
            preset = PRESETS[config.preset]
            print(f"--preset {config.preset} ({preset.source}) sets")
            print("  " + " ".join(f"{flag(key)} {value}" for key, value in preset.settings.items()))
        run = train(config)
        if is_first_process():
            if number < len(configs):
                following = f"training {number + 1} of {len(configs)}"
            else:
                following = shlex.join(["drelu-timm", "evaluate", str(run_directory(config))])
            log = f"{run / 'log.jsonl'}; next: {following}"
            print(f"wrote {run / 'model'} (the best epoch), {run / 'last'} and {log}")


def train(config: TrainConfig) -> Path:
    """Train by a config; everything is checked before the first step.

    Returns:
        The run directory.

    Raises:
        InputError: Something in the config cannot be used, the loss is not finite, or the disk is full.
    """
    config = resolve(config)
    assert config.output_dir is not None
    accelerator = make_accelerator(config)
    with held_for_training(accelerator, config.output_dir):
        check_output(config)  # again: another training may have ended here since `resolve`
        check_start(config)
        if not (config.output_dir / "model").is_dir():
            _train(config, accelerator)
    return config.output_dir


def _train(config: TrainConfig, accelerator: Accelerator) -> None:
    assert config.output_dir is not None
    check_pretrained(config)
    with accelerator.main_process_first():  # it may have to download
        data = load_images(config.dataset, config.data_dir, "train", img_size=config.img_size)[: config.n_train]
        generated = _open_generated(config, data)
    torch.manual_seed(config.seed)
    # A resumed run no longer needs the weights that it started from, and they may have been deleted.
    resumed = read_progress(config.output_dir) is not None
    model = create_model(replace(config, init_from=None) if resumed else config, data)
    trainer = Trainer(config, data, generated, model, accelerator)
    write_in_main(accelerator, config.output_dir, lambda: _write_config(config, data, generated, accelerator))
    trainer.run()


def _open_generated(config: TrainConfig, data: Images) -> GeneratedImages | None:
    if not config.generated:
        return None
    _, channels, size, _ = data.images.shape
    return GeneratedImages.open(config.generated, img_size=size, in_chans=channels, num_classes=len(data.classes))


def _write_config(
    config: TrainConfig, data: Images, generated: GeneratedImages | None, accelerator: Accelerator
) -> None:
    """Write config.json, which describes the training, once, before the first step."""
    assert config.output_dir is not None
    path = config.output_dir / "config.json"
    if path.exists():
        return
    _, channels, height, _ = data.images.shape
    about = {"dataset_title": data.title, "num_classes": len(data.classes), "in_chans": channels, "img_size": height}
    if DATASETS[config.dataset].num_classes is None:  # the folders name the classes, and other folders may not
        about["classes"] = data.classes
    launch = {"num_processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision}
    about |= {"launch": {**launch, "device": accelerator.device.type}}
    if generated is not None:
        about["generated"] = {"images": len(generated), "digest": generated.digest}
    if config.init_from is not None:
        about |= recorded_start(Run.open(config.init_from))
    write_json(path, {"train": saved(config), **about, **environment()})
