"""Card of a run that the tests evaluated, and changed copies of it."""

from dataclasses import replace
from pathlib import Path

from drelu_timm.attacks.threat_model import ThreatModel
from drelu_timm.publishing.card import Card, Paper
from drelu_timm.publishing.evaluations import choose_evaluation, further_evaluations, make_card, with_further
from drelu_timm.runs import Run

KEY = "Tester2026Cards_dense"
TEST_SIZE = 359
REPOSITORY = Path(__file__).parents[1]
PUBLISHED = sorted((REPOSITORY / "model_cards").glob("*/*/*.json"))


def measured_of(evaluated: Path) -> Card:
    run = Run.open(evaluated)
    chosen = choose_evaluation(run, ThreatModel.parse("Linf", "0.1"), None)
    results = with_further(chosen, further_evaluations(run, chosen))
    paper = Paper("A Title", "A. One, B. Two", "https://example.org", "ICLR 2026")
    return make_card(run, chosen, results, key=KEY, paper=paper, other_seeds=(), test_size=TEST_SIZE)


def trained(measured: Card, **train) -> Card:
    return replace(measured, config={**measured.config, "train": {**measured.config["train"], **train}})


def having(measured: Card, **changes) -> Card:
    """Return a card with other results; fields at the eps are accepted too."""
    point = replace(measured.point, **{name: value for name, value in changes.items() if hasattr(measured.point, name)})
    fields = {name: value for name, value in changes.items() if hasattr(measured.results, name)}
    return replace(measured, results=replace(measured.results, points=(point,), **fields))
