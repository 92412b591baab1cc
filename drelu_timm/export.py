"""`drelu-timm export`: an evaluated run becomes one folder that timm, the Hub and RobustBench load.

    drelu-timm export runs/x --key Author2026Title_ResNet-18

    model.safetensors, config.json             the timm / Hugging Face folder
    README.md                                  the model card
    register.py                                lets timm and RobustBench load the folder under <key>_<dataset>_<threat>
    model_info/<dataset>/<threat>/<key>.json   RobustBench's entry

The folder appears only after its model was loaded from it and predicted what the evaluation had written down.
"""

import csv
import os
import runpy
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import tyro
from torch import Tensor, nn

from .caps import cap_statistics
from .cards import VERDICTS, model_card
from .command_line import read_flags
from .data import Images, load_images, to_float
from .entries import Measured, Paper, model_info, registration
from .errors import InputError, unknown
from .robust_models import check_name_is_free, register_robust_model, robust_model_name
from .robustbench import adapt
from .runs import Run, read_json, write_json, write_text

_FIELDS = (
    *(
        "dataset",
        "dataset_title",
        "norm",
        "eps",
        "suite",
        "n_examples",
        "seed",
        "settings",
        "clean",
        "accuracy",
        "worst",
    ),
    *("zero_gradient_share", "verdict", "model_digest", "versions", "hardware"),
)
_BATCH = 256


@dataclass(frozen=True)
class ExportConfig:
    """Turn an evaluated run into a RobustBench entry and a timm / Hugging Face folder."""

    run: tyro.conf.Positional[Path]
    """Run directory, evaluated."""
    key: str
    """RobustBench's name of the model: authors, year, first word of the title, and what tells its models apart."""
    results: str | None = None
    """Name of the evaluation; by default the one with most examples, then attacks, in the run's threat model."""
    output_dir: Path | None = None
    """Folder to write, which must not be there yet; by default RUN/export/KEY."""
    data_dir: Path | None = None
    """Where the dataset lies; by default where training found it."""

    title: str | None = None
    """Title of the paper about the model."""
    authors: str | None = None
    """Its authors, separated by commas."""
    link: str | None = None
    """Where to read it."""
    venue: str | None = None
    """Where it was published, such as "ICLR 2026" or "arXiv, Mar 2026"."""


def main(argv: Sequence[str]) -> None:
    """Read the flags, export, and say where the files are."""
    output_dir = export(read_flags(ExportConfig, "export", argv))
    (entry,) = output_dir.glob("model_info/*/*/*.json")
    print(f"wrote {output_dir}: {output_dir / 'README.md'} says how to load it, {entry} is RobustBench's entry")


def export(config: ExportConfig) -> Path:
    """Write the exported folder of an evaluated run, and check that it loads and predicts as evaluated.

    Returns:
        The folder.

    Raises:
        InputError: No evaluated run, results of other weights, a key or an output folder that is taken, or a folder
            that does not predict what the evaluation did. Nothing is left behind.
    """
    run = Run.open(config.run)
    results_path = _choose_results(run, config.results)
    results = _read_results(results_path, run)
    name = robust_model_name(config.key, results["dataset"], results["norm"])
    output_dir = config.output_dir or run.path / "export" / config.key
    if output_dir.exists():
        raise InputError(f"--output-dir {output_dir} exists already; give another one or remove it")
    robustbench = _robustbench_or_reason()
    _check_key_is_free(config.key, name, results, robustbench)

    test = _test_images(run, results["dataset"], config.data_dir)
    measured = _measured(config, run, results, test_size=len(test))
    expected = _read_predictions(results_path.with_suffix(".csv"), test)
    with _whole_or_not_at_all(output_dir) as folder:
        for file in ("model.safetensors", "config.json"):
            shutil.copyfile(run.model_folder / file, folder / file)
        write_json(_entry_path(folder, measured), model_info(measured))
        write_text(folder / "register.py", registration(measured))
        checks = _check(folder, measured, expected, robustbench)
        write_text(folder / "README.md", model_card(measured, checks))
    register_robust_model(config.key, measured.dataset, measured.threat_model.norm, output_dir)
    return output_dir


# What is exported


def _choose_results(run: Run, name: str | None) -> Path:
    """The result file of that name, or the one with the most examples, then attacks, in the run's threat model."""
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


def _read_results(path: Path, run: Run) -> dict[str, Any]:
    """A result file that is whole and was measured on the weights that the run has now."""
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


def _measured(config: ExportConfig, run: Run, results: dict[str, Any], *, test_size: int) -> Measured:
    model = run.load_model()
    return Measured(
        key=config.key,
        config=run.config,
        results=results,
        caps=cap_statistics(model),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        test_size=test_size,
        paper=Paper(config.title, config.authors, config.link, config.venue),
    )


def _test_images(run: Run, dataset: str, data_dir: Path | None) -> Images:
    size = {"img_size": run.config["img_size"], "in_chans": run.config["in_chans"]}
    return load_images(dataset, data_dir or run.config["train"]["data_dir"], "test", **size)


# Where it is written


@contextmanager
def _whole_or_not_at_all(output_dir: Path) -> Iterator[Path]:
    """A new folder beside ``output_dir``, which takes its name at the end, or vanishes with an error."""
    folder = output_dir.with_name(f".{output_dir.name}.{os.getpid()}")
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.replace(output_dir)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _entry_path(folder: Path, measured: Measured) -> Path:
    return folder / "model_info" / measured.dataset / measured.threat_model.norm / f"{measured.key}.json"


# What is checked


def _robustbench_or_reason() -> Any:
    """RobustBench, or a sentence on why it cannot be used."""
    try:
        return adapt()
    except InputError as error:
        return str(error)


def _check_key_is_free(key: str, name: str, results: dict[str, Any], robustbench: Any) -> None:
    """Raise where timm or RobustBench has a model of that key, in whatever case."""
    check_name_is_free(name)
    if isinstance(robustbench, str):
        return
    enums = robustbench.model_zoo.enums
    zoo = robustbench.model_zoo.model_dicts.get(enums.BenchmarkDataset(results["dataset"]), {})
    for other in zoo.get(enums.ThreatModel(results["norm"]), {}):
        if name == robust_model_name(other, results["dataset"], results["norm"]):
            raise InputError(f"--key {key!r}: RobustBench has a model {other!r} already; choose another key")


@dataclass(frozen=True)
class Predictions:
    """Images [N, C, H, W] that were evaluated, with their labels [N] and the classes predicted for them then [N]."""

    images: Tensor
    labels: Tensor
    predictions: Tensor

    def accuracy(self) -> float:
        """Clean accuracy in [0, 1]."""
        return (self.predictions == self.labels).double().mean().item()


def _read_predictions(path: Path, test: Images) -> Predictions:
    """The evaluated images, by the rows of the evaluation's CSV file."""
    try:
        with path.open(newline="") as file:
            rows = [
                (int(row["index"]), int(row["label"]), int(row["clean_prediction"])) for row in csv.DictReader(file)
            ]
        index, labels, predictions = torch.tensor(rows).unbind(1)
        evaluated = test[index]
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise InputError(f"{path} is no whole table of an evaluation ({error!r}); evaluate anew") from error
    if not torch.equal(labels, evaluated.labels):
        raise InputError(
            f"{path} has other labels than the test images of {test.title}; give their place by --data-dir"
        )
    return Predictions(to_float(evaluated.images), labels, predictions)


def _check(folder: Path, measured: Measured, expected: Predictions, robustbench: Any) -> list[str]:
    """Load the folder as its users will, compare, and say in sentences what was seen."""
    runpy.run_path(str(folder / "register.py"))
    key, dataset, norm = measured.key, measured.dataset, measured.threat_model.norm
    checks = [
        _check_predictions("timm.create_model", lambda: timm.create_model(measured.name, pretrained=True), expected)
    ]
    if isinstance(robustbench, str):
        return [*checks, f"Not loaded by RobustBench: {robustbench}."]

    def load() -> nn.Module:
        return robustbench.utils.load_model(key, dataset=dataset, threat_model=norm)

    return [*checks, _check_predictions("robustbench.utils.load_model", load, expected)]


def _check_predictions(loader: str, load: Callable[[], nn.Module], expected: Predictions) -> str:
    """Compare what a loaded model predicts with what the evaluation saw."""
    found = Predictions(expected.images, expected.labels, _predict(load(), expected.images))
    n, equal = len(found.labels), int((found.predictions == expected.predictions).sum())
    accuracy = f"{100 * found.accuracy():.2f} % against {100 * expected.accuracy():.2f} % in the evaluation"
    # On other hardware rounding may turn the odd prediction that stands between two classes.
    if n - equal > n // 1000:
        raise InputError(
            f"the model that {loader} loads is not the one that was evaluated ({equal} of {n} predictions equal, "
            f"clean accuracy {accuracy}); evaluate the run anew"
        )
    return f"`{loader}`: {equal:,} of {n:,} predictions as in the evaluation, clean accuracy {accuracy}."


@torch.no_grad()
def _predict(model: nn.Module, images: Tensor) -> Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    return torch.cat([model(batch.to(device)).argmax(1).cpu() for batch in images.split(_BATCH)])
