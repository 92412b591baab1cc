"""The commands that make an evaluated run again, as a shell script and for its card."""

import shlex
from dataclasses import asdict
from textwrap import wrap
from typing import Any

from ..command_line import duration, flag, written_flags
from ..launches import Launch
from ..results.result import EpsResult, Further, Result
from ..training.config import flag_defaults
from .measured import Measured, percent

_SEED = "@seed@"  # stands for the loop's variable, which must not be quoted; no key and no setting holds an @
OBJECTIVES = {"natural": "natural training", "at": "adversarial training", "trades": "TRADES", "mart": "MART"}


def training_commands(config: dict[str, Any], output_dir: str, seed: int | str | None = None) -> list[str]:
    """The commands of a training and, before it, of those it was begun from; flags at their defaults are left out.

    Args:
        config: The run's config.json.
        output_dir: The run directory; an earlier training goes beside it, as ``<output_dir>-start``.
        seed: In the place of the run's own.
    """
    train = config["train"]
    seed = train["seed"] if seed is None else seed
    before, start = [], {}
    if config.get("init_from"):
        earlier = f"{output_dir}-start"
        same = config["init_from"]["train"]["seed"] == train["seed"]
        before = training_commands(config["init_from"], earlier, seed if same else None)
        start = {"init_from": earlier}
    settings = {**train, "seed": seed, **start, "output_dir": output_dir}
    lines = [shlex.join(words) for words in written_flags(settings, flag_defaults(train["preset"]))]
    return [*before, " \\\n    ".join([f"{_program(config)} train", *lines])]


def _program(config: dict[str, Any]) -> str:
    """What stands before the verb: ``accelerate launch`` where the training was started by it."""
    launch = config.get("launch", {"num_processes": 1, "mixed_precision": "no", "device": "cpu"})
    flags = Launch(launch["num_processes"], launch["mixed_precision"], on_cpu=launch["device"] == "cpu").flags
    return shlex.join(["accelerate", "launch", *flags, "-m", "drelu_timm"] if flags else ["drelu-timm"])


def recipe(measured: Measured) -> str:
    """A shell script with the commands that make the model, its evaluations and its card again."""
    results, point, config = measured.results, measured.point, measured.config
    run, seed = f"runs/{measured.key}", config["train"]["seed"]
    seeds = [one.seed for one in measured.seeds] or [seed]
    facts = [
        f"Clean {percent(point.clean)} %, AutoAttack {percent(measured.autoattack)} %, worst case over all "
        f"attacks {percent(point.worst)} %, gradient masking: {measured.verdict}. {measured.sample}",
        f"{len(seeds)} run{'s' if len(seeds) > 1 else ''}, seed {', '.join(map(str, seeds))}; the figures are those "
        f"of seed {seed}.",
        *measured.images_needed,
        f"Training: {training_time(measured)}; {made_with(config)}.",
        f"Evaluation: {evaluation_time(point)}; {made_with(results.environment)}.",
    ]
    last = "/last" if measured.training["weights"] == "last" else ""
    each = [*training_commands(config, f"{run}/seed{_SEED}", _SEED), _evaluation(measured, f"{run}/seed{_SEED}{last}")]
    script = [
        "#!/usr/bin/env bash",
        f"# {measured.key}: {OBJECTIVES[config['train']['objective']]} on {results.dataset_title}, evaluated for "
        f"{measured.threat_model}.",
        "#",
        *(f"# {line}" for fact in facts for line in wrap(fact, 118)),
        "set -euo pipefail",
        "",
        f"for seed in {' '.join(map(str, seeds))}; do",
        *("    " + line for command in each for line in command.replace(_SEED, "$seed").splitlines()),
        "done",
        *_further(measured, f"{run}/seed{seed}{last}"),
        *_sweep(measured, f"{run}/seed{seed}{last}"),
        _export(measured, f"{run}/seed{seed}{last}", [f"{run}/seed{other}{last}" for other in seeds if other != seed]),
    ]
    return "\n".join(script) + "\n"


def _evaluation(measured: Measured, run: str) -> str:
    results = measured.results
    return shlex.join(["drelu-timm", "evaluate", run, *_threat_model(measured), *_attacked(results)])


def _further(measured: Measured, run: str) -> list[str]:
    """The commands of the other evaluations in the worst case, but for that of the curve."""
    norm, curve = measured.norm, measured.curve
    commands = [_at_radii(run, norm, one) for one in measured.results.further]
    return [command for command in commands if curve is None or command != _at_radii(run, norm, curve)]


def _sweep(measured: Measured, run: str) -> list[str]:
    curve = measured.curve
    return [] if curve is None else [_at_radii(run, curve.norm, curve)]


def _at_radii(run: str, norm: str, results: Result | Further) -> str:
    radii = results.eps if isinstance(results.eps, str) else ",".join(results.eps)
    return shlex.join(["drelu-timm", "evaluate", run, "--norm", norm, "--eps", radii, *_attacked(results)])


def _threat_model(measured: Measured) -> list[str]:
    """The flags for norm and eps, where they are not those of the training."""
    train, norm, eps = measured.config["train"], measured.norm, measured.point.eps
    return [] if (train["norm"], train["eps"]) == (norm, eps) else ["--norm", norm, "--eps", eps]


def _attacked(results: Result | Further) -> list[str]:
    """The flags of an evaluation beside run, norm and eps, less those at their defaults."""
    words = ["--suite", results.suite, "--n-examples", str(results.n_examples)]
    for name, default in {"precision": "float32", "transfer_from": None, "seed": 0}.items():
        if (value := getattr(results, name)) != default:
            words += [flag(name), str(value)]
    return words


def _export(measured: Measured, run: str, others: list[str]) -> str:
    words = ["drelu-timm", "export", run, "--key", measured.key, *_threat_model(measured)]
    if measured.dataset != measured.config["train"]["dataset"]:
        words += ["--dataset", measured.dataset]
    for name, text in asdict(measured.paper).items():
        words += [flag(name), text]
    if measured.verdict == "masked":
        words.append("--as-masked")
    if others:
        words += ["--seeds", *others]
    return shlex.join(words)


def made_with(environment: dict[str, Any]) -> str:
    """Versions, revision and hardware, of a run's config or a result."""
    versions = ", ".join(f"{package} {version}" for package, version in environment["versions"].items())
    revision = environment.get("git_revision")
    return f"{versions}" + (f", this repository at {revision}" if revision else "") + f" on {environment['hardware']}"


def evaluation_time(point: EpsResult) -> str:
    """How long it took; where it was stopped and resumed, its last part alone."""
    one_by_one = {*point.settings} - {*point.sequences}  # a sequence's time is that of its attacks
    last_part = " for its last part, as it was stopped and went on" if one_by_one - {*point.attack_seconds} else ""
    return duration(point.seconds) + last_part


def training_time(measured: Measured) -> str:
    """How long it took; where it was begun from another training, of the last one alone."""
    count = len(measured.trainings)
    return duration(measured.training["seconds"]) + (f" for the last of its {count} trainings" if count > 1 else "")
