"""Files of version 0.1.0 are read as they were: the same tables, worst cases and cards follow from them.

``golden/run`` is a run on digits with three evaluations (one with cw-l2, one with a transfer attack) and a sweep over
eps, without its weights. The files next to it are what `report` and `export` made of it.
"""

import json
from pathlib import Path

import pandas as pd
import pytest

from drelu_timm.attacks.threat_model import ThreatModel
from drelu_timm.files import json_text
from drelu_timm.publishing.card import read_card
from drelu_timm.publishing.evaluations import choose_evaluation, further_evaluations, with_further
from drelu_timm.publishing.leaderboard import card_record, check_entry, model_info
from drelu_timm.report import ReportConfig, report
from drelu_timm.results.examples import read_adversarial, read_rows
from drelu_timm.results.result import read_result
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
    chosen = choose_evaluation(run, ThreatModel.parse("Linf", "0.1"), None)
    assert chosen.path.stem == "standard-Linf-0.1"
    results = with_further(chosen, further_evaluations(run, chosen)).published().to_json()
    assert as_json(results) == CARD["measured"]["results"]
    assert list(results) == list(CARD["measured"]["results"])


def test_a_card_is_read_and_written_the_same():
    measured = read_card(CARD, GOLDEN / "card.json")
    expected = json.dumps(CARD).replace("Golden2026Digits_Dense.sh", "Golden2026Digits_Dense.toml")  # no shell any more
    assert json.dumps(card_record(measured)) == expected  # in the same order
    check_entry(model_info(measured))


def test_result_files_are_written_as_they_were_read():
    for path in (GOLDEN / "run").glob("*/*.json"):
        assert json_text(read_result(path).to_json()) == path.read_text()
        result = read_result(path)
        for point in result.points:
            rows = read_rows(result, point.eps)
            assert rows is not None
            assert rows.shares == {"clean": point.clean, **point.accuracy, "worst": point.worst}


def test_adversarial_images_are_read():
    result = read_result(GOLDEN / "run" / "results" / "standard-Linf-0.1.json")
    rows = read_rows(result, "0.1")
    assert rows is not None
    broken = (rows.predictions == rows.labels) & ~rows.survivors
    adversarial = read_adversarial(result)
    assert adversarial.index.tolist() == broken.nonzero().squeeze(1).tolist()
    assert adversarial.images.shape == (18, 1, 8, 8)
