"""A cell of a grid: one training and its evaluations, their commands, their cost, and what is done of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

from ..attacks.attack import Attack
from ..attacks.suites import find_suite, single_attacks
from ..attacks.threat_model import ThreatModel
from ..command_line import written_flags
from ..data.datasets import DATASETS
from ..evaluation.config import EvaluateConfig, attacked_in
from ..evaluation.masking import MOST_PROBED, PROBES
from ..launch import Launch
from ..results.result import read_result
from ..training.config import TrainConfig, flag_defaults, resolve
from ..training.model import check_start
from ..training.validation import ATTACKED, MARGIN_STEPS

GRADIENT = 3  # A gradient costs about three forward passes: one forward, and a backward pass takes two.
_ASKED = ("suite", "n_examples", "seed", "precision", "transfer_from")
_TRAINING_IMAGES = {"digits": 1438, "mnist": 60_000, "cifar10": 50_000, "cifar100": 50_000, "tiny_imagenet": 100_000}
_CLASSES = 10  # of an image folder, whose classes are not known before it is read
_RESTARTS = ("n_target_classes", "restarts", "rounds", "binary_search_steps")  # settings that repeat a whole search


@dataclass(frozen=True)
class Cell:
    """One training and its evaluations.

    Attributes:
        name: Name of the cell and of its run directory.
        train: Flags of the training.
        evaluations: Flags of each evaluation.
        start: Name of the cell whose weights the training starts from, which has to end first. None for fresh weights.
    """

    name: str
    train: TrainConfig
    evaluations: tuple[EvaluateConfig, ...]
    start: str | None = None

    @property
    def path(self) -> Path:
        """The run directory."""
        assert self.train.output_dir is not None
        return self.train.output_dir

    @property
    def log(self) -> Path:
        """File for what the commands print, next to the run directory, which has to be empty when `train` starts."""
        return self.path.with_name(f"{self.name}.log")

    def commands(self, launch: Launch) -> list[list[str]]:
        """Return the commands in their order; flags at their defaults are left out."""
        commands = [[["train"], *written_flags(vars(self.train), flag_defaults(self.train.preset))]]
        for one in self.evaluations:
            commands.append([["evaluate", one.run], *written_flags(vars(one), vars(EvaluateConfig(one.run)))])
        return [[*_program(launch), *chain.from_iterable(words)] for words in commands]

    def is_done(self) -> bool:
        """Return whether the model and all results exist.

        Raises:
            InputError: They exist, but with other settings or from other starting weights than the cell asks for
                (with the message of `train`), or they cannot be read.
        """
        if not self._is_trained():
            return False
        resolve(self.train)  # compares the settings with the run directory's
        check_start(self.train)
        return not self._left()

    def doing(self) -> str:
        """Return what the cell does now or next."""
        if self._is_trained():
            return f"evaluates: {', '.join(one.suite for one in self._left()[:1]) or 'done'}"
        log = self.path / "log.jsonl"
        ended = len(log.read_bytes().splitlines()) if log.is_file() else 0
        return f"trains: epoch {min(ended + 1, self.train.epochs)} of {self.train.epochs}"

    def _is_trained(self) -> bool:
        return (self.path / "model").is_dir()

    def _left(self) -> Sequence[EvaluateConfig]:
        """Return the evaluations without a result.

        One that asks for more examples than the test set has is always among them: `evaluate` itself finds its result
        and does not repeat it.
        """
        paths = (path for path in self.path.glob("*/*.json") if path.parent.name in ("results", "sweeps"))
        results = [read_result(path).identity() for path in paths]
        trained = resolve(self.train).threat_model
        asked = [(one, self._asked(one, trained)) for one in self.evaluations]
        return [one for one, wanted in asked if not any(_is_of(result, wanted) for result in results)]

    def _asked(self, evaluation: EvaluateConfig, trained: ThreatModel) -> dict[str, Any]:
        """Return the fields that identify the result of an evaluation."""
        threat_models = attacked_in(evaluation, trained)
        eps = [each.written for each in threat_models]
        return {
            "dataset": evaluation.dataset or self.train.dataset,
            "norm": threat_models[0].norm,
            "eps": eps if len(eps) > 1 else eps[0],
            **{key: getattr(evaluation, key) for key in _ASKED},
        }

    def training_cost(self) -> int | None:
        """Return an upper bound for the training, in forward passes of one image: all epochs with their validation.

        None where the number of images is not known before they are read.
        """
        train = self.train
        images = _TRAINING_IMAGES.get(train.dataset) or train.n_train
        if images is None:
            return None
        images = min(images, train.n_train or images)
        held_out = int(images * DATASETS[train.dataset].held_out)
        is_robust = train.objective != "natural"
        attack = 1 + train.steps * GRADIENT if is_robust else 0
        updates = 2 if train.objective in ("trades", "mart") else 1  # these see clean and adversarial images
        updates *= 2 if train.awp_gamma else 1
        margin = 1 + MARGIN_STEPS * GRADIENT if is_robust else 0
        validation = held_out + min(held_out, ATTACKED) * (train.steps * GRADIENT + 2 + margin)
        return train.epochs * ((images - held_out) * (attack + updates * GRADIENT) + validation)

    def evaluation_cost(self) -> int:
        """Return an upper bound for all evaluations, in forward passes of one image.

        The bound assumes that the model has layers that adaptive attacks know, and is correct on every image under
        every attack.
        """
        trained = resolve(self.train).threat_model
        return sum(self._evaluation_cost(one, len(attacked_in(one, trained))) for one in self.evaluations)

    def _evaluation_cost(self, evaluation: EvaluateConfig, n_eps: int) -> int:
        classes = DATASETS[evaluation.dataset or self.train.dataset].num_classes or _CLASSES
        attacks = sum(map(attack_cost, single_attacks(find_suite(evaluation.suite, classes)).values()))
        probes = sum(map(attack_cost, PROBES.values()))
        n = evaluation.n_examples
        return n * (1 + 2 * GRADIENT) + n_eps * (n * attacks + min(n, MOST_PROBED) * probes)


def attack_cost(attack: Attack) -> int:
    """Return the forward passes of an attack on an image that stays correct, and the passes that judge it."""
    settings = attack.settings
    if "n_queries" in settings:
        return settings["n_queries"] + 2
    searches = prod(settings.get(key, 1) for key in _RESTARTS)
    steps = settings.get("steps") or settings.get("n_iter", 0) + 1
    gradients = 0 if attack.kind == "black-box" else searches * steps * settings.get("samples", 1)
    return gradients * GRADIENT + 2 * searches + 1  # per search, the classes are ranked or the images are judged


def _program(launch: Launch) -> list[str]:
    """Return the words of a command before its verb."""
    if not launch.flags:
        return ["python", "-m", "drelu_timm"]
    port = ["--main_process_port", "0"] if launch.num_processes > 1 else []  # a free one: several cells may run at once
    return ["python", "-m", "accelerate.commands.launch", *launch.flags, *port, "-m", "drelu_timm"]


def _is_of(result: dict[str, Any], asked: dict[str, Any]) -> bool:
    return all(result.get(key) == value for key, value in asked.items())
