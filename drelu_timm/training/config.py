"""The settings of a training: the flags of `drelu-timm train`, their defaults, and what is allowed."""

import hashlib
import json
import re
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..attacks.threat_model import ThreatModel, norm_and_radius
from ..command_line import flag, group
from ..data.datasets import DATASETS
from ..errors import InputError, one_line, unknown
from ..files import read_json
from ..schema import Constraint, Count, Share, Whole, field_types, parse
from .ibp import IBP, check_ibp
from .presets import PRESETS

if TYPE_CHECKING:
    from ..data.augment import Augmentation

SCHEDULES = ("constant", "cosine", "onecycle", "plateau")
MONITORS = ("loss", "pgd", "margin", "certified")
ON_MASKING = ("warn", "stop")
# These do not change the result of a run, so they are not in config.json.
_NOT_SAVED = ("resume", "output_dir", "save_every", "workers", "log_with", "on_masking")
# A resumed run may change these: files may move, since digests of their content are compared instead, ...
_MAY_MOVE = ("data_dir", "generated", "init_from")
_SAME_UPDATES = ("grad_accum_steps", "compile")  # ... and these give the same updates up to rounding
_Positive = Annotated[float, Constraint(lambda value: value > 0, "a number above 0")]
_NotNegative = Annotated[float, Constraint(lambda value: value >= 0, "a number >= 0")]
_Fraction = Annotated[float, Constraint(lambda value: 0 <= value < 1, "in [0, 1)")]
_Seed = Annotated[int, Constraint(lambda value: 0 <= value < 2**32, f"an integer from 0 to {2**32 - 1}")]
_LARGEST_MAGNITUDE = 10  # of timm's RandAugment, which silently reduces larger ones


@dataclass(frozen=True)
class TrainConfig:
    """Train a timm model and write a run directory."""

    model: str = field(metadata=group("task", "The model and the data."))
    """timm architecture, plain or with a D-ReLU: resnet50, wide_resnet28_10, resnet50_drelu, dense_drelu, ..."""
    dataset: str
    """digits, mnist, cifar10, cifar100, tiny_imagenet, or folder for any folder of images."""
    data_dir: Path = Path("data")
    """Folder of the dataset, which is downloaded there if missing. For folder: DIR/train and DIR/val (or test), folders
    or .tar files with one folder per class at the top and its images at any depth below."""
    img_size: int | None = None
    """Height and width of images in pixels; by default the dataset's. Required for folder."""
    n_train: Count | None = None
    """Use only the first N training images; any first N are a fair sample."""
    generated: tuple[Path, ...] = ()
    """Generated images to mix in: .npz files with `image` and `label`, such as EDM's; several are read as one."""
    generated_fraction: _Fraction = 0.0
    """Fraction of generated images in every batch; an epoch has as many steps as without them."""
    output_dir: Path | None = field(
        default=None, metadata=group("run", "Where it is written, and what it starts from.")
    )
    """Run directory to write; by default a folder in runs/ that is named after the settings and a digest of them."""
    resume: bool = False
    """Resume the run in the output directory; start from scratch where there is none."""
    init_from: Path | None = None
    """Run whose trained weights to start from."""
    preset: str | None = None
    """Named settings, printed with their source; flags and a file (--config) win over them:
    paper-drelu, paper-at, paper-trades, paper-drelu-edm, paper-trades-edm, wang2023, wang2023-tiny-imagenet.
    (In Python: `TrainConfig.from_preset`.)"""
    pretrained: bool = False
    """Start from the base architecture's ImageNet weights."""
    seed: _Seed = 0
    """Seed of all randomness."""
    objective: str = field(default="natural", metadata=group("objective", "The loss, and the inner attack."))
    """natural, at (adversarial training), n-fgsm (in a single step: a tenth of the time), trades, mart or ibp."""
    beta: _NotNegative = 6.0
    """TRADES and MART: weight of the KL term."""
    awp_gamma: _NotNegative = 0.0
    """Size of adversarial weight perturbation relative to the weights (0.005 is common); 0 for none."""
    label_smoothing: _Fraction = 0.0
    """Label smoothing in the loss (not in the attack)."""
    ibp_eps: str | None = None
    """IBP: radius of the bounds in training, such as 0.4 for --eps 0.3; by default --eps."""
    ibp_clean_weight: Share = 0.5
    """IBP: weight of the loss on clean images after the ramp; the loss on bounds has the rest."""
    ibp_ramp: Share = 0.4
    """IBP: fraction of the steps in which the radius rises from 0, and the clean weight falls from 1."""
    ibp_init: bool = False
    """IBP: draw initial weights that keep the width of intervals (Shi et al. 2021)."""
    norm: str | None = None
    """Norm of the inner attack, Linf or L2; by default the dataset's. Another norm needs --eps."""
    eps: str | None = None
    """Radius of the inner attack, such as 8/255; by default the dataset's."""
    steps: Count = 10
    """Gradient steps of the inner attack; n-fgsm always takes one."""
    step_size: _Positive | None = None
    """Length of a step of the inner attack, in pixel values of [0, 1]; by default eps / 4, for n-fgsm eps."""
    on_masking: str = "warn"
    """What to do when another attack than the inner one shows after an epoch that the model hides gradients: warn, or
    stop the training."""
    placement: str | None = field(default=None, metadata=group("layer", "The added layer of a *_drelu model."))
    """Where a *_drelu model has its D-ReLUs: head (the default), stem or all."""
    activation: str | None = None
    """Activation there: drelu (the default), srelu, relu, relu6, silu, gelu, prelu, pssilu, bounded-relu, pact, tent,
    fitact, rcr-af or kwta."""
    width: int | None = None
    """Units of the added dense layer, or channels of the added convolution; by default 128."""
    cap: float | None = None
    """Initial cap of a D-ReLU, pact, tent or fitact, fixed cap of srelu, bounded-relu or rcr-af; by default 100."""
    cap_weight: _NotNegative = 0.0
    """Weight of the penalty on caps in the loss (the paper's balancer, lambda)."""
    cap_penalty: str = "squared"
    """squared (the paper's: sum of squared caps), or effective (caps multiplied by the weights of the next layer)."""
    cap_lr: _Positive = 0.1
    """Learning rate of the caps; at the paper's 1e-3 a cap needs some 100,000 steps from 100 to 1."""
    small_images: bool = False
    """Stem for small images: 3x3, stride 1, no pooling, or an upsampling layer where the family has no such stem."""
    optimizer: str = field(default="adam", metadata=group("optimization", "Length, learning rates, the best epoch."))
    """Any optimizer of timm: adam, adamw, sgd (Nesterov, momentum 0.9), ..."""
    lr: _Positive = 1e-3
    """Highest learning rate of everything but the caps."""
    weight_decay: _NotNegative = 0.0
    """Weight decay; not applied to biases, norms, caps, and what timm's model excludes (position embeddings, ...)."""
    schedule: str = "constant"
    """Learning rates: constant, plateau (halved after 5 epochs without a lower loss), cosine (to 0) or onecycle (up,
    then along a cosine to 0)."""
    warmup: _Fraction = 0.025
    """Fraction of the steps in which onecycle rises."""
    ema_decay: _Fraction = 0.0
    """Decay per step of an exponential moving average of the weights (0.995 is common); 0 for none.
    The averaged model is measured in addition to the raw one, and is the one that is kept."""
    epochs: Count = 10
    """Largest number of passes over the training set."""
    monitor: str | None = None
    """Held-out figure that selects the best epoch, of the averaged weights if there are any: loss (default of natural),
    pgd (under the inner attack), margin (under one of another kind; default) or certified (bounds; default of ibp)."""
    patience: Count | None = None
    """Stop after N epochs without a better held-out figure; by default never."""
    batch_size: Count = 128
    """Images per step over all processes together, so that a run is the same on any number of GPUs."""
    grad_accum_steps: Count = 1
    """Parts into which each process splits its share of a batch, to save memory; BatchNorm sees each part alone."""
    sync_bn: bool = False
    """Compute BatchNorm statistics over the batch of all processes; by default each process uses its part."""
    cutout: Whole = field(default=0, metadata=group("augmentation", "In addition to crop and flip."))
    """Side of the square that Cutout erases, in pixels; 0 for none."""
    cutmix: Share = 0.0
    """Probability that a batch is mixed by CutMix."""
    rand_augment: str = ""
    """timm's RandAugment, such as rand-m9-n2-mstd0.5; empty for none."""
    compile: bool = field(default=False, metadata=group("machine", "Settings that do not change the result."))
    """Compile the model with torch.compile: a minute or more at the start, less time per step on a GPU."""
    workers: Whole = 0
    """Processes that prepare batches, per training process, at most one per core; 0 for none."""
    save_every: Whole = 0
    """Also save a state after every N steps; by default only at the end of each epoch, and on SIGTERM."""
    log_with: str | None = None
    """Tracker of accelerate that gets the figures of every epoch, in addition to log.jsonl: tensorboard, wandb, ..."""

    @classmethod
    def from_preset(cls, name: str, **settings: Any) -> "TrainConfig":
        """Return the config that ``--preset name`` gives, with flags for ``settings``.

        Raises:
            InputError: Unknown preset.
        """
        if name not in PRESETS:
            raise unknown("--preset", name, PRESETS)
        return cls(**{**PRESETS[name].settings, "preset": name, **settings})

    @property
    def threat_model(self) -> ThreatModel:
        """Norm and eps of the inner attack of a resolved config."""
        assert self.norm is not None and self.eps is not None
        return ThreatModel.parse(self.norm, self.eps)

    @property
    def augmentation(self) -> "Augmentation":
        """Augmentation of training images."""
        from ..data.augment import Augmentation  # needs torch, which the command line starts without

        dataset = DATASETS[self.dataset]
        return Augmentation(dataset.crop_padding, dataset.flip, self.cutout, self.cutmix, self.rand_augment)


def variant_base(model: str) -> str | None:
    """Return the base architecture of a *_drelu model's name, without a tag; None for other models."""
    architecture = model.partition(".")[0]
    return architecture.removesuffix("_drelu") if architecture.endswith("_drelu") else None


def flag_defaults(preset: str | None) -> dict[str, Any]:
    """Return the values of flags that are not given, with or without ``--preset``; None for required ones."""
    defaults = {each.name: None if each.default is MISSING else each.default for each in fields(TrainConfig)}
    return defaults | (PRESETS[preset].settings | {"preset": None} if preset in PRESETS else {})


def resolve(config: TrainConfig) -> TrainConfig:
    """Check a config, and fill in every default that depends on another field.

    Raises:
        InputError: A field has a value that is not allowed, or the output directory cannot be used.
    """
    config = _filled(_with_types(config))
    _check_names(config)
    _check_augmentation(config)
    _check_combinations(config)
    config = replace(config, output_dir=run_directory(config))
    check_output(config)
    return config


def run_directory(config: TrainConfig) -> Path:
    """Return the run directory of a config: its own, or the default one, whose name no other settings share.

    Raises:
        InputError: The default cannot be named, since dataset, preset, norm or eps are not allowed.
    """
    return config.output_dir or Path("runs") / _run_name(_filled(config))


def _with_types(config: TrainConfig) -> TrainConfig:
    """Check each value against the annotation of its field, as for a file: Python callers may pass anything."""
    types, values = field_types(TrainConfig), json.loads(json.dumps(asdict(config), default=str))
    return replace(config, **{name: parse(types[name], value, flag(name)) for name, value in values.items()})


def _filled(config: TrainConfig) -> TrainConfig:
    """Fill in norm, eps, step size and monitor; needs neither torch nor timm."""
    if config.dataset not in DATASETS:
        raise unknown("--dataset", config.dataset, DATASETS)
    if config.preset is not None and config.preset not in PRESETS:
        raise unknown("--preset", config.preset, PRESETS)
    threat_model = _threat_model(config)
    return replace(
        config,
        norm=threat_model.norm,
        eps=threat_model.written,
        steps=1 if config.objective == "n-fgsm" and config.steps == TrainConfig.steps else config.steps,
        step_size=config.step_size or _default_step_size(threat_model, config.objective),
        monitor=config.monitor or _default_monitor(config.objective),
    )


def saved(config: TrainConfig) -> dict[str, Any]:
    """Return what config.json holds of a config: JSON values of all settings that change the result."""
    left_out = _NOT_SAVED if config.objective == "ibp" else (*_NOT_SAVED, *IBP)  # runs from before IBP stay equal
    return json.loads(json.dumps({k: v for k, v in asdict(config).items() if k not in left_out}, default=str))


def given_settings(saved: dict[str, Any]) -> dict[str, Any]:
    """Drop the settings of a run that have the value `resolve` fills in.

    `resolve` fills them in again, so that ``step_size`` follows a new ``eps``, and ``monitor`` a new ``objective``.

    Args:
        saved: What `saved` returned, with the types of `TrainConfig`.

    Raises:
        InputError: Norm and eps are not a threat model.
    """
    objective = saved.get("objective", "natural")
    filled: dict[str, Any] = {"monitor": _default_monitor(objective)}
    if objective == "n-fgsm":
        filled["steps"] = 1
    if saved.get("norm") is not None and saved.get("eps") is not None:
        filled["step_size"] = _default_step_size(ThreatModel.parse(saved["norm"], saved["eps"]), objective)
    of_preset = flag_defaults(saved.get("preset"))  # without a setting that the preset has, the preset's would apply
    return {
        name: value
        for name, value in saved.items()
        if name not in filled or filled[name] != value or of_preset[name] is not None
    }


def model_options(config: TrainConfig) -> dict[str, Any]:
    """Return the arguments of a *_drelu model that the config gives.

    Raises:
        InputError: The model is not a *_drelu model, and there are some.
    """
    options = {key: getattr(config, key) for key in ("placement", "activation", "width", "cap", "small_images")}
    options = {key: value for key, value in options.items() if value is not None and value is not False}
    if options and not variant_base(config.model):
        given = ", ".join(flag(key) for key in options)
        raise InputError(f"{given} can only be used with *_drelu models. Use --model {config.model}_drelu.")
    return options


def _default_step_size(threat_model: ThreatModel, objective: str) -> float:
    return threat_model.eps if objective == "n-fgsm" else threat_model.eps / 4


def _default_monitor(objective: str) -> str:
    return {"natural": "loss", "ibp": "certified"}.get(objective, "margin")


def _threat_model(config: TrainConfig) -> ThreatModel:
    """Return the given norm and eps, by default the preset's or else the dataset's."""
    dataset, preset = DATASETS[config.dataset], PRESETS[config.preset].settings if config.preset else {}
    default = ThreatModel.parse(preset.get("norm", dataset.norm), preset.get("eps", dataset.eps))
    # The preset's eps counts as not given: it belongs to the preset's norm, and another norm needs its own.
    eps = None if config.eps == preset.get("eps") else config.eps
    return ThreatModel.parse(*norm_and_radius(config.norm, eps, default))


def _check_names(config: TrainConfig) -> None:
    # Imported here, since the command line reads flags and prints help without torch and timm.
    import timm

    from ..models.caps import CAP_PENALTIES
    from ..models.registry import check_tag
    from ..models.variants import Options
    from .objectives import make_objective

    if not timm.is_model(config.model):
        raise unknown("--model", config.model, timm.list_models())
    check_tag("--model", config.model)
    DATASETS[config.dataset].side(config.img_size)
    make_objective(config.objective, beta=config.beta)
    names = {"schedule": SCHEDULES, "monitor": MONITORS, "on_masking": ON_MASKING, "cap_penalty": CAP_PENALTIES}
    for name, allowed in names.items():
        if getattr(config, name) not in (None, *allowed):
            raise unknown(flag(name), getattr(config, name), allowed)
    Options(**model_options(config))


def _check_augmentation(config: TrainConfig) -> None:
    config.augmentation  # noqa: B018  (its constructor checks each value alone)
    side = DATASETS[config.dataset].side(config.img_size)
    if config.cutout > side:
        raise InputError(f"--cutout {config.cutout} is larger than the images, which are {side} pixels wide")
    given = {key: int(value) for key, value in re.findall(r"-(m|mmax)(\d+)", config.rand_augment)}
    largest = given.get("mmax", _LARGEST_MAGNITUDE)
    if given.get("m", 0) > largest:
        raise InputError(f"--rand-augment {config.rand_augment}: timm reduces magnitudes above m{largest}. Use less.")


def _check_combinations(config: TrainConfig) -> None:
    preset = config.preset
    if preset is not None and config.dataset not in PRESETS[preset].datasets:
        allowed = ", ".join(PRESETS[preset].datasets)
        raise InputError(f"--preset {preset} does not fit --dataset {config.dataset}. It is for {allowed}.")
    if preset == "paper-at" and config.init_from is None:
        raise InputError("--preset paper-at continues natural training. Name that run with --init-from RUN.")
    if config.generated and not config.generated_fraction:
        raise InputError("--generated needs --generated-fraction F as well (0.7 for CIFAR, 0.8 for TinyImageNet)")
    if config.generated_fraction and not config.generated:
        given = f"--generated-fraction {config.generated_fraction:g}"
        raise InputError(f"{given} needs --generated FILE.npz [FILE.npz ...] as well")
    if config.objective == "n-fgsm" and config.steps != 1:
        raise InputError(f"--steps {config.steps} does not fit --objective n-fgsm, which takes one step. Leave it out.")
    if config.objective == "natural" and config.monitor == "margin":
        raise InputError("--monitor margin is measured for robust objectives only. Use loss or pgd.")
    if config.cutmix and config.objective == "mart":
        raise InputError("--cutmix mixes labels, and --objective mart needs one label per image. Omit one of them.")
    check_ibp(config)


def _run_name(config: TrainConfig) -> str:
    """Return a readable name with a digest of all settings that are not at their defaults."""
    defaults = flag_defaults(None)
    given = {k: v for k, v in saved(config).items() if k not in _SAME_UPDATES and v != defaults[k]}
    digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:8]
    parts = [config.dataset, config.model, config.activation, config.objective, f"seed{config.seed}", digest]
    return "-".join(filter(None, parts))


def check_output(config: TrainConfig) -> None:
    """Check that the output directory of a resolved config is new, or belongs to the run to resume.

    Raises:
        InputError: The directory is something else, is in use, or holds a run with other settings.
    """
    folder = config.output_dir
    assert folder is not None
    path = folder / "config.json"
    try:
        # Hidden files may be the lock, or belong to a process that was killed before it wrote config.json.
        visible = [each.name for each in folder.iterdir() if not each.name.startswith(".")]
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # not a folder, too long a name, or a null character
        raise InputError(
            f"--output-dir {str(folder)[:80]!r} cannot be used ({one_line(error)}). Name another."
        ) from error
    if not visible:
        return
    if path.name not in visible:
        raise InputError(f"--output-dir {folder} is not empty and is not a run directory. Name another folder.")
    if not config.resume:
        raise InputError(f"--output-dir {folder} is in use. Add --resume to continue that run, or name another folder.")
    before, now = read_json(path).get("train"), saved(config)
    if not isinstance(before, dict):
        raise InputError(f"{path}: train must be an object. Restore the file, or name another folder.")
    differing = [
        f"{key} ({before.get(key)} before, {value} now)"
        for key, value in now.items()
        if key not in (*_MAY_MOVE, *_SAME_UPDATES) and before.get(key) != value
    ]
    if differing:
        raise InputError(f"--resume of {folder} with other settings: {', '.join(differing)}")
