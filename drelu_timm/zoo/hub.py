"""The Hugging Face Hub: an exported folder goes there in one commit, single files come back."""

from dataclasses import dataclass
from pathlib import Path

from ..digests import sha256_of
from ..errors import InputError, one_line
from ..models.weights import CONFIG, WEIGHTS, how_to_get, out_of_reach

try:
    from huggingface_hub import CommitOperationAdd, HfApi, get_token, hf_hub_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.hf_api import ModelInfo
    from huggingface_hub.utils import validate_repo_id
except ImportError as error:
    raise InputError(f"huggingface_hub cannot be used ({error}); pip install --upgrade huggingface_hub") from error

OF_THE_HUB = ".gitattributes"  # which the Hub puts into every repository


@dataclass(frozen=True)
class Push:
    """What went to the Hub, or would go there; as text, what to tell the user.

    Attributes:
        url: The page of the model repository.
        files: Bytes of each file.
        commit: The page of the commit; None for a dry run.
    """

    url: str
    files: dict[str, int]
    commit: str | None

    def __str__(self) -> str:
        if self.commit is not None:
            return f"{len(self.files)} files are at {self.url}, by the commit {self.commit}"
        width = max(map(len, self.files))
        return "\n".join(
            [
                f"Dry run, as there is no token: {len(self.files)} files would go to {self.url}, in one commit",
                *(f"  {name:{width}}  {size:>13,} bytes" for name, size in self.files.items()),
                "Log in with `hf auth login`, or set HF_TOKEN to a token that may write, and push again.",
            ]
        )


def push(folder: Path, repo: str) -> Push:
    """Upload the files of a timm / Hugging Face folder to a model repository, in one commit: all of them or none.

    A repository keeps its weights for good, as others have written down their sha256: one that is there already must be
    empty or hold these very weights, and then gets the new card, with the old one in its history. Files of other names
    that somebody put there stay. Without a token nothing is sent.

    Args:
        folder: What ``export`` writes as hub/.
        repo: "ORG/NAME"; made, public, where it does not exist.

    Raises:
        InputError: A bad name or folder, a repository with other files, no network or no rights. Nothing was uploaded
            then.
    """
    check_name(repo, f"--push {repo!r}")
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder} holds no exported model (no {' and no '.join(missing)}); export it anew")
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    token = get_token()
    api = HfApi(token=token)
    url = f"{api.endpoint}/{repo}"
    commit = None if token is None else _upload(api, repo, url, files)
    return Push(url, {file.name: file.stat().st_size for file in files}, commit)


def _upload(api: HfApi, repo: str, url: str, files: list[Path]) -> str:
    """Make the repository if need be, commit, and return the commit's page."""
    folder = files[0].parent
    made = False
    # Exception, as the errors of the Hub's transports (httpx, httpx2 or xet, by version) have nothing else in common.
    try:
        found = _find(api, repo)
        if found is None:
            api.create_repo(repo)
            made = True
    except Exception as error:
        raise _refused(url, folder, one_line(error)) from error
    if found is not None:
        _check_same_model(found, url, folder)
    try:
        return api.create_commit(
            repo,
            [CommitOperationAdd(file.name, file) for file in files],
            commit_message="Model and card, by drelu-timm export",
            parent_commit=found.sha if found else None,  # refused if somebody commits between the check and this
        ).commit_url
    except BaseException as error:  # Ctrl-C as well must leave no empty repository
        rest = _delete(api, repo, url) if made else ""
        if not isinstance(error, Exception):
            raise
        raise _refused(url, folder, one_line(error), rest) from error


def _find(api: HfApi, repo: str) -> ModelInfo | None:
    try:
        return api.model_info(repo, files_metadata=True)
    except RepositoryNotFoundError:
        return None


def _check_same_model(found: ModelInfo, url: str, folder: Path) -> None:
    """Raise where the repository holds anything and not the folder's weights."""
    files = {sibling.rfilename: sibling for sibling in found.siblings or [] if sibling.rfilename != OF_THE_HUB}
    lfs = files[WEIGHTS].lfs if WEIGHTS in files else None  # the Hub keeps all safetensors there
    if not files or (lfs is not None and lfs.sha256 == sha256_of(folder / WEIGHTS)):
        return
    listed = ", ".join(sorted(files)[:5]) + (", ..." if len(files) > 5 else "")
    raise InputError(
        f"--push: {url} holds another model or other files ({listed}), which are never overwritten; nothing was "
        f"uploaded and {folder} stays; give another name, or delete or rename that repository in its settings"
    )


def _delete(api: HfApi, repo: str, url: str) -> str:
    """Delete a repository that was made a moment ago; what to say if that fails."""
    try:
        api.delete_repo(repo)
    except Exception as error:
        return f"; the repository was made, is empty and cannot be deleted ({one_line(error)}): do it at {url}/settings"
    return ""


def _refused(url: str, folder: Path, reason: str, rest: str = "") -> InputError:
    return InputError(
        f"--push: {url} did not take the model ({reason}); nothing was uploaded and {folder} stays{rest}; "
        "check the network, the name and the token's rights (hf auth login), then push again"
    )


def fetch(repo: str, revision: str | None, file: str, cache_dir: Path | None) -> Path:
    """A file of a model repository, downloaded where it is not in the cache.

    Raises:
        InputError: No such repository, revision or file, no rights, or no network.
    """
    where = f"hf-hub:{repo}@{revision}" if revision else f"hf-hub:{repo}"
    reason = out_of_reach(repo, [file], revision=revision, cache_dir=cache_dir)
    if reason is not None:
        raise InputError(f"{where}: {file} cannot be fetched ({reason}). {how_to_get(repo)}.")
    try:
        return Path(hf_hub_download(repo, file, revision=revision, cache_dir=cache_dir))
    except Exception as error:  # as in _upload
        raise InputError(
            f"{where}: {file} cannot be fetched ({one_line(error)}); check the name, the network and, for a "
            "private repository, the token (hf auth login)"
        ) from error


def check_name(repo: str, given: str) -> None:
    """Raise where a repository's name is not ORG/NAME.

    Raises:
        InputError: It is not; ``given`` says where it was written.
    """
    try:
        validate_repo_id(repo)
        well_formed = repo.count("/") == 1
    except HFValidationError:
        well_formed = False
    if not well_formed:
        raise InputError(f"{given} names no repository; give ORG/NAME, of letters, digits, -, _ and . only")
