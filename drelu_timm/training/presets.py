"""Named settings of `drelu-timm train`, each with its source and the datasets that it was published for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..data.datasets import DATASETS

_PAPER = "Sooksatra and Rivas 2024, https://doi.org/10.3390/math12223551"
_ADAM = {"optimizer": "adam", "lr": 1e-3, "cap_lr": 1e-3, "schedule": "plateau", "patience": 10, "monitor": "loss"}
_WANG = "Wang et al. 2023, https://arxiv.org/abs/2302.04638, and its code"
# Their code updates the schedule per epoch, ours per step; their averaging has another warm-up; they hold out 1,024
# images, and start the attack from Gaussian noise of 0.001.
_SGD = {
    "objective": "trades",
    "beta": 5.0,
    "norm": "Linf",
    "eps": "8/255",
    "steps": 10,
    "step_size": 2 / 255,
    "label_smoothing": 0.1,
    "generated_fraction": 0.7,
    "optimizer": "sgd",
    "lr": 0.2,
    "weight_decay": 5e-4,
    "schedule": "onecycle",
    "warmup": 0.025,
    "ema_decay": 0.995,
    "batch_size": 512,
    "epochs": 400,
}


@dataclass(frozen=True)
class Preset:
    """Settings under one name.

    Attributes:
        source: Where they are published.
        settings: Fields of `config.TrainConfig`.
        datasets: The datasets that they are for.
    """

    source: str
    settings: dict[str, Any]
    datasets: Sequence[str] = tuple(DATASETS)


PRESETS: dict[str, Preset] = {
    "paper-drelu": Preset(
        f"{_PAPER}, section 5.2: Adam 1e-3 for all, halved after 5 epochs without a lower loss, stopped after 10",
        {**_ADAM, "epochs": 2000},
    ),
    "paper-at": Preset(
        f"{_PAPER}, section 5.4: 10 epochs of adversarial training after natural training (--init-from RUN)",
        {**_ADAM, "objective": "at", "epochs": 10},
    ),
    "paper-trades": Preset(f"{_PAPER}, section 5.4", {**_ADAM, "objective": "trades", "epochs": 2000}),
    "paper-drelu-edm": Preset(
        f"{_PAPER}, section 8: natural, 70 % generated images (80 % for TinyImageNet: --generated-fraction 0.8)",
        {**_ADAM, "epochs": 2000, "generated_fraction": 0.7},
        ("cifar10", "cifar100", "tiny_imagenet"),
    ),
    "paper-trades-edm": Preset(
        f"{_PAPER}, section 8: beta 5, 70 % generated images (80 % for TinyImageNet: --generated-fraction 0.8)",
        {**_ADAM, "objective": "trades", "beta": 5.0, "epochs": 2000, "generated_fraction": 0.7},
        ("cifar10", "cifar100", "tiny_imagenet"),
    ),
    "wang2023": Preset(f"{_WANG}; for wide_resnet28_10", _SGD, ("cifar10", "cifar100")),
    "wang2023-tiny-imagenet": Preset(
        f"{_WANG}: beta 8, 80 % generated images; for wide_resnet28_10",
        {**_SGD, "beta": 8.0, "generated_fraction": 0.8},
        ("tiny_imagenet",),
    ),
}
