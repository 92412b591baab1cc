"""`drelu-timm evaluate`: clean and robust accuracy of a model, with a verdict on gradient masking.

    drelu-timm evaluate runs/x
    drelu-timm evaluate runs/x --suite standard --norm Linf --eps 8/255 --n-examples 10000
    drelu-timm evaluate runs/x --eps 0,2/255,4/255,8/255,16/255,32/255
    drelu-timm evaluate Carmon2019Unlabeled --dataset cifar10 --data-dir data
    accelerate launch --num_processes 4 -m drelu_timm evaluate runs/x --suite standard

Writes ``runs/x/results/<suite>-<norm>-<eps>.json``, a ``.csv`` with a row per example, and the images that fooled the
model as ``.adversarial.safetensors`` (see `Adversarial`); for several eps ``runs/x/sweeps/<suite>-<norm>-up-to-<eps>``
as ``.json``, ``.csv`` and ``.png``. The folder ``.state`` next to them is the checkpoint, from which the same command
resumes.
"""

import hashlib
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
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
from .evaluation.checkpoint import Processes, launched
from .evaluation.config import EvaluateConfig, attacked_in, check_flags, result_path
from .evaluation.evaluation import Evaluation, evaluate_under
from .evaluation.named_model import NamedModel, find_model
from .files import held, remove_leftovers, write_json, write_text
from .results.display import show
from .results.examples import ADVERSARIAL, csv_text, sweep_csv_text
from .results.plotting import draw_curve, require_matplotlib
from .results.result import Result, read_result
from .results.seal import images_digest, seal
from .runs import environment


def main(config: EvaluateConfig) -> None:
    """Evaluate, and print the result's files and the next command."""
    path = evaluate(config)
    if launched().is_main_process:
        files = [path.with_suffix(suffix) for suffix in (".json", ".csv", ADVERSARIAL, ".png")]
        print(f"results in {', '.join(str(file) for file in files if file.exists())}")
        if (Path(config.run) / "config.json").is_file() and path.parent.name == "results":
            if "autoattack" in SUITES[config.suite]:
                print(f"next: drelu-timm export {quote(config.run)} --key Author2026Title_ARCH")
            else:
                which = "--suite standard (AutoAttack, which an export needs)"
                print(f"next: drelu-timm evaluate {quote(config.run)} {which}")


@dataclass(frozen=True)
class _Task:
    """Everything that a config names.

    Attributes:
        config: The flags.
        target: Model to attack.
        source: Model of ``--transfer-from``.
        dataset: Dataset of the test images.
        threat_models: From the smallest eps.
        models: Of ``target`` and, if given, ``source``; empty if the result exists.
        images: Test images to attack.
    """

    config: EvaluateConfig
    target: NamedModel
    source: NamedModel | None
    dataset: Dataset
    threat_models: Sequence[ThreatModel]
    models: Sequence[nn.Module]
    images: Images

    @property
    def is_sweep(self) -> bool:
        """Whether it is at several eps."""
        return len(self.threat_models) > 1

    @property
    def path(self) -> Path:
        """The .json file of the result."""
        return result_path(self.target.results_folder, self.config.suite, self.threat_models)

    @property
    def state(self) -> Path:
        """Folder of the checkpoint."""
        return self.path.with_suffix(".state")

    @property
    def title(self) -> str:
        """Title of the table and the plot."""
        largest = self.threat_models[-1]
        eps = f"up to {largest.written}" if self.is_sweep else largest.written
        return f"{self.target.name}, {self.images.title}, {largest.norm}, eps {eps}, {len(self.images)} examples"

    @cached_property
    def result(self) -> Result:
        """The result without its measurements."""
        eps = tuple(threat_model.written for threat_model in self.threat_models)
        return Result(
            run=self.target.name,
            model=self.target.architecture,
            dataset=self.dataset.name,
            dataset_title=self.images.title,
            norm=self.threat_models[0].norm,
            eps=eps if self.is_sweep else eps[0],
            suite=self.config.suite,
            n_examples=len(self.images),
            seed=self.config.seed,
            precision=self.config.precision,
            transfer_from=self.config.transfer_from,
            model_digest=self.target.digest,
            **environment(),
        )


def evaluate(config: EvaluateConfig) -> Path:
    """Evaluate a model, print the result, and write its files.

    A result that exists is printed again; an evaluation that was stopped is resumed.

    Returns:
        The .json file; the other files are next to it.

    Raises:
        InputError: A flag that cannot be used, a result with other settings in the same place, or another process
            that evaluates the same.
    """
    check_flags(config)
    with launched().main_process_first():  # which may have to download
        task = _find(config)
    if task.is_sweep:
        require_matplotlib()
    is_first, exists = launched().is_main_process, task.path.is_file()
    if exists and not task.state.exists():
        result = _existing(task)
    else:
        lock = task.path.with_name(f".{task.path.name}.lock")
        # The other processes of a launch wait for the first one in `Processes`, before they write anything.
        with held(lock, str(task.path)) if is_first else nullcontext():
            result = _measure(task)
    if is_first:
        show(result, f"{task.path} exists. Delete it to evaluate again." if exists else task.title)
    return task.path


def _find(config: EvaluateConfig) -> _Task:
    """Find everything that the flags name, before any attack."""
    target = find_model("RUN", config.run, dataset=config.dataset, norm=config.norm)
    dataset = _dataset(config, target)
    norm, eps = target.defaults.get("norm"), target.defaults.get("eps")
    default = ThreatModel.parse(norm, eps) if norm and eps else ThreatModel.parse(dataset.norm, dataset.eps)
    threat_models = attacked_in(replace(config, norm=config.norm or norm), default)
    source = _source(config, target, dataset, threat_models[0].norm)
    # Weights come before images: they may be unavailable, while images may take minutes to decode.
    evaluated = result_path(target.results_folder, config.suite, threat_models).is_file()
    models = [] if evaluated else _loaded(target, source)
    return _Task(config, target, source, dataset, threat_models, models, _test_images(config, target, dataset))


def _loaded(*named: NamedModel | None) -> list[nn.Module]:
    return [one.load() for one in named if one is not None]


def _dataset(config: EvaluateConfig, target: NamedModel) -> Dataset:
    name = config.dataset or target.defaults.get("dataset")
    if name is None:
        raise InputError(f"--dataset is needed to evaluate {config.run}. Use one of {', '.join(DATASETS)}.")
    if name not in DATASETS:
        raise unknown("--dataset", name, DATASETS)
    return DATASETS[name]


def _source(config: EvaluateConfig, target: NamedModel, dataset: Dataset, norm: str) -> NamedModel | None:
    """Find the model of ``--transfer-from``, which must accept the same images as the attacked one."""
    if config.transfer_from is None:
        return None
    source = find_model("--transfer-from", config.transfer_from, dataset=dataset.name, norm=norm)
    for what, own, needed in (
        ("pixels per side", source.img_size, target.img_size or dataset.img_size),
        ("channels", source.in_chans, target.in_chans or dataset.in_chans),
    ):
        if own and needed and own != needed:
            raise InputError(
                f"--transfer-from {source.name} takes images with {own} {what}, RUN {target.name} with {needed}. "
                "Use a model that takes the same images."
            )
    return source


def _test_images(config: EvaluateConfig, target: NamedModel, dataset: Dataset) -> Images:
    data_dir = config.data_dir or target.defaults.get("data_dir")
    size = {"img_size": target.img_size, "in_chans": target.in_chans}
    images = load_images(dataset.name, data_dir, "test", **size)[: config.n_examples]
    if target.classes not in (None, images.classes):
        pairs = zip_longest(target.classes, images.classes, fillvalue="nothing")
        index, (trained, found) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise InputError(
            f"--data-dir {data_dir}: class {index} is {found}, but RUN {target.name} was trained with {trained} there. "
            "Give images in folders of the same names."
        )
    return images


def _existing(task: _Task) -> Result:
    """Read the result, which must have the settings of the flags."""
    result = read_result(task.path)
    before = result.identity()
    for field, value in task.result.identity().items():
        if field != "run" and before[field] != value:
            raise InputError(
                f"{task.path} holds a result with {field} {before[field]!r}, not {value!r}. Move or delete it to "
                "evaluate again."
            )
    return result


def _measure(task: _Task) -> Result:
    """Evaluate, and let the first process write the files."""
    config = task.config
    is_first = launched().is_main_process
    if is_first:
        remove_leftovers(task.path.parent, f"{task.path.stem}.*")
    processes = Processes(task.state)
    if task.path.is_file():  # of a process that ended before we had the lock, or was killed while it cleaned up
        if is_first:
            shutil.rmtree(task.state, ignore_errors=True)
        return _existing(task)
    model, *source = [each.to(launched().device) for each in task.models]
    evaluations = evaluate_under(
        task.threat_models,
        model,
        task.images.images,
        task.images.labels,
        suite=config.suite,
        seed=config.seed,
        batch_size=config.batch_size,
        search_dtype=getattr(torch, config.precision),
        transfer_from=source[0] if source else None,
        state=task.state,
        called=(f"RUN {config.run}", f"--transfer-from {config.transfer_from}"),
        num_classes=len(task.images.classes),
        processes=processes,
    )
    result = replace(task.result, points=tuple(evaluations), processes=processes.count)
    return result if processes.index else _write(task, result, evaluations)


def _write(task: _Task, result: Result, evaluations: Sequence[Evaluation]) -> Result:
    """Write all files of a result; the .json comes last, since a result exists once it does.

    Raises:
        InputError: A full disk, or another reason why a file cannot be written.
    """
    path, adversarial = task.path, evaluations[0].adversarial
    try:
        if adversarial is None:
            by_eps = {evaluation.eps: evaluation.rows for evaluation in evaluations}
            rows = sweep_csv_text(by_eps)
            draw_curve(result.points, path.with_suffix(".png"), title=task.title)
        else:
            rows = csv_text(evaluations[0].rows)
            sha256 = adversarial.save(path.with_suffix(ADVERSARIAL), result.identity())
            result = replace(result, adversarial_sha256=sha256)
        write_text(path.with_suffix(".csv"), rows)
        sealed = seal(result, images=images_digest(task.images), rows=hashlib.sha256(rows.encode()).hexdigest())
        result = replace(result, seal=sealed)
        write_json(path, result.to_json())
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} and the files next to it cannot be written ({one_line(error)}). What was measured is kept: make "
            "room and run the same command again."
        ) from error
    shutil.rmtree(task.state, ignore_errors=True)
    return result
