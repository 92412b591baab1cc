"""Upload to and download from the Hugging Face Hub."""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from ..errors import InputError, one_line
from ..models.weights import WEIGHTS, how_to_get, out_of_reach

try:
    from huggingface_hub import CommitOperationAdd, HfApi, get_token, hf_hub_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.hf_api import ModelInfo
    from huggingface_hub.utils import validate_repo_id
except ImportError as error:
    raise InputError(f"huggingface_hub cannot be imported ({error}). pip install --upgrade huggingface_hub.") from error

GIT_ATTRIBUTES = ".gitattributes"  # which the Hub adds to every repository


def push(files: Mapping[str, bytes], repo: str) -> str | None:
    """Upload the files of a timm / Hugging Face folder to a model repository, in one commit.

    Others may have recorded the sha256 of a repository's weights, so weights are never replaced: an existing repository
    must be empty or contain the same weights. It then gets the new card, and its other files stay.

    Args:
        files: Name and content of each file, model.safetensors among them.
        repo: "ORG/NAME"; created as a public repository if it does not exist.

    Returns:
        Page of the commit; None without a token, in which case nothing is sent.

    Raises:
        InputError: The name is invalid, the repository contains other files, or the network or the rights are missing.
            Nothing is uploaded in this case.
    """
    check_name(repo, f"--push {repo!r}")
    token = get_token()
    if token is None:
        return None
    api = HfApi(token=token)
    url = f"{api.endpoint}/{repo}"
    created = False
    # Exception: the errors of the Hub's transports (httpx, httpx2 or xet, by version) have no narrower base class.
    try:
        found = _find(api, repo)
        if found is None:
            api.create_repo(repo)
            created = True
    except Exception as error:
        raise _failed(url, one_line(error)) from error
    if found is not None:
        _check_same_model(found, url, files[WEIGHTS])
    try:
        return api.create_commit(
            repo,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message="Model and card, by drelu-timm export",
            parent_commit=found.sha if found else None,  # the Hub refuses if somebody committed after the check
        ).commit_url
    except BaseException as error:  # after Ctrl-C, too, no empty repository may remain
        rest = _delete(api, repo, url) if created else ""
        if not isinstance(error, Exception):
            raise
        raise _failed(url, one_line(error), rest) from error


def _find(api: HfApi, repo: str) -> ModelInfo | None:
    try:
        return api.model_info(repo, files_metadata=True)
    except RepositoryNotFoundError:
        return None


def _check_same_model(found: ModelInfo, url: str, weights: bytes) -> None:
    """Raise InputError if the repository contains anything, and not these weights."""
    files = {sibling.rfilename: sibling for sibling in found.siblings or [] if sibling.rfilename != GIT_ATTRIBUTES}
    lfs = files[WEIGHTS].lfs if WEIGHTS in files else None  # the Hub stores all safetensors in LFS
    if not files or (lfs is not None and lfs.sha256 == sha256(weights).hexdigest()):
        return
    listed = ", ".join(sorted(files)[:5]) + (", ..." if len(files) > 5 else "")
    raise InputError(
        f"--push: {url} contains another model or other files ({listed}), which are never overwritten. Nothing was "
        "uploaded. Use another name, or delete or rename that repository in its settings."
    )


def _delete(api: HfApi, repo: str, url: str) -> str:
    """Delete a repository that was just created, and return what the user has to do if that fails."""
    try:
        api.delete_repo(repo)
    except Exception as error:
        return f" The new, empty repository cannot be deleted ({one_line(error)}). Delete it at {url}/settings."
    return ""


def _failed(url: str, reason: str, rest: str = "") -> InputError:
    return InputError(
        f"--push: the upload to {url} failed ({reason}). Nothing was uploaded.{rest} Check the network, the name and "
        "the token's rights (hf auth login), then push again."
    )


def fetch(repo: str, revision: str | None, file: str, cache_dir: Path | None) -> Path:
    """Return a file of a model repository, downloaded if it is not cached.

    Raises:
        InputError: The repository, revision or file does not exist, or the rights or the network are missing.
    """
    where = f"hf-hub:{repo}@{revision}" if revision else f"hf-hub:{repo}"
    reason = out_of_reach(repo, [file], revision=revision, cache_dir=cache_dir)
    if reason is not None:
        raise InputError(f"{where}: {file} cannot be downloaded ({reason}). {how_to_get(repo)}.")
    try:
        return Path(hf_hub_download(repo, file, revision=revision, cache_dir=cache_dir))
    except Exception as error:  # as in `push`
        raise InputError(
            f"{where}: {file} cannot be downloaded ({one_line(error)}). Check the name, the network and, for a private "
            "repository, the token (hf auth login)."
        ) from error


def check_name(repo: str, given: str) -> None:
    """Check that the name of a repository is ORG/NAME.

    Args:
        repo: The name.
        given: Flag or argument that contains it, for the error.

    Raises:
        InputError: It is not.
    """
    try:
        validate_repo_id(repo)
        well_formed = repo.count("/") == 1
    except HFValidationError:
        well_formed = False
    if not well_formed:
        raise InputError(f"{given} is not the name of a repository. Use ORG/NAME, of letters, digits, -, _ and . only.")
