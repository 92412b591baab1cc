"""Upload to the Hub and download from it, with a local stand-in."""

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


def make_files(folder: Path, seed: int) -> dict[str, bytes]:
    """Return the files that export writes as hub/, for an untrained model that is saved in a folder."""
    torch.manual_seed(seed)
    save_folder(timm.create_model("dense_drelu", num_classes=3, in_chans=1, img_size=8, width=8), folder)
    model = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    return {"README.md": b"---\nlicense: mit\n---\n# A card\n", "Tester2026Hub_dense.png": b"a picture", **model}


@pytest.fixture
def files(tmp_path):
    return make_files(tmp_path / "saved", seed=0)


IN_A_PROCESS = """
import sys
from pathlib import Path
import timm, torch
from drelu_timm import register_robust_model
from drelu_timm.zoo.hub import push
repo, folder, sha256, config_sha256 = sys.argv[1:]
push({path.name: path.read_bytes() for path in Path(folder).iterdir()}, repo)
digests = {"sha256": sha256, "config_sha256": config_sha256}
name = register_robust_model("Tester2026Hub", "digits", "Linf", f"hf-hub:{repo}", **digests)
images = torch.linspace(0, 1, 128).view(2, 1, 8, 8)
print(timm.create_model(name, pretrained=True)(images).tolist())
"""


def test_a_pushed_model_is_loaded_from_the_hub(hub, files, tmp_path):
    folder = tmp_path / "saved"
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_of_the_test"}
    arguments = [REPO, str(folder), *(sha256_of(folder / name) for name in ("model.safetensors", "config.json"))]
    command = [sys.executable, "-c", IN_A_PROCESS, *arguments]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    images = torch.linspace(0, 1, 128).view(2, 1, 8, 8)
    logits = normalized(load_folder(folder)).eval()(images).tolist()
    assert done.stdout.splitlines() == [str(logits)]


def test_all_files_go_up_in_one_commit(hub, files):
    commit = push(files, REPO)
    assert hub.files(REPO) == files
    assert hub.requests.count(("POST", "commit")) == 1
    assert commit is not None and commit.startswith(f"{hub.url}/{REPO}/commit/")


def test_without_a_token_nothing_is_sent(hub, files, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert push(files, REPO) is None
    assert hub.requests == []


def test_the_same_weights_get_a_new_card_and_the_old_one_stays_in_the_history(hub, files):
    push(files, REPO)
    hub.repos[REPO][-1]["LICENSE"] = b"somebody's"
    old = hub.files(REPO)
    files["README.md"] = b"---\nlicense: mit\n---\n# A better card\n"
    push(files, REPO)
    assert hub.files(REPO) == {**files, "LICENSE": b"somebody's"}
    assert hub.repos[REPO][-2]["README.md"] == old["README.md"] != hub.files(REPO)["README.md"]


def test_an_empty_repository_is_taken(hub, files):
    hub.make(REPO)
    push(files, REPO)
    assert hub.files(REPO) == files


@pytest.mark.parametrize("there", ["other weights", "README.md", "pytorch_model.bin"])
def test_other_files_are_never_overwritten(hub, files, tmp_path, there):
    if there == "other weights":
        push(make_files(tmp_path / "other", seed=1), REPO)
    else:
        hub.make(REPO, **{there: b"somebody's"})
    before = hub.repos[REPO][:]
    listed = "README.md, Tester2026Hub_dense.png, config.json, model.safetensors"
    with pytest.raises(
        InputError, match=r"contains another model or other files \(.*never overwritten. Nothing was uploaded."
    ) as caught:
        push(files, REPO)
    assert (listed if there == "other weights" else there) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert hub.repos[REPO] == before


def test_a_commit_by_somebody_else_after_the_check_is_not_overwritten(hub, files):
    hub.make(REPO)
    hub.before["POST", "commit"] = lambda: hub.repos[REPO].append({"README.md": b"somebody's"})
    with pytest.raises(InputError, match=r"A commit has happened since.*Nothing was uploaded"):
        push(files, REPO)
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
def test_a_failed_upload_changes_nothing(hub, files, request_, status, reason):
    hub.failures[request_] = status
    with pytest.raises(InputError, match=rf"{reason}.*Nothing was uploaded. Check the network") as caught:
        push(files, REPO)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"--push: the upload to {hub.url}/{REPO} failed (")
    assert hub.repos == {}


def test_a_failed_commit_keeps_an_existing_repository(hub, files):
    hub.make(REPO)
    hub.failures["POST", "commit"] = 500
    with pytest.raises(InputError, match="Nothing was uploaded"):
        push(files, REPO)
    assert hub.files(REPO) == {}
    assert ("DELETE", "delete") not in hub.requests


def test_an_empty_repository_that_cannot_be_deleted_again_is_named(hub, files):
    hub.failures |= {("POST", "commit"): 500, ("DELETE", "delete"): 403}
    with pytest.raises(
        InputError, match=rf"empty repository cannot be deleted \(.*\)\. Delete it at {hub.url}/{REPO}/settings"
    ):
        push(files, REPO)
    assert hub.files(REPO) == {}


def test_ctrl_c_leaves_no_empty_repository(hub, files, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", stop)
    with pytest.raises(KeyboardInterrupt):
        push(files, REPO)
    assert hub.repos == {}


def test_no_network(hub, files, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        InputError, match=r"^--push: the upload to http://127.0.0.1:9/.* failed \(.*Nothing was uploaded"
    ):
        push(files, REPO)


@pytest.mark.parametrize("repo", ["no-organisation", "a/b/c", "lab/", "lab/a name", "lab/x--y", "https://host/lab/x"])
def test_a_bad_name_is_refused(files, repo):
    with pytest.raises(InputError, match=r"is not the name of a repository. Use ORG/NAME") as caught:
        push(files, repo)
    assert str(caught.value).startswith(f"--push {repo!r}")
