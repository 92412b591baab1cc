"""Recipe of a published model: a TOML file with its training, evaluations and export, and the commands."""

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
from .card import Card, percent

OBJECTIVES = {
    "natural": "natural training",
    "at": "adversarial training",
    "trades": "TRADES",
    "mart": "MART",
    "n-fgsm": "N-FGSM",
    "ibp": "interval bound propagation",
}
_EVALUATION_DEFAULTS = {"precision": "float32", "transfer_from": None, "seed": 0}

Table = dict[str, Any]


def recipe(card: Card) -> str:
    """Return the TOML file that repeats the training, evaluations and export of a model."""
    evaluations, export = _evaluations(card), _export(card)
    lines = [*_facts(card), "", *_commands(card, evaluations, export)]
    comment = "\n".join(f"# {line}".rstrip() for line in map(_printable, lines))
    tables = [train_tables(card), *(_table("[[evaluate]]", one) for one in evaluations), _table("[export]", export)]
    return "\n\n".join([comment, *(table.rstrip("\n") for table in tables)]) + "\n"


def train_tables(card: Card) -> str:
    """Return the tables that `train --config` reads: [train], or several [[train]] if a model was trained in stages."""
    trainings = [_settings(one["train"]) for one in reversed(card.trainings)]
    trainings[-1]["output_dir"] = _run(card)
    header = "[train]" if len(trainings) == 1 else "[[train]]"
    return "\n".join(_table(header, one) for one in trainings)


def train_command(card: Card, file: str) -> str:
    """Return the command that trains from a file of `train_tables`, launched like the last training."""
    return shlex.join([*_program(card.config), "train", "--config", file])


def _settings(train: Table) -> Table:
    """Return the settings of a training that differ from their defaults."""
    train = given_settings(train)
    defaults = flag_defaults(train.get("preset"))
    if any(value is None and defaults.get(name) is not None for name, value in train.items() if name != "preset"):
        train, defaults = (
            {**train, "preset": None},
            flag_defaults(None),
        )  # TOML has no null to override a value of the preset
    return {name: value for name, value in train.items() if value not in (None, []) and value != defaults.get(name)}


def _program(config: Table) -> list[str]:
    """Return the words before the verb, with ``accelerate launch`` if it started the training."""
    launch = config.get("launch", {"num_processes": 1, "mixed_precision": "no", "device": "cpu"})
    flags = Launch(launch["num_processes"], launch["mixed_precision"], on_cpu=launch["device"] == "cpu").flags
    return ["accelerate", "launch", *flags, "-m", "drelu_timm"] if flags else ["drelu-timm"]


def _run(card: Card, seed: Any = None) -> str:
    """Return the run directory of a seed, by default the model's."""
    return f"runs/{card.key}/seed{card.config['train']['seed'] if seed is None else seed}"


def _weights(card: Card, seed: Any = None) -> str:
    """Return the run whose weights are evaluated: RUN, or RUN/last."""
    return _run(card, seed) + ("/last" if card.training["weights"] == "last" else "")


def _other_seeds(card: Card) -> list[Any]:
    return [one.seed for one in card.seeds if one.seed != card.config["train"]["seed"]]


def _facts(card: Card) -> list[str]:
    """Return the lines of a comment on the results and on the hardware and versions."""
    results, point, config = card.results, card.point, card.config
    seed, seeds = config["train"]["seed"], [one.seed for one in card.seeds]
    facts = [
        f"Clean {percent(point.clean)} %, AutoAttack {percent(card.autoattack)} %, worst case over all "
        f"attacks {percent(point.worst)} %, gradient masking: {card.verdict}. {card.sample}",
        f"Seeds: {', '.join(map(str, seeds))}; these are the results of seed {seed}." if seeds else f"Seed: {seed}.",
        *card.data_note,
        f"Training: {training_time(card)}; {made_with(config)}.",
        f"Evaluation: {evaluation_time(point)}; {made_with(results.environment)}.",
        *_other_launches(card),
    ]
    title = (
        f"{card.key}: {OBJECTIVES[config['train']['objective']]} on {results.dataset_title}, evaluated for "
        f"{card.threat_model}."
    )
    return [title, "", *(line for fact in facts for line in wrap(fact, 118))]


def _other_launches(card: Card) -> list[str]:
    """Return a sentence on each earlier training that was launched differently from the last one."""
    *earlier, last = map(_program, reversed(card.trainings))
    return [
        f"Training {number} of {len(earlier) + 1} was launched by `{shlex.join(program)}`."
        for number, program in enumerate(earlier, start=1)
        if program != last
    ]


def _commands(card: Card, evaluations: Sequence[Table], export: Table) -> list[str]:
    """Return the commands that are equivalent to the tables, for the root of this repository."""
    train = train_command(card, card.recipe)
    return [
        "Commands, from the root of this repository. The tables [[evaluate]] and [export] hold the same flags:",
        "",
        train,
        *(f"{train} {shlex.join(['--seed', str(s), '--output-dir', _run(card, s)])}" for s in _other_seeds(card)),
        *(_command("evaluate", one) for one in evaluations),
        _command("export", export),
    ]


def _command(verb: str, table: Table) -> str:
    flags = written_flags({name: value for name, value in table.items() if name != "run"}, {})
    return shlex.join(["drelu-timm", verb, table["run"], *chain.from_iterable(flags)])


def _evaluations(card: Card) -> list[Table]:
    """Return the tables of the evaluations: of each seed, the others in the worst case, and the sweep."""
    results, curve, norm = card.results, card.curve, card.norm
    run, seeds = _weights(card), [None, *_other_seeds(card)]
    tables = [{"run": _weights(card, seed), **_threat_model(card), **_attacked(results)} for seed in seeds]
    further = [_at_radii(run, norm, one) for one in results.further]
    at_curve = [] if curve is None else [_at_radii(run, curve.norm, curve)]
    return [*tables, *(one for one in further if one not in at_curve), *at_curve]


def _at_radii(run: str, norm: str, results: Result | Further) -> Table:
    eps = results.eps
    return {"run": run, "norm": norm, "eps": eps if isinstance(eps, str) else ",".join(eps), **_attacked(results)}


def _threat_model(card: Card) -> Table:
    """Return norm and eps if they differ from the training's."""
    train, asked = card.config["train"], {"norm": card.norm, "eps": card.point.eps}
    return {} if asked == {name: train[name] for name in asked} else asked


def _attacked(results: Result | Further) -> Table:
    """Return the settings of an evaluation, except run, norm, eps and those at their defaults."""
    others = {name: getattr(results, name) for name in _EVALUATION_DEFAULTS}
    given = {name: value for name, value in others.items() if value != _EVALUATION_DEFAULTS[name]}
    return {"suite": results.suite, "n_examples": results.n_examples, **given}


def _export(card: Card) -> Table:
    table = {"run": _weights(card), "key": card.key, **_threat_model(card)}
    if card.dataset != card.config["train"]["dataset"]:
        table["dataset"] = card.dataset
    table |= asdict(card.paper)
    if card.verdict == "masked":
        table["as_masked"] = True
    if others := _other_seeds(card):
        table["seeds"] = [_weights(card, seed) for seed in others]
    return table


def _table(header: str, settings: Table) -> str:
    return f"{header}\n{tomli_w.dumps(settings)}"


def _printable(line: str) -> str:
    """Replace what would end a comment: a value of a foreign run may contain line breaks."""
    return "".join(character if character.isprintable() else " " for character in line)


def made_with(environment: dict[str, Any]) -> str:
    """Format the versions, revision and hardware of a run's config or of a result."""
    versions = ", ".join(f"{package} {version}" for package, version in environment["versions"].items())
    revision = environment.get("git_revision")
    return f"{versions}" + (f", this repository at {revision}" if revision else "") + f" on {environment['hardware']}"


def evaluation_time(point: EpsResult) -> str:
    """Format the time of an evaluation; of one that was resumed, the time since then."""
    one_by_one = {*point.settings} - {*point.sequences}  # a sequence takes the time of its attacks
    last_part = " since it was resumed" if one_by_one - {*point.attack_seconds} else ""
    return duration(point.seconds) + last_part


def training_time(card: Card) -> str:
    """Format the time of a training; of several in sequence, of the last one."""
    count = len(card.trainings)
    return duration(card.training["seconds"]) + (f" for the last of its {count} trainings" if count > 1 else "")
