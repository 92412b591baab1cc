"""Trained models under RobustBench's names, from each kind of source."""

import json
import shutil
import sys
from pathlib import Path
from urllib.request import Request

import pytest
import safetensors.torch
import timm
import torch
from hub_server import connect, hub_fixture, sha  # noqa: F401

import drelu_timm
from drelu_timm import InputError, load_folder, normalized, register_robust_model, save_folder
from drelu_timm.hashing import sha256_of
from drelu_timm.zoo import robust_models

KEY = "Tester2026Sources_dense-8"
NAME = "tester2026sources_dense_8_digits_linf"
REPO = "robust-lab/tester"
FILES = ("config.json", "model.safetensors")
OTHER = "0" * 64


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder with an untrained model."""
    folder = tmp_path_factory.mktemp("saved") / "hub"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("dense_drelu", num_classes=10, in_chans=1, img_size=8, width=8)
    save_folder(model, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """Copy of it that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "hub"))


@pytest.fixture
def uploaded(hub, saved, monkeypatch):
    """Stand-in for the Hub with the model; it is also a web server, without TLS."""
    hub.make(REPO, **{name: (saved / name).read_bytes() for name in FILES})
    opened = robust_models._open
    monkeypatch.setattr(
        robust_models, "_open", lambda url, timeout: opened(url.replace("https", "http", 1), timeout=timeout)
    )
    return hub


def web(hub) -> str:
    return f"{hub.url.replace('http', 'https')}/{REPO}/resolve/main"


def digest(folder: Path, file: str = "model.safetensors") -> str:
    return sha256_of(folder / file)


def digests(folder: Path) -> dict[str, str]:
    return {"sha256": digest(folder), "config_sha256": digest(folder, "config.json")}


def register(source, **settings) -> str:
    return register_robust_model(KEY, "digits", "Linf", source, **settings)


def logits(model) -> torch.Tensor:
    return model(torch.linspace(0, 1, 128).view(2, 1, 8, 8))


def same(folder: Path, **settings) -> bool:
    """Return whether the registered model is the folder's."""
    return torch.equal(logits(timm.create_model(NAME, pretrained=True, **settings)), logits(expected(folder)))


def expected(folder: Path):
    return normalized(load_folder(folder)).eval()


# Sources


def test_a_folder(saved):
    assert register(saved) == register(str(saved), sha256=digest(saved)) == NAME
    assert same(saved)
    model = timm.create_model(NAME, pretrained=True)
    assert [name for name, _ in model.named_children()] == ["normalize", "model"]
    assert not model.training


def test_a_web_address_is_downloaded_once_when_the_model_is_created(uploaded, saved, tmp_path):
    register(web(uploaded) + "/", **digests(saved))
    assert uploaded.requests == []
    assert same(saved)
    assert same(saved)
    assert uploaded.requests == [("GET", "resolve")] * 2
    (cache,) = (tmp_path / "torch_home" / "hub" / "drelu_timm").iterdir()
    assert sorted(path.name for path in cache.iterdir()) == sorted(FILES)


def test_both_digests_pin_the_whole_model(uploaded, saved):
    for source in (saved, web(uploaded), f"hf-hub:{REPO}"):
        register(source, **digests(saved))
        assert same(saved)


def test_files_are_downloaded_to_timms_cache_dir(uploaded, saved, tmp_path):
    for source, file in ((web(uploaded), "drelu_timm/*/config.json"), (f"hf-hub:{REPO}", "models--*/refs/main")):
        register(source, **digests(saved))
        assert same(saved, cache_dir=tmp_path / "here")
        assert len(list((tmp_path / "here").glob(file))) == 1


def test_the_hub_serves_the_newest_or_the_named_commit(uploaded, saved):
    uploaded.repos[REPO].append({"config.json": b"{}", "model.safetensors": b""})
    register(f"hf-hub:{REPO}@{sha(REPO, 0)}", **digests(saved))
    assert same(saved)
    register(f"hf-hub:{REPO}", **digests(saved))
    with pytest.raises(InputError, match=r"config.json has other settings than registered"):
        timm.create_model(NAME, pretrained=True)


def test_a_name_moves_to_its_newest_source(uploaded, saved, tmp_path):
    save_folder(timm.create_model("dense_drelu", num_classes=3, in_chans=1, img_size=8), tmp_path / "other")
    register(tmp_path / "other")
    assert timm.create_model(NAME, pretrained=True).model.num_classes == 3
    register(f"hf-hub:{REPO}", **digests(saved))
    assert same(saved)


# What RobustBench does


def checkpoint(path: Path, model) -> Path:
    """Write a state dict of the whole model whose values differ from its source's."""
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


# Downloads


@pytest.mark.parametrize("target", ["http://host/config.json", "ftp://host/config.json", "//host:1/x"])
def test_a_redirect_to_anything_but_https_is_refused(uploaded, saved, tmp_path, target):
    uploaded.redirects["GET", "resolve"] = target
    register(web(uploaded), **digests(saved))
    with pytest.raises(
        InputError, match=rf"^{web(uploaded)}/config.json cannot be downloaded \(.*(https|HTTP Error)"
    ) as caught:
        timm.create_model(NAME, pretrained=True)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "torch_home").rglob("*") if path.is_file()]


def test_a_redirect_to_https_is_followed():
    request = Request("https://host/config.json")
    handler = robust_models._HttpsOnly()
    redirected = handler.redirect_request(request, None, 302, "Found", {}, "https://elsewhere/config.json")
    assert redirected is not None and redirected.full_url == "https://elsewhere/config.json"


def test_a_download_that_is_too_large_is_not_kept(uploaded, saved, tmp_path, monkeypatch):
    monkeypatch.setitem(robust_models._LARGEST, "config.json", 10)
    register(web(uploaded), **digests(saved))
    with pytest.raises(InputError, match=r"config.json is larger than 10 bytes"):
        timm.create_model(NAME, pretrained=True)
    assert not [path for path in (tmp_path / "torch_home").rglob("*") if path.is_file()]


# What is refused


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        (
            "nowhere",
            {},
            r"^nowhere does not contain an exported model \(no config.json\). Use a folder .*hf-hub:ORG/NAME\.$",
        ),
        ("ftp://host/x", {}, r"does not contain an exported model"),
        ("https://host/x", {}, r"^https://host/x: a download needs sha256 and config_sha256\. See register"),
        ("https://host/x", {"sha256": OTHER}, r"^https://host/x: a download needs config_sha256\."),
        ("hf-hub:lab/x", {"config_sha256": OTHER}, r"^hf-hub:lab/x: a download needs sha256\."),
        ("https://host/x?a=b", {"sha256": OTHER}, r"^https://host/x\?a=b has a \? or #. Use the address of a folder"),
        (
            "http://host/x",
            {"sha256": OTHER},
            r"^http://host/x: files sent over http can be replaced on the way. Use the https",
        ),
        ("hf-hub:tester", {}, r"^hf-hub:tester is not the name of a repository. Use ORG/NAME"),
        ("hf-hub:lab/x/y@main", {}, r"^hf-hub:lab/x/y@main is not the name of a repository"),
        ("hf-hub:lab/x", {"sha256": "abc"}, r"^sha256 'abc' is not a SHA-256. Use the 64 digits"),
        ("hf-hub:lab/x", {"config_sha256": "abc"}, r"^config_sha256 'abc' is not a SHA-256. Use the 64 digits"),
    ],
)
def test_a_bad_source_is_refused_at_once(source, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        register(source, **settings)
    assert "\n" not in str(caught.value)


def test_other_weights_are_never_used(uploaded, folder, tmp_path):
    found = digest(folder)
    text = rf"model.safetensors has other weights than registered \(sha256 {found}, not {OTHER}\)\. Delete"
    wrong = {**digests(folder), "sha256": OTHER}
    for source in (folder, f"hf-hub:{REPO}"):
        register(source, **wrong)
        with pytest.raises(InputError, match=text) as caught:
            timm.create_model(NAME, pretrained=True)
        assert "\n" not in str(caught.value)
    register(web(uploaded), **wrong)
    text = rf"^{web(uploaded)}/model.safetensors has other weights than .* \(sha256 {found}, not {OTHER}\)\. Ask"
    with pytest.raises(InputError, match=text):
        timm.create_model(NAME, pretrained=True)
    assert [path.name for path in (tmp_path / "torch_home").rglob("*") if path.is_file()] == ["config.json"]


def test_a_later_config_does_not_change_the_model(uploaded, folder, tmp_path):
    registered = digests(folder)
    register(f"hf-hub:{REPO}", **registered)
    assert same(folder)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.5]
    (folder / "config.json").write_text(json.dumps(config))
    uploaded.repos[REPO].append({name: (folder / name).read_bytes() for name in FILES})
    found = digest(folder, "config.json")
    for source in (folder, f"hf-hub:{REPO}"):
        register(source, **registered)
        with pytest.raises(InputError, match=rf"config.json has other settings than reg.* \(sha256 {found}"):
            timm.create_model(NAME, pretrained=True)
    register(web(uploaded), **registered)
    with pytest.raises(InputError, match=rf"^{web(uploaded)}/config.json has other settings .*sha256 {found}"):
        timm.create_model(NAME, pretrained=True)
    assert not list((tmp_path / "torch_home").rglob("config.json"))


def test_weights_that_changed_in_the_cache_are_not_used(uploaded, saved, tmp_path):
    register(web(uploaded), **digests(saved))
    assert same(saved)
    (file,) = (tmp_path / "torch_home").rglob("model.safetensors")
    file.write_bytes(b"changed")
    with pytest.raises(InputError, match=r"model.safetensors has other weights .*Delete it and download it again"):
        timm.create_model(NAME, pretrained=True)
    file.unlink()
    assert same(saved)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_file_that_cannot_be_downloaded_is_named(uploaded, saved, status):
    uploaded.failures |= {("GET", "resolve"): status, ("HEAD", "resolve"): status}
    register(web(uploaded), **digests(saved))
    with pytest.raises(InputError, match=rf"^{web(uploaded)}/config.json cannot be downloaded \(HTTP Error {status}"):
        timm.create_model(NAME, pretrained=True)
    register(f"hf-hub:{REPO}@v1", **digests(saved))
    with pytest.raises(
        InputError, match=rf"^hf-hub:{REPO}@v1: config.json cannot be downloaded \(.*\). Check the name"
    ) as caught:
        timm.create_model(NAME, pretrained=True)
    assert "\n" not in str(caught.value)


def test_a_missing_network_is_named(hub, monkeypatch):
    nobody = "https://127.0.0.1:9"
    register(f"{nobody}/x", sha256=OTHER, config_sha256=OTHER)
    with pytest.raises(InputError, match=rf"^{nobody}/x/config.json cannot be downloaded .*Check the address and"):
        timm.create_model(NAME, pretrained=True)
    register(f"hf-hub:{REPO}", sha256=OTHER, config_sha256=OTHER)
    connect(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(InputError, match=rf"^hf-hub:{REPO}: config.json cannot be .* reached: .*\)\. Check the net"):
        timm.create_model(NAME, pretrained=True)


def test_a_missing_huggingface_hub_is_named(monkeypatch):
    monkeypatch.delattr(drelu_timm.zoo, "hub", raising=False)
    monkeypatch.delitem(sys.modules, "drelu_timm.zoo.hub", raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        InputError, match=r"huggingface_hub cannot be imported \(.*\)\. pip install --upgrade huggingface_hub"
    ):
        register(f"hf-hub:{REPO}")


def test_an_html_page_instead_of_the_config_does_not_stay_in_the_cache(uploaded, saved):
    register(web(uploaded), **digests(saved))
    files = uploaded.repos[REPO][0]
    config, files["config.json"] = files["config.json"], b"<html>down for maintenance</html>"
    with pytest.raises(InputError, match=r"config.json has other settings than registered"):
        timm.create_model(NAME, pretrained=True)
    files["config.json"] = config
    assert same(saved)


class Harmful:
    """Object whose pickle creates a file when it is loaded."""

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


def test_arguments_that_would_change_a_trained_model_are_refused(saved):
    register(saved)
    with pytest.raises(InputError, match=r"num_classes=7: .* has 10 classes. Leave it out"):
        timm.create_model(NAME, pretrained=True, num_classes=7)
    with pytest.raises(InputError, match=r"in_chans=3: .* takes 1 channels. Leave it out"):
        timm.create_model(NAME, pretrained=True, in_chans=3)
    assert same(saved, num_classes=10, in_chans=1)
    with pytest.raises(InputError, match=rf"is a trained model. Use timm.create_model\('{NAME}', pretrained=True\)"):
        timm.create_model(NAME)
    with pytest.raises(TypeError, match="drop_rate"):
        timm.create_model(NAME, pretrained=True, drop_rate=0.5)


def test_names_are_robustbenchs(saved):
    assert register_robust_model("Tester-2026", "digits", "Linf", saved) == "tester_2026_digits_linf"
    with pytest.raises(InputError, match=r"--key 'Tester\.1' is not a RobustBench key. Use letters"):
        register_robust_model("Tester.1", "digits", "Linf", saved)


def test_a_name_of_timm_is_not_replaced(saved):
    timm.models.register_model(taken_digits_linf)
    with pytest.raises(InputError, match=r"--key: timm has a model 'taken_digits_linf' already\. Choose another key"):
        register_robust_model("Taken", "digits", "Linf", saved)


def taken_digits_linf(pretrained=False, **kwargs):
    raise AssertionError
