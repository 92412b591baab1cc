"""`drelu-timm train`: checks the launch, reads the data, makes the model, and trains it.

    drelu-timm train --model dense_drelu --dataset mnist --data-dir data --cap-weight 0.1
    accelerate launch --num_processes 4 -m drelu_timm train --model resnet50_drelu --dataset cifar10 --objective trades
    drelu-timm train --config recipe.toml --seed 1
    drelu-timm train --config runs/x/config.json --output-dir runs/x-again

Devices and precision belong to `accelerate launch`. All randomness is keyed by (seed, epoch, step), never by the number
of processes or by what ran before, so that a resumed run repeats the uninterrupted one.
"""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from .command_line import flag
from .data.datasets import DATASETS
from .data.generated import GeneratedImages
from .data.images import Images
from .data.readers import load_images
from .errors import InputError, one_line, unknown
from .files import write_json
from .launches import PATIENCE, is_first_process, launched_on_cpu
from .runs import Run, environment
from .training.config import TrainConfig, resolve, run_directory, saved
from .training.model import check_pretrained, create_model
from .training.presets import PRESETS
from .training.sharding import check_sharding, sharding
from .training.start import check_start, recorded_start
from .training.state import read_progress
from .training.trainer import Trainer


def main(configs: Sequence[TrainConfig]) -> None:
    """Train one configuration after the other; print what was written and what to do next."""
    for config in configs:
        resolve(config)  # so that a mistake in a later training is found before the first one
    for config in configs:
        if config.preset is not None and is_first_process():
            _show_preset(config.preset)
        run = train(config)
        if is_first_process():
            log = f"{run / 'log.jsonl'}; next: {_next(config, configs)}"
            print(f"wrote {run / 'model'} (the best epoch), {run / 'last'} and {log}")


def _next(config: TrainConfig, configs: Sequence[TrainConfig]) -> str:
    """Say what comes after a training: the next one, or the evaluation of the last."""
    number = configs.index(config) + 1
    if number < len(configs):
        return f"training {number + 1} of {len(configs)}"
    return shlex.join(["drelu-timm", "evaluate", str(run_directory(config))])


def _show_preset(name: str) -> None:
    """Print what a preset sets, and where it is from."""
    preset = PRESETS[name]
    print(f"--preset {name} ({preset.source}) sets")
    print("  " + " ".join(f"{flag(key)} {value}" for key, value in preset.settings.items()))


def train(config: TrainConfig) -> Path:
    """Train as the config says; everything is checked before the first step.

    Returns:
        The run directory.

    Raises:
        InputError: Anything in the config that cannot be used, or a loss that is no number.
    """
    config = resolve(config)
    assert config.output_dir is not None
    check_start(config)
    accelerator = make_accelerator(config)
    if (config.output_dir / "model").is_dir():
        return config.output_dir
    check_pretrained(config)
    with accelerator.main_process_first():  # which may have to download
        data = load_images(config.dataset, config.data_dir, "train", img_size=config.img_size)[: config.n_train]
        generated = _open_generated(config, data)
    torch.manual_seed(config.seed)
    goes_on = read_progress(config.output_dir / "state") is not None  # then its start is needed no more
    model = create_model(replace(config, init_from=None) if goes_on else config, data)
    trainer = Trainer(config, data, generated, model, accelerator)
    if accelerator.is_main_process:
        _describe(config, data, generated, accelerator)
    accelerator.wait_for_everyone()
    trainer.run()
    return config.output_dir


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The processes, their devices and their precision, as they were launched.

    Raises:
        InputError: A launch that this training cannot use.
    """
    if config.log_with is not None:
        _check_tracker(config.log_with)
    plugin, on_cpu = sharding(), launched_on_cpu()
    try:
        accelerator = Accelerator(
            cpu=on_cpu,
            log_with=config.log_with,
            project_dir=config.output_dir,
            fsdp_plugin=plugin,
            # A broadcast of buffers between TRADES' two forwards would change, in place, what the first one's backward
            # needs; they are averaged after every step.
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=PATIENCE),
            ],
        )
    except ValueError as error:
        raise InputError(f"accelerate cannot be started as it was launched ({one_line(error)})") from error
    if plugin is not None:
        check_sharding(config, accelerator, plugin)
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise InputError(
            f"--mixed_precision {accelerator.mixed_precision}: the gradients of the inner attack would vanish in it "
            "unscaled; launch with bf16 or no"
        )
    if config.objective == "ibp" and accelerator.mixed_precision != "no":
        raise InputError(f"--mixed_precision {accelerator.mixed_precision} rounds interval bounds. Launch ibp with no.")
    if accelerator.gradient_accumulation_steps != 1:
        raise InputError("gradient_accumulation_steps of accelerate must be 1; give --grad-accum-steps instead")
    shares = accelerator.num_processes * config.grad_accum_steps
    if config.batch_size % shares:
        raise InputError(
            f"--batch-size {config.batch_size} is no multiple of {shares} ({accelerator.num_processes} processes times "
            f"--grad-accum-steps {config.grad_accum_steps})"
        )
    if config.sync_bn and accelerator.device.type == "cpu":
        raise InputError("--sync-bn: torch has it for GPUs only; leave it out")
    return accelerator


def _check_tracker(name: str) -> None:
    if name not in LOGGER_TYPE_TO_CLASS:
        raise unknown("--log-with", name, LOGGER_TYPE_TO_CLASS)
    if name not in [tracker.value for tracker in get_available_trackers()]:
        raise InputError(f"--log-with {name}: the package is not installed; pip install {name}")


def _open_generated(config: TrainConfig, data: Images) -> GeneratedImages | None:
    if not config.generated:
        return None
    _, channels, size, _ = data.images.shape
    return GeneratedImages.open(config.generated, img_size=size, in_chans=channels, num_classes=len(data.classes))


def _describe(config: TrainConfig, data: Images, generated: GeneratedImages | None, accelerator: Accelerator) -> None:
    """Write config.json, once, before the first step: all that the training is made with."""
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
