"""The verb report: its files, its output folder, reproducible bytes, and bad input."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import tyro
from synthetic_runs import ATTACKS, RELU, point, write_json, write_result, write_rows, write_run, write_sweep

from drelu_timm.errors import InputError
from drelu_timm.flags import ReportConfig, read
from drelu_timm.report import main, report

REPORT = {"numbers.json", "report.html", "report.md"}


def make_runs(folder):
    """Write two models with three methods and two seeds, D-ReLU masked and with two cap weights, and a sweep."""
    for model in ("dense_drelu", "shallow_cnn_drelu"):
        for seed in range(2):
            for name, worst, train in (
                ("at", 0.8, {"objective": "at", **RELU}),
                ("trades", 0.75, {"objective": "trades", **RELU}),
                ("drelu-0.1", 0.1, {}),
                ("drelu-1", 0.05, {"cap_weight": 1.0, "held_out": 0.3}),
            ):
                run = write_run(folder / f"{model}-{name}-{seed}", model=model, seed=seed, **train)
                accuracy = {**ATTACKS, "pgd": 0.9 - seed / 100 - worst / 10}
                write_result(run, accuracy=accuracy, worst=worst, verdict="masked" if worst < 0.5 else "sound")
    write_sweep(folder / "dense_drelu-at-0", [point(eps="0.1", worst=1), point(eps="0.2", worst=0.5)])
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs that tests only read."""
    return make_runs(tmp_path_factory.mktemp("made") / "runs")


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory):
    """Complete report of `runs`."""
    folder = tmp_path_factory.mktemp("report") / "report"
    report(ReportConfig((runs,), folder, against_paper=True))
    return folder


@pytest.fixture
def small(tmp_path):
    """Folder with one run."""
    write_result(write_run(tmp_path / "runs" / "x"))
    return tmp_path / "runs"


def written(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_all_files_are_there(made):
    tables = ["against-paper-mnist", "rows-mnist", "table-1-mnist", "table-square-mnist"]
    figures = ["cap-weights-dense-d-relu-mnist", "cap-weights-shallow-cnn-d-relu-mnist"]
    figures += ["methods-mnist"]
    assert written(made) == {
        *REPORT,
        *(f"tables/{table}-linf-eps-0.1.{suffix}" for table in tables for suffix in ("md", "tex", "csv")),
        *(f"figures/{figure}-linf-eps-0.1.png" for figure in figures),
        "figures/over-eps-dense-mnist-linf.png",
    }


def test_worst_case_and_warning_come_first(made):
    text = (made / "report.md").read_text()
    head, _, _ = text.partition("## Compared with the paper")
    assert "The accuracy of a masked row under gradient attacks is not robustness" in head
    assert "Masked: Dense D-ReLU-0.1; Shallow CNN D-ReLU-0.1." in head
    assert "| Dense | D-ReLU-0.1 | 95.00 ± 0.00 (1) | ≤ 10.00 ± 0.00 (3) | masked |" in head


def test_statistics_figures_and_origin_are_on_the_page(made):
    text = (made / "report.md").read_text()
    assert "Over 12 blocks: one-way ANOVA F = " in text
    assert "\n\nMethods in the worst case: MNIST, Linf, eps 0.1: 2 blocks are too few. The critical difference" in text
    assert "\n\nOver 12 blocks: one-way ANOVA" in text.partition("## Methods in the paper's table 1\n\n")[2]
    assert "| Dense | AT | TRADES-6 | 0 | 20 | 1 | 0 | +5.00 (" in text
    assert (
        "![Cap weights: Dense, D-ReLU: MNIST, Linf, eps 0.1](figures/cap-weights-dense-d-relu-mnist-linf-eps-0.1.png)"
        in text
    )
    assert "16 runs, 16 result files and 1 sweep over eps" in text
    assert "Measured with: 2 x Processor; drelu-timm 0.1.0, torch 2.0.0." in text
    html = (made / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 4
    assert "is not robustness" in html
    assert "under the suite quick, on the first 10 test images. Seeds: AT 1." in text


def test_every_number_follows_from_the_files_that_it_names(made, runs):
    records = json.loads((made / "numbers.json").read_text())
    assert {record["column"] for record in records} == {"held-out", "clean", *ATTACKS, "worst"}
    for record in records:
        if record["column"] == "held-out":
            assert all(source.endswith("/log.jsonl") for source in record["sources"])
            continue
        read = [json.loads((runs / source).read_text()) for source in record["sources"]]
        results = [result for result in read if "curve" not in result]  # the sweep fools no model on further images
        if record["column"] == "cw-l2":
            values = [result["cw_l2"]["accuracy_at_budget"] for result in results]
        else:
            values = [{**result, **result["accuracy"]}[record["column"]] for result in results]
        assert record["mean"] == pytest.approx(100 * fmean(values))
        assert (record["n_seeds"], record["n_examples"]) == (2, [20])


def test_the_same_files_give_the_same_report_everywhere(made, runs, tmp_path, monkeypatch):
    shutil.copytree(runs, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    assert main(read("report", ["copy", "--against-paper"])) == 0
    again = tmp_path / "copy" / "report"
    assert written(again) == written(made)
    assert all((again / name).read_bytes() == (made / name).read_bytes() for name in written(made))


def test_notes_have_relative_paths(small, tmp_path, monkeypatch):
    write_run(small / "y", seed=1)
    monkeypatch.chdir(tmp_path)
    report(ReportConfig((small.relative_to(tmp_path),)))
    report(ReportConfig((small,), tmp_path / "second"))
    texts = [(folder / "report.md").read_text() for folder in (small / "report", tmp_path / "second")]
    assert texts[0] == texts[1]
    assert "\n\ny has no evaluation that could be read. Run drelu-timm evaluate y.\n" in texts[0]
    assert "## Robustness of 1 run\n" in texts[0]


def test_terminal(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(read("report", [str(runs), "--output-dir", str(tmp_path / "r")])) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith(" Dense")]
    assert rows[-1] == ["Dense", "D-ReLU-0.1", "95.00", "88.00", "–", "≤", "10.00", "masked", "2"]
    assert "The white-box accuracy of a masked row is not robustness" in out
    assert out.endswith(f"report in {tmp_path / 'r'}: open {tmp_path / 'r' / 'report.html'}\n")


def test_terminal_shows_fewer_seeds_bounds_and_full_names(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    write_result(write_run(small / "y", seed=1), accuracy={**ATTACKS, "autoattack": 0.75}, rows=False)
    write_result(small / "y", suite="quick", worst=0.7)
    long = write_run(small / "z", model="averylongnameofamodel_drelu", objective="mart", awp_gamma=0.1)
    write_result(long, accuracy={**ATTACKS, "autoattack": 0.75})
    report(ReportConfig((small,), tmp_path / "r"))
    out = capsys.readouterr().out
    assert "75.00 [n = 1]" in out and "≤ 75.00" in out
    assert (
        "averylongnameofamodel" in "".join(line[1:].partition(" ")[0] for line in out.splitlines()) and "…" not in out
    )


def test_a_run_of_train_and_evaluate(evaluated, tmp_path):
    outcomes = report(ReportConfig((evaluated,), tmp_path / "r"))
    assert not outcomes.broken
    assert {"figures/learned-caps-dense-digits-linf-eps-0.1.png", "tables/table-digits-linf-eps-0.1.md"} < written(
        tmp_path / "r"
    )


# The output folder


def test_another_process_that_writes_to_the_folder_is_named(small, tmp_path):
    lock = tmp_path / ".r.lock"
    code = f"""
import time
from pathlib import Path
from drelu_timm.files import held
with held(Path({str(lock)!r}), "--output-dir x"):
    print("held", flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as one:
        assert one.stdout is not None and one.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"--output-dir .*/r is in use by process {one.pid} on "):
            report(ReportConfig((small,), tmp_path / "r"))
        assert not (tmp_path / "r").exists()
        one.communicate("\n")
    report(ReportConfig((small,), tmp_path / "r"))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_leftovers_of_killed_reports_are_deleted(small, tmp_path):
    for leftover in (".r.new", "..r.new.0123abcd.part"):
        (tmp_path / leftover / "tables").mkdir(parents=True)
        (tmp_path / leftover / "report.md").touch()
    (tmp_path / ".other.new").mkdir()
    report(ReportConfig((small,), tmp_path / "r"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.new", "r", "runs"]


def test_an_error_leaves_the_earlier_report(small, tmp_path, monkeypatch):
    report(ReportConfig((small,), tmp_path / "r"))
    before = {name: (tmp_path / "r" / name).read_bytes() for name in written(tmp_path / "r")}
    write_result(write_run(small / "y", seed=1))

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("drelu_timm.report.write_page", fail)
    with pytest.raises(InputError, match=r"--output-dir .*/r cannot be written to \(.*No space left on device\)\. Use"):
        report(ReportConfig((small,), tmp_path / "r"))
    assert {name: (tmp_path / "r" / name).read_bytes() for name in written(tmp_path / "r")} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r", "runs"]


@pytest.mark.parametrize("content", [["x.txt"], ["numbers.json"], ["report.md", "numbers.json"], ["tables/x.md"]])
def test_a_folder_that_is_not_a_report_is_refused_and_unchanged(small, tmp_path, content):
    for name in content:
        (tmp_path / "etc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "etc" / name).write_text("mine")
    with pytest.raises(InputError, match=r"--output-dir .*/etc has other files and no report\. Use another\."):
        report(ReportConfig((small,), tmp_path / "etc"))
    assert written(tmp_path / "etc") == set(content)


def test_a_report_is_replaced_and_is_not_read_as_a_run(small):
    report(ReportConfig((small,)))
    assert "rows-mnist-linf-eps-0.1" in (small / "report" / "report.md").read_text()
    shutil.rmtree(small / "x")
    write_result(write_run(small / "y", dataset="digits"))
    (small / "report" / "mine.md").write_text("kept")
    report(ReportConfig((small,)))
    suffixes = ("md", "tex", "csv")
    names = ("rows", "table", "table-square")
    assert written(small / "report") == {
        *REPORT,
        "mine.md",
        *(f"tables/{name}-digits-linf-eps-0.1.{suffix}" for name in names for suffix in suffixes),
    }
    assert not list(small.glob(".report*"))


@pytest.mark.parametrize("name", ["report.md", "notes.txt"])
def test_a_folder_with_other_files_is_left_alone(small, tmp_path, name):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / name).write_text("mine")
    with pytest.raises(InputError, match=r"--output-dir .*/docs has other files and no report\. Use another\."):
        report(ReportConfig((small,), tmp_path / "docs"))
    assert written(tmp_path / "docs") == {name}
    assert (tmp_path / "docs" / name).read_text() == "mine"


def test_the_root_folder_is_refused(small):
    with pytest.raises(InputError, match=r"--output-dir / is the root folder\. Use another"):
        report(ReportConfig((small,), Path("/")))


def test_a_folder_that_cannot_be_written_to(small, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--output-dir .*file/r cannot be written to \(.*\)\. Use another"):
        report(ReportConfig((small,), tmp_path / "file" / "r"))


def test_a_linked_run(small, tmp_path):
    shutil.move(small / "x", tmp_path / "elsewhere")
    (small / "x").symlink_to(tmp_path / "elsewhere")
    report(ReportConfig((small,), tmp_path / "r"))
    records = json.loads((tmp_path / "r" / "numbers.json").read_text())
    assert all((small / source).is_file() for record in records for source in record["sources"])


def test_a_number_names_its_files(small, tmp_path):
    write_result(small / "x", suite="quick", accuracy={"apgd-ce": 0.7})
    write_result(write_run(small / "y", seed=1), accuracy={"pgd": 0.7}, n_examples=30)
    report(ReportConfig((small,), tmp_path / "r"))
    records = {record["column"]: record for record in json.loads((tmp_path / "r" / "numbers.json").read_text())}
    paper, quick = (f"x/results/{suite}-Linf-0.1.json" for suite in ("paper", "quick"))
    assert (records["fgsm"]["sources"], records["fgsm"]["n_examples"]) == ([paper], [20])
    assert set(records["apgd-ce"]["sources"]) == {paper, quick}
    assert records["cw-l2"]["sources"] == [paper]
    assert records["worst"]["n_examples"] == [20, 30]


def test_undecided_rows_are_named_first(small, tmp_path):
    write_result(write_run(small / "y", objective="at", **RELU), verdict="undecided")
    report(ReportConfig((small,), tmp_path / "r"))
    head, _, _ = (tmp_path / "r" / "report.md").read_text().partition("## Table 1")
    assert "the probes show neither a sound nor a masked accuracy: Dense AT." in head


def test_curves_of_other_suites_or_images_are_kept_apart(small, tmp_path):
    for seed, (n_examples, suite) in enumerate([(10, "quick"), (20, "quick"), (10, "all"), (10, "quick")], 1):
        run = write_run(small / f"y{seed}", seed=seed)
        write_result(run)
        write_sweep(run, [point(eps=eps, worst=0.5) for eps in ("0.1", "0.2")], n_examples, suite)
    report(ReportConfig((small,), tmp_path / "r"))
    text = (tmp_path / "r" / "report.md").read_text()
    for suite, images, seeds in (("quick", 10, 2), ("quick", 20, 1), ("all", 10, 1)):
        assert f"## Over eps: Dense, MNIST, Linf, suite {suite} on {images} images\n" in text
        assert f"under the suite {suite}, on the first {images} test images. Seeds: D-ReLU-0.1 {seeds}.\n" in text


def test_models_with_and_without_generated_images_are_in_one_figure(small, tmp_path):
    curve = [point(eps=eps, worst=0.5) for eps in ("0.05", "0.1")]
    for name, fraction in (("without", 0.0), ("with", 0.7)):
        run = write_run(small / name, objective="trades", beta=5.0, generated_fraction=fraction, **RELU)
        write_result(run)
        write_sweep(run, curve)
    report(ReportConfig((small,), tmp_path / "r"))
    text = (tmp_path / "r" / "report.md").read_text()
    assert text.count("## Over eps: Dense, MNIST, Linf\n") == 1
    assert "Seeds: TRADES-5 1, TRADES-5 + generated images 1." in text


def test_training_settings_are_listed(small, tmp_path):
    write_result(write_run(small / "y", objective="at", epochs=3, lr=1e-3, start={"epochs": 5}, **RELU))
    report(ReportConfig((small,), tmp_path / "r"))
    text = (tmp_path / "r" / "report.md").read_text()
    assert "Shared by all rows: norm Linf, eps 0.1." in text
    assert "| D-ReLU-0.1 | cap_lr 0.1, epochs 10 |" in text
    assert "| AT | epochs 3, lr 0.001 | D-ReLU: " in text


def test_a_title_stays_in_one_line(small, tmp_path):
    write_result(small / "x", dataset_title="MNIST\n# <b>Best</b>")
    report(ReportConfig((small,), tmp_path / "r"))
    lines = (tmp_path / "r" / "report.md").read_text().splitlines()
    assert not any(line.startswith("# <b>") or (line.startswith("## ") and "<b>" in line) for line in lines)


HOSTILE = "<script>alert(1)</script>|a\n# b\n\n| c | `d` [e](javascript:f) \\end{table} $g_h$ & {{ 7*7 }}"


def test_hostile_texts_are_escaped_in_every_format(small, tmp_path, capsys):
    """Titles, model names, settings, and evidence of a verdict come from files of others."""
    run = write_run(small / "y", model=f"net{HOSTILE}_drelu", objective="at", epochs=3, note=HOSTILE)
    write_result(run, dataset_title=HOSTILE, verdict="masked", hardware=HOSTILE)
    write_result(small / "x", dataset_title=HOSTILE)
    result = json.loads((run / "results" / "paper-Linf-0.1.json").read_text())
    result["verdict"]["evidence"] = [HOSTILE]
    result["settings"]["pgd"] = {HOSTILE.split()[0]: HOSTILE}
    write_json(run / "results" / "paper-Linf-0.1.json", result)
    report(ReportConfig((small,), tmp_path / "r", against_paper=True))

    html = (tmp_path / "r" / "report.html").read_text()
    assert html.count("<script>") == 1 and "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "49" not in html
    for path in [tmp_path / "r" / "report.md", *(tmp_path / "r" / "tables").glob("*.md")]:
        text = path.read_text()
        assert "<script>" not in text and "&lt;script>" in text
        assert not re.search(r"(?<!\\)\]\(javascript", text)
        headings = [line for line in text.splitlines() if line.startswith("#")]
        assert not any(line.startswith("# b") for line in headings)
        tables = [line for line in text.splitlines() if line.startswith("|")]
        for block in "\n".join(line if line.startswith("|") else "" for line in text.splitlines()).split("\n\n"):
            columns = {len(re.split(r"(?<!\\)\|", line)) for line in block.split("\n") if line}
            assert len(columns) <= 1
        assert tables
    for path in (tmp_path / "r" / "tables").glob("*.tex"):
        assert path.read_text().count(r"\end{table}") == 1 and "$g_h$" not in path.read_text()
    assert "\n# b" not in capsys.readouterr().out.replace(HOSTILE, "")


def test_an_unfinished_sweep_is_reported_first(small, tmp_path, capsys):
    write_run(small / "y", seed=1)
    write_json(small / "cells.json", {"cells": {"x": 1, "y": 1, "z": 2}})
    report(ReportConfig((small,), tmp_path / "r"))
    first = (tmp_path / "r" / "report.md").read_text().split("\n\n")[2]
    assert first == "This report is incomplete. 1 of 3 cells of the sweep runs are done; missing: y, z."
    assert "incomplete: 1 of 3 cells of the sweep runs are done; missing: y, z." in capsys.readouterr().out
    write_json(small / "cells.json", {"cells": {"x": 1}})
    report(ReportConfig((small,), tmp_path / "r"))
    assert "incomplete" not in (tmp_path / "r" / "report.md").read_text()


def test_a_report_without_drelu_does_not_speak_of_masking(tmp_path):
    write_result(write_run(tmp_path / "runs" / "x", **RELU))
    report(ReportConfig((tmp_path / "runs",), tmp_path / "r"))
    opening = (tmp_path / "r" / "report.md").read_text().split("\n## ")[1]
    assert opening.endswith("The verdict on all rows of the main tables is sound. No model has a D-ReLU.\n")


def test_the_papers_statistics_once_and_of_its_threat_model_only(small, tmp_path):
    write_result(small / "x", eps="0.3")
    write_result(write_run(small / "y", seed=1), dataset_title="MNIST (copy)")
    report(ReportConfig((small,), tmp_path / "r", against_paper=True))
    text = (tmp_path / "r" / "report.md").read_text()
    assert text.count("## Methods in the paper's table 1\n") == 1
    assert "## MNIST, Linf, eps 0.3\n" in text and "## Compared with the paper: MNIST, Linf, eps 0.3" not in text


def test_worst_cases_under_different_attacks_are_not_tested(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    path = tmp_path / "runs" / "dense_drelu-at-0" / "results" / "paper-Linf-0.1.json"
    content = json.loads(path.read_text())
    del content["accuracy"]["square"], content["settings"]["square"]
    write_json(path, content)
    report(ReportConfig((tmp_path / "runs",)))
    text = (tmp_path / "runs" / "report" / "report.md").read_text()
    assert "\n\nMethods in the worst case: MNIST, Linf, eps 0.1: 3 methods over 1 block cannot be" in text
    assert "Dense: the worst cases have no rank, since the methods" in text
    (square,) = (line for line in text.splitlines() if "| square | steps 40 |" in line)
    assert "| Dense AT seed 1; Dense TRADES-6; " in square


def test_untested_pairs_are_named(small, tmp_path):
    for name, train, result in (
        ("at", {"objective": "at"}, {}),
        ("mart", {"objective": "mart"}, {"n_examples": 30}),
        ("trades", {"objective": "trades"}, {"rows": False}),
        ("natural", {"seed": 1}, {}),
    ):
        write_result(write_run(small / name, **train, **RELU), **result)
    write_rows(write_result(write_run(small / "trades1", objective="trades", beta=1.0, **RELU)).with_suffix(".csv"), [])
    report(ReportConfig((small,), tmp_path / "r"))
    _, _, pairs = (tmp_path / "r" / "report.md").read_text().partition("## Pairs of methods")
    assert "| Dense | AT | D-ReLU-0.1 | 0 | 20 |" in pairs and pairs.partition("\n## ")[0].count("| Dense |") == 1
    (untested,) = (
        line for line in pairs.splitlines() if line.startswith("Not tested, without a common seed with rows")
    )
    for pair in ("natural and AT", "AT and TRADES-6", "AT and MART-6", "D-ReLU-0.1 and MART-6"):
        assert f"Dense {pair}" in untested
    assert "Dense AT and D-ReLU-0.1" not in untested


# Bad input


def test_broken_files_are_named_and_the_exit_code_is_1(small, tmp_path, capsys):
    broken = write_result(write_run(small / "y", seed=1))
    broken.write_text("{")
    assert main(read("report", [str(small), "--output-dir", str(tmp_path / "r")])) == 1
    assert f"broken, left out: {broken} cannot be read as JSON" in capsys.readouterr().out
    assert (
        "## Broken files, left out\n\ny/results/paper-Linf-0.1.json cannot be"
        in (tmp_path / "r" / "report.md").read_text()
    )


def test_rows_cut_short_are_named_and_the_rest_is_made(small, tmp_path):
    other = write_run(small / "y", **RELU)
    write_rows(write_result(other).with_suffix(".csv"), [""])
    outcomes = report(ReportConfig((small,), tmp_path / "r"))
    assert len(outcomes.broken) == 1 and "has 1 rows" in outcomes.broken[0]
    assert "No two methods of a model have a common seed" in (tmp_path / "r" / "report.md").read_text()


def test_nothing_to_report(tmp_path, capsys):
    write_result(write_run(tmp_path / "x")).write_text("")
    with pytest.raises(InputError, match=r"Nothing to report \| .* cannot be read as JSON .* \| .*x has no evaluation"):
        report(ReportConfig((tmp_path,)))
    assert not (tmp_path / "report").exists()
    with pytest.raises(InputError, match=r"RUNS is missing\. Give run directories"):
        report(ReportConfig(()))


def test_several_eps_and_missing_seeds_are_reported(small, tmp_path):
    write_result(write_run(small / "y", seed=1))
    write_result(write_run(small / "z", seed=1, objective="at", **RELU), n_examples=10)
    write_result(write_run(small / "w"), eps="0.3")
    report(ReportConfig((small,), tmp_path / "r"))
    text = (tmp_path / "r" / "report.md").read_text()
    assert (
        "The 2 groups cannot be compared with each other and have separate tables: MNIST, Linf, eps 0.1; MNIST" in text
    )
    assert "MNIST, Linf, eps 0.1: seed 0, which other rows have, is missing for Dense AT." in text
    assert "MNIST, Linf, eps 0.1: the rows have different numbers of test images: 10, 20." in text
    assert "2 methods over 0 blocks cannot be compared. Friedman's test needs at least 3 methods" in text
    assert "| 10 | 1 of 2 |" in text


def test_different_attack_settings_are_reported(small, tmp_path):
    strong = write_result(write_run(small / "y", seed=1))
    content = json.loads(strong.read_text())
    content["settings"]["pgd"] = {"steps": 100}
    write_json(strong, content)
    report(ReportConfig((small,), tmp_path / "r"))
    text = (tmp_path / "r" / "report.md").read_text()
    assert "Runs were attacked differently by pgd: their accuracies under it are not comparable." in text


def test_without_matplotlib_the_tables_are_made(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("drelu_timm.results.plotting.find_spec", lambda name: None)
    report(ReportConfig((runs,), tmp_path / "r"))
    text = (tmp_path / "r" / "report.md").read_text()
    assert text.count(": matplotlib, which draws") == 4
    assert "tables/table-1-mnist-linf-eps-0.1.md" in written(tmp_path / "r")


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(read("report", ["--help"]))
    out = capsys.readouterr().out
    assert "--against-paper" in out and "RUNS" in out
    assert tyro.cli(ReportConfig, args=["a", "b"]).runs[1].name == "b"
