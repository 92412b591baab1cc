"""What a run directory says of its training: the flags, and the accuracy on held-out images."""

import json
from pathlib import Path
from typing import Any

from ..attacks.threat_model import radius_written
from ..errors import InputError
from ..evaluation.result_files import RADIUS
from ..files import read_json
from ..kinds import NUMBER, OBJECT, SHARE, TEXT, Kind, check_fields, is_whole, one_of, or_null
from .naming import Flags

_FLAGS = {
    "model": TEXT,
    "dataset": TEXT,
    "seed": Kind(is_whole, "a whole number"),
    "objective": one_of(("natural", "at", "trades", "mart"), "an objective"),
    "beta": NUMBER,
    "awp_gamma": NUMBER,
    "eps": RADIUS,
    "activation": or_null(TEXT),
    "placement": or_null(TEXT),
    "cap_weight": NUMBER,
    "cap_penalty": TEXT,
    "generated_fraction": NUMBER,
}


def read_config(path: Path) -> tuple[Flags, ...]:
    """The flags that a run was trained with, then those of the run that it went on from, of that one's start, and on.

    Each with its radius in one spelling, with "mixed_precision" of its launch ("no" where a config.json is from before
    it was said), and with a digest of the generated images under "generated".

    Raises:
        InputError: It is cut short, or of another version.
    """
    config, chain = read_json(path), []
    check_fields(path, config, {"train": OBJECT, "dataset_title": TEXT})
    while config is not None:
        chain.append(_read_flags(path, config))
        config = config.get("init_from")
    return tuple(chain)


def read_held_out(run: Path) -> float | None:
    """Accuracy in [0, 1] on held-out images of the epoch that was kept, of the averaged weights if there are any.

    Returns:
        None without a log.

    Raises:
        InputError: A log that is cut short.
    """
    log = run / "log.jsonl"
    if not log.is_file():
        return None
    try:
        epochs = {line["epoch"]: line for line in map(json.loads, log.read_text(encoding="utf-8").splitlines())}
        kept = epochs[epochs[max(epochs)]["best_epoch"]]
        held_out = kept.get("held_out_ema", kept["held_out"])["pgd"]
        if not SHARE.holds(held_out):
            raise ValueError(f"pgd is {held_out!r}")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{log} is no whole log of a training ({error!r}); train anew") from error
    return held_out


def _read_flags(path: Path, config: Any) -> Flags:
    check_fields(path, config, {"train": OBJECT}, {"generated": or_null(OBJECT), "launch": OBJECT})
    flags, generated, launch = config["train"], config.get("generated"), config.get("launch", {})
    check_fields(path, flags, _FLAGS)
    check_fields(path, launch, {}, {"mixed_precision": TEXT})
    if generated is not None:
        check_fields(path, generated, {"digest": TEXT})
    return {
        **flags,
        "eps": radius_written(flags["eps"]),
        "mixed_precision": launch.get("mixed_precision", "no"),
        "generated": None if generated is None else generated["digest"][:12],
    }
