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
from ..attacks.threat_model import ThreatModel, parse_threat_models
from ..errors import DReLUWarning, InputError
from ..hashing import digest
from ..results.examples import Adversarial, Broken, Rows, share
from ..results.result import CarliniWagner, EpsResult, Verdict
from .checkpoint import Checkpoint
from .checks import channels_hint, check_labels, checked
from .driver import AttackOutcome, Driver, example_seed
from .processes import Processes
from .stages import CLEAN, CleanPass, ProbeRun, SuiteRun, run_clean, run_probes, run_suite
from .torch_state import Defaults, evaluation_state
from .user_model import AnyModel, UserModel, opened


@dataclass(frozen=True, kw_only=True)
class Evaluation(EpsResult):
    """Result of a model in one threat model, with its rows per example and its adversarial images.

    Attributes:
        threat_model: The one it was attacked in.
        suite: Name of the suite.
        seed: Keys all randomness.
        rows: What was found on each example.
        adversarial: The images that fooled the model; None of a sweep, and in all processes but the first.
        model_dtype: Of the model's weights, such as "float32"; images and logits are float32 whatever it is.
    """

    threat_model: ThreatModel
    suite: str
    seed: int
    rows: Rows = field(repr=False)
    adversarial: Adversarial | None = field(repr=False)
    model_dtype: str = "float32"

    @property
    def labels(self) -> Tensor:
        """Labels [N]."""
        return self.rows.labels

    @property
    def predictions(self) -> Tensor:
        """Classes [N] of the clean images."""
        return self.rows.predictions

    @property
    def robust(self) -> dict[str, Tensor]:
        """For each attack, on which examples [N] the model stayed right."""
        return self.rows.robust

    @property
    def survivors(self) -> Tensor:
        """On which examples [N] neither an attack of the suite nor a probe for masking fooled the model."""
        return self.rows.survivors

    @property
    def broken(self) -> Broken:
        """What fooled the model on each example first."""
        assert self.rows.broken is not None
        return self.rows.broken


SEARCH_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    state: Path | str | None = None,
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
    (evaluation,) = evaluate_under(
        parse_threat_models(norm, [eps]),
        model,
        images,
        labels,
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
    state: Path | str | None = None,
) -> list[Evaluation]:
    """Evaluate a model as `evaluate_model` does at several radii at once.

    An image that fools the model at one eps counts at every larger eps and is not attacked again, so that accuracies
    can only fall. Attacks with a starting point start where they ended at the eps before.

    Args:
        model: See `evaluate_model`, as for all other arguments.
        images: [N, C, H, W].
        labels: [N].
        eps: Radii, in any order.
        norm: "Linf" or "L2".
        suite: Name of the suite.
        seed: Keys all randomness.
        batch_size: Images per pass, at most.
        search_dtype: dtype of the search.
        transfer_from: A second model.
        state: Folder of the checkpoint.

    Returns:
        One evaluation per radius, from the smallest.

    Raises:
        InputError: See `evaluate_model`.
    """
    return evaluate_under(
        parse_threat_models(norm, eps),
        model,
        images,
        labels,
        suite=suite,
        seed=seed,
        batch_size=batch_size,
        search_dtype=search_dtype,
        transfer_from=transfer_from,
        state=state,
    )


def evaluate_under(
    threat_models: Sequence[ThreatModel],
    model: AnyModel,
    images: Tensor,
    labels: Tensor,
    *,
    suite: str,
    seed: int,
    batch_size: int,
    search_dtype: torch.dtype,
    transfer_from: AnyModel | None,
    state: Path | str | None,
    processes: Processes | None = None,
) -> list[Evaluation]:
    """Evaluate a model under parsed threat models of one norm, from the smallest eps; see `evaluate_sweep`.

    ``processes`` share the work: each of them makes the same call.
    """
    started = time.monotonic()
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"--batch-size {batch_size} is not possible; give 1 or more, a whole number")
    if search_dtype not in SEARCH_DTYPES:
        raise InputError(
            f"search_dtype {search_dtype!r} is not possible; give one of {', '.join(map(str, SEARCH_DTYPES))}"
        )
    state = None if state is None else Path(state)
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
        nothing = Checkpoint(len(labels))
        driver = Driver(user_model, images, labels, threat_models, seed, batch_size, nothing, search_dtype, processes)
        identity = _identity(driver, user_model, suite, columns)
        driver = replace(driver, checkpoint=Checkpoint(len(labels), state, identity))
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
    """Return everything that decides what is measured."""
    return {
        "model": model.digest,
        "images": digest([driver.images, driver.labels]),
        "outputs": digest([], json.dumps(model.fingerprint)),
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
        adversarial=_adversarial(driver, broken),
        eps=threat_model.written,
        settings=_settings(columns),
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


def _breaks(suite_run: SuiteRun, probed: Sequence[ProbeRun]) -> Iterator[tuple[str, AttackOutcome, Tensor]]:
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
    images = driver.checkpoint.images(stages, driver.images.shape[1:])
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
        accuracy_at_budget=share(correct & (l2 > budget)),
    )
