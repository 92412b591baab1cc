"""What an evaluation measures, stage by stage: the clean images, the attacks of a suite, the probes for masking."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..attacks.attack import Batch
from ..attacks.suites import Suite, single_attacks
from ..attacks.threat_model import ThreatModel
from ..errors import InputError
from ..results.result import Verdict
from .attacked import Attacked, label_margin
from .checkpoint import Measurement
from .driver import AttackOutcome, Driver
from .masking import PROBED, SIGNALS, Probe, probes, signals, verdict

CLEAN = "clean"  # the stage of the clean images


@dataclass(frozen=True)
class CleanPass:
    """What was measured on the clean images: [N] each."""

    predictions: Tensor
    margins: Tensor
    correct: Tensor
    signals: dict[str, Tensor]


@dataclass(frozen=True)
class SuiteRun:
    """What a suite did, in positions of threat models.

    Attributes:
        broken_at: For each column, [N]: position of the smallest that broke the example, their number where none did;
            0 for examples that are wrong as they are.
        sequences: For each column of several attacks, the same after each of them, by its name.
        outcomes: For each single attack, in the order in which they ran.
    """

    broken_at: dict[str, Tensor]
    sequences: dict[str, dict[str, Tensor]]
    outcomes: dict[str, AttackOutcome]


@dataclass(frozen=True)
class ProbeRun:
    """What the probes for masking did in one threat model, by the name of their stage, and what they say."""

    outcomes: dict[str, AttackOutcome]
    verdict: Verdict


def run_clean(driver: Driver) -> CleanPass:
    """The clean pass.

    Raises:
        InputError: Logits that are not finite.
    """
    everything = torch.ones_like(driver.labels, dtype=torch.bool)
    driver.measure(CLEAN, everything, partial(_measure_clean, Attacked(driver.model)))
    margins = driver.column(CLEAN, "margin")
    if count := int((margins == -torch.inf).sum()):
        raise InputError(f"the model returns NaN or infinite logits for {count} of {len(margins)} clean images")
    predictions = driver.column(CLEAN, "prediction").long()
    correct = predictions == driver.labels
    flags = {name: driver.column(CLEAN, name) == 1 for name in SIGNALS}
    return CleanPass(predictions, margins, correct, flags)


def _measure_clean(model: nn.Module, examples: Tensor, batch: Batch) -> Measurement:
    with torch.no_grad():
        logits = model(batch.images)
    columns = {"prediction": logits.argmax(dim=1), "margin": label_margin(logits, batch.labels)}
    return Measurement.of(examples, columns | signals(model, batch.images, batch.labels))


def run_suite(driver: Driver, columns: Suite, correct: Tensor) -> SuiteRun:
    """Every column of a suite on the correctly classified examples [N], single attacks before sequences of them."""
    run = SuiteRun({}, {}, {})
    for column, attacks in sorted(columns.items(), key=lambda item: len(item[1])):
        left = torch.where(correct, len(driver.threat_models), 0)
        after: dict[str, Tensor] = {}
        for name, attack in attacks.items():
            if name not in run.outcomes:  # what it does to all examples, it does to those that are left
                keep = _first_images(driver, correct, run.outcomes.values())
                run.outcomes[name] = driver.attack(name, attack, left, keep=keep)
            after[name] = left = torch.minimum(left, run.outcomes[name].broken_at)
        run.broken_at[column] = left
        if len(attacks) > 1:
            run.sequences[column] = after
    return run


def run_probes(driver: Driver, position: int, columns: Suite, clean: CleanPass, suite_run: SuiteRun) -> ProbeRun:
    """Run the probes in one of the driver's threat models, each on what those before it in the same ball left."""
    threat_model = driver.threat_models[position]
    examples = clean.correct & (clean.correct.cumsum(0) <= PROBED)
    broken: dict[str, Tensor] = {}
    outcomes: dict[str, AttackOutcome] = {}
    left: dict[ThreatModel, Tensor] = {}
    for probe in probes(driver.model, threat_model, driver.images[0].numel()):
        standing = left.setdefault(probe.threat_model, examples)
        within = replace(driver, threat_models=[probe.threat_model])
        counts = probe.threat_model == threat_model
        keep = _first_images(driver, clean.correct, [*suite_run.outcomes.values(), *outcomes.values()])
        outcome = within.attack(_stage(probe), probe.attack, standing.long(), keep=keep if counts else None)
        broken[probe.name] = standing & (outcome.broken_at == 0)
        left[probe.threat_model] = standing & ~broken[probe.name]
        if counts:
            outcomes[_stage(probe)] = outcome
    flags = {name: flag[examples] for name, flag in clean.signals.items()}
    broken = {name: flag[examples] for name, flag in broken.items()}
    hidden = _hidden(columns, suite_run, position)
    return ProbeRun(outcomes, verdict(driver.labels[examples], flags, broken, hidden[examples]))


def _stage(probe: Probe) -> str:
    return f"probe {probe.name} at {probe.threat_model.written}"


def _first_images(driver: Driver, correct: Tensor, outcomes: Iterable[AttackOutcome]) -> Tensor:
    """Of which examples [N] the next image that breaks them is the first one; of several radii no images are kept."""
    if len(driver.threat_models) > 1:
        return torch.zeros_like(correct)
    for outcome in outcomes:
        correct = correct & (outcome.broken_at > 0)
    return correct


def _hidden(columns: Suite, suite_run: SuiteRun, position: int) -> Tensor:
    """Which examples [N] no white-box attack of a suite broke, but another of its attacks did."""
    white_box = others = torch.zeros_like(next(iter(suite_run.broken_at.values())), dtype=torch.bool)
    for name, attack in single_attacks(columns).items():
        broken = suite_run.outcomes[name].broken_at <= position
        if attack.kind == "white-box":
            white_box = white_box | broken
        else:
            others = others | broken
    return others & ~white_box
