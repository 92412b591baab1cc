"""Models that are evaluated by name: runs, timm models, RobustBench models."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from drelu_timm import robustbench as our_robustbench
from drelu_timm.errors import InputError
from drelu_timm.evaluation.named_model import find_model
from drelu_timm.files import write_json
from drelu_timm.models.weights import load_folder, save_folder
from drelu_timm.train import train
from drelu_timm.training.config import TrainConfig
from drelu_timm.zoo.robust_models import register_robust_model

IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model's folder x/model, with the current directory next to x."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("dense_drelu", num_classes=10, in_chans=1, img_size=8)
    save_folder(model, tmp_path / "x" / "model", model_args={"img_size": 8})
    return tmp_path / "x" / "model"


class Tiny(nn.Module):
    """Architecture in place of one of RobustBench's."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, images):
        return self.layer(images.flatten(1))


@pytest.fixture
def zoo(robustbench, monkeypatch, tmp_path):
    """Two entries in RobustBench's model zoo: one on a single board, the other on two. Nothing can be downloaded."""
    monkeypatch.chdir(tmp_path)
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    def refuse(*_):
        raise ConnectionError("no\nnetwork")

    boards = model_dicts[BenchmarkDataset.cifar_10]
    entry = {"model": Tiny, "gdrive_id": "0"}
    monkeypatch.setitem(boards[ThreatModel.Linf], "Tester2026Zoo", entry)
    monkeypatch.setitem(boards[ThreatModel.Linf], "Tester2026Both", entry)
    monkeypatch.setitem(boards[ThreatModel.L2], "Tester2026Both", entry)
    monkeypatch.setattr(robustbench.utils, "download_gdrive_new", refuse)
    return tmp_path


def test_a_run_comes_first(folder):
    train = {"model": "dense_drelu", "dataset": "digits", "data_dir": "data", "norm": "L2", "eps": "0.5"}
    train |= {"seed": 0, "objective": "natural", "monitor": "loss"}
    write_json(folder.parent / "config.json", {"train": train, "in_chans": 1, "img_size": 8})
    (folder.parent).rename("resnet18")
    found = find_model("RUN", "resnet18")
    assert (found.name, found.architecture, found.defaults) == ("resnet18", "dense_drelu", train)
    assert (found.img_size, found.in_chans, len(found.digest)) == (8, 1, 64)
    assert found.results_folder == Path("resnet18/results")
    assert found.load()(IMAGES).shape == (5, 10)


def test_a_timm_name_brings_its_size():
    found = find_model("RUN", "inception_v3.tv_in1k")
    assert (found.name, found.architecture) == ("inception_v3.tv_in1k", "inception_v3.tv_in1k")
    assert (found.img_size, found.in_chans, found.defaults, found.digest) == (299, 3, {}, None)
    assert found.results_folder == Path("runs/inception_v3.tv_in1k/results")


def test_a_timm_model_without_weights_is_named_with_its_flag():
    with pytest.raises(InputError, match=r"^--transfer-from dense has no pretrained weights\. Leave out"):
        find_model("--transfer-from", "dense").load()


def test_a_registered_model_goes_by_its_key_and_by_its_timm_name(robustbench, folder):
    name = register_robust_model("Tester2026-Subject", "digits", "Linf", folder)
    expected = timm.create_model(name, pretrained=True)(IMAGES)
    for found in (find_model("RUN", "Tester2026-Subject"), find_model("RUN", name)):
        model = found.load()
        assert torch.equal(model(IMAGES), expected)
        assert not model.training
    by_key = find_model("RUN", "Tester2026-Subject", dataset="digits", norm="L2")
    assert by_key.defaults == {"dataset": "digits", "norm": "L2", "eps": None}
    assert by_key.results_folder == Path("runs/Tester2026-Subject_digits_Linf/results")


def test_a_model_of_the_zoo_is_read_from_the_folder_models(zoo):
    weights = Tiny()
    path = zoo / "models" / "cifar10" / "Linf" / "Tester2026Zoo.pt"
    path.parent.mkdir(parents=True)
    torch.save(weights.state_dict(), path)
    found = find_model("RUN", "Tester2026Zoo")
    assert found.defaults == {"dataset": "cifar10", "norm": "Linf", "eps": "8/255"}
    assert find_model("RUN", "Tester2026Zoo", norm="L2").defaults["eps"] == "0.5"
    assert torch.equal(found.load()(IMAGES), weights(IMAGES))


@pytest.mark.parametrize("content", [None, b"no weights"])
def test_weights_that_cannot_be_had_are_one_line(zoo, content):
    path = zoo / "models" / "cifar10" / "Linf" / "Tester2026Zoo.pt"
    if content:
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        find_model("RUN", "Tester2026Zoo", dataset="cifar10", norm="Linf").load()
    message = str(caught.value)
    assert message.startswith("RUN 'Tester2026Zoo' is RobustBench's model for cifar10 Linf, which cannot be read (")
    assert message.endswith("). Put its weights at models/cifar10/Linf/Tester2026Zoo.pt.")
    assert "\n" not in message
    assert content or "no network" in message


def test_a_key_of_several_boards_needs_dataset_and_norm(zoo):
    boards = r"is a RobustBench key for cifar10 L2, cifar10 Linf\. Give the --dataset and the --norm of one of them\."
    for asked in ({}, {"dataset": "cifar10"}, {"dataset": "cifar100"}):
        with pytest.raises(InputError, match=boards):
            find_model("RUN", "Tester2026Both", **asked)
    assert find_model("RUN", "Tester2026Both", norm="L2").defaults == {
        "dataset": "cifar10",
        "norm": "L2",
        "eps": "0.5",
    }


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Carmon2019Unlabelled", "Did you mean Carmon2019Unlabeled"),
        ("resnet_18", "Did you mean resnet18"),
        ("runs/nothing-here", "Give a folder made by train"),
    ],
)
def test_unknown_names_say_what_is_near(robustbench, name, hint):
    with pytest.raises(
        InputError, match=f"RUN '{name}' is neither a run directory nor a model of timm or Rob.*\\. {hint}"
    ):
        find_model("RUN", name)


def test_without_robustbench_the_error_names_the_extra(monkeypatch, tmp_path):
    our_robustbench.adapt.cache_clear()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(
        InputError, match=r"'Carmon2019Unlabeled' is neither .* pip install .*'drelu-timm\[robustbench\]'"
    ):
        find_model("RUN", "Carmon2019Unlabeled")
    our_robustbench.adapt.cache_clear()


def test_the_last_epoch_of_a_run_has_its_own_results(tmp_path):
    train(TrainConfig("dense_drelu", "digits", output_dir=tmp_path / "x", epochs=2, n_train=100, batch_size=30))
    best, last = (find_model("RUN", str(tmp_path / name)) for name in ("x", "x/last"))
    assert best.results_folder == tmp_path / "x" / "results"
    assert last.results_folder == tmp_path / "x" / "last" / "results"
    assert last.name == str(tmp_path / "x" / "last")
    expected = load_folder(tmp_path / "x" / "last").state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in last.load().model.state_dict().items())
