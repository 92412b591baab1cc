"""Result of an evaluation, as its JSON file holds it; the schema for evaluate, export, report and sweep."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from ..attacks.threat_model import Norm, radius_of, radius_written
from ..errors import InputError
from ..files import read_json
from ..schema import Constraint, Count, Share, Text, Whole, dump, load, parse

ROUNDING = 1e-9  # largest difference between equal shares

Word = Literal["sound", "undecided", "masked"]
VERDICTS: tuple[Word, ...] = get_args(Word)  # from best to worst


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
        verdict: "sound": white-box attacks find nearly all adversarial examples that other attacks find; "masked": they
            miss many; "undecided": neither is shown.
        evidence: A sentence per signal.
        numbers: The signals by name: shares in [0, 1] of the ``examples`` that were probed.
    """

    verdict: Word
    evidence: tuple[str, ...]
    numbers: dict[str, int | float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.verdict


# Set on the models of scripts/masking_battery.py and on the development set of scripts/verdict_test.
MASKED_ABOVE = 0.05  # share of examples that some attacks miss and others do not; 4 % on long-trained ReLU models
SOUND_BELOW = 0.10
UNION_MASKED_ABOVE = 0.08  # the same for all gaps together
UNION_SOUND_BELOW = 0.13
# Adversarial training with caps, whose zero gradients hide nothing at eps, leaves some 20 % there.
STUCK_ABOVE = 1 / 3  # of the examples beyond chance: share that stays correct at an eps where nothing can be robust
CHANCE_TELLS_BELOW = 0.7  # above it, too few examples are beyond chance
FEWEST = 100  # examples for "sound"
# Shares of examples that an attack misses, and that another one finds by scaled logits, by more starting points, or
# without following the gradient at the point alone.
GAPS = ("broken_by_rescaled", "broken_by_restarts", "hidden")


def conclusion(numbers: Mapping[str, float]) -> Word:
    """Return the verdict on gradient masking that follows from its numbers, by name; see `Verdict`."""
    if not numbers.get("examples"):
        return "undecided"
    limits = [(gap, MASKED_ABOVE, SOUND_BELOW) for gap in GAPS]
    is_of_first_version = "any_gap" not in numbers  # 0.1.0 had neither the union, nor suspicion, nor fewest examples
    if not is_of_first_version:
        limits.append(("any_gap", UNION_MASKED_ABOVE, UNION_SOUND_BELOW))
    if numbers["chance"] < CHANCE_TELLS_BELOW:
        stuck_above = numbers["chance"] + (1 - numbers["chance"]) * STUCK_ABOVE
        limits.append(("stuck", stuck_above, stuck_above))
    if any(numbers[f"{name}_low"] > masked_above for name, masked_above, _ in limits):
        return "masked"
    found_all = all(numbers[f"{name}_high"] < sound_below for name, _, sound_below in limits)
    looked = not numbers.get("suspicious") or "broken_by_estimated" in numbers
    enough = is_of_first_version or numbers["examples"] >= FEWEST
    return "sound" if found_all and looked and enough and not numbers["unsteady"] else "undecided"


def share_interval(count: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a binomial share (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953)."""
    from scipy.stats import binomtest  # 0.3 s, which commands that read a result may not need

    interval = binomtest(count, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True, kw_only=True)
class CarliniWagner:
    """Result of a minimum-norm attack, in addition to a robust accuracy.

    Attributes:
        median_l2: Median L2 distance over the correctly classified examples; None if it fools the model on fewer than
            half of them.
        budget: L2 radius: eps for L2; for Linf the distance of the corners, eps * sqrt(C * H * W).
        accuracy_at_budget: Share of all examples that are correct and have no adversarial image within the budget.
    """

    median_l2: float | None
    budget: float
    accuracy_at_budget: Share


@dataclass(frozen=True, kw_only=True)
class EpsResult:
    """Accuracies of a model at one eps.

    Attributes:
        eps: As written.
        settings: Settings of each attack.
        clean: Clean accuracy in [0, 1].
        accuracy: Robust accuracy in [0, 1] under each attack, or column of several attacks such as "autoattack".
        worst: Share of the examples on which neither an attack nor a probe for masking fooled the model.
        certified: Share of the examples on which interval bounds prove that no attack can fool the model; None where
            they cannot be computed, and for evaluations from before there were any.
        not_certified: Sentence that states why they cannot.
        sequences: For each column of several attacks, the accuracy after each of them.
        zero_gradient_share: Share of the correctly classified examples whose input gradient (of the cross-entropy) is
            exactly zero.
        cw_l2: For the suites with "cw-l2".
        verdict: Verdict on gradient masking.
        seconds: Wall-clock time, of a whole sweep; without the time before it resumed.
        attack_seconds: Wall-clock time of each attack of the suite that started after the evaluation resumed.
    """

    eps: Eps
    settings: dict[str, dict[str, Any]]
    clean: Share
    accuracy: dict[str, Share]
    worst: Share
    certified: Share | None = None
    not_certified: str | None = None
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
        """``accuracy``, and the accuracy under the first attack of each sequence, which saw all examples."""
        first = [next(iter(stages.items())) for stages in self.sequences.values() if stages]
        return {**dict(first), **self.accuracy}

    @property
    def columns(self) -> set[str]:
        """Attacks with an accuracy; "cw-l2" is at its L2 budget."""
        return {*self.accuracies} - {"cw-l2"} | ({"cw-l2"} if self.cw_l2 else set())

    def to_json(self) -> dict[str, Any]:
        """Return the JSON content."""
        content = {one.name: dump(getattr(self, one.name)) for one in fields(EpsResult)}
        times = {attack: round(seconds, 1) for attack, seconds in self.attack_seconds.items()}
        content |= {"seconds": round(self.seconds, 1), "attack_seconds": times}
        left_out = [name for name in ("certified", "not_certified") if content[name] is None]
        return {name: value for name, value in content.items() if name not in left_out}


@dataclass(frozen=True, kw_only=True)
class Further:
    """Another evaluation of the same weights that counts in a published worst case; its fields are as in `Result`."""

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
class Seal:
    """Chain of sha256 digests over the parts of a result; see `results.seal`. It is not a signature.

    Attributes:
        weights: Link of the model_digest.
        images: Link of the test images and labels.
        settings: Link of the threat model and the settings of every attack.
        rows: Link of the .csv file.
        result: Link of the .json file without its seal.
    """

    weights: str
    images: str
    settings: str
    rows: str
    result: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of an evaluation: at one eps, or of a sweep at several.

    Attributes:
        run: Run directory, timm name, or RobustBench's key, as given; None once published, like ``command``.
        model: Architecture, or the name again.
        dataset: Name, such as "cifar10".
        dataset_title: Name in tables, such as "CIFAR-10 (JPEG copy)".
        norm: "Linf" or "L2".
        eps: As written; of a sweep all of them, from the smallest.
        suite: Name of the suite of attacks.
        n_examples: Number of test images, from the first.
        seed: Key of all randomness.
        precision: Precision of the search, such as "float32".
        transfer_from: A second model whose adversarial images were tried.
        model_digest: sha256 of the weights file; None for weights that timm or RobustBench downloads.
        points: Accuracies at each eps.
        processes: Number of processes that shared the work.
        versions: Versions of packages.
        hardware: Description of the machine.
        command: Command line that wrote it.
        git_revision: Revision of the checkout; None for an installed package.
        adversarial_sha256: sha256 of the file of adversarial images; None for a sweep, which keeps none.
        further: Of a published result, the other evaluations that count in its worst case.
        seal: Of a result that is not published; None for version 0.1.0.
        path: File that it was read from, if any.
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
    seal: Seal | None = None
    path: Path | None = None

    @classmethod
    def from_json(cls, content: Any, what: Path | str) -> "Result":
        """Return the result in a file's JSON content; ``what`` names the file in errors.

        Raises:
            InputError: A field is missing or of another type, an attack has an impossible name, or the worst case is
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
        """Return the JSON content, with the fields of the only eps among its own, or with a curve of several."""
        points = [point.to_json() for point in self.points]
        content = self.identity() | ({"curve": points} if self.is_sweep else points[0])
        content |= {name: dump(getattr(self, name)) for name in _AFTER_POINTS}
        left_out = [name for name in ("run", "command", "adversarial_sha256", "further", "seal") if not content[name]]
        return {name: value for name, value in content.items() if name not in left_out}

    def identity(self) -> dict[str, Any]:
        """Return the fields that describe what was evaluated, and how."""
        return {name: dump(getattr(self, name)) for name in _BEFORE_POINTS}

    def published(self) -> "Result":
        """Return the result without paths, the command and the seal over them, which concern one machine only."""
        source = self.transfer_from and Path(self.transfer_from).name
        return replace(self, run=None, command=None, transfer_from=source, seal=None, path=None)

    @property
    def file(self) -> Path:
        """File that it was read from."""
        assert self.path is not None
        return self.path

    @property
    def is_sweep(self) -> bool:
        """Whether it is at several eps."""
        return not isinstance(self.eps, str)

    @property
    def point(self) -> EpsResult:
        """Accuracies at its only eps."""
        (point,) = self.points
        return point

    def at(self, eps: str) -> EpsResult | None:
        """Return the accuracies at an eps, in any spelling; None where it was not evaluated."""
        return next((point for point in self.points if radius_written(point.eps) == radius_written(eps)), None)

    @property
    def images(self) -> tuple[str, str, str]:
        """Dataset, its title, and the norm."""
        return self.dataset, self.dataset_title, self.norm

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, hardware and revision that the numbers depend on."""
        return {"versions": self.versions, "hardware": self.hardware, "git_revision": self.git_revision}

    @property
    def measured_with(self) -> str:
        """Hardware and versions in one line."""
        return f"{self.hardware}; {', '.join(f'{package} {version}' for package, version in self.versions.items())}"


_NAMES = [one.name for one in fields(Result) if one.name != "path"]
_BEFORE_POINTS = _NAMES[: _NAMES.index("points")]
_AFTER_POINTS = _NAMES[_NAMES.index("points") + 1 :]
_ATTACK = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
# Other columns of tables.
_NO_ATTACKS = {"clean", "worst", "certified", "net", "training", "masking", "images", "seeds"}


def _check_point(what: Path | str, point: EpsResult) -> None:
    """Check the accuracies and the verdict at one eps against each other."""
    names = {*point.accuracy, *point.settings, *point.sequences}
    if strange := sorted(name for name in names if name in _NO_ATTACKS or not _ATTACK.fullmatch(name)):
        raise InputError(f"{what} names an attack {strange[0]!r}, which no suite has. Evaluate again.")
    if point.worst > min([point.clean, *point.accuracy.values()]) + ROUNDING:
        raise InputError(f"{what} has a worst case above another of its accuracies. Evaluate again.")
    if point.certified is not None and point.certified > point.worst + ROUNDING:
        raise InputError(f"{what} has a certified accuracy above its worst case. Evaluate again.")
    for name, accuracy in point.accuracies.items():
        if accuracy > point.clean + ROUNDING:
            raise InputError(f"{what} has an accuracy under {name} above the clean accuracy. Evaluate again.")
    for column, after in point.sequences.items():
        if any(later > earlier + ROUNDING for earlier, later in pairwise(after.values())):
            raise InputError(f"{what} has accuracies of {column} that rise from attack to attack. Evaluate again.")
        if column in point.accuracy and after and abs([*after.values()][-1] - point.accuracy[column]) > ROUNDING:
            raise InputError(f"{what} has another accuracy under {column} than after its last attack. Evaluate again.")
    _check_verdict(f"{what}: verdict at eps {point.eps}", point.verdict)


def _check_verdict(what: str, verdict: Verdict) -> None:
    """Check that a verdict follows from its numbers, if it has any."""
    numbers = verdict.numbers
    if not numbers:
        return
    for name, value in numbers.items():
        is_possible = 0 <= value <= 1e9 and value == int(value) if name == "examples" else 0 <= value <= 1
        if not is_possible:
            raise InputError(f"{what} has a number {name} that is neither a count nor a share. Evaluate again.")
    shares = (*GAPS, "stuck", *(["any_gap"] if "any_gap" in numbers else []))
    for name in shares if numbers.get("examples") else ():
        examples, low_and_high = round(numbers["examples"]), (f"{name}_low", f"{name}_high")
        if missing := [one for one in ("chance", "unsteady", name, *low_and_high) if one not in numbers]:
            raise InputError(f"{what} has no number {missing[0]}. Evaluate again.")
        count = round(numbers[name] * examples)
        if not 0 <= count <= examples or abs(count - numbers[name] * examples) > 1e-6:
            raise InputError(f"{what} has {name} {numbers[name]}, not a share of {examples} examples. Evaluate again.")
        for one, expected in zip(low_and_high, share_interval(count, examples), strict=True):
            if abs(numbers[one] - expected) > 1e-4:  # version 0.1.0 rounded a quantile to 1.96
                raise InputError(f"{what} has {one} {numbers[one]:.4f} instead of {expected:.4f}. Evaluate again.")
    if verdict.verdict != conclusion(numbers):
        raise InputError(f"{what} is {verdict}, but its numbers give {conclusion(numbers)}. Evaluate again.")


def read_result(path: Path) -> Result:
    """Read a result file, of one eps or of several.

    Raises:
        InputError: It is cut short, of another version, or a field has an impossible value.
    """
    return replace(Result.from_json(read_json(path), path), path=path)


def best_sweep(sweeps: Iterable[Result]) -> Result | None:
    """Return the sweep with the most examples, then the most eps; None if there is none."""
    return max(sweeps, key=lambda sweep: (sweep.n_examples, len(sweep.points)), default=None)
