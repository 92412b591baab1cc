"""`drelu-timm evaluate`: clean and robust accuracy of a run, with a verdict on gradient masking.

    drelu-timm evaluate runs/x
    drelu-timm evaluate runs/x --suite standard --norm Linf --eps 8/255 --n-examples 10000
    drelu-timm evaluate resnet18 --dataset cifar10 --data-dir data

Writes ``runs/x/results/<suite>-<norm>-<eps>.json`` and, with a row an example, ``.csv``.
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import tyro
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from torch import nn

from .attacks import ThreatModel
from .command_line import read_flags
from .data import DATASETS, Dataset, Images, load_images, to_float
from .errors import InputError, one_line, unknown
from .evaluation import Evaluation, evaluate_model
from .models import normalized
from .runs import Run, environment, read_json, write_json, write_text
from .suites import ATTACKS, SUITES

__all__ = ["EvaluateConfig", "Evaluation", "evaluate", "evaluate_model", "main"]


@dataclass(frozen=True)
class EvaluateConfig:
    """Attack a model with the strongest attacks known for it, and say whether the numbers can be believed."""

    run: tyro.conf.Positional[str]
    """Run directory made by train, or the name of a timm model with pretrained weights."""
    suite: str = "quick"
    """quick, paper, standard (AutoAttack) or all; each also runs the adaptive attacks."""
    norm: str | None = None
    """Linf or L2; by default the run's, or the dataset's."""
    eps: str | None = None
    """Radius in units of a [0, 1] pixel, such as 8/255; by default the run's, or the dataset's."""
    n_examples: int = 1000
    """Use the first so many test images, at most."""
    batch_size: int = 256
    """Images a pass."""
    seed: int = 0
    """Keys the randomness of every example and attack."""
    dataset: str | None = None
    """Dataset whose test set is attacked; by default the run's."""
    data_dir: Path | None = None
    """Where the dataset lies; by default where it lay for the run."""


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated, and what goes with it.

    Attributes:
        run: Run directory, or the timm name.
        model: Architecture.
        load: Makes the model, which takes [0, 1] images.
        digest: sha256 of its weights file; None for weights that timm downloads.
        defaults: Dataset, data_dir, norm and eps where they are not given.
        img_size: Side of the images, in pixels; None for the dataset's own.
        in_chans: Channels of the images; None for the dataset's own.
        results_folder: Where results go.
    """

    run: str
    model: str
    load: Callable[[], nn.Module]
    digest: str | None
    defaults: dict[str, Any]
    img_size: int | None
    in_chans: int | None
    results_folder: Path


def main(argv: Sequence[str]) -> None:
    """Read the flags, evaluate, and say what to do next."""
    config = read_flags(EvaluateConfig, "evaluate", argv)
    path = evaluate(config)
    print(f"results in {path} and {path.with_suffix('.csv')}")
    if (Path(config.run) / "config.json").is_file():
        print(f"next: drelu-timm export {config.run} --key Author2026Title_ARCH")


def evaluate(config: EvaluateConfig) -> Path:
    """Evaluate as the config says, print the table, and write the result files.

    An evaluation that is there already is shown again, not repeated.

    Returns:
        The .json file; the .csv lies beside it.

    Raises:
        InputError: Anything in the config that cannot be used, or a result of other settings in the same place.
    """
    _check(config)
    subject = _subject(config.run)
    dataset = _dataset(config, subject)
    threat_model = _threat_model(config, subject, dataset)
    images = _test_images(config, subject, dataset)
    asked = {
        "run": subject.run,
        "model": subject.model,
        "dataset": dataset.name,
        "dataset_title": images.title,
        "norm": threat_model.norm,
        "eps": threat_model.written,
        "suite": config.suite,
        "n_examples": len(images),
        "seed": config.seed,
        "model_digest": subject.digest,
    }
    name = f"{config.suite}-{threat_model.norm}-{threat_model.written.replace('/', '_')}.json"
    path = subject.results_folder / name
    if path.is_file():
        _show(_already(path, asked), f"{path} is there already; delete it to evaluate anew")
        return path

    model = subject.load().to("cuda" if torch.cuda.is_available() else "cpu")
    evaluation = evaluate_model(
        model,
        to_float(images.images),
        images.labels,
        norm=threat_model.norm,
        eps=threat_model.written,
        suite=config.suite,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    results = asked | _summary(evaluation) | environment()
    write_text(path.with_suffix(".csv"), _rows(evaluation))
    write_json(path, results)  # last: a result is there once this is
    _show(results, f"{subject.run}, {images.title}, {threat_model}, {len(images)} examples")
    return path


def _check(config: EvaluateConfig) -> None:
    """Raise what is wrong with the flags before anything is loaded."""
    if config.suite not in SUITES:
        raise unknown("--suite", config.suite, SUITES)
    for flag, value in (("--n-examples", config.n_examples), ("--batch-size", config.batch_size)):
        if value < 1:
            raise InputError(f"{flag} {value} is not possible; give 1 or more")


def _dataset(config: EvaluateConfig, subject: Subject) -> Dataset:
    name = config.dataset or subject.defaults.get("dataset")
    if name is None:
        raise InputError(f"--dataset is needed to evaluate {config.run}; give one of {', '.join(DATASETS)}")
    if name not in DATASETS:
        raise unknown("--dataset", name, DATASETS)
    return DATASETS[name]


def _threat_model(config: EvaluateConfig, subject: Subject, dataset: Dataset) -> ThreatModel:
    norm = config.norm or subject.defaults.get("norm") or dataset.norm
    eps = config.eps or subject.defaults.get("eps") or dataset.eps
    return ThreatModel.parse(norm, eps)


def _test_images(config: EvaluateConfig, subject: Subject, dataset: Dataset) -> Images:
    data_dir = config.data_dir or subject.defaults.get("data_dir")
    size = {"img_size": subject.img_size, "in_chans": subject.in_chans}
    return load_images(dataset.name, data_dir, "test", **size)[: config.n_examples]


def _subject(name: str) -> Subject:
    """The run in a directory, or the timm model of a name."""
    if Path(name).exists():
        return _run_subject(Run.open(name))
    if timm.is_model(name.partition(".")[0]):
        return _timm_subject(name)
    raise InputError(f"RUN {name!r} is neither a run directory nor a timm model; give a folder made by train")


def _run_subject(run: Run) -> Subject:
    train = run.config["train"]
    return Subject(
        run=str(run.path),
        model=train["model"],
        load=run.load_model,
        digest=run.model_digest,
        defaults=train,
        img_size=run.config["img_size"],
        in_chans=run.config["in_chans"],
        results_folder=run.results_folder,
    )


def _timm_subject(name: str) -> Subject:
    cfg = timm.get_pretrained_cfg(name)
    return Subject(
        run=name,
        model=name,
        load=lambda: _load_timm(name),
        digest=None,
        defaults={},
        img_size=cfg.input_size[-1] if cfg else None,
        in_chans=cfg.input_size[0] if cfg else None,
        results_folder=Path("runs") / name / "results",
    )


def _load_timm(name: str) -> nn.Module:
    try:
        return normalized(timm.create_model(name, pretrained=True)).eval()
    except (OSError, RuntimeError) as error:
        raise InputError(f"RUN {name!r} is a timm model whose weights cannot be read ({one_line(error)})") from error


def _already(path: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The results in a file, which must be what is asked for."""
    results = read_json(path)
    for field, value in asked.items():
        if field != "run" and results.get(field) != value:
            raise InputError(
                f"{path} holds a result with {field} {results.get(field)!r}, not {value!r}; "
                "move it away or delete it to evaluate anew"
            )
    return results


def _summary(evaluation: Evaluation) -> dict[str, Any]:
    """What is saved of an evaluation, beside its rows."""
    return {
        "settings": evaluation.settings,
        "clean": evaluation.clean,
        "accuracy": evaluation.accuracy,
        "worst": evaluation.worst,
        "zero_gradient_share": evaluation.zero_gradient_share,
        "zero_gradients": asdict(evaluation.zero_gradients),
        "cw_l2": asdict(evaluation.cw_l2) if evaluation.cw_l2 else None,
        "verdict": asdict(evaluation.verdict),
        "seconds": round(evaluation.seconds, 1),
    }


def _rows(evaluation: Evaluation) -> str:
    """A row an example, as CSV: index, label, clean prediction, and for each attack 1 for robust or 0 for broken."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "label", "clean_prediction", *evaluation.robust])
    columns = [evaluation.labels, evaluation.predictions, *(robust.int() for robust in evaluation.robust.values())]
    for index, row in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        writer.writerow([index, *row])
    return text.getvalue()


def _show(results: dict[str, Any], title: str) -> None:
    """Print the accuracies with the verdict and its evidence beneath them."""
    table = Table("attack", "kind", "accuracy")
    table.add_row("none (clean)", "", _percent(results["clean"]))
    for name, accuracy in results["accuracy"].items():
        table.add_row(name, ATTACKS[name].kind if name in ATTACKS else "sequence", _percent(accuracy))
    table.add_section()
    table.add_row("worst case", "", _percent(results["worst"]), style="bold")
    table.add_row("zero input gradients", "", _percent(results["zero_gradient_share"]))
    console = Console()
    console.print(title, style="italic")
    console.print(table)
    if cw := results["cw_l2"]:
        median = cw["median_l2"]
        needs = "breaks fewer than half" if median is None else f"needs a median L2 distance of {median:.3f}"
        console.print(f"cw-l2 {needs}; accuracy at L2 {cw['budget']:.3f}: {_percent(cw['accuracy_at_budget'])}")
    console.print(f"verdict on the white-box accuracies: [bold]{results['verdict']['verdict']}[/bold]")
    for sentence in results["verdict"]["evidence"]:
        console.print(Padding(sentence, (0, 0, 0, 2)), highlight=False)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
