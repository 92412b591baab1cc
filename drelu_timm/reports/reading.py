"""What evaluated runs' files say, gathered for tables, figures and statistics; nothing is loaded or measured here."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..attacks.threat_model import radius_written
from ..errors import InputError, one_line
from ..hashing import sha256_of
from ..models.weights import CONFIG, WEIGHTS
from ..results.combined import Combined
from ..results.examples import read_survivors
from ..results.result import Result, best_sweep, read_result
from .outcomes import Group, Outcome, Training, read_held_out, read_training


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
    runs = sorted({run.resolve(): run for path in paths for run in _runs(path, outcomes)}.values())
    if not runs:
        where = " | ".join([f"no run in {', '.join(map(str, paths))}", *outcomes.broken])
        raise InputError(f"{where}; make one: drelu-timm sweep, or train and evaluate")
    seen: dict[tuple[Group, str, int], Outcome] = {}
    for run in runs:
        for outcome in _read_run(run, outcomes):
            key = (outcome.group, outcome.settings, outcome.seed)
            if key in seen:
                outcomes.notes.append(f"{run} is {seen[key].run} once more (settings and seed); it is left out")
                continue
            seen[key] = outcome
            outcomes.found.append(outcome)
    return outcomes


def _runs(folder: Path, outcomes: Outcomes) -> Iterator[Path]:
    """The run directories in a folder; one that cannot be read is noted down."""
    try:
        is_run = _is_run(folder)
        inside = [] if is_run else [inner for inner in sorted(folder.iterdir()) if inner.is_dir()]
    except OSError as error:
        outcomes.skip(InputError(f"{folder} cannot be read ({one_line(error)})"))
        return
    if is_run:
        yield folder
    for inner in inside:
        if not inner.name.startswith("."):
            yield from _runs(inner, outcomes)


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run directory, a broken one included: a timm folder has a config.json too, but no log."""
    return (folder / CONFIG).is_file() and not (folder / WEIGHTS).is_file()


def _read_run(run: Path, outcomes: Outcomes) -> list[Outcome]:
    """The outcomes of a run, one a threat model; what cannot be used is noted down."""
    try:
        training = read_training(run / CONFIG)
        held_out = read_held_out(run)
    except InputError as error:
        outcomes.skip(error)
        return []
    results, sweeps = (_read_all(run, folder, outcomes) for folder in ("results", "sweeps"))
    if len({one.model_digest for one in (*results, *sweeps)}) > 1:
        outcomes.skip(InputError(f"{run} holds evaluations of several weights, not these themselves; delete the older"))
        return []
    if not results:
        outcomes.notes.append(_without_results(run, sweeps))
    by_group: dict[Group, list[Result]] = {}
    for result in results:
        by_group.setdefault(_group(training, result), []).append(result)
    return [
        Outcome(
            run=run,
            train=training.train,
            start=training.start,
            group=group,
            at=_combined(run, group, of_group, sweeps, outcomes),
            held_out=held_out,
            sweep=_sweep(run, group, sweeps, outcomes),
        )
        for group, of_group in by_group.items()
    ]


def _group(training: Training, result: Result) -> Group:
    """With what an evaluation of a training can be compared."""
    generated = any(one.train["generated_fraction"] for one in (training, *training.starts))
    return Group(*result.images, radius_written(result.point.eps), generated)


def _combined(
    run: Path, group: Group, results: Sequence[Result], sweeps: Sequence[Result], outcomes: Outcomes
) -> Combined:
    """All evaluations of a run in one group together."""
    with_eps = [one for one in sweeps if one.images == group.images and one.at(group.eps)]
    kept, others = _most_examples(run, results, with_eps, group, outcomes)
    return Combined(group.eps, tuple(kept), tuple(others), _survivors((*kept, *others), group, outcomes))


def _sweep(run: Path, group: Group, sweeps: Sequence[Result], outcomes: Outcomes) -> Result | None:
    """The sweep that figures are drawn from; the others are named."""
    sweeps = [one for one in sweeps if one.images == group.images]
    best = best_sweep(sweeps)
    for one in sweeps:
        if one is not best and best is not None:
            outcomes.notes.append(
                f"{one.path} is in no figure: of {run}'s sweeps {best.file.name} has the most examples, or then radii"
            )
    return best


def _without_results(run: Path, sweeps: Sequence[Result]) -> str:
    """Why a run is not in any table, and what mends it."""
    makes_one = f"drelu-timm evaluate {run} makes one"
    if sweeps:
        return f"{run} has a sweep over eps, but no evaluation at one eps, which tables are made of; {makes_one}"
    if any((run / "last" / "results").glob("*.json")):
        return f"{run} has evaluations of its last epoch's weights only (last/results), not of the best; {makes_one}"
    return f"{run} has no evaluation that could be read; {makes_one}"


def _read_all(run: Path, folder: str, outcomes: Outcomes) -> list[Result]:
    """The result files of a run's folder that are whole and of its weights, the one with the most attacks first."""
    read = []
    weights = run / "model" / WEIGHTS
    try:
        digest = sha256_of(weights) if weights.is_file() else None  # published results come without
    except OSError as error:
        outcomes.skip(InputError(f"{weights} cannot be read ({one_line(error)})"))
        return []
    for path in sorted((run / folder).glob("*.json")):
        try:
            result = read_result(path)
        except InputError as error:
            outcomes.skip(error)
            continue
        if digest not in (None, result.model_digest):
            outcomes.skip(InputError(f"{path} was measured on other weights than {weights}; delete it, evaluate anew"))
            continue
        read.append(result)
    return sorted(read, key=lambda one: -len(one.points[0].accuracies))


def _most_examples(
    run: Path,
    results: Sequence[Result],
    sweeps: Sequence[Result],
    group: Group,
    outcomes: Outcomes,
) -> tuple[list[Result], list[Result]]:
    """Those evaluations that were made on the most examples, and the others, whose accuracies are of other images.

    How many are the most say the evaluations at one eps, as a sweep has fewer attacks.
    """
    most = max(one.n_examples for one in results)
    kept, others = ([one for one in (*results, *sweeps) if (one.n_examples == most) == many] for many in (True, False))
    for one in others:
        at = one.at(group.eps)
        assert at is not None  # of those that have none, none is among them
        outcomes.notes.append(
            f"{one.path} counts by its verdict and the images that it broke only: worst case {100 * at.worst:.2f} % of "
            f"{one.n_examples} examples, {at.verdict}; another evaluation of {run} has {most} examples"
        )
    return kept, others


def _survivors(results: Sequence[Result], group: Group, outcomes: Outcomes) -> Tensor | None:
    """Of several evaluations together; None where the rows of one are not there, or cannot be read."""
    if len(results) == 1:
        return None
    try:
        return read_survivors(results, results[0].n_examples, group.eps)
    except InputError as error:
        outcomes.skip(error)
        return None


def _order(outcome: Outcome) -> tuple[Any, ...]:
    group = outcome.group
    weight = -1.0 if outcome.cap_weight is None else outcome.cap_weight
    where = (group.dataset, group.title, group.norm, group.radius, group.generated)
    return (*where, outcome.net, outcome.method, weight, outcome.seed)
