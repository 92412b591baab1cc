"""Trained models under RobustBench's names, from each place that they may lie in."""

import json
import shutil
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import safetensors.torch
import timm
import torch
from hub_server import connect, hub_fixture, sha  # noqa: F401

import drelu_timm
from drelu_timm import InputError, load_folder, normalized, register_robust_model, save_folder
from drelu_timm.digests import sha256_of

KEY = "Tester2026Sources_dense-8"
NAME = "tester2026sources_dense_8_digits_linf"
REPO = "robust-lab/tester"
FILES = ("config.json", "model.safetensors")
OTHER = "0" * 64


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with an untrained net."""
    folder = tmp_path_factory.mktemp("saved") / "hub"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("dense_drelu", num_classes=10, in_chans=1, img_size=8, width=8)
    save_folder(model, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "hub"))


@pytest.fixture
def uploaded(hub, saved, monkeypatch):
    """The stand-in for the Hub, which is a web server as well, with the model; it speaks no TLS."""
    hub.make(REPO, **{name: (saved / name).read_bytes() for name in FILES})
    monkeypatch.setattr(torch.hub, "urlopen", lambda asked: urlopen(Request(asked.full_url.replace("https", "http"))))
    return hub


def web(hub) -> str:
    return f"{hub.url.replace('http', 'https')}/{REPO}/resolve/main"


def digest(folder: Path, file: str = "model.safetensors") -> str:
    return sha256_of(folder / file)


def register(source, **settings) -> str:
    return register_robust_model(KEY, "digits", "Linf", source, **settings)


def logits(model) -> torch.Tensor:
    return model(torch.linspace(0, 1, 128).view(2, 1, 8, 8))


def same(folder: Path, **settings) -> bool:
    """Whether the registered model is the folder's."""
    return torch.equal(logits(timm.create_model(NAME, pretrained=True, **settings)), logits(expected(folder)))


def expected(folder: Path):
    return normalized(load_folder(folder)).eval()


# Every place


def test_a_folder(saved):
    assert register(saved) == register(str(saved), sha256=digest(saved)) == NAME
    assert same(saved)
    model = timm.create_model(NAME, pretrained=True)
    assert [name for name, _ in model.named_children()] == ["normalize", "model"]
    assert not model.training


def test_a_web_address_is_fetched_once_when_the_model_is_created(uploaded, saved, tmp_path):
    register(web(uploaded) + "/", sha256=digest(saved))
    assert uploaded.requests == []
    assert same(saved)
    assert same(saved)
    assert uploaded.requests == [("GET", "resolve")] * 2
    (cache,) = (tmp_path / "torch_home" / "hub" / "drelu_timm").iterdir()
    assert sorted(path.name for path in cache.iterdir()) == sorted(FILES)


def test_a_digest_of_the_config_as_well_pins_the_whole_model(uploaded, saved):
    digests = {"sha256": digest(saved), "config_sha256": digest(saved, "config.json")}
    for source in (saved, web(uploaded), f"hf-hub:{REPO}"):
        register(source, **digests)
        assert same(saved)


def test_timms_cache_dir_is_where_files_are_fetched_to(uploaded, saved, tmp_path):
    for source, file in ((web(uploaded), "drelu_timm/*/config.json"), (f"hf-hub:{REPO}", "models--*/refs/main")):
        register(source, sha256=digest(saved))
        assert same(saved, cache_dir=tmp_path / "here")
        assert len(list((tmp_path / "here").glob(file))) == 1


def test_the_hub_gives_the_newest_commit_or_the_named_one(uploaded, saved):
    uploaded.repos[REPO].append({"config.json": b"{}", "model.safetensors": b""})
    register(f"hf-hub:{REPO}@{sha(REPO, 0)}", sha256=digest(saved))
    assert same(saved)
    register(f"hf-hub:{REPO}")
    with pytest.raises(InputError, match=r"config.json is not the config of a model"):
        timm.create_model(NAME, pretrained=True)


def test_a_name_moves_to_its_newest_source(uploaded, saved, tmp_path):
    save_folder(timm.create_model("dense_drelu", num_classes=3, in_chans=1, img_size=8), tmp_path / "other")
    register(tmp_path / "other")
    assert timm.create_model(NAME, pretrained=True).model.num_classes == 3
    register(f"hf-hub:{REPO}")
    assert same(saved)


# What RobustBench does


def checkpoint(path: Path, model) -> Path:
    """A file of a registered model's whole state dict, other than that of its source."""
    state = {name: tensor + 0.5 for name, tensor in model.state_dict().items()}
    assert {"normalize.mean", "normalize.std"} < set(state)
    safetensors.torch.save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    model.load_state_dict(state)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_timm_reads_a_checkpoint_of_the_whole_model(saved, tmp_path, suffix):
    register(saved)
    model = expected(saved)
    path = checkpoint(tmp_path / f"{KEY}{suffix}", model)
    loaded = timm.create_model(NAME, pretrained=True, checkpoint_path=str(path))
    assert torch.equal(logits(loaded), logits(model))
    assert not same(saved, checkpoint_path=str(path))


def test_robustbench_reads_a_custom_checkpoint(robustbench, saved, tmp_path):
    register(saved)
    model = expected(saved)
    path = checkpoint(tmp_path / f"{KEY}.pt", model)
    loaded = robustbench.utils.load_model(KEY, dataset="digits", threat_model="Linf", custom_checkpoint=str(path))
    assert torch.equal(logits(loaded), logits(model))


# What is refused


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        (
            "nowhere",
            {},
            r"^nowhere holds no exported model \(no config.json\); give a folder made by .*hf-hub:ORG/NAME$",
        ),
        ("ftp://host/x", {}, r"holds no exported model"),
        ("https://host/x", {}, r"^https://host/x: weights from the web need their sha256; export wrote it"),
        ("https://host/x?a=b", {"sha256": OTHER}, r"give the address of a folder, without \? and #"),
        ("http://host/x", {"sha256": OTHER}, r"^http://host/x: what comes over http may be anybody's; give its https"),
        ("hf-hub:tester", {}, r"^hf-hub:tester names no repository; give ORG/NAME"),
        ("hf-hub:lab/x/y@main", {}, r"^hf-hub:lab/x/y@main names no repository"),
        ("hf-hub:lab/x", {"sha256": "abc"}, r"^sha256 'abc' is no SHA-256; give 64 digits"),
        ("hf-hub:lab/x", {"config_sha256": "abc"}, r"^config_sha256 'abc' is no SHA-256; give 64 digits"),
    ],
)
def test_a_bad_source_is_refused_at_once(source, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        register(source, **settings)
    assert "\n" not in str(caught.value)


def test_other_weights_are_never_used(uploaded, folder, tmp_path):
    found = digest(folder)
    text = (
        rf"model.safetensors holds other weights than were registered: sha256 {OTHER} expected, {found} found; delete"
    )
    for source in (folder, f"hf-hub:{REPO}"):
        register(source, sha256=OTHER)
        with pytest.raises(InputError, match=text) as caught:
            timm.create_model(NAME, pretrained=True)
        assert "\n" not in str(caught.value)
    register(web(uploaded), sha256=OTHER)
    text = rf"^{web(uploaded)}/model.safetensors holds other weights .*not kept \(.*{OTHER}.*{found}.*\); ask"
    with pytest.raises(InputError, match=text):
        timm.create_model(NAME, pretrained=True)
    assert [path.name for path in (tmp_path / "torch_home").rglob("*") if path.is_file()] == ["config.json"]


def test_a_later_config_does_not_change_the_model(uploaded, folder, tmp_path):
    register(web(uploaded), sha256=digest(folder))
    assert same(folder)  # and the config is in the cache
    digests = {"sha256": digest(folder), "config_sha256": digest(folder, "config.json")}
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.5]
    (folder / "config.json").write_text(json.dumps(config))
    uploaded.repos[REPO].append({name: (folder / name).read_bytes() for name in FILES})
    found = digest(folder, "config.json")
    for source in (folder, f"hf-hub:{REPO}"):
        register(source, **digests)
        with pytest.raises(InputError, match=rf"config.json holds other settings than were reg.*, {found} found"):
            timm.create_model(NAME, pretrained=True)
    register(web(uploaded), **digests)
    with pytest.raises(InputError, match=rf"^{web(uploaded)}/config.json holds other settings .*not kept .*{found}"):
        timm.create_model(NAME, pretrained=True)
    assert len(list((tmp_path / "torch_home").rglob("config.json"))) == 1


def test_weights_that_changed_in_the_cache_are_not_used(uploaded, saved, tmp_path):
    register(web(uploaded), sha256=digest(saved))
    assert same(saved)
    (file,) = (tmp_path / "torch_home").rglob("model.safetensors")
    file.write_bytes(b"changed")
    with pytest.raises(InputError, match=r"model.safetensors holds other weights .*delete it and fetch it again"):
        timm.create_model(NAME, pretrained=True)
    file.unlink()
    assert same(saved)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_file_that_is_not_given_out_is_named(uploaded, saved, status):
    uploaded.failures |= {("GET", "resolve"): status, ("HEAD", "resolve"): status}
    register(web(uploaded), sha256=digest(saved))
    with pytest.raises(InputError, match=rf"^{web(uploaded)}/config.json cannot be fetched \(HTTP Error {status}"):
        timm.create_model(NAME, pretrained=True)
    register(f"hf-hub:{REPO}@v1")
    with pytest.raises(
        InputError, match=rf"^hf-hub:{REPO}@v1: config.json cannot be fetched \(.*; check the name"
    ) as caught:
        timm.create_model(NAME, pretrained=True)
    assert "\n" not in str(caught.value)


def test_no_network_is_said(hub, monkeypatch):
    nobody = "https://127.0.0.1:9"
    register(f"{nobody}/x", sha256=OTHER)
    with pytest.raises(InputError, match=rf"^{nobody}/x/config.json cannot be fetched .*check the address and the net"):
        timm.create_model(NAME, pretrained=True)
    register(f"hf-hub:{REPO}")
    connect(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(InputError, match=rf"^hf-hub:{REPO}: config.json cannot be .* reached: .*\)\. Check the net"):
        timm.create_model(NAME, pretrained=True)


def test_without_the_hubs_library_it_is_named(monkeypatch):
    monkeypatch.delattr(drelu_timm.zoo, "hub", raising=False)
    monkeypatch.delitem(sys.modules, "drelu_timm.zoo.hub", raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        InputError, match=r"huggingface_hub cannot be used \(.*\); pip install --upgrade huggingface_hub"
    ):
        register(f"hf-hub:{REPO}")


def test_a_page_in_the_configs_place_does_not_stay_in_the_cache(uploaded, saved):
    register(web(uploaded), sha256=digest(saved))
    files = uploaded.repos[REPO][0]
    config, files["config.json"] = files["config.json"], b"<html>down for maintenance</html>"
    with pytest.raises(InputError, match=r"config.json cannot be read"):
        timm.create_model(NAME, pretrained=True)
    files["config.json"] = config
    assert same(saved)


class Harmful:
    """A pickle of it makes a file where it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_never_loaded(folder, tmp_path):
    register(folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        torch.save({"model": Harmful(tmp_path / "harm")}, folder / name)
    with pytest.raises(InputError, match=r"model.safetensors cannot be read"):
        timm.create_model(NAME, pretrained=True)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model.safetensors cannot be read"):
        timm.create_model(NAME, pretrained=True)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_args": {"checkpoint_path": "x.pt"}}, "model_args contains checkpoint_path"),
        ({"model_args": None}, "model_args None is not an object. Use an object"),
        (
            {"pretrained_cfg": ["x"]},
            "config.json is not the config of a model. It must have architecture, num_classes, pretrai",
        ),
        ({"architecture": "hf-hub:lab/x"}, "config.json: architecture 'hf-hub:lab/x' is unknown"),
    ],
)
def test_a_config_from_elsewhere_is_checked(folder, changes, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    register(folder)
    with pytest.raises(InputError, match=message) as caught:
        timm.create_model(NAME, pretrained=True)
    assert "\n" not in str(caught.value)


def test_what_would_change_a_trained_model_is_refused(saved):
    register(saved)
    with pytest.raises(InputError, match=r"num_classes=7: .* has 10 classes; leave it out"):
        timm.create_model(NAME, pretrained=True, num_classes=7)
    with pytest.raises(InputError, match=r"in_chans=3: .* takes 1 channels; leave it out"):
        timm.create_model(NAME, pretrained=True, in_chans=3)
    assert same(saved, num_classes=10, in_chans=1)
    with pytest.raises(InputError, match=rf"is a trained model: timm.create_model\('{NAME}', pretrained=True\)"):
        timm.create_model(NAME)
    with pytest.raises(TypeError, match="drop_rate"):
        timm.create_model(NAME, pretrained=True, drop_rate=0.5)


def test_names_are_robustbenchs(saved):
    assert register_robust_model("Tester-2026", "digits", "Linf", saved) == "tester_2026_digits_linf"
    with pytest.raises(InputError, match=r"--key 'Tester\.1' is no RobustBench key; use letters"):
        register_robust_model("Tester.1", "digits", "Linf", saved)


def test_a_name_of_timm_is_not_taken_away(saved):
    timm.models.register_model(taken_digits_linf)
    with pytest.raises(InputError, match="--key: timm has a model 'taken_digits_linf' already; choose another key"):
        register_robust_model("Taken", "digits", "Linf", saved)


def taken_digits_linf(pretrained=False, **kwargs):
    raise AssertionError
