"""Processes of every verb, killed when they change a file: the same command then ends as if nothing had happened.

The events are Python's audit events, so a kill depends on what the process does, not on the machine's speed.
"""

import json
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from killed import kill_at
from launching import Launched

GRID = """
title = "digits"
source = "a test"
[train]
dataset = "digits"
model = "dense_drelu"
epochs = 1
n_train = 256
cap_weight = 0.1
[[evaluate]]
n_examples = 20
"""


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _figures(result: Path) -> list:
    content = _json(result)
    points = content.get("curve", [content])
    return [(point["clean"], point["accuracy"], point["worst"], point["verdict"]["verdict"]) for point in points]


# Verb -> (flags for a folder, figures that it must have given)
VERBS: dict[str, tuple[Callable[[Path], list[str]], Callable[[Path], Any]]] = {
    "train": (
        lambda folder: [
            *(
                "train",
                "--model",
                "dense_drelu",
                "--dataset",
                "digits",
                "--output-dir",
                str(folder / "new"),
                "--resume",
            ),
            *("--n-train", "256", "--epochs", "2", "--width", "16"),
        ],
        lambda folder: (
            [(folder / "new" / name / "model.safetensors").read_bytes() for name in ("model", "last")]
            + [len((folder / "new" / "log.jsonl").read_text().splitlines())]
        ),
    ),
    "evaluate": (
        lambda folder: ["evaluate", str(folder / "run"), "--suite", "quick", "--n-examples", "20"],
        lambda folder: _figures(folder / "run" / "results" / "quick-Linf-0.1.json"),
    ),
    "export": (
        lambda folder: [
            *(
                "export",
                str(folder / "run"),
                "--key",
                "Tester2026Kills_dense",
                "--output-dir",
                str(folder / "exported"),
            ),
            *("--title", "T", "--authors", "A", "--link", "https://example.org", "--venue", "N/A"),
            *("--benchmark-examples", "0"),
        ],
        lambda folder: sorted(str(path.relative_to(folder)) for path in (folder / "exported").rglob("*")),
    ),
    "report": (
        lambda folder: ["report", str(folder / "run"), "--output-dir", str(folder / "report")],
        lambda folder: [_json(folder / "report" / "numbers.json"), (folder / "report" / "report.html").is_file()],
    ),
    "sweep": (
        lambda folder: ["sweep", str(folder / "grid.toml"), "--output-dir", str(folder / "sweep")],
        lambda folder: [_figures(path) for path in sorted((folder / "sweep").glob("*/results/*.json"))],
    ),
}


def run(arguments: list[str], folder: Path, number: int | None, counted: Path) -> tuple[int | None, str]:
    process = Launched(*arguments, before=partial(kill_at, folder, number, counted))
    printed = "\n".join(process.communicate())
    return process.returncode, printed


def check_kills(verb: str, evaluated: Path, tmp_path: Path, kills: int) -> None:
    """Kill a verb at some of its events, evenly spaced; each time the next process ends with the same figures."""
    expected, events = _completed(verb, evaluated, tmp_path / "whole", None)
    kills = min(kills, events)
    for kill in range(kills):
        number = 1 + kill * events // kills
        assert _completed(verb, evaluated, tmp_path / f"kill-{kill}", number)[0] == expected, f"kill at event {number}"


def _completed(verb: str, evaluated: Path, folder: Path, number: int | None) -> tuple[Any, int]:
    """Run a verb to its end, after a kill at an event if there is a number; return its figures and count of events."""
    flags, figures = VERBS[verb]
    folder.mkdir()
    shutil.copytree(evaluated, folder / "run")
    (folder / "grid.toml").write_text(GRID)
    counted = folder.with_suffix(".events")
    if number is not None:
        code, printed = run(flags(folder), folder, number, counted)
        assert code == -signal.SIGKILL, f"event {number}: {printed}"
    code, printed = run(flags(folder), folder, None, counted)
    assert code == 0, f"after a kill at event {number}: {printed}"
    leftovers = [path for path in folder.rglob("*") if path.name.endswith((".part", ".state"))]
    assert not leftovers, leftovers
    return figures(folder), counted.stat().st_size


@pytest.mark.parametrize("verb", VERBS)
def test_a_killed_verb_is_repeated(verb, evaluated, tmp_path):
    check_kills(verb, evaluated, tmp_path, kills=2 if verb != "sweep" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_verbs_killed_a_hundred_times(verb, evaluated, tmp_path):
    """22 kills of each of five verbs, or at each of its events if there are fewer: 101 in all."""
    check_kills(verb, evaluated, tmp_path, kills=22)
