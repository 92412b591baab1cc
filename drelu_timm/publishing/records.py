"""What an evaluated run's files say, gathered for its card and its entry."""

import json
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from ..attacks.threat_model import ThreatModel
from ..errors import InputError, unknown
from ..evaluation.masking import VERDICTS
from ..evaluation.result_files import ResultFile, best_sweep, read_result, read_survivors
from ..files import read_json
from ..kinds import ANYTHING, check_fields
from ..models.caps import cap_statistics
from ..models.saved import CONFIG, WEIGHTS
from ..runs import Run
from .measured import AUTOATTACK, Measured, Paper, Seed, Weights, further_called

_OF_ATTACKS = ("settings", "sequences", "adversarial_sha256", "attack_seconds")
_FIELDS = (*_OF_ATTACKS, "seed", "precision", "seconds", "versions", "hardware")


def choose_results(run: Run, threat_model: ThreatModel, name: str | None) -> ResultFile:
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
    names = {file.path.stem: file for file in results}
    if name is not None and name not in names:
        raise unknown("--results", name, names)
    dataset = run.config["train"]["dataset"]
    found = [
        file
        for file in (results if name is None else [names[name]])
        if (file.content["dataset"], file.content["norm"]) == (dataset, threat_model.norm)
        and file.at(threat_model.written)
    ]
    if not found:
        raise InputError(
            f"{run.path} has no evaluation on {dataset} for {threat_model} in "
            f"{', '.join(str(file.path) for file in results)}; evaluate it so, or export what there is by --norm and "
            "--eps"
        )
    chosen = max(found, key=_size)
    check_fields(chosen.path, chosen.content, dict.fromkeys(_FIELDS, ANYTHING))
    return chosen


def _size(file: ResultFile) -> tuple[bool, int, int]:
    """Whether an evaluation has AutoAttack, how many examples, and how many attacks."""
    accuracy = file.content["accuracy"]
    return AUTOATTACK in accuracy, file.n_examples, len(accuracy)


def _read_all(run: Run, folder: str = "results") -> list[ResultFile]:
    """The result files of a run, of one radius each or the sweeps, all of the weights that it has now."""
    files = [read_result(path) for path in sorted(run.results_folder.with_name(folder).glob("*.json"))]
    for file in files:
        if (digest := file.content["model_digest"]) != run.model_digest:
            raise InputError(
                f"{file.path} was measured on other weights (sha256 {digest[:12]}) than {run.model_folder} holds "
                f"({run.model_digest[:12]}); delete it and evaluate anew: drelu-timm evaluate {quote(str(run.path))}"
            )
    return files


def further_evaluations(run: Run, chosen: ResultFile) -> list[ResultFile]:
    """What else was measured of the run's weights in the threat model of an evaluation on images of its test set.

    Raises:
        InputError: One that is not whole, or was measured on other weights than the run has now.
    """
    same = ("dataset", "dataset_title", "norm")
    return [
        file
        for file in (*_read_all(run), *_read_all(run, "sweeps"))
        if file.path != chosen.path
        and all(file.content[field] == chosen.content[field] for field in same)
        and file.at(chosen.content["eps"])
    ]


def with_further(chosen: ResultFile, further: Sequence[ResultFile]) -> dict[str, Any]:
    """An evaluation's results with what others add: what they broke counts as broken, and the worst verdict holds.

    Returns:
        The content of the file, its worst case and verdict those over all, and under "further" what the others are.

    Raises:
        InputError: The rows an example of one are missing, or not whole.
    """
    results, eps = chosen.content, chosen.content["eps"]
    if not further:
        return results
    survivors = read_survivors([chosen, *further], chosen.n_examples, eps)
    if survivors is None:
        without = [str(file.path) for file in (chosen, *further) if not file.path.with_suffix(".csv").is_file()]
        raise InputError(
            f"beside {', '.join(without)} the .csv with a row an example is missing; restore it, or evaluate anew"
        )
    files = (chosen, *further)
    verdicts = [_point(file, eps)["verdict"] for file in files]
    worst, verdict = max(zip(files, verdicts, strict=True), key=lambda of: VERDICTS.index(of[1]["verdict"]))
    if worst is not chosen:
        evidence = [f"So says {further_called(worst.content)}.", *verdict["evidence"]]
        verdict = {**verdict, "evidence": evidence}
    asked = ("suite", "eps", "n_examples", "seed", "precision", "transfer_from")
    told = [
        without_paths({field: file.content.get(field) for field in asked})
        | {field: _point(file, eps)[field] for field in ("accuracy", "worst")}
        | {"verdict": verdict_of_it["verdict"]}
        for file, verdict_of_it in zip(further, verdicts[1:], strict=True)
    ]
    return {**results, "worst": float(survivors.mean()), "verdict": verdict, "further": told}


def _point(file: ResultFile, eps: str) -> dict[str, Any]:
    """What a file's content says at a radius."""
    contents = file.content["curve"] if file.is_sweep else [file.content]
    return next(at for at, point in zip(contents, file.points, strict=True) if point is file.at(eps))


def measured_run(
    run: Run,
    chosen: ResultFile,
    results: dict[str, Any],
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
        results=without_paths(results),
        curve=_curve(run, results),
        seeds=_seeds(run, chosen, results, other_seeds),
        caps=cap_statistics(model),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        test_size=test_size,
        paper=paper,
        timm=read_json(run.model_folder / CONFIG),
        weights=Weights(run.model_digest, (run.model_folder / WEIGHTS).stat().st_size),
    )


def without_paths(record: dict[str, Any]) -> dict[str, Any]:
    """A config.json or a result without what only this machine knows: it is going to be published."""
    kept = {name: value for name, value in record.items() if name not in ("command", "run")}
    if record.get("transfer_from"):
        kept["transfer_from"] = Path(record["transfer_from"]).name  # of a folder, whose path is nobody's business
    if "train" in kept:
        train = kept["train"]
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


def _curve(run: Run, results: dict[str, Any]) -> dict[str, Any] | None:
    """The run's sweep over eps in that norm, of several the best."""
    same = ("norm", "dataset", "dataset_title")
    sweeps = [file for file in _read_all(run, "sweeps") if all(file.content[name] == results[name] for name in same)]
    best = best_sweep(sweeps)
    return None if best is None else without_paths(best.content)


def _seeds(run: Run, chosen: ResultFile, results: dict[str, Any], others: Sequence[Path]) -> list[Seed]:
    """The run and those of other seeds, by seed; none where there are no others."""
    seeds = {run.config["train"]["seed"]: _seed(run, results)} if others else {}
    for path in others:
        other = Run.open(path)
        if differing := _differing(run.config, other.config):
            raise InputError(f"--seeds {path}: it differs from {run.path} not by its seed only ({differing})")
        seed = other.config["train"]["seed"]
        if seed in seeds or other.model_digest in [one.model_digest for one in seeds.values()]:
            raise InputError(f"--seeds {path}: its seed, {seed}, or its weights are there twice; give each run once")
        found = choose_results(other, ThreatModel.parse(results["norm"], results["eps"]), chosen.path.stem)
        alike = ("dataset", "dataset_title", "norm", "eps", "suite", "n_examples", "seed", "precision", "settings")
        unlike = ", ".join(field for field in alike if found.content[field] != results[field])
        if unlike:
            raise InputError(f"{found.path} and {chosen.path} differ in {unlike}; evaluate both alike")
        of_seed = with_further(found, further_evaluations(other, found))
        if of_seed["verdict"]["verdict"] == "masked" != results["verdict"]["verdict"]:
            raise InputError(f"--seeds {path}: its gradients are masked, those of {run.path} are not; leave it out")
        seeds[seed] = _seed(other, of_seed)
    return [seeds[seed] for seed in sorted(seeds)]


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


def _seed(run: Run, results: dict[str, Any]) -> Seed:
    return Seed(
        seed=run.config["train"]["seed"],
        n_examples=results["n_examples"],
        clean=results["clean"],
        autoattack=results["accuracy"].get(AUTOATTACK),
        worst=results["worst"],
        verdict=results["verdict"]["verdict"],
        model_digest=results["model_digest"],
    )
