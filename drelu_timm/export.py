"""`drelu-timm export`: turn an evaluated run into one folder for RobustBench, timm and the Hugging Face Hub.

    drelu-timm export runs/x --key Author2026Title_ResNet-18 --paper paper.toml
    drelu-timm export runs/x --key Author2026Title_ResNet-18 --paper paper.toml --push ORG/NAME

    CHECKS.md                                     what was checked, how, and the results
    register.py                                   lets timm and RobustBench load the model as <key>_<dataset>_<norm>
    hub/                                          timm / Hugging Face folder with the model card; --push uploads it
    weights/                                      <key>.safetensors, <key>.pt (RobustBench's state dict), SHA256SUMS
    model_info/<dataset>/<norm>/<key>.json        RobustBench's entry
    model_cards/<dataset>/<norm>/<key>.*          card for this repository, and the data that it is made from
    scripts/<dataset>/<norm>/<key>.toml           recipe, for train --config
    submission/                                   RobustBench's issue forms, AutoAttack's log, adversarial images

The folder gets its name only after the model was loaded from it and predicted the same as in the evaluation.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .attacks.threat_model import ThreatModel
from .data.images import Images, to_float
from .data.readers import load_images
from .doctor import robustbench_clashes
from .errors import InputError, one_line
from .files import (
    atomic_file,
    atomic_folder,
    held,
    json_text,
    read_json,
    read_toml,
    remove_leftovers,
    write_json,
    write_text,
)
from .flags import ExportConfig
from .hashing import sha256_of
from .models.weights import CONFIG, WEIGHTS
from .publishing.card import AUTOATTACK, SHIPPED, Card, Paper
from .publishing.card_markdown import model_card
from .publishing.evaluations import choose_evaluation, further_evaluations, make_card, open_run, with_further
from .publishing.leaderboard import (
    autoattack_log,
    card_record,
    check_entry,
    is_external,
    model_info,
    new_evaluation,
    new_model,
)
from .publishing.recipes import recipe
from .publishing.verification import EvaluatedImages, checks_page, read_evaluated, verify
from .results.plotting import draw_curve
from .results.result import Result
from .robustbench import adapt
from .runs import Run
from .schema import field_types, load_table
from .zoo.robust_models import check_name_is_free, published_sha256, register_robust_model, robust_model_name

README = "README.md"


def main(config: ExportConfig) -> None:
    """Export a run, upload it with --push, and print where the files are."""
    if config.push is not None:
        from .zoo.hub import check_name

        check_name(config.push, f"--push {config.push!r}")
    output_dir = _output_dir(config)
    if config.push is None or not output_dir.exists():
        export(config)
        print(f"wrote {output_dir}; read {output_dir / 'CHECKS.md'} first")
        print(f"  card                {output_dir / 'hub' / README}")
        for what, pattern in {"entry": "model_info/*/*/*.json", "form": "submission/*.md"}.items():
            for path in sorted(output_dir.glob(pattern)):
                print(f"  {f'RobustBench {what}':19} {path}")
    if config.push is None:
        print(f"next: the same command with --push ORG/NAME uploads {output_dir / 'hub'}")
    else:
        print(push_exported(config, config.push))


def push_exported(config: ExportConfig, repo: str) -> str:
    """Upload the hub/ of an exported folder, and name the repository in its card and in RobustBench's form.

    No file of the folder is trusted: the texts and the picture are made again from the run, and the weights are sent as
    the bytes whose sha256 was checked.

    Returns:
        Text on what was uploaded, or would be with a token.

    Raises:
        InputError: The folder is not what `export` would now write, or as `export` and `zoo.hub.push` raise.
    """
    from .zoo.hub import push

    output_dir = _output_dir(config)
    records = [*output_dir.glob("model_cards/*/*/*.json")]
    if len(records) != 1:
        raise InputError(f"--output-dir {output_dir} is not an exported folder. Pass another one or remove it.")
    card, *_ = _read(config, *_entry(config))
    exported, now = read_json(records[0]), json.loads(json.dumps(card_record(card)))
    if differing := _differing(exported, now):
        raise InputError(
            f"--output-dir {output_dir} contains a different export than this command writes now (differs in: "
            f"{', '.join(differing)}). Remove it first."
        )
    hub = output_dir / "hub"
    with _locked(output_dir):
        files = _hub_files(card, hub / WEIGHTS, source=f"hf-hub:{repo}")
        _check_unchanged(hub, files)
        commit = push(files, repo)
        if commit is not None:
            write_text(hub / README, files[README].decode())
            write_text(output_dir / "submission" / "new-model.md", new_model(card, repo))
    if commit is None:
        listed = "\n".join(f"  {name}, {len(content):,} bytes" for name, content in files.items())
        return (
            f"Dry run without a token: {len(files)} files would be uploaded to {repo} in one commit\n{listed}\n"
            "Log in with `hf auth login`, or set HF_TOKEN to a token with write access, and push again."
        )
    return f"uploaded {len(files)} files to {repo} in the commit {commit}"


def _differing(exported: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the fields in which two card records differ; those under "measured" by their own names."""
    names = [name for name in {**exported, **now} if name != "measured" and exported.get(name) != now.get(name)]
    before, after = exported.get("measured", {}), now["measured"]
    return names + [name for name in {**before, **after} if before.get(name) != after.get(name)]


def _check_unchanged(hub: Path, files: dict[str, bytes]) -> None:
    """Check that the folder has no links, no other files, and no changed files but the card, which is replaced."""
    for path in [hub, *sorted(hub.iterdir())]:
        if path.is_symlink() or (path != hub and path.name not in files):
            raise InputError(f"--push: {path} was not written by export. Remove it.")
        if path.name not in (hub.name, README) and path.read_bytes() != files[path.name]:
            raise InputError(f"--push: {path} was changed after the export. Export again.")


def export(config: ExportConfig) -> Path:
    """Write the exported folder of an evaluated run, and check that it loads and predicts as evaluated.

    Returns:
        The folder.

    Raises:
        InputError: The run is not evaluated, results are of other weights, gradients are masked without ``as_masked``,
            metadata are missing, the key or the output folder is taken, or the exported model predicts differently
            from the evaluation. Nothing is left behind.
    """
    output_dir = _output_dir(config)
    _check_is_new(output_dir)
    run, dataset, threat_model = _entry(config)
    robustbench = _robustbench_or_reason()
    _check_key_is_free(config.key, dataset, threat_model.norm, run, robustbench)
    card, evaluations, test = _read(config, run, dataset, threat_model)
    check_entry(model_info(card))
    evaluated = read_evaluated(evaluations, test)
    with _locked(output_dir):
        _check_is_new(output_dir)  # again: another process may have written it
        remove_leftovers(output_dir.parent, output_dir.name)
        with atomic_folder(output_dir) as folder:
            _write_model(folder, card, run)
            _write_submission(folder / "submission", card, evaluated)
            checks = verify(folder, card, evaluated, robustbench, config.benchmark_examples)
            write_text(folder / "CHECKS.md", checks_page(card, checks))
    digests = {"sha256": card.weights.sha256, "config_sha256": card.config_sha256}
    register_robust_model(config.key, card.dataset, card.norm, output_dir / "hub", **digests)
    return output_dir


def _output_dir(config: ExportConfig) -> Path:
    """Return the folder to write, whose name the disk must be able to have."""
    path = config.output_dir or config.run / "export" / config.key
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # ValueError: a NUL
        raise InputError(f"--output-dir {str(path)!r} cannot be used ({one_line(error)}). Pass another one.") from error
    return path


def _check_is_new(output_dir: Path) -> None:
    if os.path.lexists(output_dir):
        raise InputError(f"--output-dir {output_dir} exists already. Pass another one or remove it.")


@contextmanager
def _locked(output_dir: Path) -> Iterator[None]:
    """Hold the lock of an exported folder, and report a failed write in one line."""
    with held(output_dir.with_name(f".{output_dir.name}.lock"), f"--output-dir {output_dir}"):
        try:
            yield
        except OSError as error:
            raise InputError(
                f"--output-dir {output_dir} cannot be written ({one_line(error)}). Free space or pass another one."
            ) from error


def _entry(config: ExportConfig) -> tuple[Run, str, ThreatModel]:
    """Return the run, RobustBench's name of its dataset, and the threat model of the entry."""
    run = open_run(config.run)
    train = run.config["train"]
    threat_model = ThreatModel.parse(config.norm or train["norm"], config.eps or train["eps"])
    trained_on = train["dataset"]
    if config.dataset not in (None, trained_on) and (trained_on, config.dataset) != ("folder", "imagenet"):
        raise InputError(
            f"--dataset {config.dataset} is not what the run was trained on ({trained_on}). Only a run on a folder may "
            "be exported as imagenet."
        )
    return run, config.dataset or trained_on, threat_model


def _read(config: ExportConfig, run: Run, dataset: str, threat_model: ThreatModel) -> tuple[Card, list[Result], Images]:
    """Return the card, the evaluations that it is made from, the chosen one first, and the test images."""
    chosen = choose_evaluation(run, threat_model, config.results)
    further = further_evaluations(run, chosen)
    results = with_further(chosen, further)
    _check_exportable(config, results)
    paper = _paper(config, chosen)
    train = run.config["train"]
    size = {"img_size": run.config["img_size"], "in_chans": run.config["in_chans"]}
    test = load_images(train["dataset"], config.data_dir or train.get("data_dir"), "test", **size)
    card = make_card(run, chosen, results, key=config.key, paper=paper, other_seeds=config.seeds, test_size=len(test))
    return replace(card, results=replace(card.results, dataset=dataset)), [chosen, *further], test


# What is written


def _hub_files(card: Card, weights: Path, *, source: str) -> dict[str, bytes]:
    """Return the files of hub/, with the card for a source as of `model_card`.

    Raises:
        InputError: The weights cannot be read, or are not the evaluated ones.
    """
    try:
        content = weights.read_bytes()
    except OSError as error:
        raise InputError(f"{weights} cannot be read ({one_line(error)}). Export again.") from error
    if (found := sha256(content).hexdigest()) != card.weights.sha256:
        raise InputError(f"{weights} does not contain the evaluated weights (sha256 {found}). Export again.")
    files = {README: model_card(card, source=source).encode(), CONFIG: json_text(card.timm).encode(), WEIGHTS: content}
    if card.curve is not None:
        images = f"{card.results.dataset_title}, {card.norm}, first {card.curve.n_examples:,} test images"
        with TemporaryDirectory() as folder:
            picture = Path(folder, f"{card.key}.png")
            draw_curve(card.curve.points, picture, title=f"{card.key}\n{images}")
            files[picture.name] = picture.read_bytes()
    return files


def _write_model(folder: Path, card: Card, run: Run) -> None:
    """Write everything but submission/ and CHECKS.md."""
    hub = _hub_files(card, run.model_folder / WEIGHTS, source=".")
    place, weights = folder / "model_cards" / card.place.parent, folder / "weights"
    copies = {place / name: content for name, content in hub.items() if name.endswith(".png")}
    if card.weights.bytes <= SHIPPED:
        copies[place / f"{card.key}.safetensors"] = hub[WEIGHTS]
    copies[weights / f"{card.key}.safetensors"] = hub[WEIGHTS]
    for path, content in ({folder / "hub" / name: content for name, content in hub.items()} | copies).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    _save_tensors(run.load_model().state_dict(), weights / f"{card.key}.pt")
    names = [f"{card.key}.safetensors", f"{card.key}.pt", f"../hub/{CONFIG}"]
    write_text(weights / "SHA256SUMS", "".join(f"{sha256_of(weights / name)}  {name}\n" for name in names))
    write_json(folder / "model_info" / f"{card.place}.json", model_info(card))
    write_json(place / f"{card.key}.json", card_record(card))
    write_text(place / f"{card.key}.md", model_card(card))
    write_text(folder / card.recipe, recipe(card))
    write_text(folder / "register.py", _registration(card))


def _registration(card: Card) -> str:
    """Return register.py, which lets timm and RobustBench load the model from the folder of the file."""
    named = ", ".join(map(json.dumps, (card.key, card.dataset, card.norm)))
    return f'''\
"""Registers {card.name} with timm, and so with RobustBench.

SOURCE may also be "hf-hub:ORG/NAME" or the https:// address of hub/.
"""

from pathlib import Path

from drelu_timm import register_robust_model

SHA256 = "{card.weights.sha256}"
CONFIG_SHA256 = "{card.config_sha256}"
SOURCE = Path(__file__).parent / "hub"
register_robust_model({named}, SOURCE, sha256=SHA256, config_sha256=CONFIG_SHA256)
'''


def _write_submission(folder: Path, card: Card, evaluated: EvaluatedImages) -> None:
    """Write what is submitted to RobustBench by hand."""
    write_text(folder / "new-model.md", new_model(card, None))
    write_text(folder / "autoattack.log", autoattack_log(card.results))
    if is_external(card):
        file = f"{card.key}_adversarial.pt"
        write_text(folder / "new-external-evaluation.md", new_evaluation(card, file, evaluated.without_image))
        rest = evaluated.test.images[len(evaluated.predictions) :]
        _save_tensors(torch.cat([evaluated.worst, to_float(rest)]), folder / file)


def _save_tensors(tensors: Any, path: Path) -> None:
    with atomic_file(path) as temporary:
        try:
            torch.save(tensors, temporary)
        except RuntimeError as error:  # which torch raises where other functions raise OSError
            raise OSError(f"{path.name}: {error}") from error


# What is checked first


def _check_exportable(config: ExportConfig, results: Result) -> None:
    """Check flags, and the verdict, which RobustBench's rules ask for."""
    if config.benchmark_examples < 0:
        raise InputError(f"--benchmark-examples {config.benchmark_examples} is negative. Use 0 or more.")
    if config.n_examples is not None and results.n_examples < config.n_examples:
        raise InputError(
            f"--n-examples {config.n_examples} is more than the evaluation has ({results.n_examples}). Evaluate again "
            f"with --n-examples {config.n_examples}."
        )
    point = results.point
    masked = point.verdict.verdict == "masked"
    if masked and not config.as_masked:
        raise InputError(
            "The gradients are masked, so AutoAttack's accuracy is an overestimate. --as-masked exports the model as "
            f"unreliable, with its worst case of {100 * point.worst:.2f} %."
        )
    if config.as_masked and not masked:
        raise InputError(f"--as-masked does not match the verdict ({point.verdict}). Leave it out.")


def _paper(config: ExportConfig, results: Result) -> Paper:
    """Return the paper, from the flags and the TOML file; an error names everything that the entry lacks."""
    given = _read_paper(config.paper) if config.paper is not None else {}
    names = [field.name for field in fields(Paper)]
    given |= {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    missing = [f"--{name}" for name in names if name not in given]
    if AUTOATTACK not in results.point.accuracy:
        missing.append(f"AutoAttack's accuracy (drelu-timm evaluate {quote(str(config.run))} --suite standard)")
    if missing:
        raise InputError(f"RobustBench's entry lacks {', '.join(missing)}. --paper FILE.toml may contain all four.")
    return Paper(**given)


def _read_paper(path: Path) -> dict[str, str]:
    return load_table(field_types(Paper), read_toml(path, "--paper"), f"--paper {path}:")


def _robustbench_or_reason() -> Any:
    """Return RobustBench, or a sentence on why it cannot be used, without the paths of this machine."""
    try:
        return adapt()
    except InputError:
        clash = next(robustbench_clashes(), None)
        return "robustbench cannot be imported" if clash is None else clash.what


def _check_key_is_free(key: str, dataset: str, norm: str, run: Run, robustbench: Any) -> None:
    """Check that the key is valid, and that neither this package, timm nor RobustBench has it for another model."""
    name = robust_model_name(key, dataset, norm)
    if published_sha256(name) not in (None, run.model_digest):  # the same weights may be exported again
        raise InputError(f"--key {key!r}: drelu_timm publishes other weights as {name}. Choose another key.")
    check_name_is_free(name)
    if isinstance(robustbench, str):
        return
    enums = robustbench.model_zoo.enums
    zoo = robustbench.model_zoo.model_dicts.get(enums.BenchmarkDataset(dataset), {})
    for other in zoo.get(enums.ThreatModel(norm), {}):
        if name == robust_model_name(other, dataset, norm):
            raise InputError(f"--key {key!r} is RobustBench's model {other!r} already. Choose another key.")
