"""Evaluations of a run for publication: one is chosen, the others count in its worst case, all make up a card."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from statistics import mean
from typing import Any

from ..attacks.threat_model import ThreatModel
from ..errors import InputError, one_line, unknown
from ..files import read_json
from ..models.caps import cap_statistics
from ..models.weights import CONFIG, WEIGHTS
from ..results.combined import Combined
from ..results.examples import read_survivors
from ..results.result import EpsResult, Further, Result, best_sweep, read_result
from ..results.seal import check_result
from ..runs import Run
from ..schema import Count, Text, Whole, field_types, load, load_table
from ..training.config import TrainConfig
from .card import AUTOATTACK, Card, Paper, Seed, Weights, evaluation_name


@dataclass(frozen=True)
class _Launch:
    num_processes: Count
    mixed_precision: Text
    device: Text


@dataclass(frozen=True)
class _Config:
    """Fields of a run's config.json that cards and recipes use, with their types."""

    train: dict[str, Any]
    dataset_title: Text
    num_classes: Count
    in_chans: Count
    img_size: Count
    hardware: Text
    versions: dict[str, str]
    git_revision: str | None
    launch: _Launch | None = None
    init_from: dict[str, Any] | None = None


_TRAIN = ("model", "dataset", "norm", "eps", "objective", "seed", "preset", "monitor")


def open_run(path: Path) -> Run:
    """Open a run directory whose config.json may be from elsewhere, and check the types of its values.

    Raises:
        InputError: The run does not exist, or a value is missing or of another type; the line names file and field.
    """
    run = Run.open(path)
    what, config = f"{run.path / 'config.json'}", run.config
    while config is not None:
        checked = load(_Config, config, what)
        load_table(field_types(TrainConfig), checked.train, f"{what}: train")
        if missing := [name for name in _TRAIN if name not in checked.train]:
            raise InputError(f"{what}: train has no {', '.join(missing)}. The file is cut or of another version.")
        what, config = f"{what}: init_from", checked.init_from
    return run


def choose_evaluation(run: Run, threat_model: ThreatModel, name: str | None) -> Result:
    """Return the named evaluation, or the best in the threat model: with AutoAttack, then most examples and attacks.

    Raises:
        InputError: No such evaluation exists on the run's dataset in the threat model, its file is incomplete, or it
            was measured on weights other than the run's.
    """
    evaluations = _read_all(run)
    if not evaluations:
        raise InputError(
            f"{run.path} has no evaluation. Make one: drelu-timm evaluate {quote(str(run.path))} --suite standard"
        )
    names = {one.file.stem: one for one in evaluations}
    if name is not None and name not in names:
        raise unknown("--results", name, names)
    dataset = run.config["train"]["dataset"]
    found = [
        one
        for one in (evaluations if name is None else [names[name]])
        if (one.dataset, one.norm) == (dataset, threat_model.norm) and one.at(threat_model.written)
    ]
    if not found:
        raise InputError(
            f"{run.path} has no evaluation on {dataset} for {threat_model} in "
            f"{', '.join(str(one.path) for one in evaluations)}. Run that evaluation, or pass another --norm and --eps."
        )
    return max(found, key=_size)


def _size(evaluation: Result) -> tuple[bool, int, int]:
    """Return whether AutoAttack ran, the number of examples, and the number of attacks."""
    accuracy = evaluation.point.accuracy
    return AUTOATTACK in accuracy, evaluation.n_examples, len(accuracy)


def _read_all(run: Run, folder: str = "results") -> list[Result]:
    """Return the evaluations in a folder of the run, which must all be of its present weights."""
    evaluations = [read_result(path) for path in sorted(run.results_folder.with_name(folder).glob("*.json"))]
    for one in evaluations:
        if one.model_digest != run.model_digest:
            raise InputError(
                f"{one.path} was measured on other weights (sha256 {str(one.model_digest)[:12]}) than those in "
                f"{run.model_folder} ({run.model_digest[:12]}). Delete it and evaluate again: drelu-timm evaluate "
                f"{quote(str(run.path))}"
            )
    return evaluations


def further_evaluations(run: Run, chosen: Result) -> list[Result]:
    """Return the other evaluations of the run in the same threat model on images of the same test set.

    Raises:
        InputError: A file is incomplete, or was measured on weights other than the run's.
    """
    return [
        one
        for one in (*_read_all(run), *_read_all(run, "sweeps"))
        if one.path != chosen.path and one.images == chosen.images and one.at(chosen.point.eps)
    ]


def with_further(chosen: Result, further: Sequence[Result]) -> Result:
    """Return an evaluation with the worst case and the worst verdict over all evaluations.

    Raises:
        InputError: The files of an evaluation contradict each other or its seal, or are missing or incomplete.
    """
    for one in (chosen, *further):
        check_result(one)
    if not further:
        return chosen
    eps = chosen.point.eps
    survivors = read_survivors([chosen, *further], chosen.n_examples, eps)
    if survivors is None:
        without = [str(one.path) for one in (chosen, *further) if not one.file.with_suffix(".csv").is_file()]
        raise InputError(
            f"The .csv with a row per example is missing next to {', '.join(without)}. Restore it or evaluate again."
        )
    combined = Combined(eps, (chosen,), tuple(further), survivors)
    verdict = combined.verdict
    if (worst := combined.decisive[0]) is not chosen:
        verdict = replace(verdict, evidence=(f"The verdict of {evaluation_name(worst)}.", *verdict.evidence))
    point = replace(chosen.point, worst=combined.worst, verdict=verdict)
    return replace(chosen, points=(point,), further=tuple(_further(one, combined.point_of(one)) for one in further))


def _further(result: Result, point: EpsResult) -> Further:
    published = result.published()
    names = ("suite", "eps", "n_examples", "seed", "precision", "transfer_from")
    about = {name: getattr(published, name) for name in names}
    return Further(**about, accuracy=point.accuracy, worst=point.worst, verdict=point.verdict.verdict)


def make_card(
    run: Run,
    chosen: Result,
    results: Result,
    *,
    key: str,
    paper: Paper,
    other_seeds: Sequence[Path],
    test_size: int,
) -> Card:
    """Return the card of an evaluated run.

    Args:
        run: The run.
        chosen: Of `choose_evaluation`.
        results: Of `with_further`.
        key: RobustBench's name of the model.
        paper: Paper about the model.
        other_seeds: Runs that differ only in their seed.
        test_size: Number of images in the whole test set.

    Raises:
        InputError: The log or a result is incomplete, or a run of ``other_seeds`` differs in more than its seed.
    """
    model = run.load_model()
    return Card(
        key=key,
        config=without_paths(run.config),
        training=_training(run),
        results=results.published(),
        curve=_curve(run, results),
        seeds=_seeds(run, chosen, results, other_seeds),
        caps=cap_statistics(model),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        test_size=test_size,
        paper=paper,
        timm=read_json(run.model_folder / CONFIG),
        weights=Weights(run.model_digest, (run.model_folder / WEIGHTS).stat().st_size),
    )


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Return a run's config.json without commands and paths of this machine, for publication."""
    kept = {name: value for name, value in config.items() if name not in ("command", "run")}
    train = config["train"]
    generated = [Path(file).name for file in train.get("generated", ())]
    published = {name: value for name, value in train.items() if name not in ("data_dir", "init_from")}
    kept["train"] = {**published, "generated": generated}
    if isinstance(kept.get("init_from"), dict):
        kept["init_from"] = without_paths(kept["init_from"])
    return kept


@dataclass(frozen=True)
class _Epoch:
    """What is needed of a line of log.jsonl."""

    epoch: Count
    best_epoch: Whole
    seconds: float
    images_per_second: float


def _training(run: Run) -> dict[str, Any]:
    """Return duration, speed and the epoch of the weights, from log.jsonl."""
    log = run.path / "log.jsonl"
    try:
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{log} is not a complete log of a training ({one_line(error)}). Train again.") from error
    epochs = [load(_Epoch, line, f"{log} line {number}") for number, line in enumerate(lines, start=1)]
    if [epoch.epoch for epoch in epochs] != [*range(1, len(epochs) + 1)] or not epochs:
        raise InputError(f"{log} is not a complete log of a training (epochs are missing or repeated). Train again.")
    last = epochs[-1]
    return {
        "epochs": last.epoch,
        "epoch": last.best_epoch if run.weights == "model" else last.epoch,
        "weights": run.weights,
        "seconds": round(sum(epoch.seconds for epoch in epochs), 1),
        "images_per_second": round(mean(epoch.images_per_second for epoch in epochs), 1),
    }


def _curve(run: Run, results: Result) -> Result | None:
    """Return the run's best sweep over eps in the norm of ``results``."""
    best = best_sweep(one for one in _read_all(run, "sweeps") if one.images == results.images)
    if best is None:
        return None
    check_result(best)
    return best.published()


def _seeds(run: Run, chosen: Result, results: Result, others: Sequence[Path]) -> tuple[Seed, ...]:
    """Return the results of the run and of other seeds, by seed; empty without other seeds."""
    seeds = {run.config["train"]["seed"]: _seed(run, results)} if others else {}
    for path in others:
        other = open_run(path)
        if differing := _differing(run.config, other.config):
            raise InputError(
                f"--seeds {path} differs from {run.path} in more than the seed ({differing}). Leave it out."
            )
        seed = other.config["train"]["seed"]
        if seed in seeds or other.model_digest in [one.model_digest for one in seeds.values()]:
            raise InputError(f"--seeds {path} repeats a seed ({seed}) or weights. Pass each run once.")
        seeds[seed] = _seed(other, _evaluation_alike(other, chosen, results))
    return tuple(seeds[seed] for seed in sorted(seeds))


def _evaluation_alike(other: Run, chosen: Result, results: Result) -> Result:
    """Return the evaluation of another seed, which must have the settings and not a worse verdict than ours."""
    found = choose_evaluation(other, ThreatModel.parse(results.norm, results.point.eps), chosen.file.stem)
    alike = ("dataset", "dataset_title", "norm", "eps", "suite", "n_examples", "seed", "precision")
    unlike = [name for name in alike if getattr(found, name) != getattr(results, name)]
    unlike += ["settings"] if found.point.settings != results.point.settings else []
    if unlike:
        raise InputError(f"{found.path} and {chosen.path} differ in {', '.join(unlike)}. Evaluate both alike.")
    combined = with_further(found, further_evaluations(other, found))
    if combined.point.verdict.verdict == "masked" != results.point.verdict.verdict:
        raise InputError(f"--seeds {other.path} has masked gradients, which the exported run has not. Leave it out.")
    return combined


def _differing(config: dict[str, Any], other: dict[str, Any]) -> str:
    """Return the settings in which two runs and their earlier trainings differ, apart from seed and paths."""
    may = ("seed", "data_dir", "generated", "init_from")
    train, others = config["train"], other["train"]
    names = [name for name in {**train, **others} if name not in may and train.get(name) != others.get(name)]
    names += [name for name in ("launch", "generated", "dataset_title") if config.get(name) != other.get(name)]
    start, others_start = config.get("init_from"), other.get("init_from")
    if bool(start) != bool(others_start) or (start and others_start and _differing(start, others_start)):
        names.append("init_from")
    return ", ".join(names)


def _seed(run: Run, results: Result) -> Seed:
    return Seed(
        seed=run.config["train"]["seed"],
        n_examples=results.n_examples,
        clean=results.point.clean,
        autoattack=results.point.accuracy.get(AUTOATTACK),
        worst=results.point.worst,
        verdict=results.point.verdict.verdict,
        model_digest=run.model_digest,
    )
