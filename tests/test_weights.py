"""Unavailable pretrained weights are reported before any work; with a local server instead of the Hub."""

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from hub_server import connect, hub_fixture  # noqa: F401

from drelu_timm import InputError, register_robust_model
from drelu_timm.evaluate import evaluate
from drelu_timm.evaluation.config import EvaluateConfig
from drelu_timm.models.weights import out_of_reach
from drelu_timm.train import train
from drelu_timm.training.config import TrainConfig

REPO = "timm/regnetx_002.pycls_in1k"
FILE = "model.safetensors"
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def state():
    torch.manual_seed(3)
    return timm.create_model("regnetx_002").state_dict()


@pytest.fixture
def offline(hub, monkeypatch):
    """Simulate no network and an empty cache; timm's own download, with its retries, must not start."""
    connect(monkeypatch, NOBODY)
    for module in ("timm.models._hub", "drelu_timm.zoo.hub"):
        monkeypatch.setattr(f"{module}.hf_hub_download", lambda *_, **__: pytest.fail("a download was started"))


def test_weights_on_the_hub_are_loaded_and_then_need_no_network(hub, state, monkeypatch):
    hub.make(REPO, **{FILE: safetensors.torch.save(state)})
    model = timm.create_model("regnetx_002_drelu", pretrained=True, num_classes=3)
    assert torch.equal(model.stem.conv.weight, state["stem.conv.weight"])
    connect(monkeypatch, NOBODY)
    again = timm.create_model("regnetx_002_drelu", pretrained=True, num_classes=3)
    assert torch.equal(again.stem.conv.weight, state["stem.conv.weight"])


@pytest.mark.parametrize("name", ["regnetx_002_drelu", "regnetx_002_drelu.pycls_in1k"])
def test_no_network(offline, tmp_path, name):
    with pytest.raises(InputError) as caught:
        timm.create_model(name, pretrained=True)
    message = str(caught.value)
    assert message.startswith(f"regnetx_002.pycls_in1k: no pretrained weights ({REPO} is not in {tmp_path}/hub_cache, ")
    assert f"and {NOBODY} cannot be reached: " in message
    assert f"run `hf download {REPO}` on a machine with a network" in message
    assert "set HF_HUB_OFFLINE=1; or, in Python, name a local file: " in message
    assert "\n" not in message


def test_the_local_file_that_the_message_names_is_loaded(offline, state, tmp_path):
    with pytest.raises(InputError, match=r"pretrained_cfg_overlay=(?P<overlay>dict\(.*\))\.$") as caught:
        timm.create_model("regnetx_002_drelu", pretrained=True)
    safetensors.torch.save_file(state, tmp_path / FILE)
    written = str(caught.value).partition("overlay=")[2].removesuffix(".").replace("FILE", str(tmp_path / FILE))
    model = timm.create_model("regnetx_002_drelu", pretrained=True, pretrained_cfg_overlay=eval(written))
    assert torch.equal(model.stem.conv.weight, state["stem.conv.weight"])


def test_weights_of_a_whole_variant_are_named_as_such(offline):
    overlay = {"hf_hub_id": "lab/x"}
    with pytest.raises(InputError, match=r"^regnetx_002_drelu.pycls_in1k: .*architecture='regnetx_002_drelu'"):
        timm.create_model("regnetx_002_drelu", pretrained=True, pretrained_cfg_overlay=overlay)


def test_offline_mode_is_named(offline, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        "drelu_timm.models.weights.HfApi.file_exists",
        lambda *_, **__: (_ for _ in ()).throw(huggingface_hub.errors.OfflineModeIsEnabled("offline")),
    )
    with pytest.raises(InputError, match=r"cannot be reached: HF_HUB_OFFLINE is set\)\. Check the network"):
        timm.create_model("regnetx_002_drelu", pretrained=True)


@pytest.mark.parametrize("status", [401, 404, 429, 503])
def test_a_hub_that_answers_is_not_out_of_reach(hub, status):
    hub.failures["HEAD", "resolve"] = status
    assert out_of_reach("lab/x", [FILE]) is None
    assert hub.requests == [("HEAD", "resolve")]


def test_a_model_without_weights():
    with pytest.raises(InputError, match=r"^dense.* has no pretrained weights\. Leave out pretrained=True or --pretr"):
        timm.create_model("dense_drelu", pretrained=True)


# The verbs, before they decode an image


@pytest.fixture
def no_images(monkeypatch):
    for verb in ("train", "evaluate"):
        monkeypatch.setattr(f"drelu_timm.{verb}.load_images", lambda *_, **__: pytest.fail("images were decoded"))


@pytest.mark.parametrize("model", ["regnetx_002_drelu", "regnetx_002.pycls_in1k"])
def test_train_pretrained_without_a_network(offline, no_images, tmp_path, model):
    with pytest.raises(
        InputError, match=rf"^--pretrained: {model}: no pretrained weights \(timm/regnetx_002.pycls_in1k"
    ):
        train(TrainConfig(model, "digits", pretrained=True, output_dir=tmp_path / "run"))


def test_train_pretrained_without_weights(no_images, tmp_path):
    with pytest.raises(InputError, match=r"^--pretrained: dense_drelu has no pretrained weights\. Leave out "):
        train(TrainConfig("dense_drelu", "digits", pretrained=True, output_dir=tmp_path / "run"))


@pytest.fixture
def on_the_hub(offline):
    """Return the name of a registered robust model that cannot be fetched."""
    return register_robust_model(
        "Tester2026Hub", "digits", "Linf", "hf-hub:lab/x", sha256="0" * 64, config_sha256="0" * 64
    )


def test_evaluate_a_timm_model(offline, no_images):
    with pytest.raises(InputError, match=r"^RUN regnetx_002: no pretrained weights .*cannot be reached: .* Check the"):
        evaluate(EvaluateConfig("regnetx_002", dataset="digits"))


def test_evaluate_a_robust_model(on_the_hub, no_images):
    with pytest.raises(InputError, match=r"^hf-hub:lab/x: config.json cannot be downloaded .*be reached: .* Check"):
        evaluate(EvaluateConfig(on_the_hub, dataset="digits"))


def test_transfer_from(on_the_hub, no_images, untrained_run):
    with pytest.raises(InputError, match=r"^hf-hub:lab/x: config.json cannot be downloaded .*be reached: .* Check"):
        evaluate(EvaluateConfig(str(untrained_run("0.1")), suite="adaptive", transfer_from=on_the_hub))
