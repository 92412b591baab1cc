"""Certified accuracy in evaluations: below every attack where bounds are known, absent with a reason where not."""

import json

import pytest
import torch
from synthetic_runs import write_result, write_run
from test_intervals import images_and_labels, trained
from torch import nn

from drelu_timm.errors import InputError
from drelu_timm.evaluation.evaluation import evaluate_model, evaluate_sweep
from drelu_timm.results.result import EpsResult, read_result

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def toy(*layers, out=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), *layers, nn.Linear(8, out))


@pytest.fixture(scope="module")
def model():
    return trained("strided").float()


@pytest.fixture(scope="module")
def batch():
    images, labels = images_and_labels()
    return images.float(), labels


def test_certified_is_at_most_the_accuracy_under_every_attack(model, batch):
    evaluations = evaluate_sweep(model, *batch, eps=["0.02", "0.05", "0.3"], suite="quick")
    for at in evaluations:
        assert at.certified is not None
        assert at.certified <= at.worst <= min(at.accuracy.values()) <= at.clean
    certified = [at.certified for at in evaluations]
    assert certified == sorted(certified, reverse=True)
    assert certified[0] > 0.5
    assert certified[-1] < certified[0]
    assert (
        not model[1].fc1.weight.dtype.is_complex and model[1].fc1.weight.dtype == torch.float32
    )  # only a copy changed


def test_a_certified_example_that_an_attack_fooled_ends_the_evaluation(model, batch, monkeypatch):
    monkeypatch.setattr("drelu_timm.evaluation.certificates.certified", lambda m, x, y, *_: torch.ones_like(y).bool())
    with pytest.raises(AssertionError, match="are certified, but an attack fooled them"):
        evaluate_model(model, *batch, eps="0.5")


def test_a_resumed_evaluation_keeps_its_certificates(model, batch, tmp_path, monkeypatch):
    before = evaluate_model(model, *batch, eps="0.05", state=tmp_path / "state")
    monkeypatch.delattr("drelu_timm.evaluation.certificates.certified")
    assert evaluate_model(model, *batch, eps="0.05", state=tmp_path / "state").certified == before.certified


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = toy(nn.ReLU())

    def forward(self, x):
        return self.model(x) + 1e-3 * torch.randn(len(x), 3).to(x.dtype)


@pytest.mark.parametrize(
    ("model", "norm", "reason"),
    [
        (toy(nn.LayerNorm(8)), "Linf", "interval bounds have no rule for torch.nn.functional.layer_norm"),
        (toy(nn.ReLU()), "L2", "interval bounds are for Linf, not for L2"),
        (toy(nn.ReLU()).bfloat16(), "Linf", "the model computes in bfloat16"),
        (toy(nn.ReLU()).forward, "Linf", "the model is a function"),
        (Noisy(), "Linf", "the model returns other logits every time"),
    ],
)
def test_models_without_bounds_have_a_reason_and_no_number(model, norm, reason, batch):
    evaluation = evaluate_model(model, *batch, eps=0.1, norm=norm)
    assert evaluation.certified is None
    assert evaluation.not_certified.startswith(f"Not certified: {reason}")
    content = EpsResult.to_json(evaluation)
    assert "certified" not in content
    assert "\n" not in content["not_certified"]


def test_results_keep_certified_and_older_ones_have_none(tmp_path):
    path = write_result(write_run(tmp_path / "x"))
    content = json.loads(path.read_text())
    assert read_result(path).point.certified is None
    assert {"certified", "not_certified"}.isdisjoint(read_result(path).to_json())
    path.write_text(json.dumps(content | {"certified": content["worst"]}))
    assert read_result(path).point.certified == content["worst"]
    assert read_result(path).to_json()["certified"] == content["worst"]
    path.write_text(json.dumps(content | {"certified": content["worst"] + 0.01}))
    with pytest.raises(InputError, match="has a certified accuracy above its worst case"):
        read_result(path)
