"""Steps of an evaluation (the clean pass, the attacks of a suite, the probes for masking) and the result they give."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from math import isfinite, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks.adaptive import Transfer
from ..attacks.attack import Batch
from ..attacks.suites import Suite, single_attacks
from ..attacks.threat_model import ThreatModel
from ..data.images import as_float
from ..errors import InputError
from ..results.display import as_html, as_text
from ..results.examples import Adversarial, Broken, Rows, share
from ..results.result import CarliniWagner, EpsResult, Verdict
from . import layers
from .certificates import certify
from .checkpoint import Measurement
from .driver import DRAWS, Attacked, AttackOutcome, Driver, example_seed, label_margin
from .fidelity import EXAMINED, measure_gradients
from .layers import HidingLayer
from .masking import MOST_PROBED, PROBED, SIGNALS, STRONGER, is_suspicious, probes, probing_order, signals
from .user_model import UserModel
from .verdicts import needs_more_examples, verdict

CLEAN = "clean"  # the stage of the clean images


@dataclass(frozen=True, kw_only=True)
class Evaluation(EpsResult):
    """Result of a model in one threat model, with its rows per example and its adversarial images.

    Attributes:
        threat_model: Norm and eps.
        suite: Name of the suite.
        seed: Key of all randomness.
        rows: Result per example.
        adversarial: Images that fooled the model; None for a sweep, and in all processes but the first.
        model_dtype: Of the model's weights, such as "float32"; images and logits are float32 for every model.
    """

    threat_model: ThreatModel
    suite: str
    seed: int
    rows: Rows = field(repr=False)
    adversarial: Adversarial | None = field(repr=False)
    model_dtype: str = "float32"

    def __str__(self) -> str:
        """Return the table of accuracies, the verdict and its evidence."""
        how = f"{self.threat_model}, suite {self.suite}, {len(self.labels):,} images, seed {self.seed}"
        return f"{how}\n{as_text(self)}"

    def _repr_html_(self) -> str:
        """Return the same for a notebook."""
        return as_html(self)

    @property
    def labels(self) -> Tensor:
        """Labels [N]."""
        return self.rows.labels

    @property
    def predictions(self) -> Tensor:
        """Predicted classes [N] of the clean images."""
        return self.rows.predictions

    @property
    def robust(self) -> dict[str, Tensor]:
        """By attack, the examples [N] on which the model stayed correct."""
        return self.rows.robust

    @property
    def survivors(self) -> Tensor:
        """The examples [N] on which neither an attack of the suite nor a probe for masking fooled the model."""
        return self.rows.survivors

    @property
    def broken(self) -> Broken:
        """What fooled the model on each example first."""
        assert self.rows.broken is not None
        return self.rows.broken


@dataclass(frozen=True)
class CleanPass:
    """Measurements on the clean images, [N] each."""

    predictions: Tensor
    margins: Tensor
    correct: Tensor
    signals: dict[str, Tensor]


@dataclass(frozen=True)
class SuiteRun:
    """Outcome of a suite, in positions of threat models.

    Attributes:
        broken_at: By column, [N]: the smallest threat model in which the model was fooled on the example, their number
            if it was fooled in none; 0 for examples that are wrong without an attack.
        sequences: By column of several attacks, the same after each of them, by its name.
        outcomes: By single attack, in the order in which they ran.
    """

    broken_at: dict[str, Tensor]
    sequences: dict[str, dict[str, Tensor]]
    outcomes: dict[str, AttackOutcome]


@dataclass(frozen=True)
class ProbeRun:
    """Outcome of the probes for masking in one threat model, by stage, and their verdict."""

    outcomes: dict[str, AttackOutcome]
    verdict: Verdict


def run(driver: Driver, suite: str, columns: Suite) -> list[Evaluation]:
    """Measure a model, and return an evaluation for each of the driver's threat models.

    Args:
        driver: With the model, the examples and the threat models.
        suite: Name of the suite.
        columns: Its columns for this model.

    Raises:
        InputError: Logits that are not finite, or a checkpoint that cannot be written.
    """
    clean = run_clean(driver)
    if clean.signals["unsteady"].any():
        driver = replace(driver, draws=DRAWS)
        clean = _by_majority(driver, clean)
    suite_run = run_suite(driver, columns, clean.correct)
    probed = [run_probes(driver, position, columns, clean, suite_run) for position in range(len(driver.threat_models))]
    evaluations = [
        _evaluation(driver, suite, columns, clean, suite_run, probed[: position + 1]) for position in range(len(probed))
    ]
    proven, reason = certify(driver, clean.correct)
    if reason:
        return [replace(evaluation, not_certified=reason) for evaluation in evaluations]
    return [_certified(*each) for each in zip(evaluations, proven, strict=True)]


def _certified(evaluation: Evaluation, proven: Tensor) -> Evaluation:
    """Add a certificate of the examples [N] that are ``proven`` to be robust, which no attack may have fooled."""
    fooled = proven & ~evaluation.survivors
    assert not fooled.any(), f"examples {fooled.nonzero().flatten().tolist()} are certified, but an attack fooled them"
    return replace(evaluation, certified=share(proven))


def run_clean(driver: Driver) -> CleanPass:
    """Measure the clean images.

    Raises:
        InputError: Logits that are not finite.
    """
    everything = torch.ones_like(driver.labels, dtype=torch.bool)
    driver.measure(CLEAN, everything, partial(_measure_clean, Attacked(driver.model)))
    margins = driver.column(CLEAN, "margin")
    if count := int((margins == -torch.inf).sum()):
        raise InputError(
            f"the model returns NaN or infinite logits for {count} of {len(margins)} clean images. They must be finite."
        )
    predictions = driver.column(CLEAN, "prediction").long()
    correct = predictions == driver.labels
    flags = {name: driver.column(CLEAN, name) == 1 for name in SIGNALS}
    return CleanPass(predictions, margins, correct, flags)


def _measure_clean(model: nn.Module, examples: Tensor, batch: Batch) -> Measurement:
    with torch.no_grad():
        logits = model(batch.images)
    columns = {"prediction": logits.argmax(dim=1), "margin": label_margin(logits, batch.labels)}
    return Measurement.of(examples, columns | signals(model, batch.images, batch.labels))


def _by_majority(driver: Driver, clean: CleanPass) -> CleanPass:
    """Return the clean pass of a model whose output is not a function of the image: by the majority of its draws."""

    def measure(examples: Tensor, batch: Batch) -> Measurement:
        with torch.no_grad():
            others = driver.model(batch.images).scatter(1, batch.labels.unsqueeze(1), -torch.inf)
        columns = {"margin": driver.margin(batch.images, batch.labels), "other": others.argmax(dim=1)}
        return Measurement.of(examples, columns)

    stage = f"{CLEAN} by majority"
    driver.measure(stage, torch.ones_like(clean.correct), measure)
    margins = driver.column(stage, "margin")
    correct = margins > 0
    predictions = torch.where(correct, driver.labels, driver.column(stage, "other").long())
    return replace(clean, predictions=predictions, margins=margins, correct=correct)


def run_suite(driver: Driver, columns: Suite, correct: Tensor) -> SuiteRun:
    """Run every column of a suite on the correctly classified examples [N], single attacks before sequences."""
    suite_run = SuiteRun({}, {}, {})
    for column, attacks in sorted(columns.items(), key=lambda item: len(item[1])):
        left = torch.where(correct, len(driver.threat_models), 0)
        after: dict[str, Tensor] = {}
        for name, attack in attacks.items():
            if name not in suite_run.outcomes:  # the outcome on all examples includes the one on the examples left
                keep = _without_image(driver, correct, suite_run.outcomes.values())
                suite_run.outcomes[name] = driver.attack(name, attack, left, keep=keep)
            after[name] = left = torch.minimum(left, suite_run.outcomes[name].broken_at)
        suite_run.broken_at[column] = left
        if len(attacks) > 1:
            suite_run.sequences[column] = after
    return suite_run


def run_probes(driver: Driver, position: int, columns: Suite, clean: CleanPass, suite_run: SuiteRun) -> ProbeRun:
    """Run the probes in one of the driver's threat models, on more examples until the verdict is decided."""
    order = probing_order(driver.labels, clean.correct, driver.seed)
    gradients = measure_gradients(driver, order[:EXAMINED])
    hidden = _hidden(columns, suite_run, position)
    hiding_layers = cache(lambda: _hiding_layers(driver, order))  # they do not depend on how many examples are probed
    count, measured = PROBED, dict[str, Tensor]()
    while True:
        examples = torch.zeros_like(clean.correct)
        examples[order[:count]] = True
        broken, outcomes = _probed(driver, position, examples, clean, gradients, suite_run, measured)
        flags = {name: flag[examples] for name, flag in clean.signals.items()}
        hiding = hiding_layers() if is_suspicious(flags, gradients, broken) else []
        found = verdict(driver.labels[examples], flags, gradients, broken, hidden[examples], hiding, clean.correct)
        if count >= min(len(order), MOST_PROBED) or not needs_more_examples(found):
            return ProbeRun(outcomes, found)
        count *= 2


def _hiding_layers(driver: Driver, positions: Tensor) -> list[HidingLayer]:
    if not isinstance(driver.model, UserModel):
        return []
    images = driver.images[positions[: layers.EXAMINED].to(driver.images.device)]
    return layers.hiding_layers(driver.model, as_float(images.to(driver.device)))


def _probed(
    driver: Driver,
    position: int,
    examples: Tensor,
    clean: CleanPass,
    gradients: dict[str, Tensor],
    suite_run: SuiteRun,
    measured: dict[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, AttackOutcome]]:
    """Run each probe on the examples [N] that the earlier ones in the same threat model left.

    ``measured`` has by stage the examples [N] of earlier calls, and is updated. Returns by probe, for each of the
    examples, whether it fooled the model; and by stage the outcomes that count.
    """
    threat_model = driver.threat_models[position]
    broken: dict[str, Tensor] = {}
    outcomes: dict[str, AttackOutcome] = {}
    left: dict[ThreatModel, Tensor] = {}
    flags = {name: flag[examples] for name, flag in clean.signals.items()}
    for probe in probes(driver.model, threat_model, driver.images[0].numel()):
        stage = f"probe {probe.name} at {probe.threat_model.written}"
        so_far = {name: flag[examples] for name, flag in broken.items()}
        if probe.name == STRONGER and stage not in measured and not is_suspicious(flags, gradients, so_far):
            continue
        remaining = left.setdefault(probe.threat_model, examples)
        within = replace(driver, threat_models=[probe.threat_model])
        counts = probe.threat_model == threat_model
        keep = _without_image(driver, clean.correct, [*suite_run.outcomes.values(), *outcomes.values()])
        new = remaining & ~measured.get(stage, torch.zeros_like(remaining))
        measured[stage] = remaining | measured.get(stage, remaining)
        outcome = within.attack(stage, probe.attack, new.long(), keep=keep if counts else None)
        broken[probe.name] = remaining & (outcome.broken_at == 0)
        left[probe.threat_model] = remaining & ~broken[probe.name]
        if counts:
            outcomes[stage] = outcome
    return {name: flag[examples] for name, flag in broken.items()}, outcomes


def _without_image(driver: Driver, correct: Tensor, outcomes: Iterable[AttackOutcome]) -> Tensor:
    """Return the examples [N] of which an adversarial image has to be kept when one is found; none for a sweep."""
    if len(driver.threat_models) > 1:
        return torch.zeros_like(correct)
    for outcome in outcomes:
        correct = correct & (outcome.broken_at > 0)
    return correct


def _hidden(columns: Suite, suite_run: SuiteRun, position: int) -> Tensor:
    """Return the examples [N] that the white-box attacks of a suite left and another of its attacks did not."""
    white_box = others = torch.zeros_like(next(iter(suite_run.broken_at.values())), dtype=torch.bool)
    for name, attack in single_attacks(columns).items():
        broken = suite_run.outcomes[name].broken_at <= position
        if attack.kind == "white-box":
            white_box = white_box | broken
        else:
            others = others | broken
    return others & ~white_box


def _evaluation(
    driver: Driver, suite: str, columns: Suite, clean: CleanPass, suite_run: SuiteRun, probed: Sequence[ProbeRun]
) -> Evaluation:
    """Return the evaluation in the last of the threat models that were ``probed``."""
    position = len(probed) - 1
    threat_model = driver.threat_models[position]
    broken = _broken(driver, clean, suite_run, probed)
    robust = {column: suite_run.broken_at[column] > position for column in columns}
    survivors = torch.tensor([not by for by in broken.by])
    rows = Rows(driver.labels, clean.predictions, robust, survivors, broken)
    shares = rows.shares
    cw = suite_run.outcomes.get("cw-l2")
    return Evaluation(
        threat_model=threat_model,
        suite=suite,
        seed=driver.seed,
        rows=rows,
        adversarial=_adversarial(driver, clean, broken),
        eps=threat_model.written,
        settings=suite_settings(columns),
        clean=shares["clean"],
        accuracy={column: shares[column] for column in columns},
        worst=shares["worst"],
        sequences={
            column: {attack: share(broken_at > position) for attack, broken_at in after.items()}
            for column, after in suite_run.sequences.items()
        },
        zero_gradient_share=share(clean.signals["zero_gradient_ce"][clean.correct]),
        cw_l2=_carlini_wagner(cw.l2, clean.correct, threat_model, driver.images[0].numel()) if cw else None,
        verdict=probed[-1].verdict,
        seconds=0.0,
        attack_seconds={
            attack: outcome.seconds for attack, outcome in suite_run.outcomes.items() if outcome.seconds is not None
        },
    )


def _broken(driver: Driver, clean: CleanPass, suite_run: SuiteRun, probed: Sequence[ProbeRun]) -> Broken:
    """Return what fooled the model on each example: the attack that ran first, if several did."""
    by = ["" if correct else CLEAN for correct in clean.correct.tolist()]
    steps = torch.full(driver.labels.shape, torch.nan, dtype=torch.float64)
    margins = torch.where(clean.correct, torch.inf, clean.margins)
    for name, outcome, flags in _outcomes(suite_run, probed):
        left = torch.tensor([not name for name in by])
        for example in (flags & left).nonzero().squeeze(1).tolist():
            by[example] = name
        steps = steps.where(~(flags & left), outcome.steps)
        margins = margins.where(~left, torch.minimum(margins, outcome.margin.nan_to_num(torch.inf)))
    seeds = [
        example_seed(driver.seed, name, example) if name and name != CLEAN else None for example, name in enumerate(by)
    ]
    return Broken(by, steps, margins, seeds)


def _outcomes(suite_run: SuiteRun, probed: Sequence[ProbeRun]) -> Iterator[tuple[str, AttackOutcome, Tensor]]:
    """Yield each stage in order, its outcome, and the examples [N] it fooled in the last threat model probed.

    What fools the model at a smaller eps counts at this one.
    """
    position = len(probed) - 1
    for attack, outcome in suite_run.outcomes.items():
        yield attack, outcome, outcome.broken_at <= position
    for probe_run in probed:
        for stage, outcome in probe_run.outcomes.items():
            yield stage, outcome, outcome.broken_at == 0


def _adversarial(driver: Driver, clean: CleanPass, broken: Broken) -> Adversarial | None:
    """Return the images that fooled the model, where the driver kept them.

    Raises:
        InputError: They do not fool it now: the checkpoint was edited, or the model has changed.
    """
    if len(driver.threat_models) > 1 or driver.processes.index:
        return None
    stages = {example: by for example, by in enumerate(broken.by) if by not in ("", CLEAN)}
    index = torch.tensor(list(stages), dtype=torch.int64)
    images = driver.checkpoint.images(stages, driver.images.shape[1:])
    # Not of models that draw random numbers. Rounding on other hardware may turn an image at the boundary.
    if not clean.signals["unsteady"].any() and (wrong := driver.count_invalid(index, images)) > max(
        1, len(index) // 1000
    ):
        raise InputError(
            f"{wrong} of {len(index)} adversarial images in the checkpoint do not fool the model inside the epsilon "
            "ball. Either was changed since: delete the checkpoint to evaluate from scratch."
        )
    return Adversarial(index, images)


def suite_settings(columns: Suite) -> dict[str, dict[str, Any]]:
    """Return the settings of every attack of a suite, and the attacks of every sequence."""
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
        accuracy_at_budget=share(correct & (l2 > budget)),
    )
