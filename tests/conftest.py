"""What several test files need: a toy variant and the folder of real data."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

import drelu_timm  # noqa: F401  (registers the models)

BESIDE_REPOSITORY = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def toy_model():
    """`shallow_cnn_drelu` for 3 classes of 1x8x8 images, in eval mode."""
    torch.manual_seed(0)
    return timm.create_model("shallow_cnn_drelu", num_classes=3, img_size=8, width=16).eval()


@pytest.fixture
def data_folder() -> Callable[[str], Path]:
    """The folder that holds the named real data set; skips where there is none."""

    def find(name: str) -> Path:
        folder = Path(os.environ.get("DRELU_TIMM_DATA", BESIDE_REPOSITORY))
        if not (folder / name).exists():
            pytest.skip(f"no {name} in {folder}; DRELU_TIMM_DATA names the folder of real data")
        return folder

    return find
