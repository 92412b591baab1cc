"""Export of an evaluated run on digits, and what timm, RobustBench and the Hub load from it."""

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import _factory
from torch import nn

from drelu_timm.attacks.threat_model import ThreatModel
from drelu_timm.data.images import to_float
from drelu_timm.data.readers import load_images
from drelu_timm.errors import InputError
from drelu_timm.export import export, main, push_exported
from drelu_timm.files import read_toml
from drelu_timm.flags import ExportConfig, read
from drelu_timm.hashing import sha256_of
from drelu_timm.publishing.evaluations import _differing, choose_evaluation, further_evaluations, with_further
from drelu_timm.publishing.verification import read_evaluated
from drelu_timm.runs import Run

KEY = "Tester2026Digits_dense"
NAME = "tester2026digits_dense_digits_linf"
RESULTS = "standard-Linf-0.1"
PAPER = {"title": "A Title", "authors": "A. One, B. Two", "link": "https://example.org", "venue": "ICLR 2026"}
N = 60
TEST_SIZE = len(load_images("digits", None, "test"))
TIMM_READS_FOLDERS = hasattr(_factory, "load_model_config_from_path")


@pytest.fixture(scope="module")
def results(evaluated):
    return json.loads((evaluated / "results" / f"{RESULTS}.json").read_text())


@pytest.fixture
def run(evaluated, tmp_path):
    """Copy of it that a test may change."""
    return copy_of(evaluated, tmp_path / "run")


@pytest.fixture(scope="module")
def exported(evaluated):
    return export(ExportConfig(evaluated, KEY, **PAPER))


def copy_of(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to, ignore=shutil.ignore_patterns("export")))


def another_seed(run: Path, seed: int) -> Path:
    """Copy a run, with another seed and other weights."""
    other = copy_of(run, run.with_name(f"seed{seed}"))
    _edit_train(other, seed=seed)
    weights = other / "model" / "model.safetensors"
    save_file({name: tensor + seed for name, tensor in load_file(weights).items()}, weights)
    for result in (*other.glob("results/*.json"), *other.glob("sweeps/*.json")):
        _edit(result, model_digest=sha256_of(weights))
    return other


# What is written


def test_the_folder_is_complete_and_nothing_is_left_next_to_it(exported):
    files = sorted(str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file())
    assert files == [
        "CHECKS.md",
        "hub/README.md",
        f"hub/{KEY}.png",
        "hub/config.json",
        "hub/model.safetensors",
        *(f"model_cards/digits/Linf/{KEY}.{suffix}" for suffix in ("json", "md", "png", "safetensors")),
        f"model_info/digits/Linf/{KEY}.json",
        "register.py",
        f"scripts/digits/Linf/{KEY}.toml",
        f"submission/{KEY}_adversarial.pt",
        "submission/autoattack.log",
        "submission/new-external-evaluation.md",
        "submission/new-model.md",
        "weights/SHA256SUMS",
        f"weights/{KEY}.pt",
        f"weights/{KEY}.safetensors",
    ]
    assert [path.name for path in exported.parent.iterdir()] == [KEY]


def test_the_sums_are_those_of_the_weights(exported, evaluated):
    lines = (exported / "weights" / "SHA256SUMS").read_text().splitlines()
    assert {line.split()[1]: line.split()[0] for line in lines} == {
        name: sha256_of(exported / "weights" / name)
        for name in (f"{KEY}.safetensors", f"{KEY}.pt", "../hub/config.json")
    }
    assert lines[0].split()[0] == Run.open(evaluated).model_digest


def test_the_config_is_checked_when_the_model_is_loaded(exported, evaluated, tmp_path):
    config = exported / "hub" / "config.json"
    assert config.read_bytes() == (evaluated / "model" / "config.json").read_bytes()
    for file in ("register.py", "hub/README.md"):
        assert sha256_of(config) in (exported / file).read_text()
    changed = Path(shutil.copytree(exported, tmp_path / "changed"))
    (changed / "hub" / "config.json").write_text(config.read_text() + " ")
    code = f"import timm, register; timm.create_model('{NAME}', pretrained=True)"
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=changed, capture_output=True, text=True)
    assert "config.json has other settings than registered" in done.stderr


def test_the_adversarial_images_have_the_size_of_the_test_set_and_give_the_worst_case(exported, results):
    adversarial = torch.load(exported / "submission" / f"{KEY}_adversarial.pt", weights_only=True)
    test = load_images("digits", None, "test")
    clean = to_float(test.images)
    assert adversarial.shape == clean.shape and adversarial.dtype == torch.float32
    assert torch.equal(adversarial[N:], clean[N:])
    assert (adversarial - clean).abs().max() <= 0.1 + 1e-6
    model = timm.create_model(NAME, pretrained=True)
    with torch.no_grad():
        right = model(adversarial[:N]).argmax(1) == test.labels[:N]
    assert right.double().mean().item() == pytest.approx(results["worst"])


def test_paths_of_this_machine_are_not_published(exported, evaluated):
    for path in exported.rglob("*"):
        if path.suffix in (".md", ".json", ".toml", ".py", ".log"):
            assert str(evaluated.parent) not in path.read_text(), path


def test_the_checks_are_listed_with_their_results(exported, results):
    page = (exported / "CHECKS.md").read_text()
    clean = f"clean accuracy {100 * results['clean']:.2f} %"
    assert f"| timm.create_model | its predictions | 60 of 60 as in the evaluation; {clean}" in page
    assert "| forward pass | the same 60 images twice | bit-equal logits: deterministic |" in page
    assert r"| normalization | is the first layer, for images in \[0, 1\] | mean 0, std 1 |" in page
    assert f"{100 * results['worst']:.2f} %, the worst case {100 * results['worst']:.2f} % |" in page


def test_paper_metadata_may_come_from_a_file_and_flags_win(run):
    paper = run.parent / "paper.toml"
    paper.write_text("\n".join(f'{name} = "{text}"' for name, text in PAPER.items()))
    folder = export(ExportConfig(run, KEY, paper=paper, venue="arXiv, Mar 2026", benchmark_examples=0))
    entry = json.loads((folder / f"model_info/digits/Linf/{KEY}.json").read_text())
    assert [entry[field] for field in ("name", "authors", "link", "venue")] == [
        *(PAPER[name] for name in ("title", "authors", "link")),
        "arXiv, Mar 2026",
    ]


def test_other_seeds_are_on_the_card(run):
    others = another_seed(run, 1), another_seed(run, 2)
    folder = export(ExportConfig(run, KEY, seeds=others, **PAPER, benchmark_examples=0))
    card = (folder / "hub" / "README.md").read_text()
    assert "this model has seed 0." in card
    assert len(re.findall(r"^\| [012] \| 60 \|", card, flags=re.MULTILINE)) == 3
    assert "of 3 seeds: clean" in card
    seeds = [f"runs/{KEY}/seed1", f"runs/{KEY}/seed2"]
    assert read_toml(folder / f"scripts/digits/Linf/{KEY}.toml", "recipe")["export"]["seeds"] == seeds


# What loads it


def test_timm_loads_the_model_with_its_normalization(exported, evaluated):
    model = timm.create_model(NAME, pretrained=True, num_classes=10)
    images = torch.rand(4, 1, 8, 8)
    assert isinstance(model, nn.Sequential)
    assert [name for name, _ in model.named_children()] == ["normalize", "model"]
    assert not model.training
    assert torch.equal(model(images), Run.open(evaluated).load_model()(images))


def test_robustbench_loads_and_benchmarks_it_with_the_accuracies_of_the_run(exported, results, robustbench):
    model = robustbench.utils.load_model(KEY, dataset="digits", threat_model="Linf")
    test = load_images("digits", None, "test")[:N]
    clean = robustbench.utils.clean_accuracy(model, to_float(test.images), test.labels)
    assert clean == pytest.approx(results["clean"])
    accuracies = robustbench.eval.benchmark(model, n_examples=N, dataset="digits", threat_model="Linf", eps=0.1)
    assert accuracies == pytest.approx((results["clean"], results["accuracy"]["autoattack"]), abs=1.5 / N)
    page = (exported / "CHECKS.md").read_text()
    assert "| robustbench.utils.load_model | its predictions | 60 of 60 as in the evaluation" in page
    assert "| the first 32 test images | robustbench.eval.benchmark | clean " in page


@pytest.mark.skipif(not TIMM_READS_FOLDERS, reason=f"timm {timm.__version__} has no local-dir")
def test_timm_reads_the_folder_itself(exported):
    inner = timm.create_model(f"local-dir:{exported / 'hub'}", pretrained=True).eval()
    whole = timm.create_model(NAME, pretrained=True)
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(inner(whole.normalize(images)), whole(images))


def test_the_code_on_the_card_runs_as_pasted(exported, request):
    blocks = re.findall(r"```python\n(.*?)```", (exported / "hub" / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    try:
        request.getfixturevalue("robustbench")
    except pytest.skip.Exception:
        blocks = [block for block in blocks if "robustbench.utils" not in block]
    if not TIMM_READS_FOLDERS:
        blocks = [block for block in blocks if "local-dir" not in block]
    for block in blocks:
        code = block + "\nprint('logits', model(__import__('torch').rand(2, 1, 8, 8)).shape)"
        done = subprocess.run([sys.executable, "-B", "-c", code], cwd=exported / "hub", capture_output=True, text=True)
        assert "logits torch.Size([2, 10])" in done.stdout, done.stderr


def test_robustbenchs_own_command_runs_with_the_registration_file(exported, robustbench):
    command = ["-m", "drelu_timm.robustbench", exported / "register.py", "--model_name", KEY, "--dataset", "digits"]
    command += ["--n_ex", "8", "--eps", "0.1", "--device", "cpu", "--threat_model", "Linf", "--to_disk", ""]
    done = subprocess.run([sys.executable, *map(str, command)], cwd=exported, capture_output=True, text=True)
    assert "Adversarial accuracy: " in done.stdout, done.stderr


# Bad input


def _edit(path: Path, **changes):
    """Change fields of a JSON file; a result has no seal then, as results of version 0.1.0."""
    content = {**json.loads(path.read_text()), **changes}
    content.pop("seal", None)
    path.write_text(json.dumps(content))


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


def _no_verdict(run):
    _edit(run / "results" / f"{RESULTS}.json", verdict={"evidence": []})


def _no_worst(run):
    path = run / "results" / f"{RESULTS}.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "worst"}))


def _other_adversarial(run):
    path = run / "results" / f"{RESULTS}.adversarial.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _fewer_rows(run):
    path = run / "results" / f"{RESULTS}.csv"
    _write_rows(path, list(csv.DictReader(path.open()))[:-1])


def _initialize(run):
    config = json.loads((run / "config.json").read_text())
    _edit(run / "config.json", init_from=config)


def _pgd_only(run):
    accuracy = json.loads((run / "results" / f"{RESULTS}.json").read_text())["accuracy"]
    _edit(run / "results" / f"{RESULTS}.json", accuracy={"pgd": accuracy["pgd"]})


def _results(**changes):
    return lambda run: _edit(run / "results" / f"{RESULTS}.json", **changes)


@pytest.mark.parametrize(
    ("spoil", "settings", "message"),
    [
        (lambda run: shutil.rmtree(run), {}, r"run is not a run directory"),
        (lambda run: shutil.rmtree(run / "results"), {}, r"has no evaluation\. Make one: drelu-timm evaluate .*run"),
        (lambda run: (run / "results" / f"{RESULTS}.json").write_text("{"), {}, r"\.json cannot be read as JSON"),
        (_no_worst, {}, r"\.json has no worst\. The file is cut or of another version; create it again\."),
        (
            _no_verdict,
            {},
            r"standard-Linf-0\.1\.json: verdict has no verdict\. The file is cut or of another version",
        ),
        (_other_weights, {}, r"\.json was measured on other weights \(sha256 \w{12}\) than those in .*model \("),
        (_results(eps="0.2"), {}, r"no evaluation on digits for Linf, eps 0\.1 in .*-0\.1\.json\. Run that evaluation"),
        (_results(norm="L2"), {"results": RESULTS}, r"no evaluation on digits for Linf, eps 0\.1 in .*/standard-Linf"),
        (
            None,
            {"dataset": "imagenet"},
            r"--dataset imagenet is not what the run was trained on \(digits\)\. Only a run on a folder may",
        ),
        (
            None,
            {"eps": "0.2"},
            r"no evaluation on digits for Linf, eps 0\.2 in .*-0\.1\.json\. Run that evaluation, or pass",
        ),
        (
            _results(clean=0.99),
            {},
            r"\.csv has another clean accuracy than .*\.json\. Delete the result and evaluate",
        ),
        (_results(worst=0.01), {}, r"\.json has another worst case than the rows next to it"),
        (_results(verdict="sound"), {}, r"\.json: verdict is 'sound'\. It must be a table of names and values\."),
        (None, {"benchmark_examples": -3}, r"--benchmark-examples -3 is negative\. Use 0 or more"),
        (None, {"output_dir": Path("/proc/x/y")}, r"--output-dir /proc/x/y cannot be written to \(.*\)\. Use another"),
        (None, {"title": "Two\nlines"}, r"RobustBench's entry would be invalid \(name: 'Two"),
        (
            lambda run: (run / "results" / f"{RESULTS}.csv").unlink(),
            {},
            r"The \.csv with a row per example is missing next to",
        ),
        (_drop_column, {}, r"\.csv has 60 rows, or no column broken_by, for 60 test images: it is cut"),
        (_fewer_rows, {}, r"\.csv has 59 rows, or no column broken_by, for 60 test images: it is cut"),
        (_other_labels, {}, r"\.csv has another clean accuracy than"),
        (_other_adversarial, {}, r"\.adversarial\.safetensors is missing, or not what the evaluation wrote"),
        (
            _other_predictions,
            {},
            r"\.csv has another clean accuracy than|create_model loads a .* \(58 of 60 predictions are equal, cl",
        ),
        (
            _results(verdict={"verdict": "masked", "evidence": []}),
            {},
            r"gradients are masked, so .* overestimate\. --as-masked exports .* worst case of \d+\.\d\d %\.$",
        ),
        (
            _results(verdict={"verdict": "sound", "evidence": []}),
            {"as_masked": True},
            r"--as-masked does not match the verdict \((sound|undecided)\)\. Leave it out",
        ),
        (
            _pgd_only,
            {"title": None, "venue": None},
            r"entry lacks --title, --venue, AutoAttack's accuracy \(drelu-timm evaluate .* standard\)\. --paper",
        ),
        (lambda run: (run / "log.jsonl").write_text('{"epoch'), {}, r"log\.jsonl is not a complete log of a training"),
        (None, {"n_examples": 10_000}, r"--n-examples 10000 is more than the evaluation has \(60\)\. Evaluate again"),
        (
            None,
            {"link": "example.org"},
            r"RobustBench's entry would be invalid \(link: 'example\.org'",
        ),
        (None, {"paper": Path("nowhere.toml")}, r"--paper nowhere\.toml cannot be read as TOML"),
        (None, {"results": "standard-Linf-0.2"}, r"--results 'standard-Linf-0\.2' is unknown; did you mean standard-"),
        (
            None,
            {"key": "Tester2026.1"},
            r"--key 'Tester2026\.1' is not a RobustBench key\. Use letters, digits, - and _",
        ),
        (lambda run: (run / "export" / KEY).mkdir(parents=True), {}, r"--output-dir .*export.* exists already"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(run, spoil, settings, message):
    if spoil:
        spoil(run)
    before = sorted(run.rglob("*"))
    with pytest.raises(InputError, match=message) as caught:
        export(ExportConfig(run, **{"key": KEY, **PAPER, **settings}))
    assert "\n" not in str(caught.value)
    assert sorted(run.rglob("*")) == before or sorted(run.rglob("*")) == sorted([*before, run / "export"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = ", r"cannot be read as TOML"),
        ('titel = "A"', r"paper\.toml: 'titel' is unknown; did you mean title\?"),
        ("title = 3", r"paper\.toml: title is 3\. It must be text in quotes\."),
    ],
)
def test_an_invalid_paper_file_is_refused(run, text, message):
    (run / "paper.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        export(ExportConfig(run, KEY, paper=run / "paper.toml"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda run: _edit_train(run, lr=0.1),
            r"--seeds .*seed1 differs from .*run in more than the seed \(lr\)\. Leave",
        ),
        (lambda run: _edit_train(run, seed=0), r"--seeds .*seed1 repeats a seed \(0\) or weights\. Pass"),
        (
            _results(suite="quick"),
            r"seed1/results/standard-.* and .*/run/results/standard-.*\.json differ in suite",
        ),
        (_results(precision="bf16", n_examples=30), r"differ in n_examples, precision\. Evaluate both alike"),
        (
            _results(verdict={"verdict": "masked", "evidence": []}),
            r"seed1 has masked gradients, which",
        ),
        (_initialize, r"in more than the seed \(init_from\)"),
        (
            lambda run: shutil.rmtree(run / "results"),
            r"seed1 has no evaluation\. Make one: drelu-timm evaluate .*seed1",
        ),
    ],
)
def test_runs_of_other_seeds_that_do_not_match_are_refused(run, spoil, message):
    other = another_seed(run, 1)
    spoil(other)
    with pytest.raises(InputError, match=message):
        export(ExportConfig(run, KEY, **PAPER, seeds=(other,)))


def test_seeds_may_be_initialized_from_other_weights():
    one, other = ({"train": {}, "init_from": {"train": {}}, "init_from_digest": digest} for digest in "ab")
    assert _differing(one, other) == ""


def _edit_train(run, **changes):
    config = json.loads((run / "config.json").read_text())
    _edit(run / "config.json", train={**config["train"], **changes})


def test_a_key_of_robustbench_is_taken_in_any_case(run, robustbench):
    _edit(run / "results" / f"{RESULTS}.json", dataset="cifar10")
    _edit_train(run, dataset="cifar10")
    with pytest.raises(
        InputError, match="--key 'rice2020overfitting' is RobustBench's model 'Rice2020Overfitting' already"
    ):
        export(ExportConfig(run, "rice2020overfitting", results=RESULTS, **PAPER))


def test_a_masked_model_is_exported_as_such(run):
    _edit(run / "results" / f"{RESULTS}.json", verdict={"verdict": "masked", "evidence": ["BPDA leaves 4.4 %."]})
    folder = export(ExportConfig(run, KEY, **PAPER, as_masked=True, benchmark_examples=0))
    entry = json.loads((folder / f"model_info/digits/Linf/{KEY}.json").read_text())
    assert entry["unreliable"] is True
    assert entry["external"] == entry["reported"]
    assert read_toml(folder / f"scripts/digits/Linf/{KEY}.toml", "recipe")["export"]["as_masked"] is True


def test_identical_weights_are_not_another_seed(run):
    other = another_seed(run, 1)
    shutil.copytree(run / "model", other / "model", dirs_exist_ok=True)
    with pytest.raises(InputError, match=r"--seeds .*seed1 repeats a seed \(1\) or weights"):
        export(ExportConfig(run, KEY, **PAPER, seeds=(other,)))


def another_evaluation(run, **changes):
    """Add an evaluation of the same weights and images by the suite "adaptive"."""
    for suffix in ("json", "csv", "adversarial.safetensors"):
        shutil.copy(run / "results" / f"{RESULTS}.{suffix}", run / "results" / f"adaptive.{suffix}")
    _edit(run / "results" / "adaptive.json", suite="adaptive", **changes)
    return run / "results" / "adaptive.csv"


def test_a_masked_verdict_of_another_evaluation_holds(run):
    another_evaluation(run, verdict={"verdict": "masked", "evidence": ["BPDA leaves 0 %."]})
    with pytest.raises(InputError, match="The gradients are masked, so AutoAttack's accuracy is an overestimate"):
        export(ExportConfig(run, KEY, **PAPER, results=RESULTS))
    folder = export(ExportConfig(run, KEY, **PAPER, results=RESULTS, as_masked=True, benchmark_examples=0))
    record = json.loads((folder / f"model_cards/digits/Linf/{KEY}.json").read_text())
    said = f"The verdict of the suite adaptive on the first {N} test images."
    assert record["measured"]["results"]["verdict"]["evidence"] == [said, "BPDA leaves 0 %."]


def moved(position: int) -> torch.Tensor:
    """Return a test image that is changed within eps."""
    return (to_float(load_images("digits", None, "test").images[position]) - 0.1).clamp(min=0)


def break_one_more(run):
    """Let `another_evaluation` fool the model on the first robust image, by noise, and return its position."""
    rows = another_evaluation(run)
    read = _rows(rows)
    fallen = next(row for row in read if row["broken_by"] == "")
    fallen["broken_by"] = "annealing"
    with rows.open("w", newline="") as file:
        writer = csv.DictWriter(file, read[0])
        writer.writeheader()
        writer.writerows(read)
    path = rows.with_suffix(".adversarial.safetensors")
    kept = load_file(path)
    index = torch.cat([kept["index"], torch.tensor([int(fallen["index"])])])
    order = index.argsort()
    images = torch.cat([kept["images"], moved(int(fallen["index"]))[None]])
    save_file({"index": index[order], "images": images[order]}, path)
    worst = sum(row["broken_by"] == "" for row in read) / N
    _edit(rows.with_suffix(".json"), worst=worst, adversarial_sha256=sha256_of(path))
    return int(fallen["index"])


def test_images_found_by_another_evaluation_count(run, results):
    fallen = break_one_more(run)
    opened = Run.open(run)
    chosen = choose_evaluation(opened, ThreatModel.parse("Linf", "0.1"), RESULTS)
    further = further_evaluations(opened, chosen)
    assert sorted(file.path.parent.name for file in further) == ["results", "sweeps"]
    joined = with_further(chosen, further)
    assert joined.point.worst == pytest.approx(results["worst"] - 1 / N)
    assert [one.suite for one in joined.further] == ["adaptive", "quick"]
    evaluated = read_evaluated([chosen, *further], load_images("digits", None, "test"))
    assert torch.equal(evaluated.worst[fallen], moved(fallen))
    assert evaluated.without_image == 0
    (run / "results" / "adaptive.csv").unlink()
    with pytest.raises(InputError, match=r"The \.csv with a row per example is missing next to .*adaptive\.json"):
        with_further(chosen, further_evaluations(opened, chosen))


def test_images_found_by_a_sweep_only_are_counted(run, results):
    chosen = choose_evaluation(Run.open(run), ThreatModel.parse("Linf", "0.1"), RESULTS)
    left = next(row["index"] for row in _rows(chosen.path.with_suffix(".csv")) if row["broken_by"] == "")
    (sweep,) = (run / "sweeps").glob("*.csv")
    lines = sweep.read_text().splitlines()
    lines[1 + int(left)] = ",".join([*lines[1 + int(left)].split(",")[:-1], "0.1"])
    sweep.write_text("\n".join(lines) + "\n")
    content = json.loads(sweep.with_suffix(".json").read_text())
    for at in content["curve"]:
        withstood = [row["worst"] == "" or float(row["worst"]) > float(at["eps"]) for row in _rows(sweep)]
        at["worst"] = sum(withstood) / len(withstood)
    sweep.with_suffix(".json").write_text(json.dumps(content))
    _edit(sweep.with_suffix(".json"))
    folder = export(ExportConfig(run, KEY, **PAPER, benchmark_examples=0))
    entry = json.loads((folder / f"model_info/digits/Linf/{KEY}.json").read_text())
    assert entry["external"] == entry["reported"] == f"{100 * (results['worst'] - 1 / N):.2f}"
    assert "1 found only in a sweep over eps, which stores no images" in (folder / "CHECKS.md").read_text()
    form = (folder / "submission" / "new-external-evaluation.md").read_text()
    assert "are clean; 1 found only in a sweep over eps also clean)" in form


def _rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_published_key_is_not_given_to_other_weights(run, tmp_path, monkeypatch):
    card = tmp_path / "cards" / "digits" / "Linf" / f"{KEY.upper()}.json"
    card.parent.mkdir(parents=True)
    card.write_text(json.dumps({"measured": {"weights": {"sha256": "0" * 64}}}))
    monkeypatch.setattr("drelu_timm.zoo.robust_models.INSTALLED", tmp_path / "cards")
    with pytest.raises(InputError, match=rf"--key '{KEY}': drelu_timm publishes other weights as {NAME}"):
        export(ExportConfig(run, KEY, **PAPER))


def test_of_several_evaluations_the_largest_in_the_runs_threat_model_is_exported(run):
    for suffix in ("json", "csv", "adversarial.safetensors"):
        shutil.copy(run / "results" / f"{RESULTS}.{suffix}", run / "results" / f"small.{suffix}")
    read = json.loads((run / "results" / "small.json").read_text())
    accuracy = {"autoattack": read["accuracy"]["autoattack"]}
    _edit(run / "results" / "small.json", accuracy=accuracy, suite="autoattack")
    once = {**PAPER, "benchmark_examples": 0}
    assert "suite standard" in (export(ExportConfig(run, KEY, **once)) / "hub" / "README.md").read_text()
    named = export(ExportConfig(run, KEY, results="small", output_dir=run / "small", **once))
    assert "suite autoattack" in (named / "hub" / "README.md").read_text()


@pytest.fixture
def no_token(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))  # of somebody's login
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def test_the_command_prints_the_files_and_what_a_push_would_do(run, capsys, no_token):
    flags = [str(run), "--key", KEY, "--output_dir", str(run / "here"), "--benchmark-examples", "0"]
    flags += [word for name, text in PAPER.items() for word in (f"--{name}", text)]
    main(read("export", flags))
    said = capsys.readouterr().out
    assert f"{run / 'here' / 'model_info' / 'digits' / 'Linf' / KEY}.json" in said
    assert "next: the same command with --push ORG/NAME uploads" in said
    main(read("export", [*flags, "--push", "tester/dense"]))
    assert "Dry run without a token: 4 files would be uploaded to tester/dense in one commit" in capsys.readouterr().out
    for file in ("hub/README.md", "submission/new-model.md"):  # it was not uploaded, so nothing names it
        assert "tester/dense" not in (run / "here" / file).read_text()


def test_an_invalid_push_is_refused_before_any_work(run, no_token):
    with pytest.raises(InputError, match=r"--push 'dense' is not the name of a repository\. Use ORG/NAME"):
        main(read("export", [str(run), "--key", KEY, "--push", "dense"]))
    (run / "here").mkdir()
    with pytest.raises(
        InputError, match=r"--output-dir .*here is not an exported folder\. Pass another one or remove it"
    ):
        main(read("export", [str(run), "--key", KEY, "--output-dir", str(run / "here"), "--push", "tester/dense"]))


def test_a_folder_that_differs_from_the_present_export_is_not_pushed(run, no_token):
    config = ExportConfig(run, KEY, **PAPER, benchmark_examples=0)
    export(config)
    changed = replace(config, title="Another title")
    with pytest.raises(
        InputError, match=r"--output-dir .* contains a different export .* \(differs in: name, paper\)\. Remove it"
    ):
        push_exported(changed, "tester/dense")
    further = another_evaluation(run, verdict={"verdict": "masked", "evidence": ["BPDA leaves 0 %."]})
    with pytest.raises(InputError, match="The gradients are masked"):
        push_exported(config, "tester/dense")
    _edit(further.with_suffix(".json"), verdict={"verdict": "sound", "evidence": []})
    with pytest.raises(InputError, match=r"contains a different export .* \(differs in: results\)"):
        push_exported(config, "tester/dense")


def test_the_weights_are_those_of_the_run(exported, evaluated):
    ours, runs = (load_file(path / "model.safetensors") for path in (exported / "hub", evaluated / "model"))
    assert ours.keys() == runs.keys()
    assert all(torch.equal(ours[name], runs[name]) for name in ours)
