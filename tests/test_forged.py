"""Export and push refuse changed files by name, and leave nothing behind when a disk refuses them."""

import csv
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from drelu_timm.data.images import to_float
from drelu_timm.data.readers import load_images
from drelu_timm.errors import InputError
from drelu_timm.export import _save_tensors, export, push_exported
from drelu_timm.flags import ExportConfig
from drelu_timm.hashing import sha256_of

KEY = "Tester2026Forged_dense"
RESULTS = "standard-Linf-0.1"
TEST = load_images("digits", None, "test")
PAPER = {"title": "A Title", "authors": "A. One", "link": "https://example.org", "venue": "ICLR 2026"}


@pytest.fixture
def run(evaluated, tmp_path):
    """Copy of an evaluated run that a test may change."""
    return Path(shutil.copytree(evaluated, tmp_path / "run", ignore=shutil.ignore_patterns("export")))


@pytest.fixture(scope="module")
def exported(evaluated, tmp_path_factory) -> Path:
    return export(settings(evaluated, tmp_path_factory.mktemp("exports") / "exported"))


def settings(run: Path, output_dir: Path, **changes) -> ExportConfig:
    return ExportConfig(run, KEY, output_dir=output_dir, **{**PAPER, "benchmark_examples": 0, **changes})


# Results


def edit_result(run: Path, change: Callable[[dict], Any], *, sealed: bool = False) -> None:
    path = run / "results" / f"{RESULTS}.json"
    content = json.loads(path.read_text())
    change(content)
    if not sealed:
        content.pop("seal")
    path.write_text(json.dumps(content))


def edit_rows(run: Path, change: Callable[[list[dict[str, str]]], Any]) -> None:
    path = run / "results" / f"{RESULTS}.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    change(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def call_broken_robust(run: Path) -> str:
    """Call four images robust in the rows and in the result, on which attacks fooled the model."""

    def change_rows(rows):
        for row in [row for row in rows if row["broken_by"] not in ("", "clean")][:4]:
            columns = list(row)
            attacks = columns[columns.index("clean_prediction") + 1 : columns.index("broken_by")]
            row |= {**dict.fromkeys(attacks, "1"), "broken_by": ""}

    def change_result(content):
        with (run / "results" / f"{RESULTS}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        for name in content["accuracy"]:
            content["accuracy"][name] = sum(row[name] == "1" for row in rows) / len(rows)
        for column, after in content["sequences"].items():
            lowest = content["accuracy"][column]
            content["sequences"][column] = {name: max(left, lowest) for name, left in after.items()}
            content["sequences"][column][[*after][-1]] = lowest
        content["worst"] = sum(row["broken_by"] == "" for row in rows) / len(rows)

    edit_rows(run, change_rows)
    edit_result(run, change_result)
    return r"adversarial\.safetensors and the rows in .*\.csv differ in which examples fooled the model"


def another_verdict(run: Path) -> str:
    words = {"sound": "masked", "undecided": "sound", "masked": "sound"}
    edit_result(run, lambda content: content["verdict"].update(verdict=words[content["verdict"]["verdict"]]))
    return r"standard-Linf-0\.1\.json.*verdict"


def another_machine(run: Path) -> str:
    edit_result(run, lambda content: content.update(hardware="8 x H200"), sealed=True)
    return r"standard-Linf-0\.1\.json: its content changed after the evaluation, by its seal"


def clean_images(run: Path) -> str:
    """Put the clean images into the place of the adversarial ones."""
    path = run / "results" / f"{RESULTS}.adversarial.safetensors"
    index = load_file(path)["index"]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({"index": index, "images": to_float(TEST.images[index])}, path, metadata=metadata)
    edit_result(run, lambda content: content.update(adversarial_sha256=sha256_of(path)))
    return r"(\d+) of the \1 adversarial images of .*\.json do not fool the model \(example \d+ first\)"


def other_predictions(run: Path) -> str:
    """Write other wrong classes for images that are misclassified, which no accuracy shows."""

    def change(rows):
        for row in [row for row in rows if row["broken_by"] == "clean"][:3]:
            wrong = {*map(str, range(10))} - {row["label"], row["clean_prediction"]}
            row["clean_prediction"] = min(wrong)

    edit_rows(run, change)
    edit_result(run, lambda content: None)
    return r"timm\.create_model loads a model other than the evaluated one \(57 of 60 predictions are equal"


@pytest.mark.parametrize(
    "change", [call_broken_robust, another_verdict, another_machine, clean_images, other_predictions]
)
def test_forged_results_are_not_exported(run, tmp_path, change):
    message = change(run)
    with pytest.raises(InputError, match=message) as caught:
        export(settings(run, tmp_path / "exported", as_masked=False))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exported").exists()


# Uploads


def plant(hub: Path) -> str:
    (hub / "notes.txt").write_text("private")
    return r"--push: .*hub/notes\.txt was not written by export\. Remove it\.$"


def plant_hidden(hub: Path) -> str:
    (hub / ".env").write_text("TOKEN=x")
    return r"--push: .*hub/\.env was not written by export"


def link(hub: Path) -> str:
    (hub / "config.json").unlink()
    (hub / "config.json").symlink_to("/etc/passwd")
    return r"--push: .*hub/config\.json was not written by export"


def link_folder(hub: Path) -> str:
    hub.rename(hub.with_name("elsewhere"))
    hub.symlink_to("elsewhere")
    return r"--push: .*hub was not written by export"


def change_weights(hub: Path) -> str:
    content = bytearray((hub / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (hub / "model.safetensors").write_bytes(content)
    return r"hub/model\.safetensors does not contain the evaluated weights \(sha256 \w{64}\)\. Export again"


def change_config(hub: Path) -> str:
    (hub / "config.json").write_text((hub / "config.json").read_text() + " ")
    return r"--push: .*hub/config\.json was changed after the export\. Export again"


def change_picture(hub: Path) -> str:
    (hub / f"{KEY}.png").write_bytes(b"<svg>")
    return rf"--push: .*hub/{KEY}\.png was changed after the export"


def remove_weights(hub: Path) -> str:
    (hub / "model.safetensors").unlink()
    return r"hub/model\.safetensors cannot be read"


CHANGES = [plant, plant_hidden, link, link_folder, change_weights, change_config, change_picture, remove_weights]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_folders_are_not_pushed(evaluated, exported, tmp_path, monkeypatch, change):
    sent = []
    monkeypatch.setattr("drelu_timm.zoo.hub.push", lambda *args: sent.append(args))
    folder = Path(shutil.copytree(exported, tmp_path / "exported"))
    message = change(folder / "hub")
    with pytest.raises(InputError, match=message) as caught:
        push_exported(settings(evaluated, folder), "tester/dense")
    assert "\n" not in str(caught.value) and sent == []


def test_a_push_sends_the_files_of_the_export_and_a_card_made_again(evaluated, exported, tmp_path, monkeypatch):
    sent = {}
    monkeypatch.setattr("drelu_timm.zoo.hub.push", lambda files, repo: sent.update(files) or "https://commit")
    folder = Path(shutil.copytree(exported, tmp_path / "exported"))
    (folder / "hub" / "README.md").write_text("changed by hand")
    text = push_exported(settings(evaluated, folder), "tester/dense")
    assert text == "uploaded 4 files to tester/dense in the commit https://commit"
    assert sent == {path.name: path.read_bytes() for path in (folder / "hub").iterdir()}
    assert b'"hf-hub:tester/dense"' in sent["README.md"] and b"changed by hand" not in sent["README.md"]
    assert "huggingface.co/tester/dense" in (folder / "submission" / "new-model.md").read_text()


# Writing


@contextmanager
def file_size_limit(size: int):
    """Let the system refuse to write files larger than a number of bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [1000, 20_000])
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(evaluated, tmp_path, size):
    with file_size_limit(size), pytest.raises(InputError, match=r"^--output-dir .* cannot be writ") as caught:
        export(settings(evaluated, tmp_path / "exported"))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_torch_reports_a_full_disk_as_an_os_error(tmp_path):
    with file_size_limit(1000), pytest.raises(OSError, match=r"^images\.pt: "):
        _save_tensors(torch.zeros(10_000), tmp_path / "images.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["config.json/below", "x" * 300, "a\0b", "a/" * 2500])
def test_a_folder_that_cannot_be_written_is_one_line(run, name):
    before = sorted(run.rglob("*"))
    with pytest.raises(InputError, match=r"^--output-dir .* cannot be (used|written to) \(") as caught:
        export(settings(run, run / name))
    assert "\n" not in str(caught.value)
    assert sorted(run.rglob("*")) == before


def test_an_export_that_was_killed_is_swept_by_the_next(evaluated, tmp_path):
    (tmp_path / ".exported.0123abcd.part" / "hub").mkdir(parents=True)
    (tmp_path / ".other.0123abcd.part").mkdir()
    export(settings(evaluated, tmp_path / "exported"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.0123abcd.part", "exported"]


HOLD = """
import sys
from pathlib import Path
from drelu_timm.files import held
with held(Path(sys.argv[1]), "the test"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_export_to_the_folder_is_refused_with_the_holder(run, tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".exported.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"^--output-dir .*exported is in use by process {holder.pid} on "):
            export(settings(run, tmp_path / "exported"))
    assert not (tmp_path / "exported").exists()


def test_a_link_in_the_place_of_the_folder_is_not_followed(run, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"--output-dir .*link exists already"):
        export(settings(run, tmp_path / "link"))


# Metadata


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"log\.jsonl is not a complete log of a training \(Expecting"),
        ("[]", r"log\.jsonl line 5 is \[\]\. It must be a table"),
        ('{"epoch": 5}', r"log\.jsonl line 5 has no best_epoch, seconds, images_per_second"),
        (
            '{"epoch": 5, "best_epoch": 5, "seconds": null, "images_per_second": 1}',
            r"line 5: seconds is None\. It must be",
        ),
        ('{"epoch": 4, "best_epoch": 4, "seconds": 1, "images_per_second": 1}', r"\(epochs are missing or repeated\)"),
        ("\udcff", r"log\.jsonl is not a complete log of a training \('utf-8' codec"),
        ("[" * 100_000, r"log\.jsonl is not a complete log"),
    ],
)
def test_a_broken_log_names_line_and_field(run, tmp_path, line, message):
    log = run / "log.jsonl"
    lines = log.read_text().splitlines()[:4]
    log.write_text("\n".join([*lines, line]), errors="surrogateescape")
    with pytest.raises(InputError, match=message) as caught:
        export(settings(run, tmp_path / "exported"))
    assert "\n" not in str(caught.value)


def edit_train(**changes):
    return lambda config: config["train"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            edit_train(seed="0; touch /tmp/x"),
            r"config\.json: train\.seed is '0; touch /tmp/x'\. It must be an integer",
        ),
        (edit_train(seed=None), r"config\.json: train has no seed\."),
        (edit_train(eps=0.1), r"config\.json: train\.eps is 0\.1\. It must be text in quotes"),
        (edit_train(sede=3), r"config\.json: train 'sede' is unknown; did you mean seed"),
        (lambda config: config["train"].pop("model"), r"config\.json: train has no model\."),
        (lambda config: config.pop("train"), r"config\.json has no train\."),
        (lambda config: config.update(train=[]), r"config\.json: train is \[\]\. It must be a table"),
        (lambda config: config.update(img_size="8"), r"config\.json: img_size is '8'\. It must be a whole number"),
        (lambda config: config.update(versions={"a": 1}), r"config\.json: versions\.a is 1\. It must be text"),
        (
            lambda config: config.update(launch={"num_processes": "$(id)"}),
            r"json: launch has no mixed_precision",
        ),
        (lambda config: config.update(init_from={"train": {}}), r"config\.json: init_from has no dataset_title"),
    ],
)
def test_a_config_with_other_types_names_the_field(run, tmp_path, change, message):
    path = run / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        export(settings(run, tmp_path / "exported"))
    assert "\n" not in str(caught.value)
