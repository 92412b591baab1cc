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
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from shlex import quote

import torch
from safetensors import SafetensorError
from torch import nn

from .attacks.suites import SUITES
from .attacks.threat_model import ThreatModel
from .data.datasets import DATASETS, Dataset
from .data.images import Images
from .data.readers import load_images
from .errors import InputError, one_line, unknown
from .evaluation.config import EvaluateConfig, attacked_in, check_flags, result_path
from .evaluation.evaluation import Evaluation, evaluate_under
from .evaluation.processes import Processes, launched
from .evaluation.subjects import Subject, find_subject
from .evaluation.user_model import check_classes
from .files import write_json, write_text
from .results.display import show
from .results.examples import ADVERSARIAL, csv_text, sweep_csv_text
from .results.plotting import draw_curve, require_matplotlib
from .results.result import Result, read_result
from .runs import environment


def main(config: EvaluateConfig) -> None:
    """Evaluate, and print the result's files and what to do next."""
    path = evaluate(config)
    if launched().is_main_process:
        files = [path.with_suffix(suffix) for suffix in (".json", ".csv", ADVERSARIAL, ".png")]
        print(f"results in {', '.join(str(file) for file in files if file.exists())}")
        if (Path(config.run) / "config.json").is_file() and path.parent.name == "results":
            print(f"next: {_next(config)}")


def _next(config: EvaluateConfig) -> str:
    """What to do with a run whose evaluation is there: `export` asks for AutoAttack."""
    if "autoattack" in SUITES[config.suite]:
        return f"drelu-timm export {quote(config.run)} --key Author2026Title_ARCH"
    return f"drelu-timm evaluate {quote(config.run)} --suite standard (AutoAttack, which an export needs)"


@dataclass(frozen=True)
class _Task:
    """What a config asks for, with everything found that it names.

    Attributes:
        config: The flags.
        subject: Whom to attack.
        source: The model of ``--transfer-from``.
        dataset: Whose test images.
        balls: From the smallest.
        models: Those of ``subject`` and, if given, ``source``; none where there is a result already.
        images: Those that are attacked.
    """

    config: EvaluateConfig
    subject: Subject
    source: Subject | None
    dataset: Dataset
    balls: Sequence[ThreatModel]
    models: Sequence[nn.Module]
    images: Images

    @property
    def is_sweep(self) -> bool:
        """Whether over several radii."""
        return len(self.balls) > 1

    @property
    def path(self) -> Path:
        """Of the .json file."""
        return result_path(self.subject.results_folder, self.config.suite, self.balls)

    @property
    def title(self) -> str:
        """Over the table and the picture."""
        eps = f"up to {self.balls[-1].written}" if self.is_sweep else self.balls[0].written
        return f"{self.subject.run}, {self.images.title}, {self.balls[0].norm}, eps {eps}, {len(self.images)} examples"

    @cached_property
    def result(self) -> Result:
        """The result that it is going to have, without what is measured."""
        radii = tuple(ball.written for ball in self.balls)
        return Result(
            run=self.subject.run,
            model=self.subject.model,
            dataset=self.dataset.name,
            dataset_title=self.images.title,
            norm=self.balls[0].norm,
            eps=radii if self.is_sweep else radii[0],
            suite=self.config.suite,
            n_examples=len(self.images),
            seed=self.config.seed,
            precision=self.config.precision,
            transfer_from=self.config.transfer_from,
            model_digest=self.subject.digest,
            **environment(),
        )


def evaluate(config: EvaluateConfig) -> Path:
    """Evaluate as the config says, print the table, and write the result files.

    An evaluation that is there already is shown again, not repeated; one that was stopped is gone on with.

    Returns:
        The .json file; the .csv lies beside it, and the adversarial images or the picture of a sweep.

    Raises:
        InputError: Anything in the config that cannot be used, or a result of other settings in the same place.
    """
    check_flags(config)
    with launched().main_process_first():  # which may have to download
        task = _found(config)
    if task.is_sweep:
        require_matplotlib()
    if task.path.is_file():
        result, title = _already(task), f"{task.path} is there already; delete it to evaluate anew"
    else:
        result, title = _measured(task), task.title
    if launched().is_main_process:
        show(result, title)
    return task.path


def _found(config: EvaluateConfig) -> _Task:
    """Everything that the flags name, looked for before any attack."""
    subject = find_subject("RUN", config.run, dataset=config.dataset, norm=config.norm)
    dataset = _dataset(config, subject)
    balls = _threat_models(config, subject, dataset)
    source = _source(config, subject, dataset, balls[0].norm)
    # Weights may be out of reach, so they come before images, which may take minutes to decode.
    evaluated = result_path(subject.results_folder, config.suite, balls).is_file()
    models = [] if evaluated else _loaded(subject, source)
    return _Task(config, subject, source, dataset, balls, models, _test_images(config, subject, dataset))


def _measured(task: _Task) -> Result:
    """The result, which the first process writes to files."""
    config, state = task.config, task.path.with_suffix(".state")
    processes = Processes(state)
    model, *source = _on_device(task)
    evaluations = evaluate_under(
        task.balls,
        model,
        task.images.images,
        task.images.labels,
        suite=config.suite,
        seed=config.seed,
        batch_size=config.batch_size,
        search_dtype=getattr(torch, config.precision),
        transfer_from=source[0] if source else None,
        state=state,
        processes=processes,
    )
    result = replace(task.result, points=tuple(evaluations), processes=processes.count)
    return result if processes.index else _written(task, result, evaluations)


def _written(task: _Task, result: Result, evaluations: Sequence[Evaluation]) -> Result:
    """Write all files of a result, the .json last: a result is there once this is.

    Raises:
        InputError: A full disk, or another reason why a file cannot be written.
    """
    path, adversarial = task.path, evaluations[0].adversarial
    try:
        if adversarial is None:
            by_eps = {evaluation.eps: evaluation.rows for evaluation in evaluations}
            write_text(path.with_suffix(".csv"), sweep_csv_text(by_eps))
            draw_curve(result.points, path.with_suffix(".png"), title=task.title)
        else:
            write_text(path.with_suffix(".csv"), csv_text(evaluations[0].rows))
            sha256 = adversarial.save(path.with_suffix(ADVERSARIAL), result.identity())
            result = replace(result, adversarial_sha256=sha256)
        write_json(path, result.to_json())
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} and the files beside it cannot be written ({one_line(error)}); what was measured is kept: make "
            "room and run the same command again"
        ) from error
    shutil.rmtree(path.with_suffix(".state"), ignore_errors=True)
    return result


def _source(config: EvaluateConfig, subject: Subject, dataset: Dataset, norm: str) -> Subject | None:
    """The model of ``--transfer-from``, which must take images as the attacked one does."""
    if config.transfer_from is None:
        return None
    source = find_subject("--transfer-from", config.transfer_from, dataset=dataset.name, norm=norm)
    for what, own, needed in (
        ("pixels a side", source.img_size, subject.img_size or dataset.img_size),
        ("channels", source.in_chans, subject.in_chans or dataset.in_chans),
    ):
        if own and needed and own != needed:
            raise InputError(
                f"--transfer-from {source.run} takes images of {own} {what}, RUN {subject.run} of {needed}; "
                "give a model that takes the same images"
            )
    return source


def _loaded(*subjects: Subject | None) -> list[nn.Module]:
    """The subjects' models, whose weights are fetched where need be."""
    return [subject.load() for subject in subjects if subject is not None]


def _on_device(task: _Task) -> list[nn.Module]:
    """The task's models on this process's device.

    Raises:
        InputError: A model with other classes than the images have.
    """
    models = [model.to(launched().device) for model in task.models]
    flags = (f"RUN {task.config.run}", f"--transfer-from {task.config.transfer_from}")
    for model, flag in zip(models, flags, strict=False):
        check_classes(model, task.images, called=flag)
    return models


def _dataset(config: EvaluateConfig, subject: Subject) -> Dataset:
    name = config.dataset or subject.defaults.get("dataset")
    if name is None:
        raise InputError(f"--dataset is needed to evaluate {config.run}; give one of {', '.join(DATASETS)}")
    if name not in DATASETS:
        raise unknown("--dataset", name, DATASETS)
    return DATASETS[name]


def _threat_models(config: EvaluateConfig, subject: Subject, dataset: Dataset) -> list[ThreatModel]:
    """Those that are asked for, or else the subject's, or the dataset's."""
    norm, eps = subject.defaults.get("norm"), subject.defaults.get("eps")
    default = ThreatModel.parse(norm, eps) if norm and eps else ThreatModel.parse(dataset.norm, dataset.eps)
    return attacked_in(replace(config, norm=config.norm or norm), default)


def _test_images(config: EvaluateConfig, subject: Subject, dataset: Dataset) -> Images:
    data_dir = config.data_dir or subject.defaults.get("data_dir")
    size = {"img_size": subject.img_size, "in_chans": subject.in_chans}
    images = load_images(dataset.name, data_dir, "test", **size)[: config.n_examples]
    if subject.classes not in (None, images.classes):
        pairs = zip_longest(subject.classes, images.classes, fillvalue="nothing")
        index, (trained, found) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise InputError(
            f"--data-dir {data_dir}: class {index} is {found}, but RUN {subject.run} was trained with {trained} there. "
            "Give images in folders of the same names."
        )
    return images


def _already(task: _Task) -> Result:
    """The result in the file, which must be what is asked for."""
    result = read_result(task.path)
    before = result.identity()
    for field, value in task.result.identity().items():
        if field != "run" and before[field] != value:
            raise InputError(
                f"{task.path} holds a result with {field} {before[field]!r}, not {value!r}; move it away or delete it "
                "to evaluate anew"
            )
    return result
