"""Flags of `drelu-timm evaluate`: their checks, and where a result goes. They need no torch, nor does their help."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..attacks.threat_model import ThreatModel, norm_and_radius, parse_threat_models
from ..data.datasets import DATASETS
from ..errors import InputError, unknown

PRECISIONS = ("float32", "bfloat16", "float16")  # names of torch's dtypes


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure robust accuracy under AutoAttack and adaptive attacks, with a verdict on gradient masking."""

    run: tyro.conf.Positional[str]
    """Run directory made by train (RUN/last: its last epoch instead of its best).
    Or the name of a timm model with pretrained weights, or of a RobustBench model."""
    suite: str = "quick"
    """quick, paper, autoattack, standard (AutoAttack and more), adaptive or all; each gives a verdict on masking."""
    norm: str | None = None
    """Linf or L2; by default the run's, or the dataset's. Another norm needs --eps."""
    eps: str | None = None
    """Radius in units of a [0, 1] pixel, such as 8/255, or several: 2/255,8/255; by default the run's or dataset's."""
    n_examples: int = 1000
    """Number of test images, from the first, at most."""
    batch_size: int = 256
    """Images per pass, at most."""
    precision: str = "float32"
    """Precision of the search: float32, or bfloat16 or float16 where that is faster. Results are judged in float32."""
    transfer_from: str | None = None
    """A second model, named like RUN, whose adversarial images are tried as well."""
    seed: int = 0
    """Key of the randomness of every example and attack."""
    dataset: str | None = None
    """Dataset of the test images; by default the run's."""
    data_dir: Path | None = None
    """Folder of the dataset; by default the run's. For --dataset folder: DIR/train and DIR/val (or test), folders or
    .tar files with a folder per class at the top and its images at any depth below."""


def check_flags(config: EvaluateConfig) -> None:
    """Check the values of the flags before anything is loaded.

    Raises:
        InputError: The first flag with a value that is not possible.
    """
    from ..attacks.suites import SUITES  # attacks need torch

    for flag, value, allowed in (
        ("--suite", config.suite, SUITES),
        ("--precision", config.precision, PRECISIONS),
        ("--dataset", config.dataset, DATASETS),
    ):
        if value is not None and value not in allowed:
            raise unknown(flag, value, allowed)
    for flag, value in (("--n-examples", config.n_examples), ("--batch-size", config.batch_size)):
        if type(value) is not int or value < 1:
            raise InputError(f"{flag} {value} is not possible. Use 1 or more.")
    if type(config.seed) is not int or not 0 <= config.seed < 2**63:
        raise InputError(f"--seed {config.seed} is not possible. Use an integer from 0 to 2**63 - 1.")


def attacked_in(config: EvaluateConfig, default: ThreatModel) -> list[ThreatModel]:
    """Return the threat models that the flags ask for, from the smallest eps.

    Args:
        config: The flags.
        default: The threat model that the model was trained in, or else the dataset's.

    Raises:
        InputError: See `norm_and_radius` and `parse_threat_models`.
    """
    norm, eps = norm_and_radius(config.norm, config.eps, default)
    return parse_threat_models(norm, eps.split(","))


def result_path(folder: Path, suite: str, threat_models: Sequence[ThreatModel]) -> Path:
    """Return the file of a result: in ``folder`` for one eps, in ``sweeps`` next to it for several."""
    largest = threat_models[-1]
    radius = largest.written.replace("/", "_")
    if len(threat_models) > 1:
        folder, radius = folder.with_name("sweeps"), f"up-to-{radius}"
    return folder / f"{suite}-{largest.norm}-{radius}.json"
