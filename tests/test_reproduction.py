"""What model_cards/reproduction.md says follows from the result files beside it."""

import json
import re
import shutil
from filecmp import cmp

import pytest
import reproduction
from reproduction import FOLDER, TEXT, Topic, make_report, papers, text, topics

from drelu_timm.errors import InputError
from drelu_timm.files import read_json


@pytest.mark.parametrize("topic", topics())
def test_reports_follow_from_the_result_files(topic, tmp_path):
    made = make_report(topic, tmp_path / "report")
    published = FOLDER / topic / "report"
    files = [path.relative_to(made) for path in made.rglob("*") if path.suffix in (".md", ".tex", ".csv", ".json")]
    assert files
    for file in files:
        assert cmp(made / file, published / file, shallow=False), file
    assert all((published / file.relative_to(made)).is_file() for file in made.rglob("*.png"))


@pytest.mark.parametrize("topic", topics())
def test_every_number_names_result_files_that_hold_it(topic):
    for record in read_json_list(FOLDER / topic / "report" / "numbers.json"):
        sources = [FOLDER / topic / "runs" / source for source in record["sources"]]
        if record["n_seeds"] == len(sources) and record["column"] in ("clean", "worst", "autoattack"):
            values = [{**result, **result["accuracy"]}[record["column"]] for result in map(read_json, sources)]
            assert record["mean"] == pytest.approx(100 * sum(values) / len(values))
        assert all(source.is_file() for source in sources)


def read_json_list(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_page_is_what_the_result_files_say():
    assert FOLDER.with_suffix(".md").read_text(encoding="utf-8") == text()


def test_the_readme_says_the_same():
    cnn = Topic("mnist-cnn-seeds", set())
    drelu, trained = (
        [cnn("shallow_cnn", training, column) for column in ("pgd", "worst")] for training in ("D-ReLU-0.1", "AT")
    )
    said = (
        f"has {drelu[0]} % under PGD, where the paper prints {papers('shallow_cnn', 'D-ReLU-0.1', 'pgd')}, and keeps "
        f"{drelu[1]} % in the worst case; with adversarial training instead it has {trained[0]} % and keeps "
        f"{trained[1]} %"
    )
    readme = FOLDER.parent.with_name("README.md").read_text(encoding="utf-8")
    assert said in " ".join(readme.split())


def test_what_the_page_links_to_is_there():
    page = FOLDER.with_suffix(".md")
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert links and all((page.parent / link).exists() for link in links)


def test_a_table_does_not_repeat_what_stands_on_the_page():
    said = set()
    first, again = (Topic("mnist", said).table("table-1-mnist-linf-eps-0.1") for _ in range(2))
    assert first.startswith(again) and "Worst case: the images that nothing broke" in first.removeprefix(again)


def test_no_accuracy_is_typed_into_the_page():
    typed = re.sub(r"\{\{.*?\}\}", "", TEXT.read_text(encoding="utf-8"))
    assert not re.search(r"\d %", typed)
    assert not re.search(r"\|\s*\*{0,2}\d+\.\d+\*{0,2}\s*\|", typed)


def test_a_line_that_is_not_there_is_an_error():
    topic = Topic("mnist", set())
    with pytest.raises(KeyError, match="0 lines are dense nothing, among dense"):
        topic("dense", "nothing", "worst")
    with pytest.raises(KeyError, match="has no such-attack"):
        topic("dense", "AT", "such-attack")


def test_what_only_one_machine_knows_is_not_taken_over(tmp_path, monkeypatch, evaluated):
    monkeypatch.setattr(reproduction, "FOLDER", tmp_path / "reproduction")
    taken = tmp_path / "reproduction" / "digits" / "runs" / evaluated.name
    (taken / "results").mkdir(parents=True)
    (taken / "results" / "older.json").write_text("{}")
    reproduction.take_over((evaluated,), "digits")
    assert sorted(path.name for path in taken.rglob("*") if path.is_file()) == [
        "config.json",
        "log.jsonl",
        "quick-Linf-up-to-0.2.csv",
        "quick-Linf-up-to-0.2.json",
        "standard-Linf-0.1.csv",
        "standard-Linf-0.1.json",
    ]
    files = [path for path in taken.rglob("*") if path.suffix in (".json", ".csv")]
    assert str(evaluated.parent) not in "".join(path.read_text() for path in files)


def test_what_cannot_be_used_or_told_apart_is_not_taken_over(tmp_path, monkeypatch, evaluated):
    monkeypatch.setattr(reproduction, "FOLDER", tmp_path / "reproduction")
    first, second = (tmp_path / folder / "run" for folder in "ab")
    for copy in (first, second):
        shutil.copytree(evaluated, copy, ignore=shutil.ignore_patterns("export"))
    config = json.loads((second / "config.json").read_text())
    (second / "config.json").write_text(json.dumps({**config, "train": {**config["train"], "seed": 1}}))
    with pytest.raises(InputError, match="several runs are called run; take each over from a folder of another name"):
        reproduction.take_over((first, second), "digits")
    (first / "results" / "cut.json").write_text("{")
    with pytest.raises(InputError, match=r"cut\.json cannot be read as JSON"):
        reproduction.take_over((first,), "digits")
    assert not (tmp_path / "reproduction").exists()
