"""What several test files need: a toy variant, an evaluated run, the folder of real data; and how tests run."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

# Of every process that a test runs in or starts: they share the cores, and OpenMP's threads wait by spinning. To be
# set before torch is imported, so torch, and what imports it, is imported by the fixtures alone.
os.environ["OMP_NUM_THREADS"] = "1"

# The same examples in every run, and no limit of time for them.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("repeatable")

BESIDE_REPOSITORY = Path(__file__).parents[2] / "shared" / "data"
MOST_WORKERS = 4  # each imports torch, in 4 s, and builds its fixtures


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes run the tests, a file each at once; 0 for a single file, which needs no other process."""
    files = {argument.partition("::")[0] for argument in config.args}
    useful = len(files) if all(file.endswith(".py") for file in files) else MOST_WORKERS
    workers = min(useful, os.cpu_count() or 1, MOST_WORKERS)
    return workers if workers > 1 else 0


def pytest_configure(config: pytest.Config) -> None:
    """Make our own warnings errors in the processes that run tests; not warnings of libraries."""
    if not config.getoption("numprocesses", None):
        config.addinivalue_line("filterwarnings", "error::drelu_timm.errors.DReLUWarning")


@pytest.fixture
def toy_model():
    """`shallow_cnn_drelu` for 3 classes of 1x8x8 images, in eval mode."""
    import timm
    import torch

    import drelu_timm  # noqa: F401  (registers the models)

    torch.manual_seed(0)
    return timm.create_model("shallow_cnn_drelu", num_classes=3, img_size=8, width=16).eval()


@pytest.fixture
def robustbench():
    """RobustBench, made to work; skips where it is not installed, or overwritten by torchattacks' stale copy."""
    from drelu_timm import robustbench as our_robustbench
    from drelu_timm.errors import InputError

    try:
        return our_robustbench.adapt()
    except InputError as error:
        if "not installed" in str(error) or "torchattacks" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory) -> Path:
    """A run on digits with an evaluation of 60 images by the standard suite, and a sweep; to be copied, not spoiled."""
    from drelu_timm.evaluate import evaluate
    from drelu_timm.evaluation.config import EvaluateConfig
    from drelu_timm.train import train
    from drelu_timm.training.config import TrainConfig

    path = tmp_path_factory.mktemp("runs") / "digits"
    train(TrainConfig("dense_drelu", "digits", output_dir=path, epochs=5, cap=20.0, width=16, eps="0.1"))
    evaluate(EvaluateConfig(str(path), suite="standard", n_examples=60))
    evaluate(EvaluateConfig(str(path), suite="quick", n_examples=20, eps="0,0.1,0.2"))
    return path


@pytest.fixture
def untrained_run(tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Makes a run directory with an untrained model for digits and a radius, as train leaves it."""
    import timm
    import torch

    from drelu_timm.models.weights import save_folder

    def make(eps: str) -> Path:
        monkeypatch.chdir(tmp_path)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = timm.create_model("dense_drelu", num_classes=10, in_chans=1, img_size=8)
        path = tmp_path / "x"
        save_folder(model, path / "model", model_args={"img_size": 8})
        train = {"model": "dense_drelu", "dataset": "digits", "data_dir": "data", "norm": "Linf", "eps": eps}
        train |= {"seed": 0, "objective": "natural", "monitor": "loss"}
        config = {"train": train, "dataset_title": "Digits", "num_classes": 10, "in_chans": 1, "img_size": 8}
        (path / "config.json").write_text(json.dumps(config))
        return path

    return make


@pytest.fixture
def data_folder() -> Callable[[str], Path]:
    """The folder that holds the named real data set; skips where there is none."""

    def find(name: str) -> Path:
        folder = Path(os.environ.get("DRELU_TIMM_DATA", BESIDE_REPOSITORY))
        if not (folder / name).exists():
            pytest.skip(f"no {name} in {folder}; DRELU_TIMM_DATA names the folder of real data")
        return folder

    return find
