"""Local stand-in for the Hugging Face Hub, with the requests that uploading and downloading a model need."""

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest


class Hub:
    """Repositories of the stand-in.

    Attributes:
        url: Its address.
        repos: The commits of each repository, each with all files; the first has the files that the Hub adds.
        failures: HTTP status to answer instead, by (method, verb), such as {("POST", "commit"): 403}.
        redirects: Addresses to redirect to instead, likewise.
        before: Functions to call before a request is answered, likewise.
        requests: Every (method, verb) so far.
    """

    def __init__(self, url: str):
        self.url = url
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.failures: dict[tuple[str, str], int] = {}
        self.redirects: dict[tuple[str, str], str] = {}
        self.before: dict[tuple[str, str], Callable[[], None]] = {}
        self.requests: list[tuple[str, str]] = []

    def make(self, repo: str, **files: bytes) -> None:
        self.repos[repo] = [{".gitattributes": b"*.safetensors filter=lfs\n", **files}]

    def files(self, repo: str) -> dict[str, bytes]:
        """Return the newest files, without the files that the Hub adds."""
        return {name: content for name, content in self.repos[repo][-1].items() if name != ".gitattributes"}


def sha(repo: str, index: int) -> str:
    """Return the name of a commit."""
    return hashlib.sha1(f"{repo} {index}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format, *args):
        pass

    def reply(self, status: int, content: object = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        match parts:
            case ["api", "repos", verb]:
                given = json.loads(body)
                call = verb, f"{given['organization']}/{given['name']}", given
            case ["api", "validate-yaml"]:
                call = "validate_yaml", "", body
            case ["api", "models", org, name]:
                call = "info", f"{org}/{name}", None
            case ["api", "models", org, name, verb, "main"]:
                call = verb, f"{org}/{name}", body
            case [org, name, "resolve", revision, file]:
                call = "resolve", f"{org}/{name}", (revision, file)
            case _:
                self.reply(501)
                return
        verb, repo, given = call
        request = (self.command, verb)
        self.hub.requests.append(request)
        self.hub.before.get(request, lambda: None)()
        if request in self.hub.failures:
            self.reply(self.hub.failures[request], {"error": "as the test wants it"})
        elif request in self.hub.redirects:
            self.reply(302, Location=self.hub.redirects[request])
        elif verb not in ("create", "validate_yaml") and repo not in self.hub.repos:
            self.reply(404, X_Error_Code="RepoNotFound")
        else:
            getattr(self, verb)(repo, given)

    do_GET = do_HEAD = do_POST = do_DELETE = answer

    def create(self, repo: str, given: dict) -> None:
        if repo in self.hub.repos:
            self.reply(409, {"error": "You already created this model repo"})
            return
        self.hub.make(repo)
        self.reply(200, {"url": f"{self.hub.url}/{repo}"})

    def delete(self, repo: str, given: dict) -> None:
        del self.hub.repos[repo]
        self.reply(200)

    def validate_yaml(self, repo: str, body: bytes) -> None:
        self.reply(200)

    def info(self, repo: str, given: None) -> None:
        commits = self.hub.repos[repo]
        siblings = []
        for name, content in commits[-1].items():
            sibling: dict = {"rfilename": name, "size": len(content)}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append(sibling)
        self.reply(200, {"id": repo, "sha": sha(repo, len(commits) - 1), "siblings": siblings})

    def preupload(self, repo: str, body: bytes) -> None:
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
        ]
        self.reply(200, {"files": files})

    def commit(self, repo: str, body: bytes) -> None:
        head, *operations = [json.loads(line) for line in body.splitlines()]
        commits = self.hub.repos[repo]
        parent = head["value"].get("parentCommit")
        if parent not in (None, sha(repo, len(commits) - 1)):
            self.reply(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        assert {each["key"] for each in operations} == {"file"}
        new = {each["value"]["path"]: base64.b64decode(each["value"]["content"]) for each in operations}
        commits.append({**commits[-1], **new})
        name = sha(repo, len(commits) - 1)
        self.reply(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{name}", "commitOid": name})

    def resolve(self, repo: str, given: tuple[str, str]) -> None:
        revision, file = given
        commits = self.hub.repos[repo]
        names = [sha(repo, index) for index in range(len(commits))]
        index = len(commits) - 1 if revision == "main" else names.index(revision) if revision in names else None
        if index is None:
            self.reply(404, X_Error_Code="RevisionNotFound")
        elif file not in commits[index]:
            self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=names[index])
        else:
            content = commits[index][file]
            digest = hashlib.sha256(content).hexdigest()
            self.reply(200, content, X_Repo_Commit=names[index], ETag=f'"{digest}"')


@contextmanager
def hub_server():
    """Run the stand-in on a free local port until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = type("Handler", (Handler,), {"hub": hub})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def connect(monkeypatch, url: str) -> None:
    """Make huggingface_hub use an address for the Hub, which need not exist."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    # Versions before 1.0 have the template in their own module.
    for module in (huggingface_hub.constants, huggingface_hub.file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture(name="hub")
def hub_fixture(monkeypatch, tmp_path):
    """The stand-in instead of the real Hub, with a token and separate caches."""
    with hub_server() as running:
        constants = huggingface_hub.constants
        connect(monkeypatch, running.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
        yield running
