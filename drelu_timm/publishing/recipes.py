"""The recipe of a published model: a TOML file that trains it, evaluates it and makes its card again."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from textwrap import wrap
from typing import Any

import tomli_w

from ..command_line import duration, written_flags
from ..launch import Launch
from ..results.result import EpsResult, Further, Result
from ..training.config import flag_defaults, given_settings
from .measured import Measured, percent

OBJECTIVES = {"natural": "natural training", "at": "adversarial training", "trades": "TRADES", "mart": "MART"}
_EVALUATION_DEFAULTS = {"precision": "float32", "transfer_from": None, "seed": 0}

Table = dict[str, Any]


def recipe(measured: Measured) -> str:
    """Return the TOML file whose tables make the model, its evaluations and its card again, with the commands."""
    evaluations, export = _evaluations(measured), _export(measured)
    lines = [*_facts(measured), "", *_commands(measured, evaluations, export)]
    comment = "\n".join(f"# {line}".rstrip() for line in map(_printable, lines))
    tables = [train_tables(measured), *(_table("[[evaluate]]", one) for one in evaluations), _table("[export]", export)]
    return "\n\n".join([comment, *(table.rstrip("\n") for table in tables)]) + "\n"


def train_tables(measured: Measured) -> str:
    """Return the part of the recipe that `train --config` reads: [train], or [[train]] for each of its trainings."""
    trainings = [_settings(one["train"]) for one in reversed(measured.trainings)]
    trainings[-1]["output_dir"] = _run(measured)
    header = "[train]" if len(trainings) == 1 else "[[train]]"
    return "\n".join(_table(header, one) for one in trainings)


def train_command(measured: Measured, file: str) -> str:
    """Return the command that trains what `train_tables` says, as the last of its trainings was launched."""
    return shlex.join([*_program(measured.config), "train", "--config", file])


def _settings(train: Table) -> Table:
    """The settings of a training that are not at their defaults; the names of its table and of the flags."""
    train = given_settings(train)
    defaults = flag_defaults(train.get("preset"))
    if any(value is None and defaults.get(name) is not None for name, value in train.items() if name != "preset"):
        train, defaults = {**train, "preset": None}, flag_defaults(None)  # TOML has no null to put over the preset's
    return {name: value for name, value in train.items() if value not in (None, []) and value != defaults.get(name)}


def _program(config: Table) -> list[str]:
    """The words before the verb: ``accelerate launch`` where the training was started by it."""
    launch = config.get("launch", {"num_processes": 1, "mixed_precision": "no", "device": "cpu"})
    flags = Launch(launch["num_processes"], launch["mixed_precision"], on_cpu=launch["device"] == "cpu").flags
    return ["accelerate", "launch", *flags, "-m", "drelu_timm"] if flags else ["drelu-timm"]


def _run(measured: Measured, seed: Any = None) -> str:
    """The run directory of a seed, by default of the model's own."""
    return f"runs/{measured.key}/seed{measured.config['train']['seed'] if seed is None else seed}"


def _weights(measured: Measured, seed: Any = None) -> str:
    """The run whose weights are evaluated: RUN, or RUN/last."""
    return _run(measured, seed) + ("/last" if measured.training["weights"] == "last" else "")


def _other_seeds(measured: Measured) -> list[Any]:
    return [one.seed for one in measured.seeds if one.seed != measured.config["train"]["seed"]]


def _facts(measured: Measured) -> list[str]:
    """What the figures are, and what they were measured with, in lines of a comment."""
    results, point, config = measured.results, measured.point, measured.config
    seed, seeds = config["train"]["seed"], [one.seed for one in measured.seeds]
    facts = [
        f"Clean {percent(point.clean)} %, AutoAttack {percent(measured.autoattack)} %, worst case over all "
        f"attacks {percent(point.worst)} %, gradient masking: {measured.verdict}. {measured.sample}",
        f"{len(seeds) or 1} run{'s' if len(seeds) > 1 else ''}, seed {', '.join(map(str, seeds or [seed]))}; the "
        f"figures are those of seed {seed}.",
        *measured.images_needed,
        f"Training: {training_time(measured)}; {made_with(config)}.",
        f"Evaluation: {evaluation_time(point)}; {made_with(results.environment)}.",
        *_other_launches(measured),
    ]
    title = (
        f"{measured.key}: {OBJECTIVES[config['train']['objective']]} on {results.dataset_title}, evaluated for "
        f"{measured.threat_model}."
    )
    return [title, "", *(line for fact in facts for line in wrap(fact, 118))]


def _other_launches(measured: Measured) -> list[str]:
    """A sentence on each earlier training that was launched in another way than the last one."""
    *earlier, last = map(_program, reversed(measured.trainings))
    return [
        f"Training {number} of {len(earlier) + 1} was launched by `{shlex.join(program)}`."
        for number, program in enumerate(earlier, start=1)
        if program != last
    ]


def _commands(measured: Measured, evaluations: Sequence[Table], export: Table) -> list[str]:
    """The commands that do what the tables say, from the root of this repository."""
    train = train_command(measured, measured.recipe)
    return [
        "The commands, from the root of this repository; the tables [[evaluate]] and [export] hold their flags:",
        "",
        train,
        *(
            f"{train} {shlex.join(['--seed', str(s), '--output-dir', _run(measured, s)])}"
            for s in _other_seeds(measured)
        ),
        *(_command("evaluate", one) for one in evaluations),
        _command("export", export),
    ]


def _command(verb: str, table: Table) -> str:
    flags = written_flags({name: value for name, value in table.items() if name != "run"}, {})
    return shlex.join(["drelu-timm", verb, table["run"], *chain.from_iterable(flags)])


def _evaluations(measured: Measured) -> list[Table]:
    """The evaluation of each seed, the others in the worst case, and that of the curve."""
    results, curve, norm = measured.results, measured.curve, measured.norm
    run, seeds = _weights(measured), [None, *_other_seeds(measured)]
    tables = [{"run": _weights(measured, seed), **_threat_model(measured), **_attacked(results)} for seed in seeds]
    further = [_at_radii(run, norm, one) for one in results.further]
    at_curve = [] if curve is None else [_at_radii(run, curve.norm, curve)]
    return [*tables, *(one for one in further if one not in at_curve), *at_curve]


def _at_radii(run: str, norm: str, results: Result | Further) -> Table:
    eps = results.eps
    return {"run": run, "norm": norm, "eps": eps if isinstance(eps, str) else ",".join(eps), **_attacked(results)}


def _threat_model(measured: Measured) -> Table:
    """Norm and eps, where they are not those of the training."""
    train, asked = measured.config["train"], {"norm": measured.norm, "eps": measured.point.eps}
    return {} if asked == {name: train[name] for name in asked} else asked


def _attacked(results: Result | Further) -> Table:
    """The settings of an evaluation in addition to run, norm and eps, less those at their defaults."""
    others = {name: getattr(results, name) for name in _EVALUATION_DEFAULTS}
    given = {name: value for name, value in others.items() if value != _EVALUATION_DEFAULTS[name]}
    return {"suite": results.suite, "n_examples": results.n_examples, **given}


def _export(measured: Measured) -> Table:
    table = {"run": _weights(measured), "key": measured.key, **_threat_model(measured)}
    if measured.dataset != measured.config["train"]["dataset"]:
        table["dataset"] = measured.dataset
    table |= asdict(measured.paper)
    if measured.verdict == "masked":
        table["as_masked"] = True
    if others := _other_seeds(measured):
        table["seeds"] = [_weights(measured, seed) for seed in others]
    return table


def _table(header: str, settings: Table) -> str:
    return f"{header}\n{tomli_w.dumps(settings)}"


def _printable(line: str) -> str:
    """A line without what would end a comment: a value of a foreign run may hold line breaks."""
    return "".join(character if character.isprintable() else " " for character in line)


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
