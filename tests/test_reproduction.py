"""model_cards/reproduction.md follows from the result files next to it."""

import json
import re
import shutil
from math import isclose

import pytest
import reproduction
from reproduction import FOLDER, TEMPLATE, Paper, Topic, copy_results, figures, page, topics

from drelu_timm.errors import InputError
from drelu_timm.files import read_json
from drelu_timm.flags import ReportConfig
from drelu_timm.report import report


@pytest.mark.parametrize("topic", topics())
def test_the_numbers_follow_from_the_result_files(topic):
    published, now = read_json(FOLDER / "numbers.json")[topic], Topic(topic).numbers()
    assert now.keys() == published.keys()
    for method, columns in now.items():
        assert columns.keys() == published[method].keys()
        for column, numbers in columns.items():
            assert numbers == pytest.approx(published[method][column], abs=1e-3), (method, column)


def test_a_report_of_the_result_files_has_the_numbers_of_the_page(tmp_path):
    runs = report(ReportConfig((FOLDER / "mnist-cnn-seeds" / "runs",), tmp_path / "r", against_paper=True))
    assert runs.broken == []
    published = read_json(FOLDER / "numbers.json")["mnist-cnn-seeds"]
    records = json.loads((tmp_path / "r" / "numbers.json").read_text())
    assert {record["column"] for record in records} >= {"clean", "pgd", "worst"}
    for record in records:
        numbers = published[f"{record['net']} {record['training']}"]
        assert isclose(record["mean"], numbers[record["column"]][0], abs_tol=1e-3)
        sources = [FOLDER / "mnist-cnn-seeds" / "runs" / source for source in record["sources"]]
        assert all(source.is_file() for source in sources)


def test_the_page_follows_from_the_result_files():
    assert FOLDER.with_suffix(".md").read_text(encoding="utf-8") == page()


def test_all_figures_can_be_drawn_and_are_published():
    names = [name for name, _ in figures()]
    assert sorted(path.stem for path in FOLDER.glob("*.png")) == sorted(names)
    text = FOLDER.with_suffix(".md").read_text(encoding="utf-8")
    assert all(f"](reproduction/{name}.png)" in text for name in names)


def test_the_page_starts_with_five_rows_of_pgd_worst_case_and_verdict():
    table = FOLDER.with_suffix(".md").read_text(encoding="utf-8").partition("## Findings")[0]
    _, _, *rows = (line for line in table.splitlines() if line.startswith("|"))
    assert len(rows) == 5
    assert "| dense, MNIST | D-ReLU-100 | 97.1 | 93.2 ± 0.9 | ≤ 14.1 ± 1.8 | masked |" in rows


def test_a_sentence_of_the_findings_has_at_most_two_numbers():
    text = FOLDER.with_suffix(".md").read_text(encoding="utf-8")
    findings = " ".join(text.partition("## Findings")[2].partition("![")[0].split())
    not_results = r"\]\([^)]*\)|[A-Z]\w+-[\d.]+|± [\d.]+|\b\d\. \*\*|et al\. \d+|95 %"
    findings = re.sub(not_results, "", findings)
    for sentence in re.split(r"(?<=[.%)])\s+(?=[A-Z])|;", findings):
        numbers = re.findall(r"\d+(?:\.\d+)?(?: of \d+)?(?: \([^)]*to[^)]*\))?", sentence)
        assert len(numbers) <= 2, sentence


def test_the_readme_has_the_same_numbers():
    cnn, paper = Topic("mnist-cnn-seeds"), Paper()
    drelu, trained = (
        [cnn("shallow_cnn", training, column) for column in ("pgd", "worst")] for training in ("D-ReLU-0.1", "AT")
    )
    said = (
        f"has {drelu[0]} % under PGD (paper: {paper('shallow_cnn', 'D-ReLU-0.1', 'pgd')}) and {drelu[1]} % in the "
        f"worst case; adversarially trained with ReLU, {trained[0]} % and {trained[1]} %"
    )
    readme = FOLDER.parent.with_name("README.md").read_text(encoding="utf-8")
    assert said in " ".join(readme.split())


def test_links_of_the_page_exist():
    markdown = FOLDER.with_suffix(".md")
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", markdown.read_text(encoding="utf-8"))
    assert links and all((markdown.parent / link).exists() for link in links)


def test_a_table_does_not_repeat_sentences_of_the_page():
    shown = set()
    first, again = (Topic("mnist", shown).table("paper") for _ in range(2))
    assert first.startswith(again) and "Worst case: share of the test images" in first.removeprefix(again)


def test_no_accuracy_is_typed_into_the_template():
    typed = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", TEMPLATE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not re.search(r"\d (%|points)", typed.replace("95 % interval", ""))
    assert not re.search(r"\|\s*\*{0,2}\d+\.\d+\*{0,2}\s*\|", typed)


def test_a_missing_method_is_an_error():
    topic = Topic("mnist")
    with pytest.raises(KeyError, match="0 methods are dense nothing, among dense"):
        topic("dense", "nothing", "worst")
    with pytest.raises(KeyError, match="has no such-attack"):
        topic("dense", "AT", "such-attack")


def test_paths_of_this_machine_are_not_copied(tmp_path, monkeypatch, evaluated):
    monkeypatch.setattr(reproduction, "FOLDER", tmp_path / "reproduction")
    copied = tmp_path / "reproduction" / "digits" / "runs" / evaluated.name
    (copied / "results").mkdir(parents=True)
    (copied / "results" / "older.json").write_text("{}")
    copy_results((evaluated,), "digits")
    assert sorted(path.name for path in copied.rglob("*") if path.is_file()) == [
        "config.json",
        "log.jsonl",
        "quick-Linf-up-to-0.2.csv",
        "quick-Linf-up-to-0.2.json",
        "standard-Linf-0.1.csv",
        "standard-Linf-0.1.json",
    ]
    files = [path for path in copied.rglob("*") if path.suffix in (".json", ".csv")]
    assert str(evaluated.parent) not in "".join(path.read_text() for path in files)
    assert (copied / "results" / "standard-Linf-0.1.csv").read_text().splitlines()[0].endswith(",broken_by")


def test_a_copy_has_the_numbers_of_the_run(tmp_path, monkeypatch, evaluated):
    copy_of, original = tmp_path / "copy", tmp_path / "original"
    monkeypatch.setattr(reproduction, "FOLDER", copy_of)
    copy_results((evaluated,), "digits")
    shutil.copytree(evaluated, original / "digits" / "runs" / "x", ignore=shutil.ignore_patterns("export"))
    copied = Topic("digits").numbers()
    monkeypatch.setattr(reproduction, "FOLDER", original)
    assert copied == Topic("digits").numbers()


def test_unusable_results_and_equal_names_are_not_copied(tmp_path, monkeypatch, evaluated):
    monkeypatch.setattr(reproduction, "FOLDER", tmp_path / "reproduction")
    first, second = (tmp_path / folder / "run" for folder in "ab")
    for copy in (first, second):
        shutil.copytree(evaluated, copy, ignore=shutil.ignore_patterns("export"))
    config = json.loads((second / "config.json").read_text())
    (second / "config.json").write_text(json.dumps({**config, "train": {**config["train"], "seed": 1}}))
    with pytest.raises(InputError, match=r"Several runs are called run\. Copy each from a folder of another name"):
        copy_results((first, second), "digits")
    (first / "results" / "cut.json").write_text("{")
    with pytest.raises(InputError, match=r"cut\.json cannot be read as JSON"):
        copy_results((first,), "digits")
    assert not (tmp_path / "reproduction").exists()
