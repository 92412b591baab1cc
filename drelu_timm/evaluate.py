"""`drelu-timm evaluate`: clean and robust accuracy of a model, with a verdict on gradient masking.

    drelu-timm evaluate runs/x
    drelu-timm evaluate runs/x --suite standard --norm Linf --eps 8/255 --n-examples 10000
    drelu-timm evaluate runs/x --eps 0,2/255,4/255,8/255,16/255,32/255
    drelu-timm evaluate Carmon2019Unlabeled --dataset cifar10 --data-dir data
    accelerate launch --num_processes 4 -m drelu_timm evaluate runs/x --suite standard

Writes ``runs/x/results/<suite>-<norm>-<eps>.json``, with a row an example ``.csv``, and with the image that broke each
example ``.adversarial.safetensors`` (see `Adversarial`); for several radii ``runs/x/sweeps/<suite>-<norm>-up-to-<eps>
.json``, ``.csv`` and ``.png``. What is measured meanwhile lies in a folder ``.state`` beside them: the same command
again goes on from there, whatever stopped it.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import PartialState
from safetensors import SafetensorError
from torch import nn

from .attacks.suites import SUITES
from .attacks.threat_model import ThreatModel, threat_models
from .command_line import read_flags
from .data.datasets import DATASETS, Dataset
from .data.images import Images
from .data.readers import load_images
from .errors import InputError, one_line, unknown
from .evaluation.adversarial import ADVERSARIAL
from .evaluation.curves import draw_curve, require_matplotlib
from .evaluation.evaluation import Evaluation, evaluate_model, evaluate_sweep
from .evaluation.results import rows, show, show_curve, summary, sweep_rows
from .evaluation.subjects import Subject, find_subject
from .processes import Processes
from .runs import environment, read_json, write_json, write_text

__all__ = [
    "EvaluateConfig",
    "Evaluation",
    "attacked_in",
    "check_flags",
    "evaluate",
    "evaluate_model",
    "evaluate_sweep",
    "main",
    "result_path",
]

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class EvaluateConfig:
    """Attack a model with the strongest attacks known for it, and say whether the numbers can be believed."""

    run: tyro.conf.Positional[str]
    """Run directory made by train (RUN/last: its last epoch, not its best).
    Or the name of a timm model with pretrained weights, or of a RobustBench model."""
    suite: str = "quick"
    """quick, paper, autoattack, standard (AutoAttack and more), adaptive or all; each gives a verdict on masking."""
    norm: str | None = None
    """Linf or L2; by default the run's, or the dataset's."""
    eps: str | None = None
    """Radius in units of a [0, 1] pixel, such as 8/255, or several: 2/255,8/255; by default the run's or dataset's."""
    n_examples: int = 1000
    """Use the first so many test images, at most."""
    batch_size: int = 256
    """Images a pass, at most."""
    precision: str = "float32"
    """What attacks search in: float32, or bfloat16 where that is faster; what they find is judged in float32."""
    transfer_from: str | None = None
    """A second model, named as RUN is, whose adversarial images are tried as well."""
    seed: int = 0
    """Keys the randomness of every example and attack."""
    dataset: str | None = None
    """Dataset whose test set is attacked; by default the run's."""
    data_dir: Path | None = None
    """Where the dataset lies; by default where it lay for the run."""


def main(argv: Sequence[str]) -> None:
    """Read the flags, evaluate, and say what to do next."""
    config = read_flags(EvaluateConfig, "evaluate", argv)
    path = evaluate(config)
    if PartialState().is_main_process:
        files = [path.with_suffix(suffix) for suffix in (".json", ".csv", ADVERSARIAL, ".png")]
        print(f"results in {', '.join(str(file) for file in files if file.exists())}")
        if (Path(config.run) / "config.json").is_file() and path.parent.name == "results":
            print(f"next: drelu-timm export {config.run} --key Author2026Title_ARCH")


def evaluate(config: EvaluateConfig) -> Path:
    """Evaluate as the config says, print the table, and write the result files.

    An evaluation that is there already is shown again, not repeated; one that was stopped is gone on with.

    Returns:
        The .json file; the .csv lies beside it, and the adversarial images or the picture of a sweep.

    Raises:
        InputError: Anything in the config that cannot be used, or a result of other settings in the same place.
    """
    check_flags(config)
    subject = find_subject("RUN", config.run, dataset=config.dataset, norm=config.norm)
    dataset = _dataset(config, subject)
    balls = _threat_models(config, subject, dataset)
    images = _test_images(config, subject, dataset)
    sweep = len(balls) > 1
    if sweep:
        require_matplotlib()
    radii = [ball.written for ball in balls]
    asked = {
        "run": subject.run,
        "model": subject.model,
        "dataset": dataset.name,
        "dataset_title": images.title,
        "norm": balls[0].norm,
        "eps": radii if sweep else radii[0],
        "suite": config.suite,
        "n_examples": len(images),
        "seed": config.seed,
        "precision": config.precision,
        "transfer_from": config.transfer_from,
        "model_digest": subject.digest,
    }
    path = result_path(subject.results_folder, config.suite, balls)
    processes = Processes(path.with_suffix(".state"))
    eps = f"up to {radii[-1]}" if sweep else radii[0]
    title = f"{subject.run}, {images.title}, {balls[0].norm}, eps {eps}, {len(images)} examples"
    if path.is_file():
        results = _already(path, asked)
        title = f"{path} is there already; delete it to evaluate anew"
    else:
        evaluations = evaluate_sweep(
            subject.load().to(PartialState().device),
            images.images,
            images.labels,
            eps=radii,
            norm=balls[0].norm,
            suite=config.suite,
            seed=config.seed,
            batch_size=config.batch_size,
            search_dtype=PRECISIONS[config.precision],
            transfer_from=_second_model(config),
            state=path.with_suffix(".state"),
            processes=processes,
        )
        summaries = [summary(evaluation) for evaluation in evaluations]
        results = asked | ({"curve": summaries} if sweep else summaries[0])
        results |= {"processes": processes.count, **environment()}
        if not processes.index:
            _write(path, asked, results, evaluations, title)
    if not processes.index:
        show_curve(results, title) if sweep else show(results, title)
    return path


def _write(
    path: Path, asked: dict[str, Any], results: dict[str, Any], evaluations: Sequence[Evaluation], title: str
) -> None:
    """All files of a result, the .json last: a result is there once this is.

    Raises:
        InputError: A full disk, or another reason why a file cannot be written.
    """
    adversarial = evaluations[0].adversarial
    try:
        if adversarial is None:
            write_text(path.with_suffix(".csv"), sweep_rows(evaluations))
            draw_curve(results["curve"], path.with_suffix(".png"), title=title)
        else:
            write_text(path.with_suffix(".csv"), rows(evaluations[0]))
            results |= {"adversarial_sha256": adversarial.save(path.with_suffix(ADVERSARIAL), asked)}
        write_json(path, results)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} and the files beside it cannot be written ({one_line(error)}); what was measured is kept: make "
            "room and run the same command again"
        ) from error
    shutil.rmtree(path.with_suffix(".state"), ignore_errors=True)


def check_flags(config: EvaluateConfig) -> None:
    """Raise what is wrong with the flags, before anything is loaded.

    Raises:
        InputError: The first flag with a value that is not possible.
    """
    for flag, value, allowed in (
        ("--suite", config.suite, SUITES),
        ("--precision", config.precision, PRECISIONS),
        ("--dataset", config.dataset, DATASETS),
    ):
        if value is not None and value not in allowed:
            raise unknown(flag, value, allowed)
    for flag, value in (("--n-examples", config.n_examples), ("--batch-size", config.batch_size)):
        if value < 1:
            raise InputError(f"{flag} {value} is not possible; give 1 or more")


def attacked_in(config: EvaluateConfig, trained: ThreatModel) -> list[ThreatModel]:
    """The balls, from the smallest, that a run trained in one is evaluated in; raises as `threat_models` does."""
    return threat_models(config.norm or trained.norm, (config.eps or trained.written).split(","))


def result_path(folder: Path, suite: str, balls: Sequence[ThreatModel]) -> Path:
    """Where a result goes: of one radius into ``folder``, of several into ``sweeps`` beside it."""
    largest = balls[-1]
    radius = largest.written.replace("/", "_")
    if len(balls) > 1:
        folder, radius = folder.with_name("sweeps"), f"up-to-{radius}"
    return folder / f"{suite}-{largest.norm}-{radius}.json"


def _second_model(config: EvaluateConfig) -> nn.Module | None:
    """The model of ``--transfer-from``."""
    if config.transfer_from is None:
        return None
    subject = find_subject("--transfer-from", config.transfer_from, dataset=config.dataset, norm=config.norm)
    return subject.load().to(PartialState().device)


def _dataset(config: EvaluateConfig, subject: Subject) -> Dataset:
    name = config.dataset or subject.defaults.get("dataset")
    if name is None:
        raise InputError(f"--dataset is needed to evaluate {config.run}; give one of {', '.join(DATASETS)}")
    if name not in DATASETS:
        raise unknown("--dataset", name, DATASETS)
    return DATASETS[name]


def _threat_models(config: EvaluateConfig, subject: Subject, dataset: Dataset) -> list[ThreatModel]:
    """Those that are asked for, or else the subject's, or the dataset's."""
    norm = config.norm or subject.defaults.get("norm") or dataset.norm
    eps = config.eps or subject.defaults.get("eps") or dataset.eps
    return threat_models(norm, eps.split(","))


def _test_images(config: EvaluateConfig, subject: Subject, dataset: Dataset) -> Images:
    data_dir = config.data_dir or subject.defaults.get("data_dir")
    size = {"img_size": subject.img_size, "in_chans": subject.in_chans}
    return load_images(dataset.name, data_dir, "test", **size)[: config.n_examples]


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
