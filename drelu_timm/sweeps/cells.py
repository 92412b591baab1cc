"""A cell of a grid: one training with its evaluations, as commands that a person could type, and how far it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..attacks.threat_model import ThreatModel
from ..command_line import written_flags
from ..evaluation.config import EvaluateConfig, attacked_in
from ..launches import Launch
from ..results.result import read_result
from ..training.config import TrainConfig, flag_defaults, resolve
from ..training.start import check_start

_ASKED = ("suite", "n_examples", "seed", "precision", "transfer_from")


@dataclass(frozen=True)
class Cell:
    """One training and what it is evaluated under.

    Attributes:
        name: What it holds, and its folder's name.
        train: Its flags, with the run directory, to be gone on with.
        evaluations: The flags of each evaluation.
        start: Name of the cell that it begins with, which has to end first; None for a fresh net.
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
        """What its commands print; beside the run directory, which has to be empty for `train`."""
        return self.path.with_name(f"{self.name}.log")

    def commands(self, launch: Launch) -> list[list[str]]:
        """The commands, one after the other; flags at their defaults are left out."""
        commands = [[["train"], *written_flags(vars(self.train), flag_defaults(self.train.preset))]]
        for one in self.evaluations:
            commands.append([["evaluate", one.run], *written_flags(vars(one), vars(EvaluateConfig(one.run)))])
        return [[*_program(launch), *chain.from_iterable(words)] for words in commands]

    def is_done(self) -> bool:
        """Whether all its files are there.

        Raises:
            InputError: They are there, but of other settings, or begun with other weights than the cell that it begins
                with has now, as `train` says it; or they cannot be read.
        """
        if not self._is_trained():
            return False
        resolve(self.train)  # which compares it with what is there
        check_start(self.train)
        return not self._left()

    def doing(self) -> str:
        """What of it comes next, or is being done."""
        if self._is_trained():
            return f"evaluates: {', '.join(one.suite for one in self._left()[:1]) or 'done'}"
        log = self.path / "log.jsonl"
        ended = len(log.read_bytes().splitlines()) if log.is_file() else 0
        return f"trains: epoch {min(ended + 1, self.train.epochs)} of {self.train.epochs}"

    def _is_trained(self) -> bool:
        return (self.path / "model").is_dir()

    def _left(self) -> Sequence[EvaluateConfig]:
        """The evaluations that are not there yet.

        One of more examples than the test set has counts as such: `evaluate` itself knows better, and does not repeat
        it.
        """
        paths = (path for path in self.path.glob("*/*.json") if path.parent.name in ("results", "sweeps"))
        results = [read_result(path).identity() for path in paths]
        trained = resolve(self.train).threat_model
        asked = [(one, self._asked(one, trained)) for one in self.evaluations]
        return [one for one, wanted in asked if not any(_is_of(result, wanted) for result in results)]

    def _asked(self, evaluation: EvaluateConfig, trained: ThreatModel) -> dict[str, Any]:
        """What the result of an evaluation has to say of itself."""
        balls = attacked_in(evaluation, trained)
        eps = [ball.written for ball in balls]
        return {
            "dataset": evaluation.dataset or self.train.dataset,
            "norm": balls[0].norm,
            "eps": eps if len(eps) > 1 else eps[0],
            **{key: getattr(evaluation, key) for key in _ASKED},
        }


def _program(launch: Launch) -> list[str]:
    """What stands before the verb."""
    if not launch.flags:
        return ["python", "-m", "drelu_timm"]
    port = ["--main_process_port", "0"] if launch.num_processes > 1 else []  # a free one: cells may run side by side
    return ["python", "-m", "accelerate.commands.launch", *launch.flags, *port, "-m", "drelu_timm"]


def _is_of(result: dict[str, Any], asked: dict[str, Any]) -> bool:
    return all(result.get(key) == value for key, value in asked.items())
