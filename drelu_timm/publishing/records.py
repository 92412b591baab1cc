"""Files of an evaluated run, gathered for its card and its entry."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from ..attacks.threat_model import ThreatModel
from ..errors import InputError, unknown
from ..files import read_json
from ..models.caps import cap_statistics
from ..models.weights import CONFIG, WEIGHTS
from ..results.combined import Combined
from ..results.examples import read_survivors
from ..results.result import EpsResult, Further, Result, best_sweep, read_result
from ..runs import Run
from .measured import AUTOATTACK, Measured, Paper, Seed, Weights, further_called


def choose_results(run: Run, threat_model: ThreatModel, name: str | None) -> Result:
    """The evaluation of that name, or the best in the threat model: with AutoAttack, then most examples and attacks.

    Raises:
        InputError: No evaluation, none of that name, none of the run's dataset in the threat model, or one that is
            not whole or was measured on other weights than the run has now.
    """
    results = _read_all(run)
    if not results:
        raise InputError(
            f"{run.path} has no evaluation; make one: drelu-timm evaluate {quote(str(run.path))} --suite standard"
        )
    names = {file.file.stem: file for file in results}
    if name is not None and name not in names:
        raise unknown("--results", name, names)
    dataset = run.config["train"]["dataset"]
    found = [
        file
        for file in (results if name is None else [names[name]])
        if (file.dataset, file.norm) == (dataset, threat_model.norm) and file.at(threat_model.written)
    ]
    if not found:
        raise InputError(
            f"{run.path} has no evaluation on {dataset} for {threat_model} in "
            f"{', '.join(str(file.path) for file in results)}; evaluate it so, or export what there is by --norm and "
            "--eps"
        )
    return max(found, key=_size)


def _size(file: Result) -> tuple[bool, int, int]:
    """Whether an evaluation has AutoAttack, how many examples, and how many attacks."""
    accuracy = file.point.accuracy
    return AUTOATTACK in accuracy, file.n_examples, len(accuracy)


def _read_all(run: Run, folder: str = "results") -> list[Result]:
    """The result files of a run, of one radius each or the sweeps, all of the weights that it has now."""
    files = [read_result(path) for path in sorted(run.results_folder.with_name(folder).glob("*.json"))]
    for file in files:
        if (digest := file.model_digest) != run.model_digest:
            raise InputError(
                f"{file.path} was measured on other weights (sha256 {str(digest)[:12]}) than {run.model_folder} holds "
                f"({run.model_digest[:12]}); delete it and evaluate anew: drelu-timm evaluate {quote(str(run.path))}"
            )
    return files


def further_evaluations(run: Run, chosen: Result) -> list[Result]:
    """What else was measured of the run's weights in the threat model of an evaluation on images of its test set.

    Raises:
        InputError: One that is not whole, or was measured on other weights than the run has now.
    """
    return [
        file
        for file in (*_read_all(run), *_read_all(run, "sweeps"))
        if file.path != chosen.path and file.images == chosen.images and file.at(chosen.point.eps)
    ]


def with_further(chosen: Result, further: Sequence[Result]) -> Result:
    """Return an evaluation with what others add: what they broke counts as broken, and the worst verdict holds.

    Returns:
        The evaluation, its worst case and verdict those over all, and under "further" what the others are.

    Raises:
        InputError: The rows of one are missing, or not whole.
    """
    if not further:
        return chosen
    eps = chosen.point.eps
    survivors = read_survivors([chosen, *further], chosen.n_examples, eps)
    if survivors is None:
        without = [str(file.path) for file in (chosen, *further) if not file.file.with_suffix(".csv").is_file()]
        raise InputError(
            f"beside {', '.join(without)} the .csv with a row an example is missing; restore it, or evaluate anew"
        )
    combined = Combined(eps, (chosen,), tuple(further), survivors)
    verdict = combined.verdict
    if (worst := combined.decisive[0]) is not chosen:
        verdict = replace(verdict, evidence=(f"So says {further_called(worst)}.", *verdict.evidence))
    point = replace(chosen.point, worst=combined.worst, verdict=verdict)
    return replace(chosen, points=(point,), further=tuple(_further(one, combined.point_of(one)) for one in further))


def _further(result: Result, point: EpsResult) -> Further:
    published = result.published()
    names = ("suite", "eps", "n_examples", "seed", "precision", "transfer_from")
    about = {name: getattr(published, name) for name in names}
    return Further(**about, accuracy=point.accuracy, worst=point.worst, verdict=point.verdict.verdict)


def measured_run(
    run: Run,
    chosen: Result,
    results: Result,
    *,
    key: str,
    paper: Paper,
    other_seeds: Sequence[Path],
    test_size: int,
) -> Measured:
    """All that cards and entries say of an evaluated run.

    Args:
        run: The run.
        chosen: Of `choose_results`.
        results: Of `with_further`.
        key: RobustBench's name of the model.
        paper: About the model.
        other_seeds: Runs that differ by their seed only.
        test_size: Images in the whole test set.

    Raises:
        InputError: A log that is cut, results that are not whole, or other seeds' runs that do not match.
    """
    model = run.load_model()
    return Measured(
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
    """Return a config.json without what concerns this machine only: it is going to be published."""
    kept = {name: value for name, value in config.items() if name not in ("command", "run")}
    train = config["train"]
    generated = [Path(file).name for file in train.get("generated", ())]
    published = {name: value for name, value in train.items() if name not in ("data_dir", "init_from")}
    kept["train"] = {**published, "generated": generated}
    if isinstance(kept.get("init_from"), dict):
        kept["init_from"] = without_paths(kept["init_from"])
    return kept


def _training(run: Run) -> dict[str, Any]:
    """How long the training took, and whose epoch's weights are exported, from log.jsonl."""
    try:
        epochs = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
        seconds = sum(epoch["seconds"] for epoch in epochs)
        last = epochs[-1]
        kept = last["best_epoch"] if run.weights == "model" else last["epoch"]
        speed = sum(epoch["images_per_second"] for epoch in epochs) / len(epochs)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"{run.path / 'log.jsonl'} is no whole log of a training ({error!r}); train anew") from error
    times = {"seconds": round(seconds, 1), "images_per_second": round(speed, 1)}
    return {"epochs": last["epoch"], "epoch": kept, "weights": run.weights, **times}


def _curve(run: Run, results: Result) -> Result | None:
    """The run's sweep over eps in that norm, of several the best."""
    best = best_sweep(file for file in _read_all(run, "sweeps") if file.images == results.images)
    return None if best is None else best.published()


def _seeds(run: Run, chosen: Result, results: Result, others: Sequence[Path]) -> tuple[Seed, ...]:
    """The run and those of other seeds, by seed; none where there are no others."""
    seeds = {run.config["train"]["seed"]: _seed(run, results)} if others else {}
    for path in others:
        other = Run.open(path)
        if differing := _differing(run.config, other.config):
            raise InputError(f"--seeds {path}: it differs from {run.path} not by its seed only ({differing})")
        seed = other.config["train"]["seed"]
        if seed in seeds or other.model_digest in [one.model_digest for one in seeds.values()]:
            raise InputError(f"--seeds {path}: its seed, {seed}, or its weights are there twice; give each run once")
        found = choose_results(other, ThreatModel.parse(results.norm, results.point.eps), chosen.file.stem)
        alike = ("dataset", "dataset_title", "norm", "eps", "suite", "n_examples", "seed", "precision")
        unlike = [name for name in alike if getattr(found, name) != getattr(results, name)]
        unlike += ["settings"] if found.point.settings != results.point.settings else []
        if unlike:
            raise InputError(f"{found.path} and {chosen.path} differ in {', '.join(unlike)}; evaluate both alike")
        of_seed = with_further(found, further_evaluations(other, found))
        if of_seed.point.verdict.verdict == "masked" != results.point.verdict.verdict:
            raise InputError(f"--seeds {path}: its gradients are masked, those of {run.path} are not; leave it out")
        seeds[seed] = _seed(other, of_seed)
    return tuple(seeds[seed] for seed in sorted(seeds))


def _differing(config: dict[str, Any], other: dict[str, Any]) -> str:
    """What of two configs differs, but for the seed and for where files lie; also of the trainings they began from."""
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
