"""The evaluation of any model under a suite of attacks: the only place where robust accuracies come from.

An attack only searches. What it returns is brought into the ball, and judged by the model itself (`driver`).
"""

import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attacks.adaptive import Transfer, substitutable_layers
from ..attacks.attack import Attack
from ..attacks.suites import Suite, find_suite, single_attacks
from ..attacks.threat_model import ThreatModel, threat_models
from ..digests import digest
from ..errors import DReLUWarning, InputError
from .adversarial import Adversarial
from .checks import channels_hint, check_labels, checked
from .driver import Driver, Outcome, example_seed
from .masking import Verdict
from .processes import Processes
from .rows import Rows
from .stages import CLEAN, CleanPass, ProbeRun, SuiteRun, run_clean, run_probes, run_suite
from .torch_state import Defaults, evaluation_state
from .user_model import AnyModel, UserModel, opened


@dataclass(frozen=True)
class CarliniWagner:
    """What a minimum-norm attack says beside a robust accuracy.

    Attributes:
        median_l2: Median L2 distance it needs over the correctly classified examples; None where it breaks fewer
            than half of them.
        budget: An L2 radius: eps for L2; for Linf that of the ball's corners, eps * sqrt(C * H * W).
        accuracy_at_budget: Share of all examples that are right and have no adversarial example found within it.
    """

    median_l2: float | None
    budget: float
    accuracy_at_budget: float


@dataclass(frozen=True)
class Broken:
    """What broke each example first, in the order of the suite.

    Attributes:
        by: Name of the attack; "clean" for an example that is wrong as it is, "" for one that withstood all. What
            only a probe for masking broke is broken by "probe <attack> at <eps>".
        steps: [N], the gradients or queries that it took; NaN where not known.
        margin: [N], logit of the label minus the largest other one, on the image that broke it; for one that withstood
            all, the smallest on any image that an attack gave.
        seed: What keyed the randomness of that attack on that example; None where nothing broke it.
    """

    by: list[str]
    steps: Tensor
    margin: Tensor
    seed: list[int | None]


@dataclass(frozen=True)
class Evaluation:
    """How a model did under a suite of attacks.

    Attributes:
        threat_model: The balls.
        suite: Name of the suite.
        seed: Keys all randomness.
        labels: [N].
        predictions: [N], of the clean images.
        robust: For each attack (or column of the suite, such as "autoattack"), [N]: right on the clean image and on
            what the attack returned.
        sequences: For each column of several attacks, such as "autoattack", the accuracy in [0, 1] that each of its
            attacks left, with those before it; that of the last is the column's.
        broken: What broke each example.
        adversarial: The images that did it; None of a sweep, and in all processes but the first.
        settings: For each attack, what decides what it finds.
        zero_gradient_share: Share of the correctly classified examples with an input gradient (of the cross-entropy)
            of exactly zero.
        cw_l2: Of the suites that hold "cw-l2".
        verdict: Whether white-box accuracies can be believed.
        seconds: Wall-clock time, of a sweep that of the whole; what was measured before it went on is not in it.
        attack_seconds: The same for each attack of the suite; those that had begun before it went on are left out.
        model_dtype: Of the model's weights, such as "float32"; images and logits are float32 whatever it is.
    """

    threat_model: ThreatModel
    suite: str
    seed: int
    labels: Tensor = field(repr=False)
    predictions: Tensor = field(repr=False)
    robust: dict[str, Tensor] = field(repr=False)
    sequences: dict[str, dict[str, float]]
    broken: Broken = field(repr=False)
    adversarial: Adversarial | None = field(repr=False)
    settings: dict[str, dict[str, Any]] = field(repr=False)
    zero_gradient_share: float
    cw_l2: CarliniWagner | None
    verdict: Verdict
    seconds: float
    attack_seconds: dict[str, float]
    model_dtype: str = "float32"

    @property
    def clean(self) -> float:
        """Clean accuracy, in [0, 1]."""
        return _share(self.predictions == self.labels)

    @property
    def accuracy(self) -> dict[str, float]:
        """Robust accuracy under each attack, in [0, 1]."""
        return {attack: _share(robust) for attack, robust in self.robust.items()}

    @property
    def worst(self) -> float:
        """Share of the examples that nothing broke, in [0, 1]: the robust accuracy."""
        return _share(self.survivors)

    @property
    def survivors(self) -> Tensor:
        """Which examples [N] nothing broke, neither an attack of the suite nor a probe for masking."""
        return torch.tensor([not by for by in self.broken.by])


def evaluate_model(
    model: AnyModel,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | str,
    norm: str = "Linf",
    suite: str = "quick",
    seed: int = 0,
    batch_size: int = 256,
    search_dtype: torch.dtype = torch.float32,
    transfer_from: AnyModel | None = None,
    state: Path | None = None,
) -> Evaluation:
    """Measure clean and robust accuracy, and whether the latter can be believed.

    The model is read in eval mode on the device it is on, and is left as it was; so are the images, torch's settings
    and its random state. `UserModel` says how the model is called.

    Args:
        model: Takes [0, 1] images [B, C, H, W] and returns logits [B, K]: a module or any function, of any
            floating-point dtype.
        images: [N, C, H, W] floats in [0, 1], or uint8, on any device.
        labels: [N] integers below K.
        eps: Radius in units of a [0, 1] pixel, e.g. 0.1 or "8/255".
        norm: "Linf" or "L2".
        suite: A name in `drelu_timm.attacks.suites.SUITES`.
        seed: Keys the randomness of every example and attack.
        batch_size: Images a pass, at most.
        search_dtype: What attacks compute in, such as ``torch.bfloat16``; what they find is judged in float32.
        transfer_from: A second model of the same classes: what fools it is tried on the first, as column "transfer".
        state: Folder for what is measured as it comes in: the same call again goes on from there. It stays afterwards.

    Raises:
        InputError: Images, labels, a model or options that cannot be used, or a state of something else.
    """
    (evaluation,) = evaluate_sweep(
        model,
        images,
        labels,
        eps=[eps],
        norm=norm,
        suite=suite,
        seed=seed,
        batch_size=batch_size,
        search_dtype=search_dtype,
        transfer_from=transfer_from,
        state=state,
    )
    return evaluation


def evaluate_sweep(
    model: AnyModel,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Sequence[float | str],
    norm: str = "Linf",
    suite: str = "quick",
    seed: int = 0,
    batch_size: int = 256,
    search_dtype: torch.dtype = torch.float32,
    transfer_from: AnyModel | None = None,
    state: Path | None = None,
    processes: Processes | None = None,
) -> list[Evaluation]:
    """`evaluate_model` for several radii at once; accuracies can only fall from one to the next.

    What breaks an example in a ball breaks it in every larger one, and is not searched again; attacks that begin at a
    point begin a larger ball where they ended in the smaller one.

    Args:
        model: As of `evaluate_model`, which says what the rest is.
        images: [N, C, H, W].
        labels: [N].
        eps: Radii, in any order.
        norm: "Linf" or "L2".
        suite: Name of the suite.
        seed: Keys all randomness.
        batch_size: Images a pass, at most.
        search_dtype: What attacks compute in.
        transfer_from: A second model.
        state: Folder for what is measured.
        processes: Who shares the work; each of them makes the same call.

    Returns:
        An evaluation a radius, from the smallest.
    """
    started = time.monotonic()
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size} is not possible; give 1 or more")
    balls = threat_models(norm, eps)
    caller, processes = Defaults.current(), processes or Processes()
    with evaluation_state(), ExitStack() as stack:
        images, labels = checked(images, labels)
        how: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "caller": caller}
        user_model = stack.enter_context(opened(model, images, **how))
        check_labels(labels, user_model.num_classes)
        if hint := channels_hint(images.shape):
            warnings.warn(hint, DReLUWarning, stacklevel=2)
        source = None
        if transfer_from is not None:
            source = stack.enter_context(opened(transfer_from, images, called="--transfer-from", **how))
        columns = _columns(suite, user_model, source)
        driver = Driver(user_model, images, labels, balls, seed, batch_size, search_dtype, processes=processes)
        driver = replace(driver, rows=Rows(state, _identity(driver, user_model, suite, columns), processes.index))
        evaluations = _measured(driver, suite, columns)
    seconds, dtype = time.monotonic() - started, str(user_model.dtype).removeprefix("torch.")
    notes = (*user_model.notes, *(f"The model of --transfer-from: {note}" for note in (source.notes if source else ())))
    return [
        replace(evaluation, seconds=seconds, model_dtype=dtype, verdict=_noted(evaluation.verdict, notes))
        for evaluation in evaluations
    ]


def _columns(suite: str, model: UserModel, source: UserModel | None) -> Suite:
    """The columns of a suite for a model, with the attack from a second one where there is one."""
    columns = find_suite(suite, model.num_classes, adaptive=bool(substitutable_layers(model)))
    if source is None:
        return columns
    if source.num_classes != model.num_classes:
        raise InputError(
            f"--transfer-from has {source.num_classes} outputs, the attacked model {model.num_classes}; "
            "give a model of the same classes"
        )
    transfer: dict[str, Attack] = {"transfer": Transfer(source)}
    return columns | {"transfer": transfer}


def _measured(driver: Driver, suite: str, columns: Suite) -> list[Evaluation]:
    """An evaluation in each of the driver's threat models."""
    clean = run_clean(driver)
    suite_run = run_suite(driver, columns, clean.correct)
    probed = [run_probes(driver, position, columns, clean, suite_run) for position in range(len(driver.threat_models))]
    return [
        _evaluation(driver, suite, columns, clean, suite_run, probed[: position + 1]) for position in range(len(probed))
    ]


def _noted(verdict: Verdict, notes: Sequence[str]) -> Verdict:
    return replace(verdict, evidence=(*notes, *verdict.evidence))


def _identity(driver: Driver, model: UserModel, suite: str, columns: Suite) -> dict[str, Any]:
    """Everything that decides what rows say."""
    return {
        "model": model.digest,
        "images": digest([driver.images, driver.labels]),
        "norm": driver.threat_models[0].norm,
        "eps": [threat_model.eps for threat_model in driver.threat_models],
        "suite": suite,
        "settings": digest([], json.dumps(_settings(columns), sort_keys=True)),
        "seed": driver.seed,
        "precision": str(driver.search_dtype),
    }


def _evaluation(
    driver: Driver, suite: str, columns: Suite, clean: CleanPass, suite_run: SuiteRun, probed: Sequence[ProbeRun]
) -> Evaluation:
    """The evaluation in the last of the threat models that were ``probed``."""
    position = len(probed) - 1
    threat_model = driver.threat_models[position]
    broken = _broken(driver, clean, suite_run, probed)
    cw = suite_run.outcomes.get("cw-l2")
    return Evaluation(
        threat_model=threat_model,
        suite=suite,
        seed=driver.seed,
        labels=driver.labels,
        predictions=clean.predictions,
        robust={column: suite_run.broken_at[column] > position for column in columns},
        sequences={
            column: {attack: _share(broken_at > position) for attack, broken_at in after.items()}
            for column, after in suite_run.sequences.items()
        },
        broken=broken,
        adversarial=_adversarial(driver, broken),
        settings=_settings(columns),
        zero_gradient_share=_share(clean.signals["zero_gradient_ce"][clean.correct]),
        cw_l2=_carlini_wagner(cw.l2, clean.correct, threat_model, driver.images[0].numel()) if cw else None,
        verdict=probed[-1].verdict,
        seconds=0.0,
        attack_seconds={
            attack: outcome.seconds for attack, outcome in suite_run.outcomes.items() if outcome.seconds is not None
        },
    )


def _broken(driver: Driver, clean: CleanPass, suite_run: SuiteRun, probed: Sequence[ProbeRun]) -> Broken:
    """By what each example was broken; of several attacks that did it, the one that ran first."""
    by = ["" if right else CLEAN for right in clean.correct.tolist()]
    steps = torch.full(driver.labels.shape, torch.nan, dtype=torch.float64)
    margins = torch.where(clean.correct, torch.inf, clean.margins)
    for name, outcome, flags in _breaks(suite_run, probed):
        standing = torch.tensor([not name for name in by])
        for example in (flags & standing).nonzero().squeeze(1).tolist():
            by[example] = name
        steps = steps.where(~(flags & standing), outcome.steps)
        margins = margins.where(~standing, torch.minimum(margins, outcome.margin.nan_to_num(torch.inf)))
    seeds = [
        example_seed(driver.seed, name, example) if name and name != CLEAN else None for example, name in enumerate(by)
    ]
    return Broken(by, steps, margins, seeds)


def _breaks(suite_run: SuiteRun, probed: Sequence[ProbeRun]) -> Iterator[tuple[str, Outcome, Tensor]]:
    """By stage, in the order in which they ran: what it did, and which examples [N] it broke in the last ball probed.

    What breaks an example in a smaller ball breaks it in this one.
    """
    position = len(probed) - 1
    for attack, outcome in suite_run.outcomes.items():
        yield attack, outcome, outcome.broken_at <= position
    for probe_run in probed:
        for stage, outcome in probe_run.outcomes.items():
            yield stage, outcome, outcome.broken_at == 0


def _adversarial(driver: Driver, broken: Broken) -> Adversarial | None:
    """The images that broke the examples, where the driver kept them."""
    if len(driver.threat_models) > 1 or driver.processes.index:
        return None
    stages = {example: by for example, by in enumerate(broken.by) if by not in ("", CLEAN)}
    images = driver.rows.images(stages, driver.images.shape[1:])
    return Adversarial(torch.tensor(list(stages), dtype=torch.int64), images)


def _settings(columns: Suite) -> dict[str, dict[str, Any]]:
    settings = {name: attack.settings for name, attack in single_attacks(columns).items()}
    for name, attack in single_attacks(columns).items():
        if isinstance(attack, Transfer) and isinstance(attack.source, UserModel):
            settings[name] |= {"source_digest": attack.source.digest}
    return settings | {column: {"stages": [*attacks]} for column, attacks in columns.items() if len(attacks) > 1}


def _carlini_wagner(l2: Tensor, correct: Tensor, threat_model: ThreatModel, pixels: int) -> CarliniWagner:
    median = float(l2[correct].median()) if correct.any() else float("inf")
    budget = threat_model.eps if threat_model.norm == "L2" else threat_model.eps * sqrt(pixels)
    return CarliniWagner(
        median_l2=median if isfinite(median) else None,
        budget=budget,
        accuracy_at_budget=_share(correct & (l2 > budget)),
    )


def _share(flags: Tensor) -> float:
    return float(flags.double().mean()) if len(flags) else 0.0
