"""A trained net and what its evaluations in one threat model left of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..attacks.threat_model import radius_of
from ..evaluation.points import Point, worst_verdict
from ..evaluation.result_files import ResultFile, read_survivors
from ..spelling import written
from .naming import Flags, activation_of, method_of, net_of, placement_of, settings_of_all


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


@dataclass(frozen=True)
class Outcome:
    """A trained net and what its evaluations in one threat model left of it.

    Attributes:
        run: The run directory.
        train: The flags it was trained with, of its config.json.
        starts: Those of the run that it went on from (``--init-from``), of that one's start, and so on.
        group: With what it can be compared.
        at: Accuracies at the group's eps; of several evaluations on as many examples, what they leave together.
        held_out: Accuracy in [0, 1] under the inner attack on held-out training images, of the epoch that was kept.
        files: The evaluations that ``at`` comes from, a sweep's point at this eps among them.
        others: Those on other numbers of examples: their verdicts count, and the images that they broke.
        curve: Accuracies at rising radii, of a sweep in the same norm; empty without one.
        curve_source: Its file.
        curve_suite: Its suite of attacks.
        measured_with: Hardware and versions of the evaluations, a line each.
    """

    run: Path
    train: Flags
    starts: tuple[Flags, ...]
    group: Group
    at: Point
    held_out: float | None
    files: tuple[ResultFile, ...]
    others: tuple[ResultFile, ...] = ()
    curve: tuple[Point, ...] = ()
    curve_source: Path | None = None
    curve_suite: str = ""
    measured_with: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        """Of the training."""
        return self.train["seed"]

    @property
    def net(self) -> str:
        """The architecture, without what the added layer adds to its name."""
        return net_of(self.train)

    @property
    def activation(self) -> str:
        """What stands in the added layer; "relu" for a net without one."""
        return activation_of(self.train)

    @property
    def placement(self) -> str:
        """Where the added layer stands; "head" for a net without one."""
        return placement_of(self.train)

    @property
    def cap_weight(self) -> float | None:
        """The balancer of a D-ReLU; None for other activations."""
        return self.train["cap_weight"] if self.activation == "drelu" else None

    @property
    def method(self) -> str:
        """Objective and activation without the balancer: "AT", "TRADES-6", "D-ReLU", "AT + D-ReLU", "natural", ..."""
        return method_of(self.train)

    @property
    def training(self) -> str:
        """The method with its balancer, as the paper writes it: "AT", "TRADES-6", "D-ReLU-0.1", "AT + D-ReLU-0.01"."""
        return self.method if self.cap_weight is None else f"{self.method}-{written(self.cap_weight)}"

    @property
    def flags(self) -> dict[str, Any]:
        """All that runs which differ in their seed only have in common, of ``starts`` too, as "init_from ..."."""
        return settings_of_all((self.train, *self.starts))

    @property
    def settings(self) -> str:
        """The flags as one string, for comparisons."""
        return json.dumps(self.flags, sort_keys=True)

    def sources(self, column: str) -> tuple[Path, ...]:
        """The result files that an accuracy comes from: an attack's, "clean", or "worst", to which all contribute."""
        if column == "worst":
            return tuple(file.path for file in (*self.files, *self.others))
        with_it = (file.path for file in self.files if column in point_in(file, self.group).columns)
        return tuple(with_it) or tuple(file.path for file in self.files)

    @property
    def tried_elsewhere(self) -> frozenset[tuple[str, str, int]]:
        """Attacks, their settings and the test images of the evaluations on other numbers of images than ``at`` has."""
        return frozenset(
            (attack, settings, point.n_examples) for point in self._others_at for attack, settings in point.tried
        )

    @property
    def verdict(self) -> str:
        """On gradient masking, the worst of all evaluations in this threat model."""
        return worst_verdict(point.verdict for point in (self.at, *self._others_at))

    @property
    def verdict_images(self) -> int | None:
        """The test images of the verdict where the evaluations that the accuracies come from do not have it."""
        if self.verdict == self.at.verdict:
            return None
        return max(point.n_examples for point in self._others_at if point.verdict == self.verdict)

    def survivors(self) -> np.ndarray | None:
        """Which test images [N] nothing broke, 1 or 0; None where rows an example were left out.

        Raises:
            InputError: Rows that are cut short, or of another version.
        """
        return read_survivors((*self.files, *self.others), self.at.n_examples, self.group.eps)

    @property
    def _others_at(self) -> list[Point]:
        return [point_in(file, self.group) for file in self.others]


def point_in(result: ResultFile, group: Group) -> Point:
    """What one of an outcome's evaluations says at its group's eps."""
    point = result.at(group.eps)
    assert point is not None  # of those that have none an outcome is not made
    return point
