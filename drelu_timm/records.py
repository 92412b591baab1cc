"""What an evaluated run's files say, gathered for its card and its entry."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .caps import cap_statistics
from .cards import VERDICTS
from .entries import AUTOATTACK, Measured, Paper, Seed, Weights
from .errors import InputError, unknown
from .runs import Run, read_json

_FIELDS = (
    *("dataset", "dataset_title", "norm", "eps", "suite", "n_examples", "seed", "precision", "settings"),
    *("clean", "accuracy", "sequences", "worst", "zero_gradient_share", "verdict", "model_digest"),
    *("adversarial_sha256", "versions", "hardware", "seconds"),
)


def choose_results(run: Run, name: str | None) -> Path:
    """The result file of that name, or the one with the most examples, then attacks, in the run's threat model.

    Raises:
        InputError: No evaluation, none of that name, or none in the run's own threat model.
    """
    paths = {path.stem: path for path in sorted(run.results_folder.glob("*.json"))}
    if not paths:
        raise InputError(f"{run.path} has no evaluation; make one: drelu-timm evaluate {run.path}")
    if name is not None:
        if name not in paths:
            raise unknown("--results", name, paths)
        return paths[name]
    sizes = {path: _size(read_json(path), run) for path in paths.values()}
    best = max(sizes, key=lambda path: sizes[path])
    if sizes[best] == (0, 0):
        raise InputError(
            f"{run.path} has no evaluation at its own dataset, norm and eps; choose by --results: {', '.join(paths)}"
        )
    return best


def _size(results: dict[str, Any], run: Run) -> tuple[int, int]:
    """Number of examples and of attacks of an evaluation; (0, 0) where the dataset, norm or eps is not the run's."""
    if any(results.get(field) != run.config["train"][field] for field in ("dataset", "norm", "eps")):
        return 0, 0
    return results.get("n_examples", 0), len(results.get("accuracy", {}))


def read_results(path: Path, run: Run) -> dict[str, Any]:
    """A result file that is whole and was measured on the weights that the run has now.

    Raises:
        InputError: It is not.
    """
    results = read_json(path)
    again = f"delete it and evaluate anew: drelu-timm evaluate {run.path}"
    if missing := [field for field in _FIELDS if field not in results]:
        raise InputError(f"{path} lacks {', '.join(missing)}; {again}")
    if results["verdict"].get("verdict") not in VERDICTS:
        raise InputError(f"{path} has no verdict on gradient masking, and no number leaves without one; {again}")
    if results["model_digest"] != run.model_digest:
        raise InputError(
            f"{path} was measured on other weights (sha256 {results['model_digest'][:12]}) than "
            f"{run.model_folder} holds ({run.model_digest[:12]}); {again}"
        )
    return results


def measured_run(
    run: Run, results: dict[str, Any], *, key: str, paper: Paper, other_seeds: Sequence[Path], test_size: int
) -> Measured:
    """All that cards and entries say of an evaluated run.

    Args:
        run: The run.
        results: Of `read_results`.
        key: RobustBench's name of the model.
        paper: About the model.
        other_seeds: Runs that differ by their seed only.
        test_size: Images in the whole test set.

    Raises:
        InputError: A log that is cut, or other seeds' runs that do not match.
    """
    model = run.load_model()
    weights = run.model_folder / "model.safetensors"
    return Measured(
        key=key,
        config=_without_paths(run.config),
        training=_training(run),
        results=_without_paths(results),
        curve=_curve(run, results),
        seeds=_seeds(run, results, other_seeds),
        caps=cap_statistics(model),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        test_size=test_size,
        paper=paper,
        timm=read_json(run.model_folder / "config.json"),
        weights=Weights(run.model_digest, weights.stat().st_size),
    )


def _without_paths(record: dict[str, Any]) -> dict[str, Any]:
    """A config.json or a result without what only this machine knows: it is going to be published."""
    kept = {name: value for name, value in record.items() if name not in ("command", "run", "transfer_from")}
    if "train" in kept:
        train = kept["train"]
        generated = [Path(file).name for file in train.get("generated", ())]
        published = {name: value for name, value in train.items() if name not in ("data_dir", "init_from")}
        kept["train"] = {**published, "generated": generated}
    if isinstance(kept.get("init_from"), dict):
        kept["init_from"] = _without_paths(kept["init_from"])
    return kept


def _training(run: Run) -> dict[str, Any]:
    """How long the training took, and whose epoch's weights are exported, from log.jsonl."""
    try:
        epochs = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
        seconds = sum(epoch["seconds"] for epoch in epochs)
        last = epochs[-1]
        kept = last["best_epoch"] if run.weights == "model" else None
        speed = sum(epoch["images_per_second"] for epoch in epochs) / len(epochs)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"{run.path / 'log.jsonl'} is no whole log of a training ({error!r}); train anew") from error
    return {"epochs": last["epoch"], "epoch": kept, "seconds": round(seconds, 1), "images_per_second": round(speed, 1)}


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
    return _without_paths(max(ours, key=lambda sweep: (sweep["n_examples"], len(sweep["curve"]))))


def _seeds(run: Run, results: dict[str, Any], others: Sequence[Path]) -> list[Seed]:
    """The run and those of other seeds, by seed; none where there are no others."""
    seeds = {run.config["train"]["seed"]: _seed(run, results)} if others else {}
    for path in others:
        other = Run.open(path)
        differing = _differing(run.config["train"], other.config["train"])
        if differing:
            raise InputError(f"--seeds {path}: it differs from {run.path} not by its seed only ({differing})")
        seed = other.config["train"]["seed"]
        if seed in seeds:
            raise InputError(f"--seeds {path}: seed {seed} is there twice; give each run once")
        found = read_results(choose_results(other, None), other)
        if (found["eps"], found["suite"], found["dataset"]) != (results["eps"], results["suite"], results["dataset"]):
            raise InputError(
                f"--seeds {path}: evaluated by suite {found['suite']} at eps {found['eps']}, {run.path} by "
                f"{results['suite']} at {results['eps']}; evaluate both alike"
            )
        seeds[seed] = _seed(other, found)
    return [seeds[seed] for seed in sorted(seeds)]


def _differing(train: dict[str, Any], other: dict[str, Any]) -> str:
    """Names of the settings but for the seed, and for where data and the weights to start from lie, that differ."""
    may = ("seed", "data_dir", "generated", "init_from")
    return ", ".join(name for name in {**train, **other} if name not in may and train.get(name) != other.get(name))


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
