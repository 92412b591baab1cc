"""Everything a training is made with: the flags of `drelu-timm train`, and what is allowed."""

from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..attacks.threat_model import ThreatModel, norm_and_radius
from ..command_line import flag, group
from ..data.datasets import DATASETS
from ..errors import InputError, unknown
from ..files import read_json
from ..schema import load
from .presets import PRESETS

if TYPE_CHECKING:
    from ..data.augment import Augmentation

SCHEDULES = ("constant", "cosine", "onecycle", "plateau")
MONITORS = ("loss", "pgd", "certified")
# What does not change the result of a run, so that it may change when it is resumed.
_NOT_SAVED = ("resume", "output_dir", "save_every", "workers", "log_with")
_MAY_MOVE = ("data_dir", "generated", "init_from")  # what lies there is compared instead, or was read at the start
_SAME_UPDATES = ("grad_accum_steps", "compile")  # up to rounding


@dataclass(frozen=True)
class TrainConfig:
    """Train a timm model and write a run directory."""

    model: str = field(metadata=group("task", "What is trained, and on what."))
    """timm architecture, plain or with its D-ReLU: resnet50, wide_resnet28_10, resnet50_drelu, dense_drelu, ..."""
    dataset: str
    """digits, mnist, cifar10, cifar100, tiny_imagenet, or folder for any folder of images."""
    data_dir: Path = Path("data")
    """Where the dataset lies, or is downloaded to. For folder: DIR/train and DIR/val (or test), folders or .tar files
    with a folder per class at the top and its images at any depth below."""
    img_size: int | None = None
    """Side of an image, in pixels; by default the dataset's own, and needed for folder."""
    n_train: int | None = None
    """Use the first so many training images only; any first ones are a fair sample."""
    generated: tuple[Path, ...] = ()
    """Generated images to mix in: .npz files with `image` and `label`, such as EDM's; several are read as one."""
    generated_fraction: float = 0.0
    """Share of generated images in every batch; an epoch keeps the size of the real training set."""
    output_dir: Path | None = field(
        default=None, metadata=group("run", "Where the run is written, and what it starts from.")
    )
    """Run directory to write; by default runs/ and a name of what the run holds."""
    resume: bool = False
    """Resume the run in the output directory; start from scratch where there is none."""
    init_from: Path | None = None
    """Run whose trained weights to start from."""
    preset: str | None = None
    """Named settings, printed with their source; flags and a file (--config) win over them:
    paper-drelu, paper-at, paper-trades, paper-drelu-edm, paper-trades-edm, wang2023, wang2023-tiny-imagenet.
    (From Python: `TrainConfig.from_preset`.)"""
    pretrained: bool = False
    """Start from the base architecture's ImageNet weights."""
    seed: int = 0
    """Keys all randomness."""
    objective: str = field(default="natural", metadata=group("objective", "The loss, and the inner attack."))
    """natural, at (adversarial training by PGD), trades, mart or ibp (certified training by interval bounds)."""
    beta: float = 6.0
    """TRADES and MART: weight of the KL term."""
    awp_gamma: float = 0.0
    """Adversarial weight perturbation, of this size relative to the weights (0.005 is common); 0 for none."""
    label_smoothing: float = 0.0
    """Share of the label that goes to all classes evenly, in the loss (not in the attack)."""
    ibp_eps: str | None = None
    """IBP: radius of the bounds in training, such as 0.4 for --eps 0.3; by default --eps."""
    ibp_clean_weight: float = 0.5
    """IBP: weight of the loss on clean images after the ramp; the bounds have the rest."""
    ibp_ramp: float = 0.4
    """IBP: share of the steps in which the radius rises from 0, and the clean weight falls from 1."""
    ibp_init: bool = False
    """Initialize for IBP (Shi et al. 2021), so that bounds do not grow from layer to layer."""
    norm: str | None = None
    """Norm of the inner attack, Linf or L2; by default the dataset's. Another one needs --eps."""
    eps: str | None = None
    """Radius of the inner attack, such as 8/255; by default the dataset's."""
    steps: int = 10
    """Gradients of the inner attack."""
    step_size: float | None = None
    """Length of a step, in units of a [0, 1] pixel; by default eps / 4."""
    placement: str | None = field(
        default=None, metadata=group("layer", "The added layer of a *_drelu model, and its caps.")
    )
    """Where a *_drelu model has its D-ReLUs: head (the default), stem or all."""
    activation: str | None = None
    """What stands there: drelu (the default), pact, srelu, relu, relu6, silu, gelu, prelu or pssilu."""
    width: int | None = None
    """Units of the added dense layer, or channels of the added convolution; by default 128."""
    cap: float | None = None
    """Initial cap of a D-ReLU, fixed cap of an S-ReLU; by default 100."""
    cap_weight: float = 0.0
    """Weight of the caps' penalty in the loss (the paper's balancer, lambda)."""
    cap_penalty: str = "squared"
    """squared (the paper's: the sum of squared caps), or effective (each cap times what the next layer makes of it)."""
    cap_lr: float = 0.1
    """Learning rate of the caps; at the paper's 1e-3 a cap needs some 100,000 steps from 100 to 1."""
    small_images: bool = False
    """A stem for small images: 3x3, stride 1, no pooling, or an upsampling layer where the family has no such stem."""
    optimizer: str = field(
        default="adam", metadata=group("optimisation", "How long, how fast, and which epoch is kept.")
    )
    """Any optimiser of timm: adam, adamw, sgd (Nesterov, momentum 0.9), ..."""
    lr: float = 1e-3
    """Learning rate of everything but the caps, at its highest."""
    weight_decay: float = 0.0
    """Weight decay; biases, norms, caps and what timm's model names (position embeddings, ...) are spared."""
    schedule: str = "constant"
    """Learning rates: constant, plateau (halved after 5 epochs without a lower loss),
    cosine (to 0, step by step) or onecycle (up, then as a cosine to 0, step by step)."""
    warmup: float = 0.025
    """Share of the steps in which onecycle rises."""
    ema_decay: float = 0.0
    """Decay, a step, of an exponential moving average of the weights (0.995 is common); 0 for none.
    The averaged model is measured beside the raw one, and is what the run keeps."""
    epochs: int = 10
    """Passes over the training set, at most."""
    monitor: str | None = None
    """Held-out figure that says which epoch is best: loss, pgd (accuracy under the inner attack), or certified (IBP).
    By default loss for natural, certified for ibp, pgd for the others; of the averaged weights if there are any."""
    patience: int | None = None
    """Stop after so many epochs without a better held-out figure; by default never."""
    batch_size: int = 128
    """Images a step, over all processes together: the same run on any number of GPUs."""
    grad_accum_steps: int = 1
    """Parts that each process takes its share of a batch in, one after the other, where memory is short.
    The same update as without up to rounding, but that BatchNorm takes the statistics of each part."""
    sync_bn: bool = False
    """BatchNorm over the batch of all processes; by default each takes the statistics of its own part."""
    cutout: int = field(
        default=0, metadata=group("augmentation", "What is done to training images, in addition to crop and flip.")
    )
    """Side of the square that Cutout erases, in pixels; 0 for none."""
    cutmix: float = 0.0
    """Probability that a batch is mixed by CutMix."""
    rand_augment: str = ""
    """timm's RandAugment, such as rand-m9-n2-mstd0.5; empty for none."""
    compile: bool = field(default=False, metadata=group("machine", "What does not change the result."))
    """Compile the model by torch.compile: a minute or more at the start, fewer seconds a step on a GPU."""
    workers: int = 0
    """Processes that prepare batches, beside each training process; 0 for none."""
    save_every: int = 0
    """Save a state after every so many steps as well; by default at the end of an epoch, and on SIGTERM."""
    log_with: str | None = None
    """Tracker of accelerate for the figures of every epoch, beside log.jsonl: tensorboard, wandb, ..."""

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
    def bounded_eps(self) -> float:
        """Radius of IBP's bounds after the ramp, of a resolved config."""
        threat_model = self.threat_model
        return ThreatModel.parse(threat_model.norm, self.ibp_eps or threat_model.written).eps

    @property
    def augmentation(self) -> "Augmentation":
        """What is done to training images."""
        from ..data.augment import Augmentation

        dataset = DATASETS[self.dataset]
        return Augmentation(dataset.crop_padding, dataset.flip, self.cutout, self.cutmix, self.rand_augment)


def flag_defaults(preset: str | None) -> dict[str, Any]:
    """What a flag that is not given stands for, beside ``--preset`` or without; None for those that must be given."""
    defaults = {each.name: None if each.default is MISSING else each.default for each in fields(TrainConfig)}
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
        step_size=_default_step_size(threat_model) if config.step_size is None else config.step_size,
        monitor=config.monitor or _default_monitor(config.objective),
        output_dir=run_directory(config),
    )
    config.bounded_eps  # noqa: B018  (which checks its own)
    _check_output(config)
    return config


def run_directory(config: TrainConfig) -> Path:
    """Return the run directory of a config: its own, or the default one."""
    return config.output_dir or Path("runs") / _run_name(config)


def given_settings(saved: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a run's saved settings those that have the value `resolve` fills in.

    They are filled in again, so that ``step_size`` follows another ``eps``, and ``monitor`` another ``objective``.

    Args:
        saved: What `saved` returned, with the types of `TrainConfig`.

    Raises:
        InputError: Norm and eps that are no threat model.
    """
    filled: dict[str, Any] = {"monitor": _default_monitor(saved.get("objective", "natural"))}
    if saved.get("norm") is not None and saved.get("eps") is not None:
        filled["step_size"] = _default_step_size(ThreatModel.parse(saved["norm"], saved["eps"]))
    of_preset = flag_defaults(saved.get("preset"))  # where a preset sets one, leaving it out gives the preset's value
    return {
        name: value
        for name, value in saved.items()
        if name not in filled or filled[name] != value or of_preset[name] is not None
    }


def _default_step_size(threat_model: ThreatModel) -> float:
    return threat_model.eps / 4


def _default_monitor(objective: str) -> str:
    return {"natural": "loss", "ibp": "certified"}.get(objective, "pgd")


def _threat_model(config: TrainConfig) -> ThreatModel:
    """What is asked for, by default the preset's, or else the dataset's; a preset's radius counts as not given."""
    dataset, preset = DATASETS[config.dataset], PRESETS[config.preset].settings if config.preset else {}
    default = ThreatModel.parse(preset.get("norm", dataset.norm), preset.get("eps", dataset.eps))
    eps = None if config.eps == preset.get("eps") else config.eps
    return ThreatModel.parse(*norm_and_radius(config.norm, eps, default))


def _check_names(config: TrainConfig) -> None:
    # Here and not above, as flags and their help do without torch and timm.
    import timm

    from ..models.caps import CAP_PENALTIES
    from ..models.registration import check_tag
    from ..models.variants import Options
    from .objectives import make_objective

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
    for name in ("ibp_clean_weight", "ibp_ramp"):
        if not 0 <= getattr(config, name) <= 1:
            raise InputError(f"{flag(name)} {getattr(config, name)} must be in [0, 1]")
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
    if config.objective == "ibp":
        _check_ibp(config)
    elif config.ibp_eps is not None or config.monitor == "certified":
        name = "monitor" if config.ibp_eps is None else "ibp_eps"
        raise InputError(f"{flag(name)} {getattr(config, name)} belongs to --objective ibp. Leave it out.")
    if config.ibp_init and (config.pretrained or config.init_from):
        raise InputError("--ibp-init would overwrite the weights of --pretrained or --init-from. Give one of them.")


def _check_ibp(config: TrainConfig) -> None:
    """Refuse what interval bounds cannot be computed with, or what the objective does not use."""
    norm = _threat_model(config).norm
    if norm != "Linf":
        raise InputError(f"--objective ibp bounds Linf epsilon balls, not --norm {norm}. Give --norm Linf and --eps.")
    for name in ("cutmix", "label_smoothing", "compile", "sync_bn"):
        if getattr(config, name):
            raise InputError(f"{flag(name)} does not go with --objective ibp. Leave it out.")


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
    if config.objective == "ibp" and config.ibp_eps:
        parts.append(f"eps{config.ibp_eps.replace('/', '_')}")
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
