"""Test the verdict on models that hide their gradients in ways it does not know, and on honest models.

    python scripts/masking_battery.py             # the table
    python scripts/masking_battery.py --seeds 3   # three trainings and attacks of each model

Every model is trained on 1,400 images of scikit-learn's digits (8x8) in about a second and judged on the other 397.
"""

import argparse
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from drelu_timm.attacks.attack import cross_entropy
from drelu_timm.attacks.pgd import pgd
from drelu_timm.attacks.threat_model import ThreatModel
from drelu_timm.evaluation.evaluation import Evaluation, evaluate_model
from drelu_timm.models.drelu import DReLU
from drelu_timm.models.inference import frozen

THREAT_MODEL = ThreatModel.parse("Linf", "0.1")
TEMPERATURE = 100.0  # of defensive distillation


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 8, 8] in [0, 1] and labels [N], for training and for evaluation."""

    train_images: Tensor
    train_labels: Tensor
    images: Tensor
    labels: Tensor

    @classmethod
    def load(cls) -> "Digits":
        """Load 1,400 images for training and 397 for evaluation, always the same."""
        pixels, classes = load_digits(return_X_y=True)
        order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
        images = (torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16)[order]
        labels = torch.tensor(classes)[order]
        return cls(images[:1400], labels[:1400], images[1400:], labels[1400:])


# Layers that hide gradients. The attacks of this project know only DReLU.


class Capped(nn.Module):
    """Activation with learnable caps, written independently of D-ReLU."""

    def __init__(self, units: int):
        super().__init__()
        self.ceiling = nn.Parameter(torch.full((units,), 10.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.clamp(x, min=0.0), self.ceiling)


class WinnersTakeAll(nn.Module):
    """Activation that passes the ``winners`` largest units of a layer (k-WTA, Xiao et al. 2020)."""

    def __init__(self, winners: int):
        super().__init__()
        self.winners = winners

    def forward(self, x: Tensor) -> Tensor:
        return x * (x >= x.topk(self.winners, dim=1).values[:, -1:])


class Steps(nn.Module):
    """Rounding to multiples of ``width``, with a straight-through gradient in training."""

    def __init__(self, width: float):
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        rounded = torch.round(x / self.width) * self.width
        return x + (rounded - x).detach() if self.training else rounded


class JPEG(nn.Module):
    """JPEG compression of each image, without a gradient.

    All images are next to each other in one file. They have the size of JPEG's blocks, which are coded independently.
    """

    def __init__(self, quality: int):
        super().__init__()
        self.quality = quality

    def forward(self, images: Tensor) -> Tensor:
        row = (images.detach().squeeze(1).permute(1, 0, 2).reshape(8, -1) * 255).round().byte()
        file = io.BytesIO()
        Image.fromarray(row.numpy()).save(file, "JPEG", quality=self.quality)
        decoded = torch.from_numpy(np.asarray(Image.open(file)).copy()).float() / 255
        return decoded.view(8, -1, 8).permute(1, 0, 2).unsqueeze(1)


class Thermometer(nn.Module):
    """Encoding of each pixel as ``levels`` channels, one per threshold that it exceeds (Buckman et al. 2018)."""

    def __init__(self, levels: int):
        super().__init__()
        self.levels = levels

    def forward(self, images: Tensor) -> Tensor:
        thresholds = torch.arange(self.levels).view(-1, 1, 1) / self.levels
        return (images > thresholds).to(images.dtype)


class Noise(nn.Module):
    """Addition of new normal noise in every call, in training and evaluation."""

    def __init__(self, deviation: float):
        super().__init__()
        self.deviation = deviation

    def forward(self, x: Tensor) -> Tensor:
        return x + self.deviation * torch.randn_like(x)


class Times(nn.Module):
    """Multiplication by a constant."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def dense(*, before: nn.Module | None = None, inputs: int = 64, hidden=nn.ReLU, last=nn.ReLU) -> nn.Sequential:
    """Return a dense model, inputs-128-128-64-10, with a given first layer and given activations."""
    layers = [nn.Flatten(), nn.Linear(inputs, 128), hidden(), nn.Linear(128, 128), hidden(), nn.Linear(128, 64), last()]
    return nn.Sequential(*([before] if before else []), *layers, nn.Linear(64, 10))


def convolutional() -> nn.Sequential:
    """Return a model of two convolutions and a linear layer."""
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, 10))


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]  # model, images, labels -> scalar


def natural(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy."""
    return F.cross_entropy(model(images), labels)


def adversarial(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy on adversarial images (Madry et al. 2018)."""
    return F.cross_entropy(model(_attacked(model, images, cross_entropy(labels))), labels)


def trades(model: nn.Module, images: Tensor, labels: Tensor, *, beta: float = 6.0) -> Tensor:
    """Return the cross-entropy plus the divergence on adversarial images (Zhang et al. 2019)."""
    with torch.no_grad():
        clean = model(images).softmax(1)
    attacked = model(_attacked(model, images, lambda logits: _divergence(logits, clean)))
    logits = model(images)
    return F.cross_entropy(logits, labels) + beta * _divergence(attacked, logits.softmax(1)).mean()


def _divergence(logits: Tensor, target: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(1), target, reduction="none").sum(1)


def _attacked(model: nn.Module, images: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    start = THREAT_MODEL.random_start(images)
    with frozen(model):
        return pgd(model, images, loss, THREAT_MODEL, start=start, steps=3, step_size=THREAT_MODEL.eps / 2)


def at_temperature(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of logits divided by a temperature, in training only; labels are [B] or [B, K]."""
    return F.cross_entropy(model(images) / TEMPERATURE, labels)


def trained(digits: Digits, model: nn.Module, *, loss: Loss, epochs: int, cap_weight: float = 0.1) -> nn.Module:
    """Train a model with Adam and return it in eval mode; caps have a separate learning rate and a penalty."""
    caps = [p for layer in model.modules() if isinstance(layer, DReLU | Capped) for p in layer.parameters()]
    rest = [p for p in model.parameters() if not any(p is cap for cap in caps)]
    optimizer = torch.optim.Adam([{"params": rest, "lr": 1e-3}, {"params": caps, "lr": 0.1}])
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(digits.train_labels)).split(64):
            value = loss(model, digits.train_images[batch], digits.train_labels[batch])
            value = value + cap_weight * sum(cap.square().sum() for cap in caps)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return model.eval()


@dataclass(frozen=True)
class Net:
    """Model of the battery, and the verdicts on it that are correct."""

    name: str
    expected: tuple[str, ...]
    train: Callable[[Digits], nn.Module]


MASKED, SOUND, NEVER_SOUND = ("masked",), ("sound",), ("masked", "undecided")


def _net(
    name: str, expected: tuple[str, ...], build: Callable[[], nn.Module], *, loss: Loss = natural, epochs=15
) -> Net:
    return Net(name, expected, lambda digits: trained(digits, build(), loss=loss, epochs=epochs))


def drelu() -> nn.Sequential:
    """Return a dense model whose last activation is a D-ReLU."""
    return dense(last=partial(DReLU, 64, cap=10.0))


def own_caps() -> nn.Sequential:
    """Return a dense model whose last activation is `Capped`."""
    return dense(last=partial(Capped, 64))


def winners_take_all() -> nn.Sequential:
    """Return a dense model in which a fifth of the units of every layer pass."""
    return dense(hidden=partial(WinnersTakeAll, 24), last=partial(WinnersTakeAll, 12))


def distilled(digits: Digits) -> nn.Module:
    """Train a model on the outputs of another, both at a high temperature (Papernot et al. 2016)."""
    teacher = trained(digits, dense(), loss=at_temperature, epochs=30)

    def from_teacher(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            answers = (teacher(images) / TEMPERATURE).softmax(dim=1)
        return at_temperature(model, images, answers)

    return trained(digits, dense(), loss=from_teacher, epochs=30)


def loud(digits: Digits) -> nn.Module:
    """Train a plain model and multiply its logits by 1e4."""
    return nn.Sequential(trained(digits, dense(), loss=natural, epochs=15), Times(1e4)).eval()


NETS = (
    _net("D-ReLU, natural", MASKED, drelu, epochs=60),
    _net("independent caps", MASKED, own_caps, epochs=60),
    _net("k winners take all", MASKED, winners_take_all, epochs=40),
    _net("quantized activations", MASKED, lambda: dense(last=lambda: nn.Sequential(nn.ReLU(), Steps(1.0))), epochs=30),
    _net("quantized inputs", MASKED, lambda: dense(before=Steps(1 / 8))),
    _net("JPEG", MASKED, lambda: dense(before=JPEG(75))),
    _net("thermometer", MASKED, lambda: dense(before=Thermometer(16), inputs=64 * 16)),
    Net("defensive distillation", MASKED, distilled),
    Net("logits times 1e4", MASKED, loud),
    _net("noise on the image", NEVER_SOUND, lambda: dense(before=Noise(0.3)), epochs=30),
    _net("ReLU", SOUND, dense),
    _net("ReLU, long training", SOUND, dense, epochs=100),
    _net("ReLU, convolutional", SOUND, convolutional),
    _net("ReLU6", SOUND, lambda: dense(hidden=nn.ReLU6, last=nn.ReLU6)),
    _net("ReLU, adversarial training", SOUND, dense, loss=adversarial),
    _net("D-ReLU, adversarial training", SOUND, drelu, loss=adversarial, epochs=30),
    _net("independent caps, adversarial training", SOUND, own_caps, loss=adversarial, epochs=30),
    _net("ReLU, TRADES", SOUND, dense, loss=trades),
    _net("D-ReLU, TRADES", SOUND, drelu, loss=trades, epochs=30),
)


def judged(model: nn.Module, images: Tensor, labels: Tensor, *, seed: int = 0) -> Evaluation:
    """Evaluate a model with the quick suite; images are [N, C, H, W] in [0, 1], labels [N]."""
    return evaluate_model(model, images, labels, norm=THREAT_MODEL.norm, eps=THREAT_MODEL.eps, suite="quick", seed=seed)


def train_and_judge(net: Net, digits: Digits, *, seed: int = 0) -> Evaluation:
    """Train and evaluate a model of the battery; the result depends only on the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return judged(net.train(digits), digits.images, digits.labels, seed=seed)


# Shares of the probed examples.
COLUMNS = {
    "PGD": "withstand_pgd",
    "all": "withstand_all",
    "rescaled": "broken_by_rescaled",
    "restarts": "broken_by_restarts",
    "hidden": "hidden",
    "far": "stuck",
    "zero, CE": "zero_gradient_ce",
    "zero, margin": "zero_gradient_margin",
    "unsteady": "unsteady",
}


def main() -> None:
    """Print the table, one line per model and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds of training and attack")
    seeds = range(parser.parse_args().seeds)
    digits = Digits.load()
    print("| model | seed | clean | " + " | ".join(COLUMNS) + " | expected | verdict | s |")
    print("| --- | ---: | ---: |" + " ---: |" * len(COLUMNS) + " --- | --- | ---: |")
    for net in NETS:
        for seed in seeds:
            started = time.monotonic()
            result = train_and_judge(net, digits, seed=seed)
            numbers = result.verdict.numbers
            figures = [f"{100 * share:.1f}" for share in (result.clean, *(numbers[name] for name in COLUMNS.values()))]
            seconds = f"{time.monotonic() - started:.1f}"
            cells = (net.name, seed, *figures, " or ".join(net.expected), result.verdict, seconds)
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
