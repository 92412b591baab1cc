"""FSDP on two processes: the weights of one process, the same end after a kill, and what is refused."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from launching import (
    SGD,
    STEP,
    Launched,
    assert_same_weights,
    config,
    flags,
    held_at,
    log,
    train_by_processes,
    wait_for,
    weights,
)

from drelu_timm.errors import InputError
from drelu_timm.models.weights import load_folder
from drelu_timm.train import train
from drelu_timm.training.config import TrainConfig
from drelu_timm.training.distributed import check_sharding, fsdp_plugin

# What `accelerate launch` makes of scripts/fsdp.yaml, but for a small model: layers of more than 1,000 weights are
# gathered separately, the others together.
LAUNCH = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP",
    "FSDP_MIN_NUM_PARAMS": "1000",
}
TRADES = {"objective": "trades", "cap_weight": 1e-2, "cap_lr": 0.1, "save_every": 2, "resume": True, **SGD}
# The gradient of this penalty reaches the weights without the distributed wrapper.
EVERYTHING = {
    "objective": "at",
    "model": "shallow_cnn_drelu",
    "cap_weight": 1e-5,
    "cap_penalty": "effective",
    "awp_gamma": 0.01,
    "grad_accum_steps": 2,
    **SGD,
    "weight_decay": 1e-2,
    "schedule": "onecycle",
}


def run_to_the_end(settings: TrainConfig) -> Path:
    """Train under FSDP, on two processes."""
    train_by_processes(settings, 2, program="fsdp_on_cpu", environment=LAUNCH)
    assert settings.output_dir is not None
    return settings.output_dir


@pytest.fixture(scope="module")
def sharded_run(tmp_path_factory) -> Path:
    return run_to_the_end(config(tmp_path_factory.mktemp("fsdp") / "run", **TRADES))


def assert_trained_alike(one: Path, other: Path) -> None:
    """The same weights, and the same figures."""
    for folder in ("model", "last"):
        assert_same_weights(one, other, folder)
    for a, b in zip(log(one), log(other), strict=True):
        assert all(a[part] == pytest.approx(b[part], rel=1e-3) for part in ("train", "held_out", "caps", "units"))


def test_sharded_trades_ends_with_the_weights_of_one_process(tmp_path, sharded_run):
    train(config(tmp_path / "one", **TRADES))
    assert_trained_alike(tmp_path / "one", sharded_run)
    assert load_folder(sharded_run / "model")(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.slow
def test_sharded_training_with_everything_does_too(tmp_path):
    one = config(tmp_path / "one", **EVERYTHING)
    train(one)
    assert_trained_alike(tmp_path / "one", run_to_the_end(replace(one, output_dir=tmp_path / "sharded")))


def test_a_killed_sharded_run_ends_as_an_uninterrupted_one(tmp_path, sharded_run):
    reached, tmp_path = tmp_path / "reached", tmp_path / "run"
    settings = config(tmp_path, **TRADES)
    launch = LAUNCH | held_at(STEP, 5, reached)
    process = Launched("train", *flags(settings), processes=2, program="fsdp_on_cpu", environment=launch)
    wait_for(reached, process)
    process.kill()
    process.wait()
    assert [state.name for state in tmp_path.glob("state/epoch-*")] == ["epoch-00000-step-0000004"]
    with pytest.raises(
        InputError, match=r"with other sharding \(FSDP before, none now\)\. Use what the run was started with"
    ):
        train(settings)
    run_to_the_end(settings)
    for folder in ("model", "last"):
        expected, actual = weights(sharded_run, folder), weights(tmp_path, folder)
        assert all(torch.equal(expected[key], actual[key]) for key in expected)


REFUSED = [
    ({"ema_decay": 0.9}, {}, "--ema-decay 0.9 cannot average sharded weights. Leave it out, or launch without FSDP"),
    ({}, {"FSDP_VERSION": "1"}, "FSDP: fsdp_version 1 flattens caps and weights into one tensor. Use fsdp_version 2"),
    (
        {},
        {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
        "FSDP: states of type SHARDED_STATE_DICT are loaded with pickle. Use fsdp_state_dict_type",
    ),
    (
        {},
        {"FSDP_OFFLOAD_PARAMS": "true"},
        "FSDP: the penalty on caps is computed on the GPU. Use fsdp_offload_params false",
    ),
]


@pytest.mark.parametrize(("settings", "variables", "text"), REFUSED, ids=["ema", "version", "state", "offload"])
def test_settings_that_sharding_does_not_support_are_refused(tmp_path, monkeypatch, settings, variables, text):
    for name, value in {**LAUNCH, **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as error:
        check_sharding(
            config(tmp_path, **settings),
            SimpleNamespace(distributed_type=DistributedType.FSDP),  # pyright: ignore[reportArgumentType]
            fsdp_plugin(),  # pyright: ignore[reportArgumentType]
        )
    assert str(error.value).startswith(text)
    assert "\n" not in str(error.value)


def test_a_launch_that_accelerate_would_not_shard_is_refused(tmp_path, monkeypatch):
    for name, value in LAUNCH.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"^FSDP: Accelerate shards models on GPUs only\. Launch without FSDP\.$"):
        train(config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
