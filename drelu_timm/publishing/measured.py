"""What was measured of an evaluated run: all that its card, its entry and its recipe state, gathered from its files."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..attacks.threat_model import ThreatModel
from ..data.datasets import DATASETS
from ..files import json_text
from ..results.result import EpsResult, Further, Result
from ..schema import load
from ..zoo.robust_models import robust_model_name

AUTOATTACK = "autoattack"
PROBES = "the probes for gradient masking"  # which break examples as well, and count
# What RobustBench's boards are made of; elsewhere it is the whole test set.
BOARD_EXAMPLES = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 5_000}


@dataclass(frozen=True)
class Paper:
    """What RobustBench lists a model by.

    Attributes:
        title: Of the paper about the model.
        authors: Separated by commas.
        link: Where to read it.
        venue: Such as "ICLR 2026", "arXiv, Mar 2026", or "N/A".
    """

    title: str
    authors: str
    link: str
    venue: str


@dataclass(frozen=True)
class Weights:
    """The file model.safetensors of a run.

    Attributes:
        sha256: In hexadecimal.
        bytes: How many there are.
    """

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Seed:
    """A run that differs from the one on the card by its seed only.

    Attributes:
        seed: Of the training.
        n_examples: Test images of its evaluation.
        clean: Accuracy in [0, 1].
        autoattack: Likewise, under AutoAttack; None where it was not run.
        worst: Likewise, over all attacks.
        verdict: On gradient masking.
        model_digest: sha256 of its weights.
    """

    seed: int
    n_examples: int
    clean: float
    autoattack: float | None
    worst: float
    verdict: str
    model_digest: str


@dataclass(frozen=True)
class Measured:
    """An evaluated run under the name that it is to have: all that a card and an entry say, from the run's files.

    Attributes:
        key: RobustBench's name of the model.
        config: The run's config.json.
        training: Of log.jsonl: epochs, the epoch whose weights these are, seconds, images a second; and whether the
            weights are the "last" epoch's or the best "model".
        results: The evaluation, with the worst case and the verdict of all in this threat model; see `with_further`.
        curve: A sweep; None where the run has none of this norm.
        seeds: The run and those that differ by the seed only, where any were given.
        caps: Mean, min and max of the learned caps; empty without a D-ReLU.
        num_parameters: Of the model.
        test_size: Images in the whole test set.
        paper: About the model.
        timm: The timm folder's config.json.
        weights: Their hash and size.
    """

    key: str
    config: dict[str, Any]
    training: dict[str, Any]
    results: Result
    curve: Result | None
    seeds: tuple[Seed, ...]
    caps: dict[str, float]
    num_parameters: int
    test_size: int
    paper: Paper
    timm: dict[str, Any]
    weights: Weights

    @property
    def name(self) -> str:
        """What timm calls the model."""
        return robust_model_name(self.key, self.dataset, self.norm)

    @property
    def point(self) -> EpsResult:
        """Accuracies in the threat model."""
        return self.results.point

    @property
    def dataset(self) -> str:
        """As ``--dataset`` and RobustBench spell it."""
        return self.results.dataset

    @property
    def norm(self) -> str:
        """As ``--norm`` and RobustBench spell it."""
        return self.results.norm

    @cached_property
    def threat_model(self) -> ThreatModel:
        """What the attacks were allowed."""
        return ThreatModel.parse(self.norm, self.point.eps)

    @property
    def place(self) -> Path:
        """Where its files lie below ``model_info``, ``model_cards`` and ``scripts``, less their suffix."""
        return Path(self.dataset, self.norm, self.key)

    @property
    def recipe(self) -> str:
        """Where the file that trains it is stored in this project."""
        return f"scripts/{self.place.as_posix()}.toml"

    @property
    def config_sha256(self) -> str:
        """Of the timm folder's config.json, as the exported folder has it."""
        return hashlib.sha256(json_text(self.timm).encode()).hexdigest()

    @property
    def verdict(self) -> str:
        """On gradient masking: "sound", "masked" or "undecided"."""
        return self.point.verdict.verdict

    @property
    def autoattack(self) -> float | None:
        """Robust accuracy under AutoAttack, in [0, 1]; None where it was not run."""
        return self.point.accuracy.get(AUTOATTACK)

    @property
    def external(self) -> float | None:
        """What RobustBench ranks by in AutoAttack's stead: the worst case, where AutoAttack's number does not hold."""
        worst = self.point.worst
        holds = self.autoattack is not None and worst >= self.autoattack and self.verdict != "masked"
        return None if holds else worst

    @property
    def trainings(self) -> list[dict[str, Any]]:
        """The config of the training, then of that which it was begun from, and so on."""
        chain = [self.config]
        while earlier := chain[-1].get("init_from"):
            chain.append(earlier)
        return chain

    @property
    def is_copy(self) -> bool:
        """Whether the images are not those of RobustBench's board, but compressed or otherwise stored anew.

        A folder's always are, as it is read in an order and at a size of our own, and the board's 5,000 are others.
        """
        known = DATASETS.get(self.dataset)
        return self.dataset in BOARD_EXAMPLES and (known is None or self.results.dataset_title != known.title)

    @property
    def images_needed(self) -> list[str]:
        """A sentence on where a training has to find the images, if they are none that it would download."""
        if not self.is_copy:
            return []
        title = self.results.dataset_title
        return [f"{title} is not what a training finds or downloads by itself: give each its folder by --data-dir."]

    @property
    def preliminary(self) -> bool:
        """Whether the results are: see `is_preliminary`."""
        return self.is_preliminary(self.results.n_examples)

    def is_preliminary(self, n_examples: int) -> bool:
        """Whether numbers are from fewer images than the leaderboard asks for, or from a copy of them."""
        return self.is_copy or n_examples < BOARD_EXAMPLES.get(self.dataset, self.test_size)

    @property
    def attacks(self) -> str:
        """What the worst case is over."""
        return ", ".join([*self.attacks_tried, PROBES])

    @property
    def attacks_tried(self) -> list[str]:
        """The attacks of all evaluations that count in the worst case."""
        evaluations = (self.point, *self.results.further)
        return list(dict.fromkeys(attack for one in evaluations for attack in one.accuracy))

    @property
    def sample(self) -> str:
        """How many of which images every number is from."""
        n, title = self.results.n_examples, self.results.dataset_title
        sample = f"the first {n:,} of the {self.test_size:,}" if n < self.test_size else f"all {n:,}"
        return f"{'Preliminary: measured' if self.preliminary else 'Measured'} on {sample} test images of {title}."


def further_called(evaluation: Result | Further) -> str:
    """Return suite, radii and images of an evaluation, in words."""
    eps = evaluation.eps
    over = "" if isinstance(eps, str) else f" over eps {', '.join(eps)}"
    return f"the suite {evaluation.suite}{over} on the first {evaluation.n_examples:,} test images"


def percent(accuracy: float | None) -> str | None:
    """An accuracy in [0, 1] as RobustBench writes it: percent with two decimals, as text."""
    return None if accuracy is None else f"{100 * accuracy:.2f}"


def spread(accuracies: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation (n - 1) of two or more accuracies in [0, 1], in percent."""
    return f"{100 * mean(accuracies):.{digits}f} ± {100 * stdev(accuracies):.{digits}f}"


def from_record(record: dict[str, Any], path: Path) -> Measured:
    """Return what a card record, as of `card_record`, is made from; the inverse of that function.

    Raises:
        InputError: A record that is not whole; the error names its path.
    """
    return load(Measured, record.get("measured"), path)
