"""Training by interval bound propagation: end to end, resumed, by two processes, and what it refuses."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from launching import STEP, Launched, assert_same_weights, config, flags, held_at, log, train_by_processes, wait_for

from drelu_timm.errors import InputError
from drelu_timm.models.drelu import cap_layers
from drelu_timm.models.intervals import certified
from drelu_timm.models.weights import load_folder, save_folder
from drelu_timm.runs import Run
from drelu_timm.train import train
from drelu_timm.training.config import resolve
from drelu_timm.training.distributed import make_accelerator


def ibp(path: Path, **settings):
    defaults = {"objective": "ibp", "placement": "all", "cap": 1.0, "eps": "0.05", "ibp_eps": "0.06"}
    return config(path, **{**defaults, **settings})


def test_ibp_certifies_held_out_images_and_caps_settle(tmp_path):
    run = Run.open(train(ibp(tmp_path / "run", n_train=None, epochs=8, ibp_init=True)))
    entries = log(run.path)
    assert entries[-1]["train"].keys() == {"loss", "cross_entropy", "certified_cross_entropy", "cap_penalty"}
    held_out = entries[-1]["held_out"]
    assert held_out.keys() == {"loss", "clean", "pgd", "certified"}
    assert 0.5 < held_out["certified"] <= held_out["pgd"] <= held_out["clean"]
    best = max(entries, key=lambda entry: entry["held_out"]["certified"])
    assert entries[-1]["best_epoch"] == best["epoch"]
    assert run.config["train"]["monitor"] == "certified"
    assert run.config["train"]["eps"] == "0.05"  # which is what `evaluate` attacks at, not ibp_eps


def test_the_ramp_of_a_resumed_run_is_that_of_the_uninterrupted_one(tmp_path):
    settings = [ibp(tmp_path / name, epochs=3, ibp_ramp=1.0, save_every=1) for name in ("whole", "killed")]
    train(settings[0])
    reached = tmp_path / "reached"
    process = Launched("train", *flags(settings[1]), environment=held_at(STEP, 4, reached))
    wait_for(reached, process)
    process.kill()
    process.wait()
    train(replace(settings[1], resume=True))
    assert_same_weights(*(each.output_dir for each in settings))


def test_two_processes_take_the_step_of_one(tmp_path):
    settings = [ibp(tmp_path / name, epochs=1, ibp_ramp=0.5) for name in ("one", "two")]
    train(settings[0])
    train_by_processes(settings[1], processes=2)
    one, two = (load_folder(each.output_dir / "last").state_dict() for each in settings)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "L2"}, "has bounds for Linf, not for --norm L2"),
        ({"cutmix": 0.5}, "--cutmix does not go with --objective ibp"),
        ({"label_smoothing": 0.1}, "--label-smoothing does not go with"),
        ({"compile": True}, "--compile does not go with"),
        ({"ibp_ramp": 1.5}, r"--ibp-ramp is 1.5. It must be .* 0 .*1"),
        ({"ibp_clean_weight": -0.5}, r"--ibp-clean-weight is -0.5. It must be .* 0 .*1"),
        ({"ibp_eps": "2"}, "larger than the pixel range"),
        ({"objective": "at"}, "--ibp-eps 0.06 belongs to --objective ibp"),
        ({"objective": "at", "ibp_eps": None, "monitor": "certified"}, "--monitor certified belongs to"),
        ({"ibp_init": True, "init_from": Path("runs/x")}, "--ibp-init would overwrite"),
    ],
)
def test_what_ibp_cannot_use_is_refused(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        resolve(ibp(tmp_path / "run", **settings))


def test_a_model_without_bounds_is_refused_before_the_first_step(tmp_path):
    settings = ibp(tmp_path / "run", model="dense_drelu", activation="silu", cap=None)
    with pytest.raises(InputError, match=r"interval bounds have no rule for torch\.nn\.functional\.silu"):
        train(settings)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_bf16_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda self: "bf16"))
    with pytest.raises(InputError, match="--mixed_precision bf16 rounds interval bounds"):
        make_accelerator(resolve(ibp(tmp_path / "run")))


def test_cnn7_is_the_model_of_the_literature():
    model = timm.create_model("cnn7", in_chans=3, img_size=32)
    weights = {name: tuple(weight.shape) for name, weight in model.named_parameters() if weight.ndim > 1}
    convolutions = [(64, 3, 3, 3), (64, 64, 3, 3), (128, 64, 3, 3), (128, 128, 3, 3), (128, 128, 3, 3)]
    assert list(weights.values()) == [*convolutions, (512, 128 * 16 * 16), (10, 512)]
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert timm.create_model("cnn7", channels=2)(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_cnn7_has_a_variant_with_caps_everywhere(tmp_path):
    model = timm.create_model("cnn7_drelu", placement="all", cap=0.5, channels=4, img_size=8).eval()
    assert [layer.cap.numel() for layer in cap_layers(model)] == [4, 4, 8, 8, 8, 32]
    save_folder(model, tmp_path / "model")
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(load_folder(tmp_path / "model").eval()(images), model(images))
    assert certified(model, images, model(images).argmax(1), 0.0).all()
