"""Everything a training is made with: the flags of `drelu-timm train`, its presets, and what is allowed."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import tyro

from .attacks import ThreatModel
from .data import DATASETS
from .errors import InputError, unknown
from .objectives import make_objective
from .runs import read_json
from .variants import Options

SCHEDULES = ("constant", "cosine", "plateau")
_PAPER = {"optimizer": "adam", "lr": 1e-3, "cap_lr": 1e-3, "schedule": "plateau", "patience": 10}
PRESETS: dict[str, dict[str, Any]] = {
    # Section 5.2 of the D-ReLU paper: Adam 1e-3 for everything, halved on a plateau of 5 epochs, stopped after 10.
    "paper-drelu": {**_PAPER, "epochs": 2000},
    # Section 5.4: adversarial training for 10 epochs after natural training (--init-from RUN).
    "paper-at": {**_PAPER, "objective": "at", "epochs": 10},
    "paper-trades": {**_PAPER, "objective": "trades", "epochs": 2000},
}


@dataclass(frozen=True)
class TrainConfig:
    """Train a timm model and write a run directory."""

    model: str
    """timm architecture, plain or with its D-ReLU: resnet50, resnet50_drelu, dense_drelu, shallow_cnn_drelu, ..."""
    dataset: str
    """digits, mnist, cifar10, cifar100, tiny_imagenet, or folder for any folder of images."""
    data_dir: Path = Path("data")
    """Where the dataset lies, or is downloaded to."""
    img_size: int | None = None
    """Side of an image, in pixels; by default the dataset's own, and needed for folder."""
    output_dir: Path | None = None
    """Run directory to write; by default runs/ and a name of what the run holds."""
    resume: bool = False
    """Go on with the run in the output directory; starts anew where there is none."""
    init_from: Path | None = None
    """Run whose trained weights to start from."""
    preset: str | None = None
    """Named settings, over which flags given beside it win: paper-drelu, paper-at, paper-trades."""

    objective: str = "natural"
    """natural, at (adversarial training by PGD) or trades."""
    beta: float = 6.0
    """TRADES: weight of the KL term."""
    norm: str | None = None
    """Norm of the inner attack, Linf or L2; by default the dataset's."""
    eps: str | None = None
    """Radius of the inner attack, such as 8/255; by default the dataset's."""
    steps: int = 10
    """Gradients of the inner attack."""
    step_size: float | None = None
    """Length of a step, in units of a [0, 1] pixel; by default eps / 4."""

    placement: str | None = None
    """Where a *_drelu model has its D-ReLUs: head (the default), stem or all."""
    activation: str | None = None
    """What stands there: drelu (the default), or srelu, relu6, relu for controls."""
    width: int | None = None
    """Units of the added dense layer, or channels of the added convolution; by default 128."""
    cap: float | None = None
    """Initial cap of a D-ReLU, fixed cap of an S-ReLU; by default 100."""
    small_images: bool = False
    """A stem for small images: 3x3, stride 1, no pooling, or an upsampling layer where the family has no such stem."""
    pretrained: bool = False
    """Start from the base architecture's ImageNet weights."""

    cap_weight: float = 0.0
    """Weight of the sum of squared caps in the loss (the paper's balancer, lambda)."""
    cap_lr: float = 0.1
    """Learning rate of the caps; at the paper's 1e-3 a cap needs some 100,000 steps from 100 to 1."""
    optimizer: str = "adam"
    """Any optimiser of timm: adam, adamw, sgd, ..."""
    lr: float = 1e-3
    """Learning rate of everything but the caps."""
    weight_decay: float = 0.0
    """Weight decay; biases, norms and caps are spared."""
    schedule: str = "constant"
    """Learning rates: constant, cosine (to 0, step by step) or plateau (halved after 5 epochs without a lower loss)."""
    epochs: int = 10
    """Passes over the training set, at most."""
    patience: int | None = None
    """Stop after so many epochs without a lower held-out loss; by default never."""
    batch_size: int = 128
    """Images a step, over all processes together: the same run on any number of GPUs."""
    n_train: int | None = None
    """Use the first so many training images only; any first ones are a fair sample."""
    seed: int = 0
    """Keys all randomness."""

    @property
    def threat_model(self) -> ThreatModel:
        """Norm and radius of the inner attack, of a resolved config."""
        assert self.norm is not None and self.eps is not None
        return ThreatModel.parse(self.norm, self.eps)


def preset_in(argv: Sequence[str]) -> TrainConfig:
    """The settings of the preset that a command line names, for its flags to be read over.

    Raises:
        InputError: No such preset.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    name = parser.parse_known_args(argv)[0].preset
    if name is not None and name not in PRESETS:
        raise unknown("--preset", name, PRESETS)
    return TrainConfig(model=tyro.MISSING, dataset=tyro.MISSING, **PRESETS.get(name or "", {}))


def resolve(config: TrainConfig) -> TrainConfig:
    """The config with every default filled in that depends on another field, and checked.

    Raises:
        InputError: One line on the first field that cannot be used.
    """
    if config.dataset not in DATASETS:
        raise unknown("--dataset", config.dataset, DATASETS)
    if not timm.is_model(config.model):
        raise unknown("--model", config.model, timm.list_models())
    if config.preset == "paper-at" and config.init_from is None:
        raise InputError("--preset paper-at goes on from natural training; give that run by --init-from RUN")
    for name in ("epochs", "batch_size", "steps", "lr", "cap_lr"):
        if not getattr(config, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)} must be above 0")
    for name in ("beta", "cap_weight", "weight_decay"):
        if not 0 <= getattr(config, name) < float("inf"):
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)} must be a number >= 0")
    make_objective(config.objective, beta=config.beta)
    if config.schedule not in SCHEDULES:
        raise unknown("--schedule", config.schedule, SCHEDULES)
    Options(**model_options(config))
    dataset = DATASETS[config.dataset]
    threat_model = ThreatModel.parse(config.norm or dataset.norm, config.eps or dataset.eps)
    config = replace(
        config,
        norm=threat_model.norm,
        eps=threat_model.written,
        step_size=threat_model.eps / 4 if config.step_size is None else config.step_size,
        output_dir=config.output_dir or Path("runs") / _run_name(config),
    )
    _check_output(config)
    return config


def _run_name(config: TrainConfig) -> str:
    parts = [config.dataset, config.model, config.placement, config.activation, config.objective]
    if config.objective == "trades":
        parts.append(f"beta{config.beta:g}")
    if config.cap_weight:
        parts.append(f"cap{config.cap_weight:g}")
    return "-".join([*filter(None, parts), f"seed{config.seed}"])


def _check_output(config: TrainConfig) -> None:
    """Refuse a directory that is in use, and a --resume whose flags are not those the run began with."""
    assert config.output_dir is not None
    if not (config.output_dir / "config.json").exists():
        if config.output_dir.is_dir() and any(config.output_dir.iterdir()):
            raise InputError(f"--output-dir {config.output_dir} is not empty and holds no run; name another folder")
        return
    if not config.resume:
        raise InputError(f"--output-dir {config.output_dir} is in use; add --resume to go on, or name another folder")
    before, now = read_json(config.output_dir / "config.json")["train"], saved(config)
    differing = [f"{key} ({before.get(key)} before, {now[key]} now)" for key in now if before.get(key) != now[key]]
    if differing:
        raise InputError(f"--resume of {config.output_dir} with other settings: {', '.join(differing)}")


def saved(config: TrainConfig) -> dict[str, Any]:
    """The config as config.json holds it: what makes the run, so not where from or whether it was resumed."""
    fields = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    return {key: value for key, value in fields.items() if key not in ("resume", "output_dir")}


def model_options(config: TrainConfig) -> dict[str, Any]:
    """The arguments of a *_drelu model that the config gives."""
    options = {key: getattr(config, key) for key in ("placement", "activation", "width", "cap", "small_images")}
    options = {key: value for key, value in options.items() if value not in (None, False)}
    if options and not config.model.partition(".")[0].endswith("_drelu"):
        given = ", ".join(f"--{key.replace('_', '-')}" for key in options)
        raise InputError(f"{given} belongs to *_drelu models; --model {config.model}_drelu takes it")
    return options
