"""What evaluated runs' files say, gathered for tables, figures and statistics; nothing is loaded or measured here."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .attacks import ThreatModel
from .errors import InputError
from .models import CONFIG, WEIGHTS, sha256_of
from .result_files import VERDICTS, check_accuracies, check_has, read_checked, read_held_out, read_survivors

# Where a file lies, and what the seed changes: all else that a run was trained with is one setting.
_NOT_SETTINGS = ("seed", "data_dir", "generated", "init_from", "preset")
_TRAIN = ("model", "dataset", "seed", "objective", "beta", "awp_gamma", "activation", "placement")
_TRAIN += ("cap_weight", "cap_penalty", "generated_fraction")
_RESULT = ("dataset", "dataset_title", "norm", "eps", "n_examples", "model_digest")


@dataclass(frozen=True)
class Group:
    """What has to be the same for accuracies to stand in one table.

    Attributes:
        dataset: Its name, such as "cifar10".
        title: What it is called, such as "CIFAR-10 (JPEG copy)".
        norm: "Linf" or "L2".
        eps: The radius as written, such as "8/255".
        generated: Whether the nets were trained with generated images as well.
    """

    dataset: str
    title: str
    norm: str
    eps: str
    generated: bool

    def __str__(self) -> str:
        """As in headings."""
        return f"{self.title}, {self.norm}, eps {self.eps}" + (", with generated images" if self.generated else "")


@dataclass(frozen=True)
class Point:
    """What attacks leave of a net at one radius.

    Attributes:
        eps: The radius as written.
        n_examples: Test images.
        clean: Accuracy in [0, 1].
        accuracy: Likewise, by attack or sequence of attacks; the first attack of a sequence, which saw all examples,
            is an attack of its own too.
        worst: Likewise, over all of them and the probes for gradient masking.
        verdict: On gradient masking: "sound", "undecided" or "masked".
        zero_gradient_share: Of the examples classified right, in [0, 1].
        cw_l2: Accuracy at the L2 radius ``cw_budget`` under Carlini and Wagner's attack, which looks for the nearest
            adversarial example and knows no ball; its ``accuracy`` counts only what lies in the ball.
        cw_budget: eps for L2; for Linf the radius of the ball's corners, eps * sqrt(C * H * W).
        settings: Of each attack, what decides what it finds.
    """

    eps: str
    n_examples: int
    clean: float
    accuracy: dict[str, float]
    worst: float
    verdict: str
    zero_gradient_share: float
    cw_l2: float | None = None
    cw_budget: float | None = None
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def radius(self) -> float:
        """eps as a number."""
        return ThreatModel.parse("Linf", self.eps).eps


@dataclass(frozen=True)
class Outcome:
    """A trained net and what its evaluations in one threat model left of it.

    Attributes:
        run: The run directory.
        train: The flags it was trained with, of its config.json.
        start: Those of the run that it went on from (``--init-from``), if any.
        group: With what it can be compared.
        at: Accuracies at the group's eps; of several evaluations on as many examples, the lower ones.
        held_out: Accuracy in [0, 1] under the inner attack on held-out training images, of the epoch that was kept.
        sources: The result files.
        curve: Accuracies at rising radii, of a sweep in the same norm; empty without one.
        curve_source: Its file.
        measured_with: Hardware and versions of the evaluations, a line each.
    """

    run: Path
    train: dict[str, Any]
    start: dict[str, Any] | None
    group: Group
    at: Point
    held_out: float | None
    sources: tuple[Path, ...]
    curve: tuple[Point, ...] = ()
    curve_source: Path | None = None
    measured_with: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        """Of the training."""
        return self.train["seed"]

    @property
    def net(self) -> str:
        """The architecture, without what the D-ReLU adds to its name."""
        return self.train["model"].removesuffix("_drelu")

    @property
    def activation(self) -> str:
        """What stands in the added layer; "relu" for a net without one."""
        if not self.train["model"].endswith("_drelu"):
            return "relu"
        return self.train["activation"] or "drelu"

    @property
    def placement(self) -> str:
        """Where the added layer stands; "head" for a net without one."""
        return self.train["placement"] or "head"

    @property
    def cap_weight(self) -> float | None:
        """The balancer of a D-ReLU; None for other activations."""
        return self.train["cap_weight"] if self.activation == "drelu" else None

    @property
    def method(self) -> str:
        """Objective and activation without the balancer: "AT", "TRADES-6", "D-ReLU", "AT + D-ReLU", "natural", ..."""
        parts = [*filter(None, [self._objective, self._activation])]
        return " + ".join(parts) or "natural"

    @property
    def training(self) -> str:
        """The method with its balancer, as the paper writes it: "AT", "TRADES-6", "D-ReLU-0.1", "AT + D-ReLU-0.01"."""
        return self.method if self.cap_weight is None else f"{self.method}-{self.cap_weight:g}"

    @property
    def flags(self) -> dict[str, Any]:
        """All that runs which differ in their seed only have in common, with those of ``start`` as "init_from ..."."""
        if self.start is None:
            return _settings(self.train) | {"init_from": "none"}
        start = {f"init_from {name}": value for name, value in _settings(self.start).items()}
        return _settings(self.train) | {"init_from": "a run"} | start

    @property
    def settings(self) -> str:
        """The flags as one string, for comparisons."""
        return json.dumps(self.flags, sort_keys=True)

    def survivors(self) -> np.ndarray | None:
        """Which test images [N] nothing broke, 1 or 0; None where rows an example were left out.

        Raises:
            InputError: Rows that are cut short, or of another version.
        """
        return read_survivors(self.sources, self.at.n_examples)

    @property
    def _objective(self) -> str:
        objective, beta = self.train["objective"], f"{self.train['beta']:g}"
        names = {"natural": "", "at": "AT", "trades": f"TRADES-{beta}", "mart": f"MART-{beta}"}
        return names[objective] + (" + AWP" if self.train["awp_gamma"] else "")

    @property
    def _activation(self) -> str:
        names = {"relu": "", "drelu": "D-ReLU", "srelu": "S-ReLU", "relu6": "ReLU6", "silu": "SiLU", "gelu": "GELU"}
        name = names.get(self.activation, self.activation)
        details = [] if self.placement == "head" or not name else [self.placement]
        if self.activation == "drelu" and self.train["cap_penalty"] != "squared":
            details.append(self.train["cap_penalty"])
        return f"{name} ({', '.join(details)})" if details else name


@dataclass
class Outcomes:
    """All that was found.

    Attributes:
        found: One a run and threat model.
        broken: Files that were skipped since they cannot be used, and why; a line each.
        notes: What else a reader has to know; a line each.
    """

    found: list[Outcome] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def skip(self, error: InputError) -> None:
        """Note a file down that cannot be used, once."""
        if str(error) not in self.broken:
            self.broken.append(str(error))

    def groups(self) -> dict[Group, list[Outcome]]:
        """Outcomes that can be compared, each group by net, method, balancer and seed."""
        groups: dict[Group, list[Outcome]] = {}
        for outcome in sorted(self.found, key=_order):
            groups.setdefault(outcome.group, []).append(outcome)
        return groups


def read_outcomes(paths: Iterable[Path]) -> Outcomes:
    """What the run directories in some folders hold, at any depth.

    Args:
        paths: Run directories, or folders that hold them.

    Raises:
        InputError: A path that is no folder, or folders without any run.
    """
    paths, outcomes = list(paths), Outcomes()
    for path in paths:
        if not path.is_dir():
            raise InputError(f"{path} is no folder; give run directories, or folders that hold them")
    runs = sorted({run.resolve(): run for path in paths for run in _runs(path)}.values())
    if not runs:
        raise InputError(f"no run in {', '.join(map(str, paths))}; make one: drelu-timm sweep, or train and evaluate")
    seen: dict[tuple[str, str, int], Outcome] = {}
    for run in runs:
        for outcome in _read_run(run, outcomes):
            key = (str(outcome.group), outcome.settings, outcome.seed)
            if key in seen:
                outcomes.notes.append(f"{run} is {seen[key].run} once more (settings and seed); it is left out")
                continue
            seen[key] = outcome
            outcomes.found.append(outcome)
    return outcomes


def _runs(folder: Path) -> Iterator[Path]:
    if _is_run(folder):
        yield folder
        return
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and not inner.name.startswith("."):
            yield from _runs(inner)


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run directory, a broken one included: a timm folder has a config.json too, but no log."""
    return (folder / CONFIG).is_file() and not (folder / WEIGHTS).is_file()


def _read_run(run: Path, outcomes: Outcomes) -> list[Outcome]:
    """The outcomes of a run, one a threat model; what cannot be used is noted down."""
    try:
        config = read_checked(run / CONFIG, ("train", "dataset_title"))
        train, start = config["train"], (config.get("init_from") or {}).get("train")
        for flags in (train, start) if start is not None else (train,):
            check_has(run / CONFIG, flags, _TRAIN)
        held_out = read_held_out(run)
    except InputError as error:
        outcomes.skip(error)
        return []
    results = _read_all(run, "results", _RESULT, outcomes)
    curves = _read_all(run, "sweeps", (*_RESULT, "curve"), outcomes)
    if not results:
        outcomes.notes.append(f"{run} has no evaluation that could be read; drelu-timm evaluate {run} makes one")
    by_group: dict[Group, list[tuple[Path, dict[str, Any]]]] = {}
    for path, result in results:
        generated = bool(train["generated_fraction"])
        group = Group(result["dataset"], result["dataset_title"], result["norm"], result["eps"], generated)
        by_group.setdefault(group, []).append((path, result))
    return [
        _outcome(run, train, start, group, held_out, _most_examples(run, of_group, outcomes), curves)
        for group, of_group in by_group.items()
    ]


def _outcome(
    run: Path,
    train: dict[str, Any],
    start: dict[str, Any] | None,
    group: Group,
    held_out: float | None,
    results: Sequence[tuple[Path, dict[str, Any]]],
    curves: Sequence[tuple[Path, dict[str, Any]]],
) -> Outcome:
    same = [one for one in curves if all(one[1][name] == getattr(group, name) for name in ("dataset", "norm"))]
    curve_source, curve = max(same, key=lambda one: len(one[1]["curve"])) if same else (None, None)
    return Outcome(
        run=run,
        train=train,
        start=start,
        group=group,
        at=_lowest([_point(result, result["n_examples"]) for _, result in results]),
        held_out=held_out,
        sources=tuple(path for path, _ in results),
        curve=() if curve is None else tuple(_point(at, curve["n_examples"]) for at in curve["curve"]),
        curve_source=curve_source,
        measured_with=tuple(dict.fromkeys(_measured_with(result) for _, result in results)),
    )


def _read_all(run: Path, folder: str, fields: Sequence[str], outcomes: Outcomes) -> list[tuple[Path, dict[str, Any]]]:
    """The result files of a run's folder that are whole and of its weights, the one with the most attacks first."""
    read = []
    weights = run / "model" / WEIGHTS
    digest = sha256_of(weights) if weights.is_file() else None  # published results come without
    for path in sorted((run / folder).glob("*.json")):
        try:
            result = read_checked(path, fields)
            points = result.get("curve", [result])
            for at in points if isinstance(points, list) else [points]:
                check_accuracies(path, at)
        except InputError as error:
            outcomes.skip(error)
            continue
        if digest not in (None, result["model_digest"]):
            outcomes.skip(InputError(f"{path} was measured on other weights than {weights}; delete it, evaluate anew"))
            continue
        read.append((path, result))
    return sorted(read, key=lambda one: -len(one[1].get("accuracy", ())))


def _most_examples(
    run: Path, results: Sequence[tuple[Path, dict[str, Any]]], outcomes: Outcomes
) -> list[tuple[Path, dict[str, Any]]]:
    """Those evaluations that were made on the most examples, as others cannot be put together with them."""
    most = max(result["n_examples"] for _, result in results)
    for path, result in results:
        if result["n_examples"] < most:
            outcomes.notes.append(f"{path} is left out: another evaluation of {run} has {most} examples")
    return [(path, result) for path, result in results if result["n_examples"] == most]


def _point(at: dict[str, Any], n_examples: int) -> Point:
    first = [next(iter(stages.items())) for stages in at.get("sequences", {}).values() if stages]
    cw = at.get("cw_l2") or {}
    return Point(
        eps=at["eps"],
        n_examples=n_examples,
        clean=at["clean"],
        accuracy={**dict(first), **at["accuracy"]},
        worst=at["worst"],
        verdict=at["verdict"]["verdict"],
        zero_gradient_share=at["zero_gradient_share"],
        cw_l2=cw.get("accuracy_at_budget"),
        cw_budget=cw.get("budget"),
        settings=at.get("settings", {}),
    )


def _lowest(points: Sequence[Point]) -> Point:
    """Several evaluations of one net on the same examples: each attack's lowest accuracy, and the worst verdict."""
    first = points[0]
    accuracy: dict[str, float] = {}
    settings: dict[str, dict[str, Any]] = {}
    for point in points:
        for attack, left in point.accuracy.items():
            if attack not in accuracy or left < accuracy[attack]:
                accuracy[attack], settings[attack] = left, point.settings.get(attack, {})
    cw = min(points, key=lambda point: 1 if point.cw_l2 is None else point.cw_l2)
    return Point(
        eps=first.eps,
        n_examples=first.n_examples,
        clean=first.clean,
        accuracy=accuracy,
        worst=min(point.worst for point in points),
        verdict=max((point.verdict for point in points), key=VERDICTS.index),
        zero_gradient_share=max(point.zero_gradient_share for point in points),
        cw_l2=cw.cw_l2,
        cw_budget=cw.cw_budget,
        settings=settings,
    )


def _measured_with(result: dict[str, Any]) -> str:
    versions = (f"{package} {version}" for package, version in (result.get("versions") or {}).items())
    return f"{result.get('hardware') or 'hardware not known'}; {', '.join(versions) or 'versions not known'}"


def _settings(train: dict[str, Any]) -> dict[str, Any]:
    """The flags but for those that change no setting, an added layer's defaults filled in."""
    settings = {name: value for name, value in train.items() if name not in _NOT_SETTINGS}
    if train["model"].endswith("_drelu"):
        settings |= {"placement": train["placement"] or "head", "activation": train["activation"] or "drelu"}
    return settings


def _order(outcome: Outcome) -> tuple[Any, ...]:
    group = outcome.group
    weight = -1.0 if outcome.cap_weight is None else outcome.cap_weight
    return (
        group.dataset,
        group.title,
        group.norm,
        group.eps,
        group.generated,
        outcome.net,
        outcome.method,
        weight,
        outcome.seed,
    )
