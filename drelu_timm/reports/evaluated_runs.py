"""Evaluated runs, read from their files: the input of tables, figures and statistics."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..attacks.threat_model import radius_of, radius_written
from ..errors import InputError, one_line
from ..files import read_json
from ..hashing import sha256_of
from ..models.weights import CONFIG, WEIGHTS
from ..results.combined import Combined
from ..results.examples import read_survivors
from ..results.result import EpsResult, Result, best_sweep, read_result
from ..results.seal import check_result
from ..schema import Whole, load
from .training_settings import TrainingSettings, read_held_out, read_settings

CELLS = "cells.json"  # of a sweep: the number of evaluations of each cell


@dataclass(frozen=True)
class _Cells:
    cells: dict[str, Whole]


@dataclass(frozen=True)
class Group:
    """What two accuracies must have in common to be compared in one table.

    Attributes:
        dataset: Name, such as "cifar10".
        title: Title, such as "CIFAR-10 (JPEG copy)".
        norm: "Linf" or "L2".
        eps: eps in its canonical spelling, such as "8/255".
        generated: Whether generated images were used in the training, or in one that it started from.
    """

    dataset: str
    title: str
    norm: str
    eps: str
    generated: bool

    def __str__(self) -> str:
        return f"{self.title}, {self.norm}, eps {self.eps}" + (", with generated images" if self.generated else "")

    @property
    def images(self) -> tuple[str, str, str]:
        """Dataset, title and norm, as in `Result.images`."""
        return self.dataset, self.title, self.norm


@dataclass(frozen=True, kw_only=True)
class EvaluatedRun(TrainingSettings):
    """Run with all of its evaluations under one threat model.

    Attributes:
        path: Run directory.
        group: Group that its accuracies belong to.
        combined: All evaluations at the group's eps, sweeps included.
        held_out: Accuracy in [0, 1] under the inner attack on held-out training images; None without a log.
        sweep: Sweep over eps in the same norm, for the figures; None without one.
    """

    path: Path
    group: Group
    combined: Combined
    held_out: float | None
    sweep: Result | None = None

    @property
    def curve(self) -> tuple[EpsResult, ...]:
        """Accuracies at ascending eps; empty without a sweep."""
        return () if self.sweep is None else self.sweep.points

    @property
    def verdict(self) -> str:
        """Worst verdict of all evaluations under this threat model."""
        return self.combined.verdict.verdict

    def sources(self, column: str) -> tuple[Path, ...]:
        """Return the files that an accuracy comes from: an attack's, "clean", or "worst", to which all contribute."""
        combined = self.combined
        if column == "worst":
            return tuple(result.file for result in combined.all)
        with_it = (result.file for result in combined.results if column in combined.point_of(result).columns)
        return tuple(with_it) or tuple(result.file for result in combined.results)

    def survivors(self) -> np.ndarray | None:
        """Return 1 for each test image on which the model stayed robust, else 0, [N]; None if rows were left out."""
        survivors = read_survivors(self.combined.all, self.combined.n_examples, self.group.eps)
        return None if survivors is None else survivors.int().numpy()


@dataclass
class EvaluatedRuns:
    """Everything that was found in some folders.

    Attributes:
        found: One entry per run and threat model.
        broken: One line per file that was skipped, with the reason.
        notes: Other remarks for the reader, one line each.
        unfinished: One sentence per sweep that is not finished, with its missing cells.
    """

    found: list[EvaluatedRun] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)

    def skip(self, error: InputError) -> None:
        """Record a file that cannot be used, once."""
        if str(error) not in self.broken:
            self.broken.append(str(error))

    def groups(self) -> dict[Group, list[EvaluatedRun]]:
        """Return the runs by group, each group sorted by architecture, method, cap weight and seed."""
        groups: dict[Group, list[EvaluatedRun]] = {}
        for run in sorted(self.found, key=_order):
            groups.setdefault(run.group, []).append(run)
        return groups


def _order(run: EvaluatedRun) -> tuple[Any, ...]:
    group = run.group
    cap_weight = -1.0 if run.cap_weight is None else run.cap_weight
    where = (group.dataset, group.title, group.norm, radius_of(group.eps), group.generated)
    return (*where, run.architecture, run.method, cap_weight, run.seed)


def read_evaluated_runs(paths: Iterable[Path]) -> EvaluatedRuns:
    """Read all run directories in some folders, at any depth.

    Args:
        paths: Run directories, or folders that contain them.

    Raises:
        InputError: A path is not a folder, or no folder contains a run.
    """
    paths, runs = list(paths), EvaluatedRuns()
    for path in paths:
        if not path.is_dir():
            raise InputError(f"{path} is not a folder. Give run directories, or folders that contain them.")
    folders = sorted({folder.resolve(): folder for path in paths for folder in _run_folders(path, runs)}.values())
    if not folders:
        where = " | ".join([f"No run in {', '.join(map(str, paths))}", *runs.broken])
        raise InputError(f"{where}. Make one with drelu-timm sweep, or with train and evaluate.")
    seen: dict[tuple[Group, str, int], EvaluatedRun] = {}
    for folder in folders:
        for run in _read_run(folder, runs):
            same = seen.setdefault((run.group, run.settings_key, run.seed), run)
            if same is run:
                runs.found.append(run)
            else:
                runs.notes.append(f"{folder} is left out: it has the same settings and seed as {same.path}.")
    return runs


def _run_folders(folder: Path, runs: EvaluatedRuns) -> Iterator[Path]:
    """Yield the run directories in a folder, and record what cannot be read."""
    try:
        # A timm folder has a config.json too, but with the weights next to it.
        is_run = (folder / CONFIG).is_file() and not (folder / WEIGHTS).is_file()
        inside = [] if is_run else [inner for inner in sorted(folder.iterdir()) if inner.is_dir()]
    except OSError as error:
        runs.skip(InputError(f"{folder} cannot be read ({one_line(error)})."))
        return
    if is_run:
        yield folder
    elif (folder / CELLS).is_file():
        _read_cells(folder, runs)
    for inner in inside:
        if not inner.name.startswith("."):
            yield from _run_folders(inner, runs)


def _read_cells(folder: Path, runs: EvaluatedRuns) -> None:
    """Record which cells of a sweep lack evaluations."""
    try:
        cells = load(_Cells, read_json(folder / CELLS), folder / CELLS).cells
    except InputError as error:
        runs.skip(error)
        return
    evaluated = {
        name: sum(1 for inside in ("results", "sweeps") for _ in (folder / name / inside).glob("*.json"))
        for name in cells
    }
    if missing := [name for name, count in cells.items() if evaluated[name] < count]:
        done = f"{len(cells) - len(missing)} of {len(cells)} cells"
        name = folder.resolve().name
        runs.unfinished.append(f"{done} of the sweep {name} are done; missing: {', '.join(missing)}.")


def _read_run(folder: Path, runs: EvaluatedRuns) -> list[EvaluatedRun]:
    """Read a run, once per threat model, and record what cannot be used."""
    try:
        settings = read_settings(folder / CONFIG)
        held_out = read_held_out(folder)
    except InputError as error:
        runs.skip(error)
        return []
    results, sweeps = (_read_results(folder, inside, runs) for inside in ("results", "sweeps"))
    if len({one.model_digest for one in (*results, *sweeps)}) > 1:
        runs.skip(InputError(f"{folder} has evaluations of different weights. Delete the older ones."))
        return []
    if not results:
        runs.notes.append(_without_results(folder, sweeps))
    by_group: dict[Group, list[Result]] = {}
    generated = any(one.train["generated_fraction"] for one in (settings, *settings.starts))
    for result in results:
        group = Group(*result.images, radius_written(result.point.eps), generated)
        by_group.setdefault(group, []).append(result)
    return [
        EvaluatedRun(
            train=settings.train,
            start=settings.start,
            path=folder,
            group=group,
            combined=_combine(folder, group, of_group, sweeps, runs),
            held_out=held_out,
            sweep=_choose_sweep(folder, group, sweeps, runs),
        )
        for group, of_group in by_group.items()
    ]


def _read_results(folder: Path, inside: str, runs: EvaluatedRuns) -> list[Result]:
    """Read and check the result files of a run's weights, with the most attacks first.

    A result is recorded as broken if it contradicts the rows or the adversarial images next to it, or its seal.
    """
    read = []
    weights = folder / "model" / WEIGHTS
    try:
        digest = sha256_of(weights) if weights.is_file() else None  # published results come without weights
    except OSError as error:
        runs.skip(InputError(f"{weights} cannot be read ({one_line(error)})."))
        return []
    for path in sorted((folder / inside).glob("*.json")):
        try:
            result = read_result(path)
            if digest not in (None, result.model_digest):
                raise InputError(f"{path} was measured on other weights than {weights}. Delete it and evaluate again.")
            check_result(result)
        except InputError as error:
            runs.skip(error)
        else:
            read.append(result)
    return sorted(read, key=lambda one: -len(one.points[0].accuracies))


def _without_results(folder: Path, sweeps: Sequence[Result]) -> str:
    """Return why a run is in no table, and the command that changes this."""
    command = f"Run drelu-timm evaluate {folder}."
    if sweeps:
        return f"{folder} has a sweep over eps, but tables need an evaluation at one eps. {command}"
    if any((folder / "last" / "results").glob("*.json")):
        return f"{folder} has evaluations of the last epoch's weights only (last/results), not of the best. {command}"
    return f"{folder} has no evaluation that could be read. {command}"


def _combine(
    folder: Path, group: Group, results: Sequence[Result], sweeps: Sequence[Result], runs: EvaluatedRuns
) -> Combined:
    """Combine all evaluations of a run in one group.

    Accuracies are those on the most examples that an evaluation at one eps has. A sweep has fewer attacks, so it does
    not decide. Evaluations on other numbers of examples count by their verdict and the images that fooled the model.
    """
    most = max(one.n_examples for one in results)
    evaluations = [*results, *(one for one in sweeps if one.images == group.images and one.at(group.eps))]
    kept, others = ([one for one in evaluations if (one.n_examples == most) == many] for many in (True, False))
    for one in others:
        point = one.at(group.eps)
        assert point is not None
        runs.notes.append(
            f"{one.path} counts only by its verdict and the images that fooled the model: worst case "
            f"{100 * point.worst:.2f} % of {one.n_examples} examples, {point.verdict}; another evaluation of {folder} "
            f"has {most} examples."
        )
    survivors = read_survivors((*kept, *others), most, group.eps) if len(evaluations) > 1 else None
    return Combined(group.eps, tuple(kept), tuple(others), survivors)


def _choose_sweep(folder: Path, group: Group, sweeps: Sequence[Result], runs: EvaluatedRuns) -> Result | None:
    """Return the sweep for the figures, and note which others are not drawn."""
    sweeps = [one for one in sweeps if one.images == group.images]
    best = best_sweep(sweeps)
    for one in sweeps:
        if one is not best and best is not None:
            runs.notes.append(f"{one.path} is not drawn: {best.file.name} of {folder} has more examples or more eps.")
    return best
