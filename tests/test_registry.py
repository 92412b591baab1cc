"""timm's lists of the models of this package."""

import json
import subprocess
import sys

import pytest
import timm
import torch

import drelu_timm
from drelu_timm.models.registry import MODULE

ADDED = """
import json, timm
def lists():
    return {
        "modules": timm.list_modules(),
        "models": timm.list_models(),
        "resnet": timm.list_models(module="resnet"),
        "pretrained": timm.list_pretrained(),
    }
before = lists()
import drelu_timm
after = lists()
print(json.dumps({name: [[*{*after[name]} - {*old}], [*{*old} - {*after[name]}]] for name, old in before.items()}))
"""


@pytest.fixture(scope="module")
def added():
    """Return what `import drelu_timm` adds to timm's lists; nothing may be removed from them."""
    done = subprocess.run([sys.executable, "-c", ADDED], capture_output=True, text=True, check=True)
    lists = json.loads(done.stdout)
    assert [gone for _, gone in lists.values()] == [[]] * 4
    return {name: new for name, (new, _) in lists.items()}


def test_all_models_are_in_one_module(added):
    assert added["modules"] == [MODULE] == ["drelu_timm"]
    assert added["resnet"] == []
    assert {"resnet50_drelu", "dense", "dense_drelu", "preact_resnet18"} <= {*added["models"]}
    listed = timm.list_models(module="drelu_timm")
    assert {*added["models"]} <= {*listed}
    assert timm.models.is_model_in_modules("resnet50_drelu", ["drelu_timm"])
    assert not timm.models.is_model_in_modules("resnet50_drelu", ["resnet"])


def test_only_trained_models_are_listed_as_pretrained(added):
    assert len(added["pretrained"]) == 10
    assert all(name.startswith("drelutimm2026_") for name in added["pretrained"])
    name = "drelutimm2026_dense_drelu_at_eps01_mnist_linf"
    assert name in added["pretrained"]
    assert timm.models.is_model_pretrained(name)
    assert timm.create_model(name, pretrained=True).model.num_classes == 10


def test_a_variant_is_created_pretrained_without_being_listed():
    for name in ("resnet18_drelu", "resnet18_drelu.a1_in1k"):
        assert not timm.models.is_model_pretrained(name)
        assert timm.get_pretrained_cfg(name).hf_hub_id == "timm/resnet18.a1_in1k"
    torch.manual_seed(1)
    base = timm.create_model("resnet18").state_dict()
    overlay = {"architecture": "resnet18", "state_dict": base}
    model = timm.create_model("resnet18_drelu.a1_in1k", pretrained=True, pretrained_cfg_overlay=overlay, width=6)
    assert torch.equal(model.conv1.weight, base["conv1.weight"])


def test_the_package_exports_no_models():
    exported = {}
    exec("from drelu_timm import *", exported)
    assert {*drelu_timm.__all__} <= {*exported}
    assert "resnet50_drelu" not in exported
