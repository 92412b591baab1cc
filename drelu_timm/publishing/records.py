"""What an evaluated run's files say, gathered for its card and its entry."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..attacks.threat_model import ThreatModel
from ..errors import InputError, unknown
from ..evaluation.masking import VERDICTS
from ..files import read_json
from ..models.caps import cap_statistics
from ..models.saved import CONFIG, WEIGHTS
from ..runs import Run
from .measured import AUTOATTACK, Measured, Paper, Seed, Weights

_FIELDS = (
    *("dataset", "dataset_title", "norm", "eps", "suite", "n_examples", "seed", "precision", "settings"),
    *("clean", "accuracy", "sequences", "worst", "zero_gradient_share", "verdict", "model_digest"),
    *("adversarial_sha256", "versions", "hardware", "seconds"),
)


def choose_results(run: Run, threat_model: ThreatModel, name: str | None) -> Path:
    """The result file of that name, or the best in the threat model: with AutoAttack, then most examples and attacks.

    Raises:
        InputError: No evaluation, none of that name, or none of the run's dataset in the threat model.
    """
    paths = {path.stem: path for path in sorted(run.results_folder.glob("*.json"))}
    if not paths:
        raise InputError(f"{run.path} has no evaluation; make one: drelu-timm evaluate {run.path}")
    if name is not None:
        if name not in paths:
            raise unknown("--results", name, paths)
        paths = {name: paths[name]}
    asked = {"dataset": run.config["train"]["dataset"], "norm": threat_model.norm, "eps": threat_model.written}
    results = {path: read_json(path) for path in paths.values()}
    found = [path for path in results if all(results[path].get(field) == asked[field] for field in asked)]
    if not found:
        raise InputError(
            f"{run.path} has no evaluation on {asked['dataset']} for {threat_model} in {', '.join(paths)}; evaluate "
            "it so, or export what there is by --norm and --eps"
        )
    return max(found, key=lambda path: _size(results[path]))


def _size(results: dict[str, Any]) -> tuple[bool, int, int]:
    """Whether an evaluation has AutoAttack, how many examples, and how many attacks."""
    accuracy = results.get("accuracy", {})
    return AUTOATTACK in accuracy, results.get("n_examples", 0), len(accuracy)


def check_no_worse_verdict(run: Run, chosen: Path, results: dict[str, Any]) -> None:
    """Raise where another evaluation of the same weights in the same threat model says that gradients are masked.

    Raises:
        InputError: One does.
    """
    same = ("dataset", "norm", "eps", "model_digest")
    for path in sorted(run.results_folder.glob("*.json")):
        other = read_json(path)
        alike = all(other.get(field) == results[field] for field in same)
        if alike and _verdict(other) == "masked" != _verdict(results):
            raise InputError(f"{path} says masked, {chosen} {_verdict(results)}; export by --results {path.stem}")


def _verdict(results: dict[str, Any]) -> Any:
    verdict = results.get("verdict")
    return verdict.get("verdict") if isinstance(verdict, dict) else None


def read_results(path: Path, run: Run) -> dict[str, Any]:
    """A result file that is whole and was measured on the weights that the run has now.

    Raises:
        InputError: It is not.
    """
    results = read_json(path)
    again = f"delete it and evaluate anew: drelu-timm evaluate {run.path}"
    if missing := [field for field in _FIELDS if field not in results]:
        raise InputError(f"{path} lacks {', '.join(missing)}; {again}")
    if _verdict(results) not in VERDICTS:
        raise InputError(f"{path} has no verdict on gradient masking, and no number leaves without one; {again}")
    if results["model_digest"] != run.model_digest:
        raise InputError(
            f"{path} was measured on other weights (sha256 {results['model_digest'][:12]}) than "
            f"{run.model_folder} holds ({run.model_digest[:12]}); {again}"
        )
    return results


def measured_run(
    run: Run,
    results_path: Path,
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
        results_path: Of `choose_results`.
        results: Of `read_results`.
        key: RobustBench's name of the model.
        paper: About the model.
        other_seeds: Runs that differ by their seed only.
        test_size: Images in the whole test set.

    Raises:
        InputError: A log that is cut, or other seeds' runs that do not match.
    """
    model = run.load_model()
    return Measured(
        key=key,
        config=without_paths(run.config),
        training=_training(run),
        results=without_paths(results),
        curve=_curve(run, results),
        seeds=_seeds(run, results_path, results, other_seeds),
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
    """The run's sweep over eps in that norm; of several, the one with the most examples, then radii."""
    sweeps = [read_json(path) for path in sorted(run.results_folder.with_name("sweeps").glob("*.json"))]
    ours = [
        sweep
        for sweep in sweeps
        if all(sweep.get(name) == results[name] for name in ("model_digest", "norm", "dataset"))
    ]
    if not ours:
        return None
    return without_paths(max(ours, key=lambda sweep: (sweep["n_examples"], len(sweep["curve"]))))


def _seeds(run: Run, results_path: Path, results: dict[str, Any], others: Sequence[Path]) -> list[Seed]:
    """The run and those of other seeds, by seed; none where there are no others."""
    seeds = {run.config["train"]["seed"]: _seed(run, results)} if others else {}
    for path in others:
        other = Run.open(path)
        if differing := _differing(run.config, other.config):
            raise InputError(f"--seeds {path}: it differs from {run.path} not by its seed only ({differing})")
        seed = other.config["train"]["seed"]
        if seed in seeds or other.model_digest in [one.model_digest for one in seeds.values()]:
            raise InputError(f"--seeds {path}: its seed, {seed}, or its weights are there twice; give each run once")
        found_path = other.results_folder / results_path.name
        found = read_results(found_path, other)
        alike = ("dataset", "dataset_title", "norm", "eps", "suite", "n_examples", "seed", "precision", "settings")
        unlike = ", ".join(field for field in alike if found[field] != results[field])
        if unlike:
            raise InputError(f"{found_path} and {results_path} differ in {unlike}; evaluate both alike")
        if _verdict(found) == "masked" != _verdict(results):
            raise InputError(f"--seeds {path}: its gradients are masked, those of {run.path} are not; leave it out")
        seeds[seed] = _seed(other, found)
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
        verdict=_verdict(results),
        model_digest=results["model_digest"],
    )
