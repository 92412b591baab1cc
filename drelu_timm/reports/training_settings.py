"""Settings of a training, from its config.json and log, and the names that tables give it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..attacks.threat_model import radius_written
from ..errors import InputError, one_line
from ..files import read_json
from ..formatting import written
from ..results.result import Eps
from ..schema import Count, Share, Text, Whole, load

Flags = dict[str, Any]

_NOT_SETTINGS = ("seed", "data_dir", "init_from", "preset")  # the seed, and where files are
_LAYER = "_drelu"  # suffix of the name of an architecture with an added layer
_OBJECTIVES = {"natural": "", "at": "AT", "trades": "TRADES-{}", "mart": "MART-{}", "n-fgsm": "N-FGSM", "ibp": "IBP"}
_ACTIVATIONS = {"relu": "", "drelu": "D-ReLU", "srelu": "S-ReLU", "relu6": "ReLU6", "silu": "SiLU", "gelu": "GELU"}


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a training.

    Attributes:
        train: The flags of its config.json.
        start: Settings of the training whose weights it started from (``--init-from``), if any.
    """

    train: Flags
    start: "TrainingSettings | None" = None

    @property
    def starts(self) -> list["TrainingSettings"]:
        """The training it started from, the one that training started from, and so on."""
        return [] if self.start is None else [self.start, *self.start.starts]

    @property
    def seed(self) -> int:
        """Seed of the training."""
        return self.train["seed"]

    @property
    def architecture(self) -> str:
        """Name of the architecture without the suffix of an added layer and without timm's pretrained tag."""
        return self._full_architecture.removesuffix(_LAYER)

    @property
    def activation(self) -> str:
        """Activation of the added layer; "relu" for a model without one."""
        return (self.train["activation"] or "drelu") if self._has_layer else "relu"

    @property
    def placement(self) -> str:
        """Placement of the added layer; "head" for a model without one."""
        return self.train["placement"] or "head"

    @property
    def cap_weight(self) -> float | None:
        """Cap weight of a D-ReLU; None for other activations."""
        return self.train["cap_weight"] if self.activation == "drelu" else None

    @property
    def method(self) -> str:
        """Objective and activation without the cap weight: "AT", "TRADES-6", "D-ReLU", "AT + D-ReLU", "natural"."""
        objective = _OBJECTIVES[self.train["objective"]].format(written(self.train["beta"]))
        awp = " + AWP" if self.train["awp_gamma"] else ""
        return " + ".join(filter(None, [objective + awp, self._activation_name])) or "natural"

    @property
    def training(self) -> str:
        """The method with its cap weight, as the paper writes it: "AT", "D-ReLU-0.1", "AT + D-ReLU-0.01"."""
        return self.method if self.cap_weight is None else f"{self.method}-{written(self.cap_weight)}"

    @property
    def own_settings(self) -> Flags:
        """Flags that decide the weights, with the defaults of an added layer filled in and all numbers as floats."""
        flags = {name: _as_float(value) for name, value in self.train.items() if name not in _NOT_SETTINGS}
        return flags | ({"placement": self.placement, "activation": self.activation} if self._has_layer else {})

    @property
    def settings(self) -> Flags:
        """Everything that runs which differ only in their seed have in common, with the starts as "init_from ..."."""
        if self.start is None:
            return self.own_settings | {"init_from": "none"}
        started = {f"init_from {name}": value for name, value in self.start.settings.items()}
        return self.own_settings | {"init_from": "a run"} | started

    @property
    def settings_key(self) -> str:
        """The settings as one string, equal for equal settings."""
        return json.dumps(self.settings, sort_keys=True)

    @property
    def _full_architecture(self) -> str:
        return self.train["model"].partition(".")[0]

    @property
    def _has_layer(self) -> bool:
        return self._full_architecture.endswith(_LAYER)

    @property
    def _activation_name(self) -> str:
        name = _ACTIVATIONS.get(self.activation, self.activation)
        details = [] if self.placement == "head" or not name else [self.placement]
        if self.activation == "drelu" and self.train["cap_penalty"] != "squared":
            details.append(self.train["cap_penalty"])
        return f"{name} ({', '.join(details)})" if details else name


def _as_float(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


@dataclass(frozen=True)
class _Flags:
    """Flags of a training that reports read; its config.json has more."""

    model: Text
    dataset: Text
    seed: Whole
    objective: Literal["natural", "at", "trades", "mart", "n-fgsm", "ibp"]
    beta: float
    awp_gamma: float
    eps: Eps
    activation: Text | None
    placement: Text | None
    cap_weight: float
    cap_penalty: Text
    generated_fraction: float


@dataclass(frozen=True)
class _Generated:
    digest: Text


@dataclass(frozen=True)
class _Launch:
    mixed_precision: Text = "no"  # older files do not state it


@dataclass(frozen=True)
class _Config:
    """A training, or one that another training started from, in a config.json."""

    train: _Flags
    generated: _Generated | None = None
    launch: _Launch = _Launch()
    init_from: dict[str, Any] | None = None


def read_settings(path: Path) -> TrainingSettings:
    """Read the settings of a training and of its starts from its config.json.

    Each has eps in its canonical spelling, the "mixed_precision" of its launch ("no" in older files, which do not
    state it), and the digest of its generated images as "generated".

    Raises:
        InputError: The file is cut short or of another version.
    """
    try:
        return _settings(path, read_json(path))
    except RecursionError as error:
        raise InputError(f"{path}: init_from is nested too deeply. Restore the file or train again.") from error


def _settings(path: Path, content: dict[str, Any]) -> TrainingSettings:
    config = load(_Config, content, path)
    flags = {
        **content["train"],
        "eps": radius_written(config.train.eps),
        "mixed_precision": config.launch.mixed_precision,
        "generated": None if config.generated is None else config.generated.digest[:12],
    }
    return TrainingSettings(flags, None if config.init_from is None else _settings(path, config.init_from))


@dataclass(frozen=True)
class _HeldOut:
    pgd: Share


@dataclass(frozen=True)
class _Epoch:
    """Line of log.jsonl."""

    epoch: Count
    held_out: _HeldOut
    held_out_ema: _HeldOut | None = None
    best_epoch: Count | None = None


def read_held_out(run: Path) -> float | None:
    """Read the accuracy in [0, 1] under the inner attack on held-out training images, at the epoch that was kept.

    It is from the averaged weights if there are any.

    Returns:
        None without a log.

    Raises:
        InputError: The log is cut short, or a line has another field or type; with the number of the line.
    """
    log = run / "log.jsonl"
    if not log.is_file():
        return None
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{log} cannot be read ({one_line(error)}). Restore it or train again.") from error
    epochs: dict[int, _Epoch] = {}
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{log}:{number} is not JSON ({one_line(error)}). Restore it or train again.") from error
        epoch = load(_Epoch, content, f"{log}:{number}")
        epochs[epoch.epoch] = epoch
    best = epochs[max(epochs)].best_epoch if epochs else None
    if best not in epochs:
        raise InputError(f"{log}: best_epoch of the last line is {best}, not an epoch of the log. Train again.")
    kept = epochs[best]
    return (kept.held_out_ema or kept.held_out).pgd
