"""Data of a model card: everything that is published about an evaluated model.

`Card` is in ``model_cards/<dataset>/<norm>/<key>.json``, under "measured". The Markdown of the card, RobustBench's
entry and the recipe are functions of it.
"""

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
PROBES = "the probes for gradient masking"  # the images that they find count in the worst case
SHIPPED = 1_500_000  # bytes; larger weights are not stored next to their card
# Test images of RobustBench's boards. For other datasets a complete evaluation is one of the whole test set.
BOARD_EXAMPLES = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 5_000}


@dataclass(frozen=True)
class Paper:
    """Paper by which RobustBench lists a model.

    Attributes:
        title: Title.
        authors: Names, separated by commas.
        link: Address of the paper.
        venue: Such as "ICLR 2026", "arXiv, Mar 2026", or "N/A".
    """

    title: str
    authors: str
    link: str
    venue: str


@dataclass(frozen=True)
class Weights:
    """SHA-256 in hexadecimal and size in bytes of a model.safetensors."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Seed:
    """Results of one of several runs that differ only in their seed; accuracies in [0, 1]."""

    seed: int
    n_examples: int
    clean: float
    autoattack: float | None
    worst: float
    verdict: str
    model_digest: str


@dataclass(frozen=True)
class Card:
    """Everything that is published about an evaluated model.

    Attributes:
        key: RobustBench's name of the model.
        config: config.json of the run, without paths.
        training: Summary of log.jsonl: epochs, the epoch of the weights, seconds, images per second, and whether the
            weights are from the "last" epoch or from the best, "model".
        results: The evaluation, with the worst case and verdict over all evaluations in this threat model.
        curve: A sweep over eps; None if the run has none in this norm.
        seeds: The run and the runs that differ only in their seed; empty if no others were given.
        caps: Mean, min and max of the learned caps; empty without a D-ReLU.
        num_parameters: Number of parameters.
        test_size: Number of images in the whole test set.
        paper: Paper about the model.
        timm: config.json of the timm folder.
        weights: Digest and size of the weights.
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
        """Name of the model in timm."""
        return robust_model_name(self.key, self.dataset, self.norm)

    @property
    def point(self) -> EpsResult:
        """Accuracies and verdict in the threat model."""
        return self.results.point

    @property
    def dataset(self) -> str:
        """Dataset as RobustBench spells it."""
        return self.results.dataset

    @property
    def norm(self) -> str:
        """Norm as RobustBench spells it."""
        return self.results.norm

    @cached_property
    def threat_model(self) -> ThreatModel:
        """Threat model of the evaluation."""
        return ThreatModel.parse(self.norm, self.point.eps)

    @property
    def place(self) -> Path:
        """Path of its files below model_info/, model_cards/ and scripts/, without the suffix."""
        return Path(self.dataset, self.norm, self.key)

    @property
    def recipe(self) -> str:
        """Path of its recipe in this repository."""
        return f"scripts/{self.place.as_posix()}.toml"

    @property
    def config_sha256(self) -> str:
        """SHA-256 of config.json in the exported folder."""
        return hashlib.sha256(json_text(self.timm).encode()).hexdigest()

    @property
    def verdict(self) -> str:
        """Verdict on gradient masking: "sound", "masked" or "undecided"."""
        return self.point.verdict.verdict

    @property
    def autoattack(self) -> float | None:
        """Robust accuracy under AutoAttack in [0, 1]; None if it was not run."""
        return self.point.accuracy.get(AUTOATTACK)

    @property
    def external(self) -> float | None:
        """Worst case in [0, 1] where AutoAttack's accuracy is an overestimate; RobustBench then ranks by it."""
        worst = self.point.worst
        holds = self.autoattack is not None and worst >= self.autoattack and self.verdict != "masked"
        return None if holds else worst

    @property
    def trainings(self) -> list[dict[str, Any]]:
        """Configs of the training, of the training that it was initialized from, and so on."""
        chain = [self.config]
        while earlier := chain[-1].get("init_from"):
            chain.append(earlier)
        return chain

    @property
    def attacks_tried(self) -> list[str]:
        """Attacks of all evaluations that count in the worst case."""
        evaluations = (self.point, *self.results.further)
        return list(dict.fromkeys(attack for one in evaluations for attack in one.accuracy))

    @property
    def is_copy(self) -> bool:
        """Whether the images are not the ones of RobustBench's board but, for example, a JPEG copy of them.

        True for every folder of images: they are ordered and resized by us, and the board uses 5,000 others.
        """
        known = DATASETS.get(self.dataset)
        return self.dataset in BOARD_EXAMPLES and (known is None or self.results.dataset_title != known.title)

    @property
    def preliminary(self) -> bool:
        """Whether the results are preliminary; see `is_preliminary`."""
        return self.is_preliminary(self.results.n_examples)

    def is_preliminary(self, n_examples: int) -> bool:
        """Return whether results are from fewer images than the leaderboard asks for, or from a copy of its images."""
        return self.is_copy or n_examples < BOARD_EXAMPLES.get(self.dataset, self.test_size)

    # Phrases that several of the published texts share

    @property
    def attacks(self) -> str:
        """Everything that the worst case is taken over."""
        return ", ".join([*self.attacks_tried, PROBES])

    @property
    def sample(self) -> str:
        """Sentence on the number of test images."""
        n, title = self.results.n_examples, self.results.dataset_title
        sample = f"the first {n:,} of the {self.test_size:,}" if n < self.test_size else f"all {n:,}"
        return f"{'Preliminary: measured' if self.preliminary else 'Measured'} on {sample} test images of {title}."

    @property
    def data_note(self) -> list[str]:
        """Sentence on data that a training does not find by itself; empty for other data."""
        if not self.is_copy:
            return []
        return [
            f"{self.results.dataset_title} is neither found nor downloaded by default. Pass its folder: --data-dir."
        ]

    @property
    def architecture(self) -> str:
        """timm architecture, with the placement and activation if they are not the default."""
        train = self.config["train"]
        options = [option for option in (train.get("placement"), train.get("activation")) if option]
        return train["model"] + (f" ({', '.join(options)})" if options else "")

    @property
    def has_drelu(self) -> bool:
        """Whether the architecture is one of this project's."""
        return self.config["train"]["model"].endswith("_drelu")

    @property
    def is_pretrained(self) -> bool:
        """Whether any of the trainings started from timm's ImageNet weights."""
        return any(config["train"].get("pretrained") for config in self.trainings)

    @property
    def other_datasets(self) -> list[str]:
        """Sentence on the other datasets of earlier trainings; empty without any."""
        own = _dataset_of(self.config)
        others = dict.fromkeys(one["dataset_title"] for one in self.trainings if _dataset_of(one) != own)
        return [f"It was initialized from a model trained on {' and '.join(others)}."] if others else []

    @property
    def generated_images(self) -> list[str]:
        """Sentence on generated images in any of the trainings; empty without any."""
        for config in self.trainings:
            if fraction := config["train"].get("generated_fraction"):
                count = config.get("generated", {}).get("images")
                images = f"{_short(count)} synthetic images" if count else "synthetic images"
                return [f"It uses additional {images} in training ({fraction:.0%} of every batch)."]
        return []

    @property
    def license(self) -> str:
        """License of the weights as the Hub spells it: the strictest that may apply."""
        if self.generated_images:
            return "cc-by-nc-sa-4.0"
        return "other" if self.is_pretrained else "mit"

    @property
    def license_terms(self) -> str:
        """Sentences on the license of the weights and on licenses of others that apply to them."""
        sentences = ["MIT."]
        if self.is_pretrained:
            sentences.append("Training started from timm's ImageNet weights, whose own license also applies.")
        if self.generated_images:
            sentences.append(
                "Training used generated images. EDM's images and models are licensed CC BY-NC-SA 4.0, which "
                "limits derived work to non-commercial use under the same license."
            )
        return " ".join(sentences)


def _dataset_of(config: dict[str, Any]) -> tuple[str, ...]:
    """Return what distinguishes the dataset of a training; for folders of images that is their name."""
    dataset = config["train"]["dataset"]
    return (dataset, config["dataset_title"]) if dataset == "folder" else (dataset,)


def _short(count: int) -> str:
    """Format a number as RobustBench's footnotes do: 1M, 20M; 5,000."""
    return f"{count // 1_000_000}M" if count % 1_000_000 == 0 else f"{count:,}"


def read_card(content: dict[str, Any], path: Path) -> Card:
    """Return the card that a JSON file holds.

    Raises:
        InputError: A field is missing or of another type; the error names the path.
    """
    return load(Card, content.get("measured"), path)


def evaluation_name(evaluation: Result | Further) -> str:
    """Return suite, eps and number of images of an evaluation as a phrase."""
    eps = evaluation.eps
    over = "" if isinstance(eps, str) else f" over eps {', '.join(eps)}"
    return f"the suite {evaluation.suite}{over} on the first {evaluation.n_examples:,} test images"


def percent(accuracy: float | None) -> str | None:
    """Format an accuracy in [0, 1] as RobustBench does: in percent, with two decimals."""
    return None if accuracy is None else f"{100 * accuracy:.2f}"


def spread(accuracies: Sequence[float], digits: int = 2) -> str:
    """Format mean and standard deviation (n - 1) of two or more accuracies in [0, 1], in percent."""
    return f"{100 * mean(accuracies):.{digits}f} ± {100 * stdev(accuracies):.{digits}f}"
