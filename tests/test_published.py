"""Models that are published with the package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import drelu_timm
from drelu_timm import InputError, load_folder, normalized, save_folder
from drelu_timm.hashing import sha256_of
from drelu_timm.zoo import robust_models
from drelu_timm.zoo.robust_models import register_published

KEY = "Tester2026Published_dense"
NAME = "tester2026published_dense_digits_linf"


def publish(cards: Path, saved: Path, key: str = KEY) -> Path:
    """Write a model's card, with its weights next to it."""
    weights = saved / "model.safetensors"
    measured = {
        "key": key,
        "timm": json.loads((saved / "config.json").read_text()),
        "weights": {"sha256": sha256_of(weights), "bytes": weights.stat().st_size},
        "recipe": f"scripts/digits/Linf/{key}.toml",
    }
    card = cards / "digits" / "Linf" / f"{key}.json"
    card.parent.mkdir(parents=True, exist_ok=True)
    card.write_text(json.dumps({"dataset": "digits", "unreliable": False, "measured": measured}))
    card.with_suffix(".safetensors").write_bytes(weights.read_bytes())
    return card


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "saved"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_folder(timm.create_model("dense_drelu", num_classes=10, in_chans=1, img_size=8, width=8), folder)
    return folder


@pytest.fixture
def cards(tmp_path):
    return tmp_path / "model_cards"


def test_a_published_model_is_created_by_its_name(cards, saved):
    publish(cards, saved)
    register_published(cards)
    model = timm.create_model(NAME, pretrained=True)
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(model(images), normalized(load_folder(saved)).eval()(images))


IN_A_PROCESS = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("the network was used")
socket.socket.connect = socket.getaddrinfo = refuse
import timm, torch, drelu_timm
print(timm.create_model(sys.argv[1], pretrained=True)(torch.zeros(1, 1, 8, 8)).tolist())
"""


def test_an_installed_copy_finds_its_cards_without_the_network(tmp_path, saved):
    copy = tmp_path / "site-packages" / "drelu_timm"
    shutil.copytree(Path(drelu_timm.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    publish(copy / "model_cards", saved)
    publish(copy / "model_cards", saved, "Broken").write_text("{")
    done = subprocess.run(
        [sys.executable, "-B", "-c", IN_A_PROCESS, NAME],
        env={**os.environ, "PYTHONPATH": str(copy.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    logits = normalized(load_folder(saved)).eval()(torch.zeros(1, 1, 8, 8)).tolist()
    assert done.stdout.splitlines()[-1] == str(logits)


def test_a_checkout_finds_its_cards_next_to_the_package(cards, saved, tmp_path, monkeypatch):
    publish(cards, saved, "InCheckout")
    monkeypatch.setattr(robust_models, "INSTALLED", tmp_path / "none")
    monkeypatch.setattr(robust_models, "IN_CHECKOUT", cards)
    register_published()
    assert timm.is_model("incheckout_digits_linf")


def test_without_a_folder_nothing_is_registered(cards, monkeypatch):
    monkeypatch.setattr(robust_models, "INSTALLED", cards)
    monkeypatch.setattr(robust_models, "IN_CHECKOUT", cards)
    before = timm.list_models()
    register_published()
    assert timm.list_models() == before


def test_a_card_is_read_when_its_model_is_created(cards, saved):
    publish(cards, saved).write_text("{")
    register_published(cards)
    with pytest.raises(InputError, match=rf"{KEY}.json cannot be read as JSON"):
        timm.create_model(NAME, pretrained=True)


@pytest.mark.parametrize("lost", ["measured", "timm", "weights", "recipe"])
def test_a_card_that_lacks_something_is_named(cards, saved, lost):
    card = publish(cards, saved)
    content = json.loads(card.read_text())
    (content if lost == "measured" else content["measured"]).pop(lost)
    card.write_text(json.dumps(content))
    register_published(cards)
    with pytest.raises(InputError, match=rf"{KEY}.json is not the card of a model \(KeyError\('{lost}'\)\)"):
        timm.create_model(NAME, pretrained=True)


def test_only_a_card_with_its_weights_is_listed_as_pretrained(cards, saved):
    publish(cards, saved, "TesterListed")
    publish(cards, saved, "TesterUnlisted").with_suffix(".safetensors").unlink()
    register_published(cards)
    assert timm.list_pretrained("tester*listed_digits_linf") == ["testerlisted_digits_linf"]
    drelu_timm.register_robust_model("TesterUnlisted", "digits", "Linf", saved)
    assert timm.models.is_model_pretrained("testerunlisted_digits_linf")


def test_the_error_for_missing_weights_names_the_recipe(cards, saved):
    card = publish(cards, saved)
    card.with_suffix(".safetensors").unlink()
    register_published(cards)
    weights = saved / "model.safetensors"
    with pytest.raises(InputError) as caught:
        timm.create_model(NAME, pretrained=True)
    assert str(caught.value) == (
        f"{KEY}: its weights do not come with the package ({weights.stat().st_size:,} bytes, sha256 "
        f"{sha256_of(weights)}). Make them with drelu-timm train --config "
        f"scripts/digits/Linf/{KEY}.toml and drelu-timm export, then call register_robust_model('{KEY}', 'digits', "
        "'Linf', FOLDER), or pass the location of these weights with their sha256."
    )


def test_other_weights_next_to_a_card_are_not_used(cards, saved):
    weights = publish(cards, saved).with_suffix(".safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    register_published(cards)
    with pytest.raises(InputError, match=rf"{KEY}.safetensors has other weights than registered \(sha256"):
        timm.create_model(NAME, pretrained=True)


def test_stray_files_do_not_stop_the_import(cards, saved):
    for name in ("._Tester2026.json", "a.b.json"):
        publish(cards, saved).with_name(name).write_text("")
    register_published(cards)
    assert timm.is_model(NAME)
