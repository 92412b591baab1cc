"""Result of an evaluation, as its JSON file holds it: the one schema for evaluate, export, report and sweep."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from ..attacks.threat_model import Norm, radius_of, radius_written
from ..errors import InputError
from ..files import read_json
from ..schema import Constraint, Count, Share, Text, Whole, dump, load, parse

ROUNDING = 1e-9  # of shares that are equal

Word = Literal["sound", "undecided", "masked"]
VERDICTS: tuple[Word, ...] = get_args(Word)  # from good to bad


def _is_eps(value: str) -> bool:
    try:
        return radius_of(value) >= 0
    except InputError:
        return False


Eps = Annotated[str, Constraint(_is_eps, 'a radius in quotes, such as "8/255"')]


@dataclass(frozen=True)
class Verdict:
    """Whether white-box robust accuracies can be believed.

    Attributes:
        verdict: "sound": white-box attacks find nearly all that is to be found; "masked": they do not, by far;
            "undecided": neither is shown.
        evidence: A sentence for each signal.
        numbers: The same by name: shares in [0, 1] of the ``examples`` that were probed.
    """

    verdict: Word
    evidence: tuple[str, ...]
    numbers: dict[str, int | float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.verdict


@dataclass(frozen=True, kw_only=True)
class CarliniWagner:
    """What a minimum-norm attack shows in addition to a robust accuracy.

    Attributes:
        median_l2: Median L2 distance it needs over the correctly classified examples; None where it fools the model on
            fewer than half of them.
        budget: An L2 radius: eps for L2; for Linf that of the corners of the epsilon ball, eps * sqrt(C * H * W).
        accuracy_at_budget: Share of all examples that are right and have no adversarial example found within it.
    """

    median_l2: float | None
    budget: float
    accuracy_at_budget: Share


@dataclass(frozen=True, kw_only=True)
class EpsResult:
    """Accuracies of a model at one eps.

    Attributes:
        eps: As written.
        settings: For each attack, what decides what it finds.
        clean: Clean accuracy in [0, 1].
        accuracy: Robust accuracy in [0, 1] under each attack, or column of several attacks such as "autoattack".
        worst: Share of the examples on which neither an attack nor a probe for masking fooled the model.
        sequences: For each column of several attacks, the accuracy that each of its attacks left, with those before it.
        zero_gradient_share: Of the examples classified right, those with an input gradient (of the cross-entropy) of
            exactly zero.
        cw_l2: Of the suites that hold "cw-l2".
        verdict: On gradient masking.
        seconds: Wall-clock time, of a sweep that of the whole; without what was measured before it resumed.
        attack_seconds: The same for each attack of the suite; without those that had started before it resumed.
    """

    eps: Eps
    settings: dict[str, dict[str, Any]]
    clean: Share
    accuracy: dict[str, Share]
    worst: Share
    sequences: dict[str, dict[str, Share]] = field(default_factory=dict)
    zero_gradient_share: Share
    cw_l2: CarliniWagner | None
    verdict: Verdict
    seconds: float
    attack_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def radius(self) -> float:
        """eps as a number."""
        return radius_of(self.eps)

    @property
    def accuracies(self) -> dict[str, float]:
        """Those of ``accuracy``, and of the first attack of each sequence, which saw all examples."""
        first = [next(iter(stages.items())) for stages in self.sequences.values() if stages]
        return {**dict(first), **self.accuracy}

    @property
    def columns(self) -> set[str]:
        """The attacks that there is an accuracy for; "cw-l2" is the one at its L2 budget."""
        return {*self.accuracies} - {"cw-l2"} | ({"cw-l2"} if self.cw_l2 else set())

    def to_json(self) -> dict[str, Any]:
        """Return what a file holds of it."""
        content = {one.name: dump(getattr(self, one.name)) for one in fields(EpsResult)}
        times = {attack: round(seconds, 1) for attack, seconds in self.attack_seconds.items()}
        return content | {"seconds": round(self.seconds, 1), "attack_seconds": times}


@dataclass(frozen=True, kw_only=True)
class Further:
    """Another evaluation of the same weights whose images count in a published worst case; as of `Result`."""

    suite: str
    eps: Eps | Annotated[tuple[Eps, ...], Constraint(bool, "a list of radii, not empty")]
    n_examples: Count
    seed: int
    precision: str
    transfer_from: str | None
    accuracy: dict[str, Share]
    worst: Share
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of an evaluation: at one eps, or of a sweep at several.

    Attributes:
        run: Run directory, timm name, or RobustBench's key, as given; None once published, like ``command``.
        model: Architecture, or the name again.
        dataset: Its name, such as "cifar10".
        dataset_title: What it is called, such as "CIFAR-10 (JPEG copy)".
        norm: "Linf" or "L2".
        eps: As written; of a sweep all of them, from the smallest.
        suite: Of attacks.
        n_examples: Number of test images, the first of the test set.
        seed: Keys all randomness.
        precision: What attacks searched in, such as "float32".
        transfer_from: A second model whose adversarial images were tried.
        model_digest: sha256 of the weights file; None for weights that timm or RobustBench downloads.
        points: At each eps.
        processes: Number of processes that shared the work.
        versions: Of packages.
        hardware: In words.
        command: That made it.
        git_revision: Of the checkout; None of an installed package.
        adversarial_sha256: Of the file of adversarial images; None of a sweep, which keeps none.
        further: Of a published result, the other evaluations that count in its worst case.
        path: The file it was read from, if any.
    """

    run: str | None = None
    model: str | None
    dataset: Text
    dataset_title: Text
    norm: Norm
    eps: Eps | Annotated[tuple[Eps, ...], Constraint(bool, "a list of radii, not empty")]
    suite: Text
    n_examples: Count
    seed: Whole
    precision: Text
    transfer_from: str | None
    model_digest: str | None
    points: tuple[EpsResult, ...] = ()
    processes: Count = 1
    versions: dict[str, str]
    hardware: Text
    command: str | None = None
    git_revision: str | None
    adversarial_sha256: str | None = None
    further: tuple[Further, ...] = ()
    path: Path | None = None

    @classmethod
    def from_json(cls, content: Any, what: Path | str) -> "Result":
        """Make a result of what a file holds; ``what`` names the file in errors.

        Raises:
            InputError: A field is missing or holds something else, an attack that no suite names, or a worst case
                above another accuracy.
        """
        fields_of_file = {name: value for name, value in content.items() if name not in ("points", "path")}
        result = load(cls, fields_of_file, what)
        if result.is_sweep:
            points = parse(tuple[EpsResult, ...], content.get("curve"), f"{what}: curve")
        else:
            points = (load(EpsResult, content, what),)
        for point in points:
            _check_point(what, point)
        if result.is_sweep and result.eps != tuple(point.eps for point in points):
            raise InputError(f"{what}: eps and curve have different radii. Evaluate again.")
        return replace(result, points=points)

    def to_json(self) -> dict[str, Any]:
        """Return what a file holds of it: of one eps the fields of its point among its own, of several a curve."""
        points = [point.to_json() for point in self.points]
        content = self.identity() | ({"curve": points} if self.is_sweep else points[0])
        content |= {name: dump(getattr(self, name)) for name in _AFTER_POINTS}
        left_out = [name for name in ("run", "command", "adversarial_sha256", "further") if not content[name]]
        return {name: value for name, value in content.items() if name not in left_out}

    def identity(self) -> dict[str, Any]:
        """Return what was evaluated and how, as in a file."""
        return {name: dump(getattr(self, name)) for name in _BEFORE_POINTS}

    def published(self) -> "Result":
        """Return it without what concerns this machine only: paths and the command."""
        source = self.transfer_from and Path(self.transfer_from).name
        return replace(self, run=None, command=None, transfer_from=source, path=None)

    @property
    def file(self) -> Path:
        """The file it was read from."""
        assert self.path is not None
        return self.path

    @property
    def is_sweep(self) -> bool:
        """Whether it is over several eps."""
        return not isinstance(self.eps, str)

    @property
    def point(self) -> EpsResult:
        """Accuracies at its only eps."""
        (point,) = self.points
        return point

    def at(self, eps: str) -> EpsResult | None:
        """Return the accuracies at an eps, whatever its spelling; None where it was not evaluated."""
        return next((point for point in self.points if radius_written(point.eps) == radius_written(eps)), None)

    @property
    def images(self) -> tuple[str, str, str]:
        """Which images it is of, and in which norm."""
        return self.dataset, self.dataset_title, self.norm

    @property
    def environment(self) -> dict[str, Any]:
        """What the numbers have to be read with."""
        return {"versions": self.versions, "hardware": self.hardware, "git_revision": self.git_revision}

    @property
    def measured_with(self) -> str:
        """Hardware and versions in a line."""
        return f"{self.hardware}; {', '.join(f'{package} {version}' for package, version in self.versions.items())}"


_NAMES = [one.name for one in fields(Result) if one.name != "path"]
_BEFORE_POINTS = _NAMES[: _NAMES.index("points")]
_AFTER_POINTS = _NAMES[_NAMES.index("points") + 1 :]
_ATTACK = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_NO_ATTACKS = {"clean", "worst", "net", "training", "masking", "images", "seeds"}  # what else has a column in tables


def _check_point(what: Path | str, point: EpsResult) -> None:
    names = {*point.accuracy, *point.settings, *point.sequences}
    if strange := sorted(name for name in names if name in _NO_ATTACKS or not _ATTACK.fullmatch(name)):
        raise InputError(f"{what} names an attack {strange[0]!r}, which no suite does; evaluate anew")
    if point.worst > min([point.clean, *point.accuracy.values()]) + ROUNDING:
        raise InputError(f"{what} has a worst case above another of its accuracies; evaluate anew")


def read_result(path: Path) -> Result:
    """Read a result file, of one eps or of several.

    Raises:
        InputError: It is cut short, of another version, or holds something other than accuracies and verdicts.
    """
    return replace(Result.from_json(read_json(path), path), path=path)


def best_sweep(sweeps: Iterable[Result]) -> Result | None:
    """Return the one on the most examples, then at the most eps; None of none."""
    return max(sweeps, key=lambda sweep: (sweep.n_examples, len(sweep.points)), default=None)
