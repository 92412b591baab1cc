"""Whether the verdict on gradient masking is right for models that it was not made for.

    cd scripts
    python -m verdict_test                       # the development set
    python -m verdict_test --set final           # the final set; no limit may be set on it
    python -m verdict_test --only "JPEG" "AT"    # some models, with the evidence of their verdicts

Trained models, true answers, and verdicts are kept in a folder, so that a stopped test continues where it was; verdicts
are kept for each state of the package's source code.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from torch import nn

import drelu_timm
from drelu_timm.evaluation.evaluation import evaluate_model

from .answers import Answer, find_answer
from .rivals import Rivals, ask_rivals
from .roster import DEVELOPMENT, FINAL, Entry
from .table import Row, matrix, print_rows
from .training import task

FOLDER = Path(gettempdir()) / "drelu_timm_verdict_test"


@dataclass(frozen=True)
class Kept:
    """Models and measurements of one entry, in a folder."""

    entry: Entry
    folder: Path

    @classmethod
    def of(cls, entry: Entry, folder: Path) -> "Kept":
        """Return what is kept of an entry."""
        name = "".join(letter if letter.isalnum() else "-" for letter in entry.name)
        return cls(entry, folder / name)

    def model(self) -> nn.Module:
        """Return the trained model."""
        path = self.folder / "model.pt"
        if not path.exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = self.entry.make()
            self._write(path, lambda temporary: torch.save(model, temporary))
        return torch.load(path, weights_only=False).eval()

    def measured(self, name: str, measure: Callable[[nn.Module], dict[str, Any]]) -> dict[str, Any]:
        """Return a measurement by its name; it is made if it is not kept."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            content = json.dumps(measure(self.model()), indent=1)
            self._write(path, lambda temporary: temporary.write_text(content))
        return json.loads(path.read_text())

    def _write(self, path: Path, write: Callable[[Path], Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        write(temporary)
        temporary.replace(path)


def source_digest() -> str:
    """Return a digest of the package's source code."""
    folder = Path(drelu_timm.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def judge(entry: Entry, model: nn.Module, *, suite: str, seed: int) -> dict[str, Any]:
    """Evaluate a model and return its verdict, worst case, and time."""
    data, started = task(entry.task), time.process_time()
    ball = entry.threat_model
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        result = evaluate_model(model, data.images, data.labels, norm=ball.norm, eps=ball.eps, suite=suite, seed=seed)
    return {
        "verdict": str(result.verdict),
        "evidence": result.verdict.evidence,
        "numbers": result.verdict.numbers,
        "worst": result.worst,
        "seconds": time.process_time() - started,
    }


def measure(entry: Entry, folder: Path, *, code: str, seed: int) -> Row:
    """Return all that is measured of an entry."""
    kept = Kept.of(entry, folder)

    def judged(suite: str) -> dict[str, Any]:
        return kept.measured(f"{suite}-{seed}-{code}", lambda model: judge(entry, model, suite=suite, seed=seed))

    answer = Answer(**kept.measured("answer", lambda model: asdict(find_answer(entry, model))))
    rivals = Rivals(**kept.measured("rivals", lambda model: asdict(ask_rivals(entry, model))))
    return Row(entry, answer, rivals, judged("quick"), judged("adaptive"))


def main() -> None:
    """Print the rows and the confusion matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=("development", "final"), default="development")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="models by name, of either set, with the evidence")
    parser.add_argument("--seed", type=int, default=0, help="of the attacks")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where models and measurements are kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    entries = DEVELOPMENT if arguments.set == "development" else FINAL
    if arguments.only:
        by_name = {entry.name: entry for entry in (*DEVELOPMENT, *FINAL)}
        if unknown := [name for name in arguments.only if name not in by_name]:
            parser.error(f"--only {unknown[0]!r} is not a model of the test. Models: {', '.join(by_name)}.")
        entries = [by_name[name] for name in arguments.only]
    code = source_digest()
    measured = (measure(entry, arguments.folder, code=code, seed=arguments.seed) for entry in entries)
    rows = list(print_rows(measured, with_evidence=bool(arguments.only)))
    if not arguments.only:
        print("\n" + matrix(rows))


if __name__ == "__main__":
    main()
