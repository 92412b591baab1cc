"""What a cell costs at most, in forward passes of one image, and what one of these takes on this machine.

A bound of the passes: training runs all its epochs, and every test image withstands every attack. None of the time, as
the start of processes, the data and the optimiser's steps come on top.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from ..attacks.adaptive import substitutable_layers
from ..attacks.attack import Attack
from ..attacks.suites import find_suite, single_attacks
from ..data.datasets import DATASETS
from ..data.images import Images, to_float
from ..data.readers import load_images
from ..evaluation.config import EvaluateConfig, attacked_in
from ..evaluation.masking import PROBED, probes
from ..models.modes import channels_last
from ..runs import environment
from ..training.config import TrainConfig, model_options, resolve
from ..training.model import create_model
from ..training.objectives import make_objective
from ..training.validation import ATTACKED
from .cells import Cell

GRADIENT = 3  # forward passes: one forward, and a backward pass takes some two
# Of the published training sets; of any other only reading tells.
_TRAINING_IMAGES = {"digits": 1438, "mnist": 60_000, "cifar10": 50_000, "cifar100": 50_000, "tiny_imagenet": 100_000}
_REPEATED = ("n_target_classes", "restarts", "rounds", "binary_search_steps")  # settings by which attacks begin anew
_CLASSES = 10  # of a folder of images, which has to be read to know them
_BATCH = 16
_ROUNDS = 3


@dataclass(frozen=True)
class Cost:
    """An upper bound, in forward passes of one image.

    Attributes:
        training: All epochs, with what is measured behind each.
        evaluation: All evaluations.
    """

    training: int
    evaluation: int

    @property
    def forwards(self) -> int:
        """Of both."""
        return self.training + self.evaluation

    def __str__(self) -> str:
        return f"{self.training:,} forward passes to train, {self.evaluation:,} to evaluate"


def cost(cell: Cell, model: nn.Module) -> Cost:
    """What a cell costs at most; ``model`` is its untrained net, which decides what attacks it."""
    return Cost(training(cell.train), sum(evaluation(cell.train, one, model) for one in cell.evaluations))


def training(config: TrainConfig) -> int:
    """Forward passes of a training."""
    images = _training_images(config)
    held_out = int(images * DATASETS[config.dataset].held_out)
    validation = held_out + min(held_out, ATTACKED) * (config.steps * GRADIENT + 2)
    return config.epochs * ((images - held_out) * _of_an_image(config) + validation)


def _training_images(config: TrainConfig) -> int:
    known = _TRAINING_IMAGES.get(config.dataset) or _decoded_images(config.dataset, config.data_dir, config.img_size)
    return min(known, config.n_train or known)


@cache  # or every cell of a grid would decode the same folder, and print what is in it
def _decoded_images(dataset: str, data_dir: Path, img_size: int | None) -> int:
    return len(load_images(dataset, data_dir, "train", img_size=img_size))


def _of_an_image(config: TrainConfig) -> int:
    """Forward passes of a training image, counted on a model that does nothing."""
    objective = make_objective(config.objective, beta=config.beta)
    model, image, label = _Counting(), torch.linspace(0, 1, 3).reshape(1, 1, 1, 3), torch.tensor([0])
    attack = 0
    if objective.raised is not None:
        objective.raised(model, image, label)
        attack = model.count + config.steps * GRADIENT
        model.count = 0
    objective.losses(model, image, image, label)
    return attack + model.count * GRADIENT * (2 if config.awp_gamma else 1)


class _Counting(nn.Module):
    """Gives pixels as logits, and counts how often it is asked."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x.flatten(1)


def evaluation(train: TrainConfig, config: EvaluateConfig, model: nn.Module) -> int:
    """Forward passes of an evaluation of a training's net."""
    trained, dataset = resolve(train).threat_model, DATASETS[train.dataset]
    side = train.img_size or dataset.img_size or 0
    suite = find_suite(config.suite, dataset.num_classes or _CLASSES, adaptive=bool(substitutable_layers(model)))
    attacks = single_attacks(suite).values()  # one in several columns runs once
    balls = attacked_in(config, trained)
    probing = [probe.attack for probe in probes(model, balls[-1], dataset.in_chans * side * side)]
    clean = 1 + 2 * GRADIENT
    of_radius = config.n_examples * _of_attacks([*attacks])
    of_radius += min(config.n_examples, PROBED) * _of_attacks(probing)
    return config.n_examples * clean + len(balls) * of_radius


def _of_attacks(attacks: Sequence[Attack]) -> int:
    return sum(map(forwards, attacks))


def forwards(attack: Attack) -> int:
    """Forward passes of an attack on an image that withstands it, with what judges its result; from its settings."""
    settings = attack.settings
    if "n_queries" in settings:
        return settings["n_queries"] + 2
    begun = prod(settings.get(key, 1) for key in _REPEATED)
    steps = settings.get("steps") or settings.get("n_iter", 0) + 1
    gradients = 0 if attack.kind == "black-box" else begun * steps * settings.get("samples", 1)
    return gradients * GRADIENT + 2 * begun + 1  # each time, the classes are ranked or the result is judged


class Clock:
    """Times a forward pass of each distinct net once, on the device that a cell would take.

    Args:
        threads: That a cell would have on a CPU.
    """

    def __init__(self, threads: int):
        self._threads = threads
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._models: dict[str, nn.Module] = {}
        self._seconds: dict[str, float] = {}

    @property
    def machine(self) -> str:
        """What it times on."""
        threads = "" if self._device.type == "cuda" else f" by {self._threads} of its threads"
        return f"{environment()['hardware']}{threads}, with {_BATCH} images at once"

    def model(self, config: TrainConfig) -> nn.Module:
        """The net of a training, untrained and without memory for its weights."""
        key = _key(config)
        if key not in self._models:
            with torch.device("meta"):
                self._models[key] = _net(config)
        return self._models[key]

    def seconds(self, config: TrainConfig) -> float:
        """Of a forward pass of one image."""
        key = _key(config)
        if key not in self._seconds:
            threads = torch.get_num_threads()
            torch.set_num_threads(self._threads)
            self._seconds[key] = self._timed(_net(config), to_float(_blank(config).images))
            torch.set_num_threads(threads)
        return self._seconds[key]

    @torch.no_grad()
    def _timed(self, model: nn.Module, images: Tensor) -> float:
        model = model.to(self._device).eval()
        images = images.repeat(_BATCH // len(images), 1, 1, 1).to(self._device)
        took = []
        with channels_last(model):
            for _ in range(1 + _ROUNDS):
                began = time.perf_counter()
                model(images).sum().item()  # which waits for the device
                took.append(time.perf_counter() - began)
        return median(took[1:]) / _BATCH


def _net(config: TrainConfig) -> nn.Module:
    with torch.random.fork_rng():
        return create_model(replace(config, init_from=None, pretrained=False), _blank(config))


def _key(config: TrainConfig) -> str:
    return json.dumps([config.model, config.dataset, config.img_size, model_options(config)])


def _blank(config: TrainConfig) -> Images:
    """Two images of the dataset's form, as it need not be there."""
    dataset = DATASETS[config.dataset]
    side = dataset.side(config.img_size)
    images = torch.zeros(2, dataset.in_chans, side, side, dtype=torch.uint8)
    images[1] = 255
    classes = tuple(map(str, range(dataset.num_classes or _CLASSES)))
    return Images(images, torch.tensor([0, 1]), classes, dataset.title)
