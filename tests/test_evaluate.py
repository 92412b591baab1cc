"""The evaluation: which images count, which input is refused, which files are written."""

import csv
import hashlib
import json
import re
import shutil
from contextlib import contextmanager

import pytest
import timm
import torch
from accelerate import PartialState
from fake_attacks import FakeAttack, FakeMinimumNormAttack, only
from launching import Launched, held_at, wait_for
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

import drelu_timm.evaluate as verb
from drelu_timm.__main__ import main
from drelu_timm.attacks.suites import ATTACKS, SUITES
from drelu_timm.attacks.threat_model import ThreatModel
from drelu_timm.errors import InputError
from drelu_timm.evaluation.driver import label_margin
from drelu_timm.evaluation.evaluation import evaluate_model, evaluate_sweep
from drelu_timm.models.weights import save_folder
from drelu_timm.results import examples
from drelu_timm.results.examples import Adversarial
from drelu_timm.zoo.robust_models import register_robust_model


def small_model(num_classes=6):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, num_classes))


@pytest.fixture
def toy():
    """A small model, images, and labels that are right for all but the first."""
    model = small_model()
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = model(images).argmax(dim=1)
    labels[0] = (labels[0] + 1) % 6
    return model, images, labels


def gives(change, *, name="fake", minimum_norm=False):
    """An attack that returns ``change(images)``, by its name."""
    attack = FakeMinimumNormAttack if minimum_norm else FakeAttack
    return {name: attack(lambda model, batch, threat_model: change(batch.images))}


def test_result_of_the_quick_suite(toy):
    result = evaluate_model(*toy, eps="8/255", suite="quick")
    assert result.clean == 39 / 40
    assert set(result.accuracy) == {"apgd-ce", "apgd"}, "the model has no layer to substitute"
    assert set(result.settings) == {"apgd-ce", "apgd-t", "apgd"}
    assert 0 <= result.worst <= min(result.accuracy.values()) < result.clean
    assert result.settings["apgd-t"]["n_target_classes"] == 3
    assert result.zero_gradient_share == 0
    assert result.cw_l2 is None
    assert str(result.verdict) == "undecided", "fewer than 100 examples"
    assert not any(robust[0] for robust in result.robust.values()), "robust, but wrong on the clean image"


def test_the_first_attack_that_fooled_the_model_is_reported(toy):
    result = evaluate_model(*toy, eps="8/255", suite="quick")
    broken = result.broken
    assert broken.by[0] == "clean"
    for example, by in enumerate(broken.by[1:], start=1):
        assert by in ("", "apgd-ce", "apgd-t") or by.startswith("probe ")
        assert (by == "apgd-ce") == (not result.robust["apgd-ce"][example])
        assert (broken.margin[example] <= 0) == bool(by)
        assert (broken.seed[example] is None) == (not by)
        if by.startswith("apgd"):
            assert 1 <= broken.steps[example] <= 3 * 21
    assert result.worst == broken.by.count("") / 40
    assert torch.equal(result.survivors, torch.tensor([not by for by in broken.by]))


def test_a_probe_counts_that_fools_the_model_where_the_suite_did_not(toy, monkeypatch):
    result = evaluate_model(*toy, eps="8/255", suite=only(monkeypatch, gives(lambda x: x)))
    assert result.accuracy == {"fake": result.clean}
    assert result.worst < result.clean - 0.2
    assert any(by.startswith("probe margin at 8/255") or by.startswith("probe pgd at 8/255") for by in result.broken.by)


def test_a_second_model_is_tried(toy):
    model, images, labels = toy
    result = evaluate_model(model, images, labels, eps="8/255", suite="quick", transfer_from=model)
    alone = evaluate_model(model, images, labels, eps="8/255", suite="quick")
    assert set(result.accuracy) - set(alone.accuracy) == {"transfer"}
    assert result.accuracy["transfer"] < result.clean - 0.2
    assert len(result.settings["transfer"]["source_digest"]) == 64
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = nn.Sequential(nn.Flatten(), nn.Linear(64, 6))
    unrelated = evaluate_model(model, images, labels, eps="8/255", transfer_from=other)
    assert unrelated.accuracy["transfer"] > result.accuracy["transfer"] + 0.1


def test_a_second_model_is_called_like_the_attacked_one(toy):
    """With finite gradients, and in the precision of the search; it is restored afterwards."""

    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.dtypes = small_model(), set()

        def forward(self, images):  # the first pixel's gradient is NaN
            self.dtypes.add(torch.is_autocast_enabled("cpu"))
            return self.inner(images + 0 * (images[:, :, :1, :1] - 2).relu().sqrt())

    source = Blind().train()
    result = evaluate_model(*toy, eps="8/255", transfer_from=source)
    assert result.accuracy["transfer"] < result.clean - 0.2
    assert source.dtypes == {False}
    assert source.training and all(parameter.requires_grad for parameter in source.parameters())
    evaluate_model(*toy, eps="8/255", transfer_from=source, search_dtype=torch.bfloat16)
    assert source.dtypes == {False, True}


def test_same_result_again_and_for_any_batch(toy, monkeypatch):
    suite = only(monkeypatch, {name: ATTACKS[name] for name in ("pgd", "noise", "bpda", "twin", "annealing")})
    whole = evaluate_model(*toy, eps=0.03, suite=suite, batch_size=100)
    torch.rand(7)
    again = evaluate_model(*toy, eps=0.03, suite=suite, batch_size=7)
    assert whole.accuracy == again.accuracy
    assert all(torch.equal(whole.robust[name], again.robust[name]) for name in whole.robust)


def test_model_and_random_state_are_left_as_they_were(toy):
    model, images, labels = toy
    model.train()
    model[1].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    evaluate_model(model, images[:4], labels[:4], eps=0.03, suite="quick")
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def flags():
    """Settings that allow TF32, restored afterwards."""
    flags = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [flag.allow_tf32 for flag in flags]
    yield flags
    for flag, allowed in zip(flags, before, strict=True):
        flag.allow_tf32 = allowed


@pytest.mark.parametrize("allowed", [(True, False), (False, True)])
def test_float32_is_not_tf32(toy, flags, allowed):
    """Not in the search either; the settings are restored, also after an error."""
    seen = []
    for flag, before in zip(flags, allowed, strict=True):
        flag.allow_tf32 = before

    class Looks(nn.Module):
        def forward(self, images):
            seen.append([flag.allow_tf32 for flag in flags])
            if len(seen) == 9:
                raise KeyboardInterrupt
            return small_model()(images)

    with pytest.raises(KeyboardInterrupt):
        evaluate_model(Looks(), *toy[1:], eps=0.03, batch_size=8)
    assert seen == [[False, False]] * 9
    assert [flag.allow_tf32 for flag in flags] == [*allowed]


def test_images_outside_the_epsilon_ball_are_projected(toy, monkeypatch):
    model, images, labels = toy
    far = evaluate_model(*toy, eps=1e-6, suite=only(monkeypatch, gives(lambda x: 5 - 9 * x)))
    assert far.accuracy["fake"] == far.clean
    outcome = model(1 - images).argmax(dim=1) == labels
    reached = evaluate_model(*toy, eps=1, suite=only(monkeypatch, gives(lambda x: 1 - x)))
    assert torch.equal(reached.robust["fake"], outcome & (reached.predictions == labels))


def test_images_that_are_not_finite_do_not_count(toy, monkeypatch):
    result = evaluate_model(*toy, eps=1, suite=only(monkeypatch, gives(lambda x: x * float("nan"))))
    assert result.accuracy["fake"] == result.clean


def test_a_model_with_nan_logits_on_an_adversarial_image_is_fooled(toy, monkeypatch):
    class Fails(nn.Module):
        def forward(self, images):
            logits = small_model()(images)
            return logits.where(images.flatten(1).amax(1, keepdim=True) < 1, torch.nan)

    _, images, labels = toy
    result = evaluate_model(Fails(), images * 0.99, labels, eps=1, suite=only(monkeypatch, gives(torch.ones_like)))
    assert result.worst == 0


def test_minimum_norm_attack_counts_inside_the_epsilon_ball_only(toy, monkeypatch):
    suite = only(monkeypatch, gives(lambda x: 1 - x, name="cw-l2", minimum_norm=True))
    model, images, labels = toy
    result = evaluate_model(*toy, eps=0.5, norm="L2", suite=suite)
    assert result.accuracy["cw-l2"] == result.clean
    found = (result.predictions == labels) & (model(1 - images).argmax(dim=1) != labels)
    needed = (1 - 2 * images).flatten(1).norm(dim=1)
    assert result.cw_l2.budget == 0.5
    assert result.cw_l2.accuracy_at_budget == result.clean
    distances = needed.where(found, torch.inf)[1:]
    median = float(distances.median())
    assert result.cw_l2.median_l2 == (pytest.approx(median) if median < float("inf") else None)
    assert evaluate_model(*toy, eps=0.5, suite=suite).cw_l2.budget == 0.5 * 8


def test_the_paper_suite_measures_the_distance_of_cw(toy):
    model, images, labels = toy
    result = evaluate_model(model, images[:16], labels[:16], eps="0.05", suite="paper")
    assert {"fgsm", "pgd", "apgd-ce", "apgd-dlr", "cw-l2", "square"} == set(result.accuracy)
    assert 0 < result.cw_l2.median_l2 < 0.5
    assert result.cw_l2.budget == pytest.approx(0.05 * 8)
    assert result.cw_l2.accuracy_at_budget < result.accuracy["cw-l2"] < result.clean


@pytest.mark.parametrize(
    ("norm", "eps", "count"), [("Linf", 0.02, 32), pytest.param("L2", 0.15, 100, marks=pytest.mark.slow)]
)
def test_standard_is_autoattack(norm, eps, count):
    """Compared with pyautoattack's own driver, with other seeds: the same examples are robust, up to a few."""
    from pyautoattack import AutoAttack

    model = small_model(num_classes=10).eval()
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = model(images).argmax(dim=1)
    ours = evaluate_model(model, images, labels, norm=norm, eps=eps, suite="standard")
    with torch.random.fork_rng():
        adversarial, _ = AutoAttack(model, norm=norm, eps=eps, seed=5).run_standard_evaluation(images, labels)
    theirs = model(adversarial).argmax(dim=1) == labels
    assert 0.1 < theirs.float().mean() < 0.9, "the test has nothing to compare"
    assert (ours.robust["autoattack"] != theirs).sum() <= count // 30
    assert ours.settings["autoattack"] == {"stages": ["apgd-ce", "apgd-t", "fab-t", "square"]}
    assert ours.settings["square"]["n_queries"] == 5000


def test_later_attacks_of_autoattack_get_no_example_when_none_is_left(toy):
    result = evaluate_model(*toy, eps=0.9, suite="standard")
    assert result.accuracy["autoattack"] == result.worst == 0


def test_an_attack_is_not_repeated_in_a_sequence(toy, monkeypatch):
    calls = []

    def fake(name, change):
        def search(model, batch, threat_model):
            calls.append((name, len(batch)))
            return change(batch.images)

        return {name: FakeAttack(search)}

    first, second = fake("first", lambda x: x), fake("second", torch.zeros_like)
    monkeypatch.setitem(SUITES, "only", {"both": first | second, "first": first})
    result = evaluate_model(*toy, eps=1, suite="only")
    assert calls == [("first", 39), ("second", 39)]
    assert list(result.accuracy) == ["both", "first"]
    assert result.accuracy["both"] < result.accuracy["first"] == result.clean


def test_a_sequence_reports_the_accuracy_after_each_of_its_attacks(toy):
    result = evaluate_model(*toy, eps="8/255", suite="standard")
    (left,) = result.sequences.values()
    assert list(result.sequences) == ["autoattack"]
    assert list(left) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert list(left.values()) == sorted(left.values(), reverse=True)
    assert 1 > left["apgd-ce"] >= left["square"] == result.accuracy["autoattack"]
    quick = evaluate_model(*toy, eps="8/255", suite="quick")
    assert quick.sequences["apgd"]["apgd-ce"] == quick.accuracy["apgd-ce"]


# Adversarial images


@pytest.mark.parametrize(
    ("norm", "eps", "attacks"),
    [
        ("Linf", "8/255", ["fgsm", "pgd", "noise"]),
        ("Linf", "8/255", ["noise"]),
        ("L2", "0.2", ["noise", "cw-l2"]),
    ],
)
def test_adversarial_images_fool_the_model_where_reported(toy, monkeypatch, norm, eps, attacks):
    model, images, labels = toy
    suite = only(monkeypatch, {attack: ATTACKS[attack] for attack in attacks})
    result = evaluate_model(*toy, norm=norm, eps=eps, suite=suite)
    index, found = result.adversarial.index, result.adversarial.images
    assert index.tolist() == [example for example, by in enumerate(result.broken.by) if by not in ("", "clean")]
    assert (len(index), found.dtype) == (round(40 * (result.clean - result.worst)), torch.float32)
    assert len(set(result.broken.by) - {"", "clean"}) > 1, "the test has nothing to compare"
    assert ThreatModel.parse(norm, eps).contains(found, images[index]).all()
    torch.testing.assert_close(
        label_margin(model(found), labels[index]).double(), result.broken.margin[index], rtol=0, atol=1e-5
    )
    put_in = images.clone()
    put_in[index] = found
    assert (model(put_in).argmax(dim=1) == labels).double().mean() == result.worst


def test_the_first_image_that_fools_the_model_is_kept(toy, monkeypatch):
    def dark(images):  # of every second example only
        return images * (images.flatten(1).sum(dim=1) > 32).view(-1, 1, 1, 1)

    suite = only(monkeypatch, gives(dark, name="dark") | gives(lambda x: 1 - x, name="inverse"))
    result = evaluate_model(*toy, eps=1, suite=suite)
    first = {"dark": dark, "inverse": lambda x: 1 - x}
    assert set(first) <= set(result.broken.by)
    for example, image in zip(result.adversarial.index.tolist(), result.adversarial.images, strict=True):
        if (by := result.broken.by[example]) in first:
            assert torch.equal(image, first[by](toy[1][example : example + 1])[0])


def test_the_images_are_the_same_on_disk_and_in_memory(toy, tmp_path):
    in_memory = evaluate_model(*toy, eps="8/255", batch_size=9).adversarial
    on_disk = evaluate_model(*toy, eps="8/255", batch_size=9, state=tmp_path).adversarial
    assert len(in_memory.index)
    assert torch.equal(in_memory.index, on_disk.index)
    assert torch.equal(in_memory.images, on_disk.images)
    assert sorted(kept(tmp_path)) == on_disk.index.tolist(), "one image per example"


def kept(state):
    """The examples whose images a checkpoint has."""
    return [example for path in state.iterdir() for example in load_file(path)["kept"].tolist()]


def test_a_robust_model_has_no_images(toy, monkeypatch, tmp_path):
    result = evaluate_model(*toy, eps=1e-7, suite=only(monkeypatch, gives(lambda x: x)), state=tmp_path / "state")
    assert result.worst == result.clean
    assert result.adversarial.images.shape == (0, 1, 8, 8)
    result.adversarial.save(tmp_path / "none.safetensors", {})
    assert load_file(tmp_path / "none.safetensors")["index"].shape == (0,)


def test_a_sweep_keeps_no_images(toy, tmp_path):
    sweep = evaluate_sweep(*toy, eps=["1/255", "8/255"], suite="quick", state=tmp_path)
    assert [evaluation.adversarial for evaluation in sweep] == [None, None]
    assert kept(tmp_path) == []


def test_the_same_images_are_the_same_file(tmp_path):
    found = Adversarial(torch.tensor([2, 5]), torch.rand(2, 1, 8, 8))
    identity = {"norm": "Linf", "eps": "8/255", "suite": "quick", "seed": 0, "model_digest": "0"}
    assert len({found.save(tmp_path / f"{i}.safetensors", identity) for i in range(5)}) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, x, y: (m, x * 255, y), r"images are in \[.*, 25.*\]\. Use \[0, 1\]"),
        (lambda m, x, y: (m, x - 0.5, y), r"images are in \[-0.*\. Use \[0, 1\]"),
        (lambda m, x, y: (m, x.log().log(), y), r"images are in \[nan, nan\]"),
        (
            lambda m, x, y: (m, (x * 255).int(), y),
            r"images are torch.int32 \[40, 1, 8, 8\]\. Use \[N, C, H, W\], floats",
        ),
        (lambda m, x, y: (m, x.flatten(1), y), r"images are torch.float32 \[40, 64\]\. Use \[N, C, H, W\]"),
        (lambda m, x, y: (m, x[:0], y[:0]), r"0 images and labels of shape \[0\]\. Use one label per image"),
        (lambda m, x, y: (m, x, y[:-1]), r"40 images and labels of shape \[39\]\. Use one label per image"),
        (lambda m, x, y: (m, x, y.float()), r"labels are torch.float32 .*Use integers from 0 to classes - 1"),
        (lambda m, x, y: (m, x, y - 1), r"labels are torch.int64 from -1\. Use integers"),
        (lambda m, x, y: (m, x, y + 10), "the model has 6 outputs, the labels go up to 15"),
        (
            lambda m, x, y: (m, x[..., 1:], y),
            r"the model cannot run on 1x8x7 images \(.*mat1 and mat2 .*\)\. Use images",
        ),
        (lambda m, x, y: (nn.Sequential(m, nn.Threshold(-9e9, 0), Nan()), x, y), "NaN or infinite logits for 40 of 40"),
        (
            lambda m, x, y: (nn.Identity(), x, y),
            r"the model returns \[8, 1, 8, 8\] for 8 images\. It must return logits",
        ),
        (
            lambda m, x, y: (nn.Sequential(m, nn.Softmax(1)), x, y),
            "the model returns probabilities .* Use the model without its softmax",
        ),
    ],
)
def test_data_and_models_that_cannot_be_used(toy, change, message):
    with pytest.raises(InputError, match=message):
        evaluate_model(*change(*toy), eps=0.1)


class Nan(nn.Module):
    def forward(self, logits):
        return logits * float("nan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": "hello"}, "--eps 'hello' is not a radius"),
        ({"norm": "L1"}, "--norm 'L1' is unknown"),
        ({"suite": "standart"}, "--suite 'standart' is unknown; did you mean standard"),
        ({"batch_size": 0}, "batch_size 0 is not possible. Use an integer above 0"),
        ({"batch_size": True}, "batch_size True is not possible"),
        ({"seed": "x"}, "seed 'x' is not possible. Use an integer from 0 to"),
        ({"seed": float("nan")}, "seed nan is not possible"),
        ({"seed": -1}, "seed -1 is not possible"),
        ({"seed": 2**63}, "seed 9223372036854775808 is not possible"),
        ({"suite": None}, "suite None is not possible. Use one of quick"),
        ({"suite": []}, r"suite \[\] is not possible"),
        ({"search_dtype": torch.int32}, "search_dtype torch.int32 is not possible. Use one of torch.float32"),
        ({"state": 3}, "state 3 is not possible. Use a path"),
        ({"norm": None}, "norm None is not possible. Use Linf or L2"),
        ({"eps": None}, "--eps 'None' is not a radius"),
        ({"eps": float("nan")}, "--eps 'nan' is not a radius"),
        ({"eps": [0.1, 0.2]}, r"--eps '\[0.1, 0.2\]' is not a radius"),
        (
            {"transfer_from": small_model(7)},
            "transfer_from has 7 outputs, the attacked model 6. Use a model of the same",
        ),
        (
            {"transfer_from": nn.Linear(7, 6)},
            r"transfer_from cannot run on 1x8x8 images \(.*mat1 and mat2 shapes cannot",
        ),
        ({"eps": 0}, "--eps 0 leaves nothing to attack. Use a radius above 0"),
    ],
)
def test_options_that_cannot_be_used(toy, options, message):
    with pytest.raises(InputError, match=message):
        evaluate_model(*toy, **{"eps": 0.1, **options})


@pytest.mark.parametrize("eps", ["8/255", 0.1, None, torch.tensor([0.1])])
def test_the_eps_of_a_sweep_that_are_not_a_list(toy, eps):
    with pytest.raises(InputError, match=r"eps .* is not possible\. Use a list of radii"):
        evaluate_sweep(*toy, eps=eps)


@pytest.mark.parametrize("arguments", [(None, 1, 2), (0, None, 2), (0, 1, None)])
def test_arguments_that_are_missing(toy, arguments):
    given = [value if value is None else toy[value] for value in arguments]
    with pytest.raises(InputError, match=r"the model is NoneType|images are NoneType|labels are NoneType"):
        evaluate_model(*given, eps=0.1)


@pytest.mark.parametrize("n_examples", [10.0, "10", None, True])
def test_flags_of_another_type(n_examples):
    with pytest.raises(InputError, match=r"--n-examples .* is not possible"):
        verb.evaluate(verb.EvaluateConfig("x", n_examples=n_examples))


# The verb


@pytest.fixture
def run(untrained_run):
    return untrained_run("8/255")


def test_evaluate_writes_results_and_does_not_repeat_itself(run, capsys):
    arguments = ["evaluate", str(run), "--n-examples", "20", "--batch_size", "8"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    path = run / "results" / "quick-Linf-8_255.json"
    results = json.loads(path.read_text())
    for shown in (
        "clean",
        "apgd-ce",
        "bpda",
        "worst case",
        "zero input gradients",
        "verdict",
        "--suite standard (Auto",
    ):
        assert shown in printed
    assert (results["norm"], results["eps"], results["suite"], results["seed"]) == ("Linf", "8/255", "quick", 0)
    assert (results["model"], results["dataset"], results["n_examples"]) == ("dense_drelu", "digits", 20)
    assert results["verdict"]["evidence"]
    assert len(results["model_digest"]) == 64

    with path.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(20))
    extra = ["broken_by", "steps", "margin", "seed"]
    assert list(rows[0]) == ["index", "label", "clean_prediction", *results["accuracy"], *extra]
    assert sum(not row["broken_by"] for row in rows) / 20 == results["worst"]
    for attack, accuracy in results["accuracy"].items():
        assert sum(int(row[attack]) for row in rows) / 20 == accuracy
    assert sum(row["label"] == row["clean_prediction"] for row in rows) / 20 == results["clean"]
    images = path.with_suffix(".adversarial.safetensors")
    assert {file.name for file in path.parent.iterdir()} == {path.name, path.with_suffix(".csv").name, images.name}
    assert results["sequences"]["apgd"]["apgd-ce"] == results["accuracy"]["apgd-ce"]
    assert set(results["attack_seconds"]) == {"apgd-ce", "apgd-t", "bpda", "bpda-soft", "twin"}

    tensors = load_file(images)
    broken = [int(row["index"]) for row in rows if row["broken_by"] not in ("", "clean")]
    assert tensors["index"].tolist() == broken
    assert tensors["images"].shape == (len(broken), 1, 8, 8)
    assert hashlib.sha256(images.read_bytes()).hexdigest() == results["adversarial_sha256"]
    with safe_open(images, "pt") as file:
        identity = json.loads(file.metadata()["identity"])
    assert identity["model_digest"] == results["model_digest"]
    assert [identity[field] for field in ("norm", "eps", "suite", "seed")] == ["Linf", "8/255", "quick", 0]

    written = path.read_bytes()
    assert main(arguments) == 0
    assert "json exists. Delete it to evaluate again." in capsys.readouterr().out
    assert path.read_bytes() == written

    assert main([*arguments, "--seed", "1"]) == 2
    assert "holds a result with seed 0, not 1. Move or delete it" in capsys.readouterr().err
    assert path.read_bytes() == written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "RUN 'nothing' is neither a run directory nor a model of timm or RobustBench. Give a folder"),
        (["."], "is not a run directory (it has no config.json)"),
        (["resnet18"], "--dataset is needed to evaluate resnet18. Use one of digits, mnist"),
        (["x", "--dataset", "digit"], "--dataset 'digit' is unknown; did you mean digits"),
        (["x", "--eps", "eight"], "--eps 'eight' is not a radius"),
        (["x", "--eps", "2/255,8"], "--eps 8 is larger than the pixel range"),
        (["x", "--norm", "L2"], "--norm L2 needs --eps: the default 8/255 is a radius for Linf"),
        (["x", "--norm", "L3"], "--norm 'L3' is unknown"),
        (["x", "--suite", "quik"], "--suite 'quik' is unknown; did you mean quick"),
        (["x", "--n-examples", "0"], "--n-examples 0 is not possible. Use 1 or more"),
        (["x", "--n-examples", "-1"], "--n-examples -1 is not possible. Use 1 or more"),
        (["x", "--seed", "-1"], "--seed -1 is not possible. Use an integer from 0 to 2**63 - 1"),
        (["x", "--eps", ""], "--eps '' is not a radius"),
        (["x", "--eps", "8/255,"], "--eps '' is not a radius"),
        (["x", "--eps", "\uff18/255"], "--eps '\uff18/255' is not a radius"),
        (["x", "--eps", "1_0/255"], "--eps '1_0/255' is not a radius"),
        (["x", "--eps", "1e-9"], "--eps 1e-9 is below 6e-08, float32's smallest step below 1"),
        (["resnet18_drelu", "--dataset", "digits"], "RUN 'resnet18_drelu' has pretrained weights for all but its head"),
        (["x", "--transfer-from", "resnet18_drelu.a1_in1k"], "--transfer-from 'resnet18_drelu.a1_in1k' has pretrained"),
        (
            ["x", "--transfer-from", "resnet18.a1_in1k"],
            "--transfer-from resnet18.a1_in1k takes images with 224 pixels per side",
        ),
        (["resnet18.a1_in1"], "RUN 'resnet18.a1_in1' is unknown; did you mean resnet18.a1_in1k"),
        (["x", "--transfer-from", "dense.x"], "--transfer-from 'dense.x' is unknown; allowed: dense.untrained"),
        (["dense", "--dataset", "digits"], "RUN dense has no pretrained weights. Leave out pretrained"),
    ],
)
def test_flags_that_cannot_be_used(run, capsys, arguments, message):
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (run / "results").exists()


def test_only_the_first_process_downloads(run, monkeypatch):
    """Data and weights are read while the other processes wait for the first."""
    events = []

    @contextmanager
    def first(self):
        events.append("begin")
        yield
        events.append("end")

    def reading(name):
        own = getattr(verb, name)
        monkeypatch.setattr(verb, name, lambda *args, **options: events.append(name) or own(*args, **options))

    for name in ("find_model", "load_images", "_loaded"):
        reading(name)
    monkeypatch.setattr(PartialState, "main_process_first", first)
    assert main(["evaluate", str(run), "--n-examples", "2", "--transfer-from", str(run)]) == 0
    text = " ".join(events)
    assert sorted({*events}) == ["_loaded", "begin", "end", "find_model", "load_images"]
    assert not {*re.sub("begin.*?end", "", text).split()}
    assert events.index("_loaded") < events.index("load_images")  # weights may be out of reach


def with_classes(run, count):
    """A copy of the run, whose model has so many outputs."""
    other = run.with_name(f"of-{count}")
    shutil.copytree(run, other)
    shutil.rmtree(other / "model")
    model = timm.create_model("dense_drelu", num_classes=count, in_chans=1, img_size=8)
    save_folder(model, other / "model", model_args={"img_size": 8})
    return str(other)


@pytest.mark.parametrize("count", [5, 12])
def test_a_model_of_other_classes_than_the_dataset_is_refused(run, capsys, count):
    other, digits = with_classes(run, count), [str(run), "--n-examples", "2"]  # whose labels are 0 and 3
    for arguments, called in (([other, *digits[1:]], "RUN"), ([*digits, "--transfer-from", other], "--transfer-from")):
        assert main(["evaluate", *arguments]) == 2
        expected = f"error: {called} {other} has {count} outputs, the dataset 10 classes. Use the dataset that the"
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize(("board", "asked"), [("L2", []), ("Linf", ["--norm", "L2"])])
def test_a_model_of_robustbench_does_not_keep_the_radius_of_another_norm(robustbench, run, capsys, board, asked):
    key = f"Tester2026-Norm-{board}"
    register_robust_model(key, "digits", board, run / "model")
    assert main(["evaluate", key, *asked]) == 2
    assert capsys.readouterr().err == "error: --norm L2 needs --eps: the default 0.1 is a radius for Linf.\n"
    assert main(["evaluate", key, *asked, "--eps", "0.5", "--n-examples", "4"]) == 0
    path = run.with_name("runs") / f"{key}_digits_{board}" / "results" / "quick-L2-0.5.json"
    assert json.loads(path.read_text())["norm"] == "L2"


def test_a_full_disk_at_the_end_is_reported_and_loses_nothing(run, capsys, monkeypatch):
    arguments = ["evaluate", str(run), "--n-examples", "20"]
    path = run / "results" / "quick-Linf-8_255.json"

    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(examples, "save_file", full)
    assert main(arguments) == 2
    assert f"error: {path} and the files next to it cannot be written (No space left" in capsys.readouterr().err
    assert not path.exists()
    monkeypatch.undo()
    monkeypatch.chdir(run.parent)
    assert main(arguments) == 0
    assert "apgd-ce" not in json.loads(path.read_text())["attack_seconds"], "it was measured again"


def test_a_second_evaluation_of_the_same_is_refused_while_the_first_one_runs(run, capsys, tmp_path):
    reached = tmp_path / "reached"
    first = Launched("evaluate", str(run), environment=held_at("torch.nn:Module.__call__", 50, reached))
    wait_for(reached, first)
    path = run / "results" / "quick-Linf-8_255.json"
    try:
        assert main(["evaluate", str(run)]) == 2
        message = rf"error: {re.escape(str(path))} is in use by process {first.pid} on .* Wait until it ends"
        assert re.search(message, capsys.readouterr().err)
    finally:
        first.kill()
        first.wait()
    assert main(["evaluate", str(run), "--n-examples", "1000"]) == 0
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".csv", ".json", ".safetensors"]


def test_what_a_killed_evaluation_left_is_removed(run):
    path = run / "results" / "quick-Linf-8_255.json"
    left = [path.with_name(f".{path.name}.0123abcd.part"), path.with_suffix(".state") / ".a.safetensors.0123abcd.part"]
    for file in left:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{")
    assert main(["evaluate", str(run), "--n-examples", "2"]) == 0
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".csv", ".json", ".safetensors"]
    left[1].parent.mkdir()
    left[1].write_text("killed after the result was written")
    written = path.read_bytes()
    assert main(["evaluate", str(run), "--n-examples", "2"]) == 0
    assert not left[1].parent.exists() and path.read_bytes() == written


def test_a_result_that_is_cut_short_is_reported(run, capsys):
    path = run / "results" / "quick-Linf-8_255.json"
    path.parent.mkdir()
    path.write_text('{"run": "x", "mod')
    assert main(["evaluate", str(run), "--n-examples", "20"]) == 2
    assert f"{path} cannot be read as JSON" in capsys.readouterr().err
