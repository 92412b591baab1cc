"""An evaluated run as RobustBench files it: the ``model_info`` entry, and the file that registers the model."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .attacks import ThreatModel
from .robust_models import robust_model_name

AUTOATTACK = "autoattack"


@dataclass(frozen=True)
class Paper:
    """Who wrote where about the model; None where nobody has said."""

    title: str | None = None
    authors: str | None = None
    link: str | None = None
    venue: str | None = None


@dataclass(frozen=True)
class Measured:
    """An evaluated run under the name that it is to have.

    Attributes:
        key: RobustBench's name of the model.
        config: The run's config.json.
        results: The evaluation's JSON file.
        caps: Mean, min and max of the learned caps; empty without a D-ReLU.
        num_parameters: Of the model.
        test_size: Images in the whole test set.
        paper: About the model.
    """

    key: str
    config: dict[str, Any]
    results: dict[str, Any]
    caps: dict[str, float]
    num_parameters: int
    test_size: int
    paper: Paper

    @property
    def name(self) -> str:
        """What timm calls the model."""
        return robust_model_name(self.key, self.dataset, self.threat_model.norm)

    @property
    def dataset(self) -> str:
        """As ``--dataset`` and RobustBench spell it."""
        return self.results["dataset"]

    @cached_property
    def threat_model(self) -> ThreatModel:
        """What the attacks were allowed."""
        return ThreatModel.parse(self.results["norm"], self.results["eps"])

    @property
    def verdict(self) -> str:
        """On gradient masking: "sound", "masked" or "undecided"."""
        return self.results["verdict"]["verdict"]

    @property
    def autoattack(self) -> float | None:
        """Robust accuracy under AutoAttack, in [0, 1]; None where it was not run."""
        return self.results["accuracy"].get(AUTOATTACK)

    @property
    def external(self) -> float | None:
        """What RobustBench ranks by in AutoAttack's stead: the worst case, where AutoAttack's number does not hold."""
        worst = self.results["worst"]
        holds = self.autoattack is not None and worst >= self.autoattack and self.verdict != "masked"
        return None if holds else worst

    @property
    def sample(self) -> str:
        """How many of which images every number is from; "preliminary" where it is not the whole test set."""
        n, title = self.results["n_examples"], self.results["dataset_title"]
        if n < self.test_size:
            return f"Preliminary: measured on {n:,} of the {self.test_size:,} test images of {title}."
        return f"Measured on all {n:,} test images of {title}."


def percent(accuracy: float | None) -> str | None:
    """An accuracy in [0, 1] as RobustBench writes it: percent with two decimals, as text."""
    return None if accuracy is None else f"{100 * accuracy:.2f}"


def model_info(measured: Measured) -> dict[str, Any]:
    """The entry that RobustBench keeps under ``model_info/<dataset>/<threat>/<key>.json``, field by field as it does.

    ``autoattack_acc`` is null where AutoAttack was not run, ``unreliable`` says that the gradients are masked, and
    ``external``, by which RobustBench ranks, is there where AutoAttack's number is not the worst case.
    """
    train, paper = measured.config["train"], measured.paper
    external = {} if measured.external is None else {"external": percent(measured.external)}
    return {
        "link": paper.link,
        "name": paper.title,
        "authors": paper.authors,
        "additional_data": bool(train.get("pretrained")),
        "number_forward_passes": 1,
        "dataset": measured.dataset,
        "venue": paper.venue,
        "architecture": train["model"],
        "eps": measured.threat_model.written,
        "clean_acc": percent(measured.results["clean"]),
        "reported": percent(measured.results["worst"]),
        "autoattack_acc": percent(measured.autoattack),
        **external,
        "footnote": _footnote(measured),
        "unreliable": measured.verdict == "masked",
    }


def _footnote(measured: Measured) -> str:
    sentences = [measured.sample, f"Gradient-masking verdict: {measured.verdict}."]
    if measured.autoattack is None:
        sentences.append("AutoAttack was not run.")
    if measured.external is not None:
        attacks = ", ".join(measured.results["accuracy"])
        sentences.append(
            f"{percent(measured.external)}% robust accuracy is the worst case, image by image, of {attacks}."
        )
    return " ".join(sentences)


def registration(measured: Measured) -> str:
    """The file register.py, which lets timm and RobustBench load the folder that it lies in."""
    arguments = f"{measured.key!r}, {measured.dataset!r}, {measured.threat_model.norm!r}".replace("'", '"')
    return f'''\
"""Registers {measured.name} with timm, from this folder; its README.md shows the use."""

from pathlib import Path

from drelu_timm import register_robust_model

register_robust_model({arguments}, Path(__file__).parent)
'''
