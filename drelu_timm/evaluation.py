"""The evaluation of any model under a suite of attacks: the only place where robust accuracies come from.

An attack only searches. What it returns is brought into the ball, and judged by the model itself (`driver`).
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adaptive import substitutable_layers
from .attacks import ThreatModel, channels_last, frozen
from .checks import check_data, count_classes
from .driver import Attacked, Batch, Columns, Driver, Outcome, example_seed, label_margin
from .errors import InputError
from .masking import PROBED, SIGNALS, Verdict, probes, signals, verdict
from .processes import Processes
from .rows import Rows, digest, model_digest
from .suites import ATTACKS, Suite, find_suite

CLEAN = "clean"  # the stage of the clean images


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
        broken: What broke each example.
        settings: For each attack, what decides what it finds.
        zero_gradient_share: Share of the correctly classified examples with an input gradient (of the cross-entropy)
            of exactly zero.
        cw_l2: Of the suites that hold "cw-l2".
        verdict: Whether white-box accuracies can be believed.
        seconds: Wall-clock time, of a sweep that of the whole; what was measured before it went on is not in it.
    """

    threat_model: ThreatModel
    suite: str
    seed: int
    labels: Tensor
    predictions: Tensor
    robust: dict[str, Tensor]
    broken: Broken
    settings: dict[str, dict[str, Any]]
    zero_gradient_share: float
    cw_l2: CarliniWagner | None
    verdict: Verdict
    seconds: float

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
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | str,
    norm: str = "Linf",
    suite: str = "quick",
    seed: int = 0,
    batch_size: int = 256,
    search_dtype: torch.dtype = torch.float32,
    transfer_from: nn.Module | None = None,
    state: Path | None = None,
) -> Evaluation:
    """Measure clean and robust accuracy, and whether the latter can be believed.

    The model is read in eval mode on the device it is on, and is left as it was.

    Args:
        model: Takes [0, 1] images [B, C, H, W] and returns logits [B, K].
        images: [N, C, H, W] floats in [0, 1], or uint8, on any device.
        labels: [N] integers below K.
        eps: Radius in units of a [0, 1] pixel, e.g. 0.1 or "8/255".
        norm: "Linf" or "L2".
        suite: A name in `drelu_timm.suites.SUITES`.
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
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Sequence[float | str],
    norm: str = "Linf",
    suite: str = "quick",
    seed: int = 0,
    batch_size: int = 256,
    search_dtype: torch.dtype = torch.float32,
    transfer_from: nn.Module | None = None,
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
    threat_models = sorted((ThreatModel.parse(norm, radius) for radius in eps), key=lambda ball: ball.eps)
    if threat_models[-1].eps == 0:
        raise InputError("--eps 0 leaves nothing to attack; give a radius above 0")
    check_data(images, labels)
    labels = labels.cpu().long()
    processes = processes or Processes()
    with frozen(model), channels_last(model):
        num_classes = count_classes(model, images, labels)
        columns = find_suite(suite, num_classes, adaptive=bool(substitutable_layers(model)))
        if transfer_from is not None:
            columns["transfer"] = (replace(ATTACKS["transfer"], source=transfer_from),)
        driver = Driver(model, images, labels, threat_models, seed, batch_size, search_dtype, processes=processes)
        driver = replace(driver, rows=Rows(state, _identity(driver, suite, columns), processes.index))
        clean = _measure_clean(driver)
        attacked = _attack(driver, columns, clean.correct)
        probed = [_probe(driver, position, columns, clean, attacked) for position in range(len(threat_models))]
        evaluations = [
            _evaluation(driver, suite, columns, clean, attacked, probed[: position + 1])
            for position in range(len(threat_models))
        ]
    seconds = time.monotonic() - started
    return [replace(evaluation, seconds=seconds) for evaluation in evaluations]


def _identity(driver: Driver, suite: str, columns: Suite) -> dict[str, Any]:
    """Everything that decides what rows say."""
    return {
        "model": model_digest(driver.model),
        "images": digest([driver.images, driver.labels]),
        "norm": driver.threat_models[0].norm,
        "eps": [threat_model.eps for threat_model in driver.threat_models],
        "suite": suite,
        "settings": digest([], json.dumps(_settings(columns), sort_keys=True)),
        "seed": driver.seed,
        "precision": str(driver.search_dtype),
    }


@dataclass(frozen=True)
class _Clean:
    """What was measured on the clean images: [N] each."""

    predictions: Tensor
    margins: Tensor
    correct: Tensor
    signals: dict[str, Tensor]


@dataclass(frozen=True)
class _Attacked:
    """What a suite did, in positions of threat models.

    Attributes:
        broken_at: For each column, [N]: position of the smallest that broke the example, their number where none did;
            0 for examples that are wrong as they are.
        outcomes: For each single attack.
    """

    broken_at: dict[str, Tensor]
    outcomes: dict[str, Outcome]


def _attack(driver: Driver, columns: Suite, correct: Tensor) -> _Attacked:
    """Every column of a suite on the correctly classified examples [N], single attacks before sequences of them."""
    attacked = _Attacked({}, {})
    for column, stages in sorted(columns.items(), key=lambda item: len(item[1])):
        left = torch.where(correct, len(driver.threat_models), 0)
        for attack in stages:
            if attack.name not in attacked.outcomes:  # what it does to all examples, it does to those that are left
                attacked.outcomes[attack.name] = driver.attack(attack, left)
            left = torch.minimum(left, attacked.outcomes[attack.name].broken_at)
        attacked.broken_at[column] = left
    return attacked


@dataclass(frozen=True)
class _Probed:
    """What the probes for masking did in one threat model, by the name of their stage, and what they say."""

    outcomes: dict[str, Outcome]
    verdict: Verdict


def _probe(driver: Driver, position: int, columns: Suite, clean: _Clean, attacked: _Attacked) -> _Probed:
    """Run the probes in one of the driver's threat models, each on what those before it in the same ball left."""
    threat_model = driver.threat_models[position]
    examples = clean.correct & (clean.correct.cumsum(0) <= PROBED)
    broken: dict[str, Tensor] = {}
    outcomes: dict[str, Outcome] = {}
    left: dict[ThreatModel, Tensor] = {}
    for probe in probes(driver.model, threat_model, driver.images[0].numel()):
        standing = left.setdefault(probe.threat_model, examples)
        stage = f"probe {probe.attack.name} at {probe.threat_model.written}"
        within = replace(driver, threat_models=[probe.threat_model])
        outcome = within.attack(probe.attack, standing.long(), stage=stage)
        broken[probe.attack.name] = standing & (outcome.broken_at == 0)
        left[probe.threat_model] = standing & ~broken[probe.attack.name]
        if probe.threat_model == threat_model:
            outcomes[stage] = outcome
    flags = {name: flag[examples] for name, flag in clean.signals.items()}
    broken = {name: flag[examples] for name, flag in broken.items()}
    hidden = _hidden(columns, attacked, position)
    return _Probed(outcomes, verdict(driver.labels[examples], flags, broken, hidden[examples]))


def _hidden(columns: Suite, attacked: _Attacked, position: int) -> Tensor:
    """Which examples [N] no white-box attack of a suite broke, but another of its attacks did."""
    white_box = others = torch.zeros_like(next(iter(attacked.broken_at.values())), dtype=torch.bool)
    for attack in {attack.name: attack for stages in columns.values() for attack in stages}.values():
        broken = attacked.outcomes[attack.name].broken_at <= position
        if attack.kind == "white-box":
            white_box = white_box | broken
        else:
            others = others | broken
    return others & ~white_box


def _evaluation(
    driver: Driver, suite: str, columns: Suite, clean: _Clean, attacked: _Attacked, probed: Sequence[_Probed]
) -> Evaluation:
    """The evaluation in the last of the threat models that were ``probed``."""
    position = len(probed) - 1
    threat_model = driver.threat_models[position]
    broken = {name: (outcome, outcome.broken_at <= position) for name, outcome in attacked.outcomes.items()}
    for outcomes in (within.outcomes for within in probed):  # what broke it in a smaller ball breaks it in this one
        broken |= {stage: (outcome, outcome.broken_at == 0) for stage, outcome in outcomes.items()}
    cw = attacked.outcomes.get("cw-l2")
    return Evaluation(
        threat_model=threat_model,
        suite=suite,
        seed=driver.seed,
        labels=driver.labels,
        predictions=clean.predictions,
        robust={column: attacked.broken_at[column] > position for column in columns},
        broken=_broken(driver, clean, broken),
        settings=_settings(columns),
        zero_gradient_share=_share(clean.signals["zero_gradient_ce"][clean.correct]),
        cw_l2=_carlini_wagner(cw.l2, clean.correct, threat_model, driver.images[0].numel()) if cw else None,
        verdict=probed[-1].verdict,
        seconds=0.0,
    )


def _broken(driver: Driver, clean: _Clean, broken: Mapping[str, tuple[Outcome, Tensor]]) -> Broken:
    """By what each example was broken; of several attacks that did it, the first."""
    by = ["" if right else CLEAN for right in clean.correct.tolist()]
    steps = torch.full(driver.labels.shape, torch.nan, dtype=torch.float64)
    margins = torch.where(clean.correct, torch.inf, clean.margins)
    for name, (outcome, flags) in broken.items():
        standing = torch.tensor([not name for name in by])
        for example in (flags & standing).nonzero().squeeze(1).tolist():
            by[example] = name
        steps = steps.where(~(flags & standing), outcome.steps)
        margins = margins.where(~standing, torch.minimum(margins, outcome.margin.nan_to_num(torch.inf)))
    seeds = [
        example_seed(driver.seed, name, example) if name and name != CLEAN else None for example, name in enumerate(by)
    ]
    return Broken(by, steps, margins, seeds)


def _measure_clean(driver: Driver) -> _Clean:
    """The clean pass.

    Raises:
        InputError: Logits that are not finite.
    """
    driver.measure(
        CLEAN, torch.ones_like(driver.labels, dtype=torch.bool), partial(_clean_columns, Attacked(driver.model))
    )
    margins = driver.column(CLEAN, "margin")
    if count := int((margins == -torch.inf).sum()):
        raise InputError(f"the model returns NaN or infinite logits for {count} of {len(margins)} clean images")
    predictions = driver.column(CLEAN, "prediction").long()
    correct = predictions == driver.labels
    flags = {name: driver.column(CLEAN, name) == 1 for name in SIGNALS}
    return _Clean(predictions, margins, correct, flags)


def _clean_columns(model: nn.Module, batch: Batch) -> Columns:
    with torch.no_grad():
        logits = model(batch.images)
    columns = {"prediction": logits.argmax(dim=1), "margin": label_margin(logits, batch.labels)}
    return columns | signals(model, batch.images, batch.labels)


def _settings(columns: Suite) -> dict[str, dict[str, Any]]:
    attacks = [attack for stages in columns.values() for attack in stages]
    settings = {attack.name: attack.settings for attack in attacks}
    for attack in attacks:
        if attack.source is not None:
            settings[attack.name] = {**attack.settings, "source_digest": model_digest(attack.source)}
    sequences = {column: stages for column, stages in columns.items() if len(stages) > 1}
    return settings | {column: {"stages": [attack.name for attack in stages]} for column, stages in sequences.items()}


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
