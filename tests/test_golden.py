"""Files of version 0.1.0 are read as they were: the same tables, worst cases and cards follow from them.

``golden/run`` is a run on digits with three evaluations (one with cw-l2, one with a transfer attack) and a sweep over
eps, without its weights. The files beside it are what `report` and `export` made of it.
"""

import json
from pathlib import Path

import pandas as pd
import pytest

from drelu_timm.attacks.threat_model import ThreatModel
from drelu_timm.publishing.entries import card_record, check_entry, model_info
from drelu_timm.publishing.measured import from_record
from drelu_timm.publishing.records import choose_results, further_evaluations, with_further, without_paths
from drelu_timm.report import ReportConfig, report
from drelu_timm.runs import Run

GOLDEN = Path(__file__).parent / "golden"
CARD = json.loads((GOLDEN / "card.json").read_text())


@pytest.fixture
def run():
    run = Run.open(GOLDEN / "run")
    run.__dict__["model_digest"] = CARD["measured"]["weights"]["sha256"]  # its weights are not there to be hashed
    return run


def as_json(content):
    return json.loads(json.dumps(content))


def test_a_report_has_the_same_numbers(tmp_path):
    outcomes = report(ReportConfig((GOLDEN / "run",), tmp_path))
    assert outcomes.broken == []
    assert (tmp_path / "numbers.json").read_text() == (GOLDEN / "numbers.json").read_text()
    for name in ("rows-digits-linf-eps-0.1.csv", "table-digits-linf-eps-0.1.csv"):
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "tables" / name), pd.read_csv(GOLDEN / name))


def test_an_export_counts_all_evaluations_together(run):
    chosen = choose_results(run, ThreatModel.parse("Linf", "0.1"), None)
    assert chosen.path.stem == "standard-Linf-0.1"
    results = with_further(chosen, further_evaluations(run, chosen))
    assert as_json(without_paths(results)) == CARD["measured"]["results"]


def test_a_card_is_read_and_written_the_same():
    measured = from_record(CARD)
    assert as_json(card_record(measured)) == CARD
    check_entry(model_info(measured))
