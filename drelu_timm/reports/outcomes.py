"""Evaluated runs: what a training is called, what its config.json and log state, what evaluations left of the model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..attacks.threat_model import radius_of, radius_written
from ..errors import InputError
from ..files import read_json
from ..formatting import written
from ..results.combined import Combined
from ..results.examples import read_survivors
from ..results.result import Eps, EpsResult, Result
from ..schema import Text, Whole, load

Flags = dict[str, Any]

# Where a file is, and what the seed changes: everything else that a run was trained with is one setting.
_NOT_SETTINGS = ("seed", "data_dir", "init_from", "preset")
_LAYER = "_drelu"  # what an added layer adds to an architecture's name
_OBJECTIVES = {"natural": "", "at": "AT", "trades": "TRADES-{}", "mart": "MART-{}"}
_ACTIVATIONS = {"relu": "", "drelu": "D-ReLU", "srelu": "S-ReLU", "relu6": "ReLU6", "silu": "SiLU", "gelu": "GELU"}


@dataclass(frozen=True)
class Training:
    """A training, by the flags of its config.json, and what it is called.

    Attributes:
        train: The flags.
        start: The training that it started from (``--init-from``), if any.
    """

    train: Flags
    start: "Training | None" = None

    @property
    def starts(self) -> list["Training"]:
        """The training that it started from, that one's start, and so on."""
        return [] if self.start is None else [self.start, *self.start.starts]

    @property
    def seed(self) -> int:
        """Keys the randomness of the training."""
        return self.train["seed"]

    @property
    def net(self) -> str:
        """The architecture, without what the added layer adds to its name and without timm's tag of weights."""
        return self._architecture.removesuffix(_LAYER)

    @property
    def activation(self) -> str:
        """The activation of the added layer; "relu" for a net without one."""
        return (self.train["activation"] or "drelu") if self._has_layer else "relu"

    @property
    def placement(self) -> str:
        """Where the added layer is; "head" for a net without one."""
        return self.train["placement"] or "head"

    @property
    def cap_weight(self) -> float | None:
        """The balancer of a D-ReLU; None for other activations."""
        return self.train["cap_weight"] if self.activation == "drelu" else None

    @property
    def method(self) -> str:
        """Objective and activation without the balancer: "AT", "TRADES-6", "D-ReLU", "AT + D-ReLU", "natural", ..."""
        objective = _OBJECTIVES[self.train["objective"]].format(written(self.train["beta"]))
        awp = " + AWP" if self.train["awp_gamma"] else ""
        return " + ".join(filter(None, [objective + awp, self._activation])) or "natural"

    @property
    def training(self) -> str:
        """The method with its balancer, as the paper writes it: "AT", "TRADES-6", "D-ReLU-0.1", "AT + D-ReLU-0.01"."""
        return self.method if self.cap_weight is None else f"{self.method}-{written(self.cap_weight)}"

    @property
    def own_flags(self) -> Flags:
        """The flags that are settings, an added layer's defaults filled in, every number a float."""
        flags = {name: _as_float(value) for name, value in self.train.items() if name not in _NOT_SETTINGS}
        return flags | ({"placement": self.placement, "activation": self.activation} if self._has_layer else {})

    @property
    def flags(self) -> Flags:
        """All that runs which differ in their seed only have in common, of ``starts`` too, as "init_from ..."."""
        if self.start is None:
            return self.own_flags | {"init_from": "none"}
        started = {f"init_from {name}": value for name, value in self.start.flags.items()}
        return self.own_flags | {"init_from": "a run"} | started

    @property
    def settings(self) -> str:
        """The flags as one string, for comparisons."""
        return json.dumps(self.flags, sort_keys=True)

    @property
    def _architecture(self) -> str:
        return self.train["model"].partition(".")[0]

    @property
    def _has_layer(self) -> bool:
        return self._architecture.endswith(_LAYER)

    @property
    def _activation(self) -> str:
        name = _ACTIVATIONS.get(self.activation, self.activation)
        details = [] if self.placement == "head" or not name else [self.placement]
        if self.activation == "drelu" and self.train["cap_penalty"] != "squared":
            details.append(self.train["cap_penalty"])
        return f"{name} ({', '.join(details)})" if details else name


def _as_float(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


@dataclass(frozen=True)
class Group:
    """What has to be the same for accuracies to stand in one table.

    Attributes:
        dataset: Its name, such as "cifar10".
        title: What it is called, such as "CIFAR-10 (JPEG copy)".
        norm: "Linf" or "L2".
        eps: The radius in its one spelling, such as "8/255".
        generated: Whether the nets were trained with generated images as well, they or what they went on from.
    """

    dataset: str
    title: str
    norm: str
    eps: str
    generated: bool

    def __str__(self) -> str:
        """As in headings."""
        return f"{self.title}, {self.norm}, eps {self.eps}" + (", with generated images" if self.generated else "")

    @property
    def radius(self) -> float:
        """eps as a number."""
        return radius_of(self.eps)

    @property
    def images(self) -> tuple[str, str, str]:
        """As of a `Result`."""
        return self.dataset, self.title, self.norm


@dataclass(frozen=True, kw_only=True)
class Outcome(Training):
    """A trained model and what its evaluations in one threat model left of it.

    Attributes:
        run: The run directory.
        group: With what it can be compared.
        at: All evaluations at the group's eps, those of sweeps included.
        held_out: Accuracy in [0, 1] under the inner attack on held-out training images, of the epoch that was kept.
        sweep: The sweep over eps, in the same norm, that figures are drawn from; None without one.
    """

    run: Path
    group: Group
    at: Combined
    held_out: float | None
    sweep: Result | None = None

    @property
    def curve(self) -> tuple[EpsResult, ...]:
        """Accuracies at rising eps; empty without a sweep."""
        return () if self.sweep is None else self.sweep.points

    @property
    def measured_with(self) -> tuple[str, ...]:
        """Hardware and versions of the evaluations that accuracies are of, a line each."""
        return tuple(dict.fromkeys(result.measured_with for result in self.at.results))

    @property
    def verdict(self) -> str:
        """On gradient masking, in a word: the worst of all evaluations in this threat model."""
        return self.at.verdict.verdict

    def sources(self, column: str) -> tuple[Path, ...]:
        """Return the files that an accuracy is from: an attack's, "clean", or "worst", to which all contribute."""
        if column == "worst":
            return tuple(result.file for result in self.at.all)
        with_it = (result.file for result in self.at.results if column in self.at.point_of(result).columns)
        return tuple(with_it) or tuple(result.file for result in self.at.results)

    def survivors(self) -> np.ndarray | None:
        """Return on which test images [N] the model stayed robust, 1 or 0; None where rows were left out.

        Raises:
            InputError: Rows that are cut short, or of another version.
        """
        survivors = read_survivors(self.at.all, self.at.n_examples, self.group.eps)
        return None if survivors is None else survivors.int().numpy()


# What files state of a training


@dataclass(frozen=True)
class _Flags:
    """The flags of a training that reports read; its config.json has more."""

    model: Text
    dataset: Text
    seed: Whole
    objective: Literal["natural", "at", "trades", "mart"]
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
    """A training, or one that another started from, in a config.json."""

    train: _Flags
    generated: _Generated | None = None
    launch: _Launch = _Launch()
    init_from: dict[str, Any] | None = None


def read_training(path: Path) -> Training:
    """Read the flags of a training and of those that it started from, from its config.json.

    Each with its radius in one spelling, with "mixed_precision" of its launch ("no" in older files, which do not state
    it), and with a digest of the generated images under "generated".

    Raises:
        InputError: It is cut short, or of another version.
    """
    return _training(path, read_json(path))


def _training(path: Path, content: dict[str, Any]) -> Training:
    config = load(_Config, content, path)
    flags = {
        **content["train"],
        "eps": radius_written(config.train.eps),
        "mixed_precision": config.launch.mixed_precision,
        "generated": None if config.generated is None else config.generated.digest[:12],
    }
    return Training(flags, None if config.init_from is None else _training(path, config.init_from))


def read_held_out(run: Path) -> float | None:
    """Accuracy in [0, 1] on held-out images of the epoch that was kept, of the averaged weights if there are any.

    Returns:
        None without a log.

    Raises:
        InputError: A log that is cut short.
    """
    log = run / "log.jsonl"
    if not log.is_file():
        return None
    try:
        epochs = {line["epoch"]: line for line in map(json.loads, log.read_text(encoding="utf-8").splitlines())}
        kept = epochs[epochs[max(epochs)]["best_epoch"]]
        held_out = kept.get("held_out_ema", kept["held_out"])["pgd"]
        if not 0 <= held_out <= 1:
            raise ValueError(f"pgd is {held_out!r}")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{log} is no whole log of a training ({error!r}); train anew") from error
    return held_out
