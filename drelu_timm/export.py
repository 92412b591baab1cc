"""`drelu-timm export`: an evaluated run becomes one folder that RobustBench, timm and the Hugging Face Hub take.

    drelu-timm export runs/x --key Author2026Title_ResNet-18 --paper paper.toml
    drelu-timm export runs/x --key Author2026Title_ResNet-18 --paper paper.toml --push ORG/NAME

    CHECKS.md                                     what was verified of all this, how, and with what result
    register.py                                   lets timm and RobustBench load the model as <key>_<dataset>_<threat>
    hub/                                          the timm / Hugging Face folder with the model card: --push uploads it
    weights/                                      <key>.safetensors, <key>.pt (RobustBench's state dict), SHA256SUMS
    model_info/<dataset>/<threat>/<key>.json      RobustBench's entry
    model_cards/<dataset>/<threat>/<key>.*        the card as this project keeps it, with what it is made from
    scripts/<dataset>/<threat>/<key>.toml         the recipe that makes all of it again, for train --config
    submission/                                   RobustBench's issue forms, AutoAttack's log, adversarial images

The folder appears only after the model was loaded from it and predicted what the evaluation had written down.
"""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from shlex import quote
from typing import Any

from .attacks.threat_model import ThreatModel
from .data.images import Images
from .data.readers import load_images
from .errors import InputError
from .files import read_json, read_toml, write_text
from .flags import ExportConfig
from .publishing.cards import model_card
from .publishing.entries import card_record, check_entry, model_info
from .publishing.folder import whole_or_not_at_all, write_model, write_submission
from .publishing.measured import AUTOATTACK, Measured, Paper
from .publishing.records import choose_results, further_evaluations, measured_run, with_further
from .publishing.submission import new_model
from .publishing.verification import checks_page, read_evaluated, verify
from .results.result import Result
from .robustbench import adapt
from .runs import Run
from .schema import field_types, load_table
from .zoo.published import published_sha256
from .zoo.robust_models import check_name_is_free, register_robust_model, robust_model_name


def main(config: ExportConfig) -> None:
    """Export a run, upload it if asked to, and print where the files are."""
    if config.push is not None:
        _check_repository(config.push)
    output_dir = _output_dir(config)
    if config.push is None or not output_dir.exists():
        export(config)
        _say(output_dir)
    if config.push is None:
        print(f"next: the same command with --push ORG/NAME uploads {output_dir / 'hub'}")
    else:
        print(push_exported(config, config.push))


def _say(output_dir: Path) -> None:
    (entry,) = output_dir.glob("model_info/*/*/*.json")
    forms = ", ".join(map(str, sorted((output_dir / "submission").glob("*.md"))))
    print(f"wrote {output_dir}; read {output_dir / 'CHECKS.md'} first")
    print(f"  card                 {output_dir / 'hub' / 'README.md'}")
    print(f"  RobustBench's entry  {entry}")
    print(f"  RobustBench's forms  {forms}")


def push_exported(config: ExportConfig, repo: str) -> str:
    """Upload the hub/ of an exported folder, its card and RobustBench's form now naming the repository.

    Returns:
        What was done, or would be done with a token.

    Raises:
        InputError: A folder that is not what `export` would make of the run now, what `export` raises, or what
            `zoo.hub.push` does.
    """
    from .zoo.hub import push

    output_dir = _output_dir(config)
    records = [*output_dir.glob("model_cards/*/*/*.json")]
    if len(records) != 1:
        raise InputError(f"--output-dir {output_dir} is no exported folder; give another one or remove it")
    measured = _subject(config, *_entry(config)).measured
    exported, now = read_json(records[0]), json.loads(json.dumps(card_record(measured)))
    if differing := _differing(exported, now):
        raise InputError(
            f"--output-dir {output_dir} holds another export than this command makes now (other: "
            f"{', '.join(differing)}); remove it first"
        )
    card = output_dir / "hub" / "README.md"
    before = card.read_text()
    write_text(card, model_card(measured, source=f"hf-hub:{repo}"))
    there = False
    try:
        pushed = push(output_dir / "hub", repo)
        there = pushed.commit is not None
    finally:
        if not there:  # what is not there must not be named
            write_text(card, before)
    if there:
        write_text(output_dir / "submission" / "new-model.md", new_model(measured, repo))
    return str(pushed)


def _check_repository(repo: str) -> None:
    from .zoo.hub import check_name

    check_name(repo, f"--push {repo!r}")


def _output_dir(config: ExportConfig) -> Path:
    return config.output_dir or config.run / "export" / config.key


def _differing(exported: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The fields of two card records that differ, those of what was measured by name."""
    fields_ = [name for name in {**exported, **now} if name != "measured" and exported.get(name) != now.get(name)]
    before, after = exported.get("measured", {}), now["measured"]
    return fields_ + [name for name in {**before, **after} if before.get(name) != after.get(name)]


@dataclass(frozen=True)
class _Subject:
    """What is to be exported: all that was measured of it, the evaluations that it comes from, and the test images."""

    measured: Measured
    chosen: Result
    further: list[Result]
    test: Images


def export(config: ExportConfig) -> Path:
    """Write the exported folder of an evaluated run, and check that it loads and predicts as evaluated.

    Returns:
        The folder.

    Raises:
        InputError: No evaluated run, results of other weights, masked gradients without ``as_masked``, missing
            metadata, a key or an output folder that is taken, or a folder that does not predict what the evaluation
            did. Nothing is left behind.
    """
    output_dir = _output_dir(config)
    if output_dir.exists():
        raise InputError(f"--output-dir {output_dir} exists already; give another one or remove it")
    run, dataset, threat_model = _entry(config)
    robustbench = _robustbench_or_reason()
    _check_key_is_free(config.key, dataset, threat_model.norm, run, robustbench)
    subject = _subject(config, run, dataset, threat_model)
    measured = subject.measured
    check_entry(model_info(measured))
    evaluated = read_evaluated(subject.chosen, subject.further, subject.test)
    with whole_or_not_at_all(output_dir) as folder:
        write_model(folder, measured, run)
        write_submission(folder, measured, subject.test, evaluated)
        checks = verify(folder, measured, evaluated, robustbench, config.benchmark_examples)
        write_text(folder / "CHECKS.md", checks_page(measured, checks))
    register_robust_model(
        config.key,
        measured.dataset,
        measured.norm,
        output_dir / "hub",
        sha256=measured.weights.sha256,
        config_sha256=measured.config_sha256,
    )
    return output_dir


def _entry(config: ExportConfig) -> tuple[Run, str, ThreatModel]:
    """The run, and where its entry belongs: RobustBench's name of the dataset, and the threat model."""
    run = Run.open(config.run)
    train = run.config["train"]
    threat_model = ThreatModel.parse(config.norm or train["norm"], config.eps or train["eps"])
    return run, _dataset(config, train["dataset"]), threat_model


def _subject(config: ExportConfig, run: Run, dataset: str, threat_model: ThreatModel) -> _Subject:
    """Gather what is to be exported, and check that it may be."""
    chosen = choose_results(run, threat_model, config.results)
    further = further_evaluations(run, chosen)
    results = with_further(chosen, further)
    _check_exportable(config, results)
    paper = _paper(config, chosen)
    test = _test_images(run, config.data_dir)
    measured = measured_run(
        run, chosen, results, key=config.key, paper=paper, other_seeds=config.seeds, test_size=len(test)
    )
    measured = replace(measured, results=replace(measured.results, dataset=dataset))
    return _Subject(measured, chosen, further, test)


# What may be exported


def _dataset(config: ExportConfig, trained_on: str) -> str:
    """As RobustBench calls what a run was trained on."""
    if config.dataset not in (None, trained_on) and (trained_on, config.dataset) != ("folder", "imagenet"):
        raise InputError(
            f"--dataset {config.dataset}: the run was trained on {trained_on}; only a folder may stand for imagenet"
        )
    return config.dataset or trained_on


def _check_exportable(config: ExportConfig, results: Result) -> None:
    """Raise what RobustBench's rules, or the flags, do not allow."""
    if config.benchmark_examples < 0:
        raise InputError(f"--benchmark-examples {config.benchmark_examples} must be 0 or more")
    if config.n_examples is not None and results.n_examples < config.n_examples:
        raise InputError(
            f"--n-examples {config.n_examples}: the evaluation has {results.n_examples}; evaluate anew, with "
            f"--n-examples {config.n_examples}"
        )
    point = results.point
    masked = point.verdict.verdict == "masked"
    if masked and not config.as_masked:
        raise InputError(
            "the verdict on gradient masking is masked, so AutoAttack's number does not hold; --as-masked exports the "
            f"model as unreliable, with its worst case of {100 * point.worst:.2f} %"
        )
    if config.as_masked and not masked:
        raise InputError(f"--as-masked: the verdict is {point.verdict}; leave the flag out")


def _paper(config: ExportConfig, results: Result) -> Paper:
    """The metadata of the paper, from the flags and the TOML file; whatever is missing for an entry is said at once."""
    given = _read_paper(config.paper) if config.paper is not None else {}
    names = [field.name for field in fields(Paper)]
    given |= {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    missing = [f"--{name}" for name in names if name not in given]
    if AUTOATTACK not in results.point.accuracy:
        missing.append(f"AutoAttack's accuracy (drelu-timm evaluate {quote(str(config.run))} --suite standard)")
    if missing:
        raise InputError(
            f"RobustBench's entry lacks {', '.join(missing)}; --paper FILE.toml may hold title, authors, link and venue"
        )
    return Paper(**given)


def _read_paper(path: Path) -> dict[str, str]:
    return load_table(field_types(Paper), read_toml(path, "--paper"), f"--paper {path}:")


def _test_images(run: Run, data_dir: Path | None) -> Images:
    train = run.config["train"]
    size = {"img_size": run.config["img_size"], "in_chans": run.config["in_chans"]}
    return load_images(train["dataset"], data_dir or train["data_dir"], "test", **size)


# What is checked


def _robustbench_or_reason() -> Any:
    """RobustBench, or a sentence on why it cannot be used."""
    try:
        return adapt()
    except InputError as error:
        return str(error).partition("; mend it with")[0]  # a command for this machine only


def _check_key_is_free(key: str, dataset: str, norm: str, run: Run, robustbench: Any) -> None:
    """Raise what is no key, or is one that this package has for other weights, or timm or RobustBench in any case."""
    name = robust_model_name(key, dataset, norm)
    if published_sha256(name) not in (None, run.model_digest):  # the same weights may be exported again
        raise InputError(f"--key {key!r}: drelu_timm publishes other weights as {name}; choose another key")
    check_name_is_free(name)
    if isinstance(robustbench, str):
        return
    enums = robustbench.model_zoo.enums
    zoo = robustbench.model_zoo.model_dicts.get(enums.BenchmarkDataset(dataset), {})
    for other in zoo.get(enums.ThreatModel(norm), {}):
        if name == robust_model_name(other, dataset, norm):
            raise InputError(f"--key {key!r}: RobustBench has a model {other!r} already; choose another key")
