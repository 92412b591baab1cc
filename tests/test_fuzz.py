"""Files of a finished run that are damaged or edited: every verb ends in one line, or gives the same numbers.

The 500 mutations of the slow test are a function of their number, so a failure is repeated by that number.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from drelu_timm.__main__ import main

VALUES = [None, True, -1, 0, 1.5, "x", "", "\0", "é\n", [], {}, [1], {"x": 1}, 10**400, 1e308, float("nan"), -(2**63)]
DEEP = "[" * 50_000
KEY = "Tester2026Digits_dense"


# Mutations: (content of a file, random numbers) -> its new content, or None for no file


def delete(content: bytes, rng: random.Random) -> bytes | None:
    return None


def empty(content: bytes, rng: random.Random) -> bytes:
    return b""


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def flip_a_bit(content: bytes, rng: random.Random) -> bytes:
    position = rng.randrange(min(len(content), 2000))
    return content[:position] + bytes([content[position] ^ 1 << rng.randrange(8)]) + content[position + 1 :]


def noise(content: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(len(content) % 10_000)


def nest_deeply(content: bytes, rng: random.Random) -> bytes:
    return DEEP.encode()


def change_a_value(content: bytes, rng: random.Random) -> bytes:
    """Replace or remove a value of a JSON file, or of a line of a .jsonl file, or a cell of a CSV; else a bit."""
    lines = content.splitlines(keepends=True)
    try:
        tree = json.loads(content)
    except ValueError:
        number = rng.randrange(len(lines) or 1)
        try:
            line = lines[number].decode().rstrip("\n")
            changed = json.dumps(_changed(json.loads(line), rng)) if line.startswith("{") else _other_cell(line, rng)
        except (ValueError, IndexError):
            return flip_a_bit(content, rng)
        return b"".join([*lines[:number], changed.encode() + b"\n", *lines[number + 1 :]])
    return json.dumps(_changed(tree, rng)).encode()


def _other_cell(line: str, rng: random.Random) -> str:
    cells = line.split(",")
    cells[rng.randrange(len(cells))] = rng.choice(["", "x", "-1", "9" * 400, "nan", '"'])
    return ",".join(cells)


def _changed(tree: Any, rng: random.Random) -> Any:
    places = list(_places(tree))
    parent, key = rng.choice(places)
    how = rng.randrange(4)
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent, dict):
        parent["another"] = rng.choice(VALUES)
    else:
        parent[key] = rng.choice(VALUES)
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in list(keys):
        yield tree, key
        yield from _places(tree[key])


MUTATIONS = [delete, empty, truncate, flip_a_bit, noise, nest_deeply, *[change_a_value] * 6]


# Verbs: (mutated run, folder for what is written) -> flags


VERBS: dict[str, Callable[[Path, Path], list[str]]] = {
    "evaluate": lambda run, _: ["evaluate", str(run), "--suite", "standard", "--n-examples", "60"],
    "sweep of eps": lambda run, _: [
        *("evaluate", str(run), "--suite", "quick", "--n-examples", "20", "--eps", "0,0.1,0.2"),
    ],
    "export": lambda run, out: [
        *("export", str(run), "--key", KEY, "--output-dir", str(out / "x"), "--benchmark-examples", "0"),
        *("--title", "T", "--authors", "A", "--link", "https://example.org", "--venue", "N/A"),
    ],
    "report": lambda run, out: ["report", str(run), "--output-dir", str(out / "x")],
    "resume": lambda run, _: [
        *("train", "--model", "dense_drelu", "--dataset", "digits", "--output-dir", str(run), "--resume"),
        *("--epochs", "5", "--cap", "20", "--width", "16", "--eps", "0.1"),
    ],
    "repeat": lambda run, out: ["train", "--config", str(run / "config.json"), "--output-dir", str(out / "x")],
}


def numbers(run: Path, verb: str, out: Path) -> Any:
    """Return the accuracies that a verb has read or written."""
    if verb == "evaluate":
        return _accuracies(json.loads((run / "results" / "standard-Linf-0.1.json").read_text()))
    if verb == "export":
        (card,) = out.glob(f"x/model_cards/*/*/{KEY}.json")
        return _accuracies(json.loads(card.read_text())["measured"]["results"])
    if verb == "report":
        return {path.name: path.read_text() for path in (out / "x").glob("table-*.csv")}
    return None


def _accuracies(result: dict[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in ("clean", "accuracy", "worst", "eps", "norm", "n_examples")}


class Fuzzed:
    """A finished run, and what the verbs give of it."""

    def __init__(self, run: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.run, self.folder, self._capsys = run, folder, capsys
        self.files = sorted(path.relative_to(run) for path in run.rglob("*") if path.is_file())
        self._expected: dict[str, Any] = {}

    def finding(self, number: int, verbs: list[str]) -> str | None:
        """Return what is wrong with the verbs after a mutation; None if nothing is."""
        rng = random.Random(number)
        file, mutate = rng.choice(self.files), rng.choice(MUTATIONS)
        content = mutate((self.run / file).read_bytes(), rng)
        for verb in verbs:
            if wrong := self._wrong(file, content, verb):
                return f"mutation {number} ({mutate.__name__} of {file}), {verb}: {wrong}"
        return None

    def _wrong(self, file: Path, content: bytes | None, verb: str) -> str | None:
        if verb not in self._expected:
            with self._copied() as (run, out):
                code, error = self._run(verb, run, out)
                assert code == 0, error
                self._expected[verb] = numbers(run, verb, out)
        with self._copied() as (run, out):
            (run / file).unlink() if content is None else (run / file).write_bytes(content)
            code, error = self._run(verb, run, out)
            if code is None:
                return error
            lines = [line for line in error.splitlines() if line.startswith(("error:", "Traceback"))]
            if code == 2 and len(lines) != 1:
                return f"not one line: {error[-500:]}"
            if code != 0:
                return None
            if file.name.endswith("safetensors") and file.parent.name != "results":
                return None  # other weights are another model, and are evaluated as such
            if verb == "report" and content is None and file.parent.name in ("results", "sweeps"):
                return None  # a report is about the files that there are
            got = numbers(run, verb, out)
            return None if got == self._expected[verb] else f"other numbers: {str(got)[:300]}"

    def _copied(self) -> "_Copied":
        return _Copied(self.run, self.folder)

    def _run(self, verb: str, run: Path, out: Path) -> tuple[int | None, str]:
        self._capsys.readouterr()
        try:
            code = main(VERBS[verb](run, out))
        except SystemExit as exit_:
            code = 2 if exit_.code else 0
        except BaseException as error:
            return None, f"{type(error).__name__}: {str(error)[:300]}"
        return code, self._capsys.readouterr().err


class _Copied:
    """A copy of a run, and a folder for what a verb writes, deleted at the end."""

    def __init__(self, run: Path, folder: Path):
        self._run, self._folder = run, folder

    def __enter__(self) -> tuple[Path, Path]:
        (self._folder / "out").mkdir(parents=True)
        return Path(shutil.copytree(self._run, self._folder / "run")), self._folder / "out"

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder)


@pytest.fixture
def fuzzed(evaluated, tmp_path, capsys, monkeypatch) -> Fuzzed:
    from drelu_timm import train
    from drelu_timm.training.config import resolve

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train", lambda config: resolve(config).output_dir)  # its checks, not its epochs
    run = tmp_path / "finished"
    shutil.copytree(evaluated, run, ignore=shutil.ignore_patterns("export"))
    return Fuzzed(run, tmp_path / "fuzz", capsys)


@pytest.mark.parametrize("verb", VERBS)
def test_a_few_mutations_of_a_finished_run(fuzzed, verb):
    findings = [fuzzed.finding(number, [verb]) for number in range(1000, 1005)]
    assert not list(filter(None, findings))


@pytest.mark.slow
def test_500_mutations_of_a_finished_run(fuzzed):
    findings = [fuzzed.finding(number, list(VERBS)) for number in range(500)]
    assert not list(filter(None, findings))
