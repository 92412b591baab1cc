"""The demo: table and picture from given results, and the complete demo."""

import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from synthetic_runs import about, point, write_run

from drelu_timm import demo as demonstration
from drelu_timm.demo import demo, draw, table
from drelu_timm.evaluation.config import EvaluateConfig
from drelu_timm.files import write_json
from drelu_timm.flags import DemoConfig, ExportConfig
from drelu_timm.results.result import Result
from drelu_timm.runs import Run


def result(verdict: str, worst: float) -> dict:
    accuracy = {"pgd": 0.641, "autoattack": 0.086, "bpda": 0.053}
    at = point(eps="0.2", clean=0.975, accuracy=accuracy, worst=worst, verdict=verdict)
    return about({"model": "dense_drelu", "dataset": "digits"}, "standard", 359) | at | {"zero_gradient_share": 0.671}


def read(verdict: str, worst: float) -> Result:
    return Result.from_json(result(verdict, worst), Path("result.json"))


def test_table_has_every_accuracy_and_verdict():
    console = Console(width=120, file=io.StringIO())
    console.print(table({"D-ReLU": read("masked", 0.011)}))
    text = console.file.getvalue()
    for part in ("Digits, Linf, eps 0.2, 359 test images", "97.5", "64.1", "8.6", "5.3", "1.1", "67.1", "masked"):
        assert part in text


def test_picture_is_drawn(tmp_path):
    draw({"ReLU": read("sound", 0.01), "D-ReLU": read("masked", 0.011)}, tmp_path / "demo.png")
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.size == (1200, 630)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100


def test_runs_of_the_demo_may_have_other_evaluations(tmp_path, monkeypatch, capsys):
    def evaluated(config: EvaluateConfig) -> Path:
        other, path = (Path(config.run) / "results" / f"{suite}-Linf-0.2.json" for suite in ("quick", config.suite))
        write_json(other, result("undecided", 0.5) | {"n_examples": 20})
        write_json(path, result("sound", 0.011))
        return path

    def exported(config: ExportConfig) -> Path:
        write_json(config.run / "x" / "model_info" / "digits" / "Linf" / "x.json", {})
        return config.run / "x"

    monkeypatch.setattr(demonstration, "export", exported)
    monkeypatch.setattr(demonstration, "train", lambda config: write_run(config.output_dir))
    monkeypatch.setattr(demonstration, "evaluate", evaluated)
    demo(DemoConfig(output_dir=tmp_path))
    assert "359 test images" in capsys.readouterr().out


@pytest.mark.slow
def test_the_complete_demo_distinguishes_masking_from_robustness(tmp_path, capsys):
    demo(DemoConfig(output_dir=tmp_path))
    verdicts = {}
    for path in tmp_path.glob("*/results/*.json"):
        content = json.loads(path.read_text())
        verdicts[path.parts[-3]] = content["verdict"]["verdict"]
        assert Run.open(path.parents[1]).model_digest == content["model_digest"]
    assert verdicts == {"relu": "sound", "drelu": "masked", "drelu-trades": "sound"}
    places = dict(re.findall(r"^  ([\w ,]+): +(/.+)$", capsys.readouterr().out, re.MULTILINE))
    assert Path(places["picture"]) == tmp_path / "demo.png"
    assert len(places) == 5 and all(Path(place).exists() for place in places.values())
    demo(DemoConfig(output_dir=tmp_path))  # a second time nothing is repeated
