"""What is evaluated, and how: the flags of `drelu-timm evaluate`, what is allowed, and where a result goes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..attacks.threat_model import ThreatModel, norm_and_radius, parse_threat_models
from ..data.datasets import DATASETS
from ..errors import InputError, unknown

PRECISIONS = ("float32", "bfloat16")  # names of torch's dtypes


@dataclass(frozen=True)
class EvaluateConfig:
    """Attack a model by AutoAttack, and by attacks that know what hides a gradient; say what can be believed."""

    run: tyro.conf.Positional[str]
    """Run directory made by train (RUN/last: its last epoch, not its best).
    Or the name of a timm model with pretrained weights, or of a RobustBench model."""
    suite: str = "quick"
    """quick, paper, autoattack, standard (AutoAttack and more), adaptive or all; each gives a verdict on masking."""
    norm: str | None = None
    """Linf or L2; by default the run's, or the dataset's. Another one needs --eps."""
    eps: str | None = None
    """Radius in units of a [0, 1] pixel, such as 8/255, or several: 2/255,8/255; by default the run's or dataset's."""
    n_examples: int = 1000
    """Use the first so many test images, at most."""
    batch_size: int = 256
    """Images a pass, at most."""
    precision: str = "float32"
    """What attacks search in: float32, or bfloat16 where that is faster; what they find is judged in float32."""
    transfer_from: str | None = None
    """A second model, named as RUN is, whose adversarial images are tried as well."""
    seed: int = 0
    """Keys the randomness of every example and attack."""
    dataset: str | None = None
    """Dataset whose test set is attacked; by default the run's."""
    data_dir: Path | None = None
    """Where the dataset lies; by default where it lay for the run. For --dataset folder: DIR/train and DIR/val (or
    test), folders or .tar files with a folder per class at the top and its images at any depth below."""


def check_flags(config: EvaluateConfig) -> None:
    """Raise what is wrong with the flags, before anything is loaded.

    Raises:
        InputError: The first flag with a value that is not possible.
    """
    from ..attacks.suites import SUITES  # attacks need torch, which the flags and their help do without

    for flag, value, allowed in (
        ("--suite", config.suite, SUITES),
        ("--precision", config.precision, PRECISIONS),
        ("--dataset", config.dataset, DATASETS),
    ):
        if value is not None and value not in allowed:
            raise unknown(flag, value, allowed)
    for flag, value in (("--n-examples", config.n_examples), ("--batch-size", config.batch_size)):
        if value < 1:
            raise InputError(f"{flag} {value} is not possible; give 1 or more")


def attacked_in(config: EvaluateConfig, default: ThreatModel) -> list[ThreatModel]:
    """The balls, from the smallest, that a model is evaluated in.

    Args:
        config: What is asked for.
        default: What the model was trained in, or else the dataset's.

    Raises:
        InputError: As `norm_and_radius` and `parse_threat_models` do.
    """
    norm, eps = norm_and_radius(config.norm, config.eps, default)
    return parse_threat_models(norm, eps.split(","))


def result_path(folder: Path, suite: str, balls: Sequence[ThreatModel]) -> Path:
    """Where a result goes: of one radius into ``folder``, of several into ``sweeps`` beside it."""
    largest = balls[-1]
    radius = largest.written.replace("/", "_")
    if len(balls) > 1:
        folder, radius = folder.with_name("sweeps"), f"up-to-{radius}"
    return folder / f"{suite}-{largest.norm}-{radius}.json"
