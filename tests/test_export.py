"""From an evaluated digits run to what timm and RobustBench load."""

import csv
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import tyro
from timm.models import _factory
from torch import nn

from drelu_timm.cards import VERDICTS, model_card
from drelu_timm.data import load_images, to_float
from drelu_timm.entries import AUTOATTACK, Measured, Paper, model_info
from drelu_timm.errors import InputError
from drelu_timm.evaluate import EvaluateConfig, evaluate
from drelu_timm.export import ExportConfig, export, main
from drelu_timm.robust_models import register_robust_model
from drelu_timm.robustbench import adapt
from drelu_timm.runs import Run
from drelu_timm.suites import SUITES
from drelu_timm.train import TrainConfig, train

KEY = "Tester2026Digits_dense"
NAME = "tester2026digits_dense_digits_linf"
RESULTS = "quick-Linf-0.1"
N = 60
TEST_SIZE = len(load_images("digits", None, "test"))
TIMM_READS_FOLDERS = hasattr(_factory, "load_model_config_from_path")


def robustbench():
    try:
        return adapt()
    except InputError as error:
        if "not installed" in str(error) or "torchattacks" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run on digits with one evaluation."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    train(TrainConfig("dense_drelu", "digits", output_dir=path, epochs=5, cap=20.0, width=16, eps="0.1"))
    evaluate(EvaluateConfig(str(path), suite="quick", n_examples=N))
    return path


@pytest.fixture(scope="module")
def results(evaluated):
    return json.loads((evaluated / "results" / f"{RESULTS}.json").read_text())


@pytest.fixture
def run(evaluated, tmp_path):
    """A copy of it to spoil."""
    return Path(shutil.copytree(evaluated, tmp_path / "run", ignore=shutil.ignore_patterns("export")))


@pytest.fixture(scope="module")
def exported(evaluated):
    return export(ExportConfig(evaluated, KEY))


@pytest.fixture(scope="module")
def measured(evaluated, results):
    return Measured(
        KEY, Run.open(evaluated).config, results, {"mean": 9.0, "min": 1.0, "max": 20.0}, 1000, TEST_SIZE, Paper()
    )


def test_the_folder_holds_what_it_should_and_nothing_is_left_beside_it(exported):
    files = sorted(str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file())
    assert files == [
        "README.md",
        "config.json",
        "model.safetensors",
        f"model_info/digits/Linf/{KEY}.json",
        "register.py",
    ]
    assert [path.name for path in exported.parent.iterdir()] == [KEY]


def test_the_entry_has_all_fields_of_robustbench_in_its_formats(exported, results):
    entry = json.loads((exported / f"model_info/digits/Linf/{KEY}.json").read_text())
    number = re.compile(r"\d{1,3}\.\d\d")
    assert all(number.fullmatch(entry[field]) for field in ("clean_acc", "reported", "external"))
    assert entry == {
        "link": None,
        "name": None,
        "authors": None,
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": "digits",
        "venue": None,
        "architecture": "dense_drelu",
        "eps": "0.1",
        "clean_acc": f"{100 * results['clean']:.2f}",
        "reported": f"{100 * results['worst']:.2f}",
        "autoattack_acc": None,
        "external": f"{100 * results['worst']:.2f}",
        "footnote": entry["footnote"],
        "unreliable": results["verdict"]["verdict"] == "masked",
    }
    assert entry["footnote"].startswith(f"Preliminary: measured on 60 of the {TEST_SIZE} test images of Digits. ")
    assert f"Gradient-masking verdict: {results['verdict']['verdict']}. AutoAttack was not run." in entry["footnote"]


@pytest.mark.parametrize(
    ("verdict", "autoattack", "worst", "external", "unreliable"),
    [
        ("sound", 0.5, 0.5, None, False),
        ("sound", 0.5, 0.4312, "43.12", False),
        ("undecided", 0.5, 0.4312, "43.12", False),
        ("masked", 0.5, 0.031, "3.10", True),
        ("masked", 0.5, 0.5, "50.00", True),
        ("sound", None, 0.4, "40.00", False),
    ],
)
def test_the_board_ranks_by_the_worst_case(measured, verdict, autoattack, worst, external, unreliable):
    accuracy = {"pgd": 0.9} if autoattack is None else {"autoattack": autoattack}
    judged = {"verdict": verdict, "evidence": []}
    results = {**measured.results, "accuracy": accuracy, "worst": worst, "verdict": judged}
    entry = model_info(replace(measured, results=results))
    assert (entry.get("external"), entry["unreliable"]) == (external, unreliable)
    assert entry["reported"] == f"{100 * worst:.2f}"
    assert (entry["autoattack_acc"] is None) == (autoattack is None)
    assert f"verdict: {verdict}" in entry["footnote"]


def test_the_accuracy_under_autoattack_is_found_in_the_suite_that_has_it():
    assert AUTOATTACK in SUITES["standard"]


def test_paper_metadata_comes_from_the_options(run):
    paper = {"title": "A Title", "authors": "A. One, B. Two", "link": "https://example.org", "venue": "ICLR 2026"}
    folder = export(ExportConfig(run, KEY, **paper))
    entry = json.loads((folder / f"model_info/digits/Linf/{KEY}.json").read_text())
    assert [entry[field] for field in ("name", "authors", "link", "venue")] == list(paper.values())
    assert "A. One, B. Two, A Title, ICLR 2026, https://example.org" in (folder / "README.md").read_text()


def test_a_number_of_the_whole_test_set_is_not_preliminary(measured):
    whole = replace(measured, results={**measured.results, "n_examples": TEST_SIZE})
    assert f"Measured on all {TEST_SIZE} test images of Digits." in model_info(whole)["footnote"]
    assert "reliminary" not in model_card(whole, []) + model_info(whole)["footnote"]
    assert model_card(measured, []).count("reliminary") == 3


def test_timm_gives_the_model_with_its_normalisation(exported, evaluated):
    model = timm.create_model(NAME, pretrained=True, num_classes=10)
    images = torch.rand(4, 1, 8, 8)
    assert isinstance(model, nn.Sequential)
    assert [name for name, _ in model.named_children()] == ["normalize", "model"]
    assert not model.training
    assert torch.equal(model(images), Run.open(evaluated).load_model()(images))


def test_robustbench_loads_it_with_the_clean_accuracy_of_the_run(exported, results):
    rb = robustbench()
    runpy.run_path(str(exported / "register.py"))
    model = rb.utils.load_model(KEY, dataset="digits", threat_model="Linf")
    test = load_images("digits", None, "test")[:N]
    assert rb.utils.clean_accuracy(model, to_float(test.images), test.labels) == pytest.approx(results["clean"])
    assert "`robustbench.utils.load_model`: 60 of 60 predictions" in (exported / "README.md").read_text()


@pytest.mark.skipif(not TIMM_READS_FOLDERS, reason=f"timm {timm.__version__} has no local-dir")
def test_timm_reads_the_folder_itself(exported):
    inner = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    whole = timm.create_model(NAME, pretrained=True)
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(inner(whole.normalize(images)), whole(images))


def test_what_the_card_says_of_loading_runs_as_pasted(exported):
    blocks = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    try:
        robustbench()
    except pytest.skip.Exception:
        blocks = [block for block in blocks if "robustbench" not in block]
    if not TIMM_READS_FOLDERS:
        blocks = [block for block in blocks if "local-dir" not in block]
    code = "\n".join([*blocks, "print('logits', model(__import__('torch').rand(2, 1, 8, 8)).shape)"])
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=exported, capture_output=True, text=True)
    assert "logits torch.Size([2, 10])" in done.stdout, done.stderr


def test_the_hub_reads_the_card(exported, results):
    card = huggingface_hub.ModelCard((exported / "README.md").read_text())
    assert (card.data.license, card.data.library_name) == ("mit", "timm")
    verdict = results["verdict"]["verdict"]
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values == {
        "Clean accuracy, preliminary": round(100 * results["clean"], 2),
        f"Robust accuracy, worst case (Linf, eps 0.1; gradient masking: {verdict}, preliminary)": round(
            100 * results["worst"], 2
        ),
    }


def test_the_card_says_every_number_with_the_verdict_and_its_evidence(exported, results):
    card = (exported / "README.md").read_text()
    for attack, accuracy in results["accuracy"].items():
        assert f"| {attack} | {100 * accuracy:.2f} |" in card
    assert f"| **worst case** | {100 * results['worst']:.2f} |" in card
    assert all(f"- {sentence}" in card for sentence in results["verdict"]["evidence"])
    assert VERDICTS[results["verdict"]["verdict"]] in card
    assert results["hardware"] in card
    assert f"torch {results['versions']['torch']}" in card
    assert "Its caps after training: mean " in card
    assert "10.3390/math12223551" in card


def test_the_card_of_a_masked_model_says_that_it_is_not_robust(measured):
    masked = {**measured.results, "verdict": {"verdict": "masked", "evidence": ["BPDA leaves 4.4 %."]}}
    card = model_card(replace(measured, results=masked), [])
    assert "**The gradients are masked.**" in card
    assert "- BPDA leaves 4.4 %." in card
    assert "- Not robust: the accuracy under white-box attack comes from masked gradients." in card


def test_the_command_in_the_card_repeats_the_training(exported, evaluated):
    (command,) = re.findall(r"```bash\n(drelu-timm train .*?)\n```", (exported / "README.md").read_text(), re.DOTALL)
    flags = shlex.split(command.replace("\\\n", " "))[2:]
    repeated = asdict(tyro.cli(TrainConfig, args=flags))
    trained = Run.open(evaluated).config["train"]
    read = {"data_dir": Path(trained["data_dir"]), "generated": tuple(map(Path, trained["generated"]))}
    assert {name: repeated[name] for name in trained} == {**trained, **read}


def _edit(path: Path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _other_weights(run):
    file = run / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _other_predictions(run):
    path = run / "results" / f"{RESULTS}.csv"
    rows = list(csv.DictReader(path.open()))
    for row in rows[:2]:
        row["clean_prediction"] = str((int(row["clean_prediction"]) + 1) % 10)
    _write_rows(path, rows)


def _other_labels(run):
    path = run / "results" / f"{RESULTS}.csv"
    rows = list(csv.DictReader(path.open()))
    rows[0]["label"] = str((int(rows[0]["label"]) + 1) % 10)
    _write_rows(path, rows)


def _drop_column(run):
    path = run / "results" / f"{RESULTS}.csv"
    rows = [{name: row[name] for name in ("index", "label")} for row in csv.DictReader(path.open())]
    _write_rows(path, rows)


def _write_rows(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _verdict(run):
    _edit(run / "results" / f"{RESULTS}.json", verdict={"evidence": []})


def _no_worst(run):
    path = run / "results" / f"{RESULTS}.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in ("worst", "seed")}))


@pytest.mark.parametrize(
    ("spoil", "settings", "message"),
    [
        (lambda run: shutil.rmtree(run), {}, r"run is no run directory"),
        (lambda run: shutil.rmtree(run / "results"), {}, r"has no evaluation; make one: drelu-timm evaluate .*run"),
        (lambda run: (run / "results" / f"{RESULTS}.json").write_text("{"), {}, r"\.json cannot be read as JSON"),
        (_no_worst, {}, r"\.json lacks seed, worst; delete it and evaluate anew"),
        (_verdict, {}, r"no verdict on gradient masking, and no number leaves without one; delete it"),
        (_other_weights, {}, r"\.json was measured on other weights \(sha256 \w{12}\) than .*model holds"),
        (
            lambda run: _edit(run / "results" / f"{RESULTS}.json", eps="0.2"),
            {},
            r"no evaluation at its own dataset, norm and eps; choose by",
        ),
        (lambda run: (run / "results" / f"{RESULTS}.csv").unlink(), {}, r"\.csv is no whole table of an evaluation"),
        (_drop_column, {}, r"\.csv is no whole table of an evaluation \(KeyError\('clean_prediction'\)\)"),
        (_other_labels, {}, r"\.csv has other labels than the test images of Digits; .*--data-dir"),
        (
            _other_predictions,
            {},
            r"timm.create_model loads is not the one .* \(58 of 60 predictions equal, clean accuracy",
        ),
        (
            None,
            {"results": "quick-Linf-0.2"},
            r"--results 'quick-Linf-0\.2' is unknown; did you mean quick-Linf-0\.1\?",
        ),
        (None, {"key": "Tester2026.1"}, r"--key 'Tester2026\.1' is no RobustBench key; use letters, digits, - and _"),
        (lambda run: (run / "export" / KEY).mkdir(parents=True), {}, r"--output-dir .*export.* exists already"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(run, spoil, settings, message):
    if spoil:
        spoil(run)
    before = sorted(run.rglob("*"))
    with pytest.raises(InputError, match=message) as caught:
        export(ExportConfig(run, **{"key": KEY, **settings}))
    assert "\n" not in str(caught.value)
    assert sorted(run.rglob("*")) == before or sorted(run.rglob("*")) == sorted([*before, run / "export"])


def test_a_key_of_robustbench_is_taken_in_whatever_case(run):
    robustbench()
    _edit(run / "results" / f"{RESULTS}.json", dataset="cifar10")
    with pytest.raises(
        InputError, match="--key 'rice2020overfitting': RobustBench has a model 'Rice2020Overfitting' al"
    ):
        export(ExportConfig(run, "rice2020overfitting", results=RESULTS))


def test_of_several_evaluations_the_largest_in_the_runs_threat_model_is_exported(run):
    for suffix in ("json", "csv"):
        shutil.copy(run / "results" / f"{RESULTS}.{suffix}", run / "results" / f"small.{suffix}")
    _edit(run / "results" / "small.json", n_examples=59, suite="small")
    assert "suite quick" in (export(ExportConfig(run, KEY)) / "README.md").read_text()
    named = export(ExportConfig(run, KEY, results="small", output_dir=run / "small"))
    assert "suite small" in (named / "README.md").read_text()


def test_the_command_says_where_the_files_are(run, capsys):
    main([str(run), "--key", KEY, "--output_dir", str(run / "here")])
    assert (
        f"{run / 'here' / 'model_info' / 'digits' / 'Linf' / KEY}.json is RobustBench's entry"
        in capsys.readouterr().out
    )


def test_an_exported_model_is_registered_or_refused_with_a_reason(exported, tmp_path):
    assert register_robust_model("Tester-2026", "digits", "Linf", exported) == "tester_2026_digits_linf"
    with pytest.raises(InputError, match="holds no exported model"):
        register_robust_model(KEY, "digits", "Linf", tmp_path)
    with pytest.raises(InputError, match=r"num_classes=7: .* has 10 classes; leave it out"):
        timm.create_model(NAME, pretrained=True, num_classes=7)
    with pytest.raises(InputError, match=r"is a trained model: timm.create_model\('tester2026.*, pretrained=True\)"):
        timm.create_model(NAME)
    with pytest.raises(TypeError, match="drop_rate"):
        timm.create_model(NAME, pretrained=True, drop_rate=0.5)
