"""Pushing to the Hub and fetching back, at a stand-in for it."""

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from hub_server import hub_fixture  # noqa: F401

from drelu_timm import InputError, load_folder, normalized, save_folder
from drelu_timm.hashing import sha256_of
from drelu_timm.zoo.hub import push

REPO = "robust-lab/Tester2026Hub_dense"
NAMES = ["README.md", "Tester2026Hub_dense.png", "config.json", "model.safetensors"]


def make_folder(path: Path, seed: int) -> Path:
    """What export writes as hub/, of an untrained net."""
    torch.manual_seed(seed)
    save_folder(timm.create_model("dense_drelu", num_classes=3, in_chans=1, img_size=8, width=8), path)
    (path / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    (path / "Tester2026Hub_dense.png").write_bytes(b"a picture")
    return path


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "hub", seed=0)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


IN_A_PROCESS = """
import sys
from pathlib import Path
import timm, torch
from drelu_timm import register_robust_model
from drelu_timm.zoo.hub import push
repo, folder, sha256 = sys.argv[1:]
print(push(Path(folder), repo).url)
name = register_robust_model("Tester2026Hub", "digits", "Linf", f"hf-hub:{repo}", sha256=sha256)
images = torch.linspace(0, 1, 128).view(2, 1, 8, 8)
print(timm.create_model(name, pretrained=True)(images).tolist())
"""


def test_what_was_pushed_is_loaded_back_by_its_name_on_the_hub(hub, folder, tmp_path):
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_of_the_test"}
    arguments = [REPO, str(folder), sha256_of(folder / "model.safetensors")]
    command = [sys.executable, "-c", IN_A_PROCESS, *arguments]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    images = torch.linspace(0, 1, 128).view(2, 1, 8, 8)
    logits = normalized(load_folder(folder)).eval()(images).tolist()
    assert done.stdout.splitlines() == [f"{hub.url}/{REPO}", str(logits)]


def test_all_files_go_up_in_one_commit(hub, folder):
    pushed = push(folder, REPO)
    assert hub.files(REPO) == contents(folder)
    assert hub.requests.count(("POST", "commit")) == 1
    assert (pushed.url, list(pushed.files)) == (f"{hub.url}/{REPO}", NAMES)
    assert str(pushed) == f"4 files are at {pushed.url}, by the commit {pushed.commit}"


def test_hidden_files_stay_here(hub, folder):
    (folder / ".DS_Store").write_bytes(b"")
    push(folder, REPO)
    assert sorted(hub.files(REPO)) == NAMES


def test_without_a_token_nothing_is_sent_and_it_is_said_what_would_be(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    pushed = push(folder, REPO)
    assert pushed.commit is None
    first, *files, last = str(pushed).splitlines()
    assert first == f"Dry run, as there is no token: 4 files would go to {hub.url}/{REPO}, in one commit"
    assert [line.split()[0] for line in files] == NAMES
    assert [line.split()[1] for line in files] == [f"{len(contents(folder)[name]):,}" for name in NAMES]
    assert "hf auth login" in last
    assert hub.requests == []


def test_the_same_weights_get_a_new_card_and_the_old_one_stays_in_the_history(hub, folder):
    push(folder, REPO)
    hub.repos[REPO][-1]["LICENSE"] = b"somebody's"
    old = hub.files(REPO)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A better card\n")
    push(folder, REPO)
    assert hub.files(REPO) == {**contents(folder), "LICENSE": b"somebody's"}
    assert hub.repos[REPO][-2]["README.md"] == old["README.md"] != hub.files(REPO)["README.md"]


def test_an_empty_repository_is_taken(hub, folder):
    hub.make(REPO)
    push(folder, REPO)
    assert hub.files(REPO) == contents(folder)


@pytest.mark.parametrize("there", ["other weights", "README.md", "pytorch_model.bin"])
def test_nothing_that_is_there_is_overwritten(hub, folder, tmp_path, there):
    if there == "other weights":
        push(make_folder(tmp_path / "other", seed=1), REPO)
    else:
        hub.make(REPO, **{there: b"somebody's"})
    before = hub.repos[REPO][:]
    listed = "README.md, Tester2026Hub_dense.png, config.json, model.safetensors"
    with pytest.raises(
        InputError, match=r"holds another model or other files \(.*never overwritten; .*stays;"
    ) as caught:
        push(folder, REPO)
    assert (listed if there == "other weights" else there) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert hub.repos[REPO] == before


def test_a_commit_by_somebody_else_since_the_look_is_not_overwritten(hub, folder):
    hub.make(REPO)
    hub.before["POST", "commit"] = lambda: hub.repos[REPO].append({"README.md": b"somebody's"})
    with pytest.raises(InputError, match=r"A commit has happened since.*nothing was uploaded"):
        push(folder, REPO)
    assert hub.files(REPO) == {"README.md": b"somebody's"}


@pytest.mark.parametrize(
    ("request_", "status", "reason"),
    [
        (("GET", "info"), 403, "403 Forbidden"),
        (("POST", "create"), 401, "401"),
        (("POST", "create"), 403, "403 Forbidden"),
        (("POST", "preupload"), 403, "403 Forbidden"),
        (("POST", "commit"), 403, "403 Forbidden"),
        (("POST", "commit"), 500, "Internal Server Error"),
    ],
)
def test_a_refusal_leaves_nothing_there_and_everything_here(hub, folder, request_, status, reason):
    hub.failures[request_] = status
    before = contents(folder)
    with pytest.raises(
        InputError, match=rf"{reason}.*nothing was uploaded and .*hub stays; check the network"
    ) as caught:
        push(folder, REPO)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"--push: {hub.url}/{REPO} did not take the model (")
    assert hub.repos == {}
    assert contents(folder) == before


def test_a_failed_commit_leaves_a_repository_that_was_there(hub, folder):
    hub.make(REPO)
    hub.failures["POST", "commit"] = 500
    with pytest.raises(InputError, match="nothing was uploaded"):
        push(folder, REPO)
    assert hub.files(REPO) == {}
    assert ("DELETE", "delete") not in hub.requests


def test_an_empty_repository_that_cannot_be_deleted_again_is_named(hub, folder):
    hub.failures |= {("POST", "commit"): 500, ("DELETE", "delete"): 403}
    with pytest.raises(InputError, match=rf"is empty and cannot be deleted \(.*\): do it at {hub.url}/{REPO}/settings"):
        push(folder, REPO)
    assert hub.files(REPO) == {}


def test_ctrl_c_leaves_no_empty_repository(hub, folder, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", stop)
    with pytest.raises(KeyboardInterrupt):
        push(folder, REPO)
    assert hub.repos == {}


def test_no_network(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        InputError, match=r"^--push: http://127.0.0.1:9/.* did not take the model \(.*nothing was uploaded"
    ):
        push(folder, REPO)


@pytest.mark.parametrize("repo", ["no-organisation", "a/b/c", "lab/", "lab/a name", "lab/x--y", "https://host/lab/x"])
def test_a_bad_name_is_refused(folder, repo):
    with pytest.raises(InputError, match=r"names no repository; give ORG/NAME") as caught:
        push(folder, repo)
    assert str(caught.value).startswith(f"--push {repo!r}")


@pytest.mark.parametrize(
    ("gone", "named"), [(("config.json",), r"no config.json\)"), (NAMES, "no config.json and no model")]
)
def test_a_folder_that_is_no_model_is_refused(folder, gone, named):
    for name in gone:
        (folder / name).unlink()
    with pytest.raises(InputError, match=f"holds no exported model .{named}"):
        push(folder, REPO)
