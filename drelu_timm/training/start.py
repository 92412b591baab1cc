"""The run whose trained weights another one begins with (--init-from): what is recorded of it, and that it stays so."""

from typing import Any

from ..errors import InputError
from ..files import read_json
from ..runs import Run
from .config import TrainConfig

_DIGEST = "init_from_digest"


def recorded_start(start: Run) -> dict[str, Any]:
    """What a run's config.json says of the one that it begins with: its config, and the sha256 of its weights."""
    return {"init_from": start.config, _DIGEST: start.model_digest}


def check_start(config: TrainConfig) -> None:
    """Compare the weights that a run has begun with, if it has begun, with those that its ``init_from`` holds now.

    A start that is gone is in nobody's way, nor is a run of before the digest was recorded.

    Raises:
        InputError: They are others.
    """
    assert config.output_dir is not None
    path = config.output_dir / "config.json"
    if config.init_from is None or not path.exists():
        return
    before = read_json(path).get(_DIGEST)
    try:
        now = Run.open(config.init_from).model_digest
    except (InputError, OSError):
        return
    if before not in (None, now):
        raise InputError(
            f"--resume of {config.output_dir}: --init-from {config.init_from} has other weights than it began with "
            f"(sha256 {before[:12]} before, {now[:12]} now); put those back, or name another --output-dir"
        )
