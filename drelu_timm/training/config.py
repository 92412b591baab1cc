"""Everything a training is made with: the flags of `drelu-timm train`, and what is allowed."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import timm
import tyro

from ..attacks.threat_model import ThreatModel, norm_and_radius
from ..command_line import flag
from ..data.augment import Augmentation
from ..data.datasets import DATASETS
from ..errors import InputError, unknown
from ..files import read_json
from ..models.caps import CAP_PENALTIES
from ..models.registration import check_tag
from ..models.variants import Options
from ..schema import load
from . import flags
from .objectives import make_objective
from .presets import PRESETS

SCHEDULES = ("constant", "cosine", "onecycle", "plateau")
MONITORS = ("loss", "pgd")
# What does not change the result of a run, so that it may change when it is resumed.
_NOT_SAVED = ("resume", "output_dir", "save_every", "workers", "log_with")
_MAY_MOVE = ("data_dir", "generated", "init_from")  # what lies there is compared instead, or was read at the start
_SAME_UPDATES = ("grad_accum_steps", "compile")  # up to rounding


@dataclass(frozen=True)
class TrainConfig(
    flags.Machine, flags.Augmentation, flags.Optimisation, flags.Layer, flags.Objective, flags.Start, flags.Task
):
    """Train a timm model and write a run directory."""  # fields come in the order of the bases from the last

    @classmethod
    def from_preset(cls, name: str, **settings: Any) -> "TrainConfig":
        """The config that ``--preset name`` and flags for ``settings`` give.

        Raises:
            InputError: No such preset.
        """
        if name not in PRESETS:
            raise unknown("--preset", name, PRESETS)
        return cls(**{**PRESETS[name].settings, "preset": name, **settings})

    @property
    def threat_model(self) -> ThreatModel:
        """Norm and radius of the inner attack, of a resolved config."""
        assert self.norm is not None and self.eps is not None
        return ThreatModel.parse(self.norm, self.eps)

    @property
    def augmentation(self) -> Augmentation:
        """What is done to training images."""
        dataset = DATASETS[self.dataset]
        return Augmentation(dataset.crop_padding, dataset.flip, self.cutout, self.cutmix, self.rand_augment)


def preset_in(argv: Sequence[str]) -> TrainConfig:
    """The settings of the preset that a command line names, for its flags to be read over.

    Raises:
        InputError: No such preset.
    """
    parser = ArgumentParser("drelu-timm train", add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    name = parser.parse_known_args(argv)[0].preset
    if name is None:
        return TrainConfig(model=tyro.MISSING, dataset=tyro.MISSING)
    return TrainConfig.from_preset(name, model=tyro.MISSING, dataset=tyro.MISSING)


def flag_defaults(preset: str | None) -> dict[str, Any]:
    """What a flag that is not given stands for, beside ``--preset`` or without; None for those that must be given."""
    defaults = {field.name: None if field.default is MISSING else field.default for field in fields(TrainConfig)}
    return defaults | (PRESETS[preset].settings | {"preset": None} if preset in PRESETS else {})


def resolve(config: TrainConfig) -> TrainConfig:
    """The config with every default filled in that depends on another field, and checked.

    Raises:
        InputError: One line on the first field that cannot be used.
    """
    _check_names(config)
    _check_numbers(config)
    _check_combinations(config)
    threat_model = _threat_model(config)
    config = replace(
        config,
        norm=threat_model.norm,
        eps=threat_model.written,
        step_size=threat_model.eps / 4 if config.step_size is None else config.step_size,
        monitor=config.monitor or ("loss" if config.objective == "natural" else "pgd"),
        output_dir=config.output_dir or Path("runs") / _run_name(config),
    )
    _check_output(config)
    return config


def _threat_model(config: TrainConfig) -> ThreatModel:
    """What is asked for, by default the preset's, or else the dataset's; a preset's radius counts as not given."""
    dataset, preset = DATASETS[config.dataset], PRESETS[config.preset].settings if config.preset else {}
    default = ThreatModel.parse(preset.get("norm", dataset.norm), preset.get("eps", dataset.eps))
    eps = None if config.eps == preset.get("eps") else config.eps
    return ThreatModel.parse(*norm_and_radius(config.norm, eps, default))


def _check_names(config: TrainConfig) -> None:
    if config.dataset not in DATASETS:
        raise unknown("--dataset", config.dataset, DATASETS)
    if not timm.is_model(config.model):
        raise unknown("--model", config.model, timm.list_models())
    check_tag("--model", config.model)
    DATASETS[config.dataset].side(config.img_size)
    make_objective(config.objective, beta=config.beta)
    for name, allowed in {"schedule": SCHEDULES, "monitor": MONITORS, "cap_penalty": CAP_PENALTIES}.items():
        if getattr(config, name) not in (None, *allowed):
            raise unknown(flag(name), getattr(config, name), allowed)
    Options(**model_options(config))


def _check_numbers(config: TrainConfig) -> None:
    for name in (
        "epochs",
        "batch_size",
        "grad_accum_steps",
        "steps",
        "step_size",
        "lr",
        "cap_lr",
        "n_train",
        "patience",
    ):
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{flag(name)} {value} must be a number above 0")
    for name in ("beta", "cap_weight", "weight_decay", "awp_gamma", "workers", "save_every"):
        if not 0 <= getattr(config, name) < float("inf"):
            raise InputError(f"{flag(name)} {getattr(config, name)} must be a number >= 0")
    if not 0 <= config.seed < 2**32:
        raise InputError(f"--seed {config.seed} must be an integer from 0 to {2**32 - 1}")
    for name in ("generated_fraction", "ema_decay", "label_smoothing", "warmup"):
        if not 0 <= getattr(config, name) < 1:
            raise InputError(f"{flag(name)} {getattr(config, name)} must be in [0, 1)")
    config.augmentation  # noqa: B018  (which checks its own)


def _check_combinations(config: TrainConfig) -> None:
    if config.preset is not None:
        _check_preset(config, config.preset)
    if bool(config.generated) != bool(config.generated_fraction):
        given, missing = ("--generated", "--generated-fraction F (0.7 for CIFAR, 0.8 for TinyImageNet are common)")
        if not config.generated:
            given, missing = (
                f"--generated-fraction {config.generated_fraction:g}",
                "--generated FILE.npz [FILE.npz ...]",
            )
        raise InputError(f"{given} needs {missing} as well")
    if config.cutmix and config.objective == "mart":
        raise InputError("--cutmix mixes labels, and --objective mart needs one label an image; leave one of them out")


def _check_preset(config: TrainConfig, name: str) -> None:
    if name not in PRESETS:
        raise unknown("--preset", name, PRESETS)
    if config.dataset not in PRESETS[name].datasets:
        raise InputError(
            f"--preset {name} does not fit --dataset {config.dataset}; it is for {', '.join(PRESETS[name].datasets)}"
        )
    if name == "paper-at" and config.init_from is None:
        raise InputError("--preset paper-at goes on from natural training; give that run by --init-from RUN")


def _run_name(config: TrainConfig) -> str:
    parts = [config.dataset, config.model, config.placement, config.activation, config.objective]
    if config.objective in ("trades", "mart"):
        parts.append(f"beta{config.beta:g}")
    if config.awp_gamma:
        parts.append(f"awp{config.awp_gamma:g}")
    if config.cap_weight:
        parts.append(f"{'' if config.cap_penalty == 'squared' else config.cap_penalty + '-'}cap{config.cap_weight:g}")
    if config.generated_fraction:
        parts.append(f"generated{config.generated_fraction:g}")
    return "-".join([*filter(None, parts), f"seed{config.seed}"])


@dataclass(frozen=True)
class _Saved:
    """What is read of a config.json to resume its training."""

    train: dict[str, Any]


def _check_output(config: TrainConfig) -> None:
    """Refuse a directory that is in use, and a --resume whose flags are not those the run began with."""
    assert config.output_dir is not None
    if config.output_dir.exists() and not config.output_dir.is_dir():
        raise InputError(f"--output-dir {config.output_dir} is a file; name a folder")
    path = config.output_dir / "config.json"
    if not path.exists():
        held = config.output_dir.iterdir() if config.output_dir.is_dir() else ()
        if any(not path.name.startswith(".") for path in held):  # those may be of a killed process
            raise InputError(f"--output-dir {config.output_dir} is not empty and holds no run; name another folder")
        return
    if not config.resume:
        raise InputError(f"--output-dir {config.output_dir} is in use; add --resume to go on, or name another folder")
    before, now = load(_Saved, read_json(path), path).train, saved(config)
    compared = [key for key in now if key not in (*_MAY_MOVE, *_SAME_UPDATES)]
    differing = [f"{key} ({before.get(key)} before, {now[key]} now)" for key in compared if before.get(key) != now[key]]
    if differing:
        raise InputError(f"--resume of {config.output_dir} with other settings: {', '.join(differing)}")


def saved(config: TrainConfig) -> dict[str, Any]:
    """The config as config.json holds it: what makes the run, so not where from or whether it was resumed."""
    return {key: _plain(value) for key, value in asdict(config).items() if key not in _NOT_SAVED}


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def model_options(config: TrainConfig) -> dict[str, Any]:
    """The arguments of a *_drelu model that the config gives."""
    options = {key: getattr(config, key) for key in ("placement", "activation", "width", "cap", "small_images")}
    options = {key: value for key, value in options.items() if value is not None and value is not False}
    if options and not config.model.partition(".")[0].endswith("_drelu"):
        given = ", ".join(flag(key) for key in options)
        raise InputError(f"{given} belongs to *_drelu models; --model {config.model}_drelu takes it")
    return options
