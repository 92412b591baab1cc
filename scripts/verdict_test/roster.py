"""The models of the test, by kind, and which of them limits may be set on."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from masking_battery import Noise, Times
from timm.models.convmixer import ConvMixer
from timm.models.mlp_mixer import MlpMixer
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from drelu_timm.attacks.threat_model import ThreatModel
from drelu_timm.models.drelu import DReLU

from . import defenses, tricks
from .training import (
    L2,
    LINF,
    Loss,
    adversarial,
    adversarial_l2,
    cooled,
    natural,
    smoothed,
    task,
    trades,
    trained,
)


@dataclass(frozen=True)
class Entry:
    """A model of the test.

    Attributes:
        name: Its name, unique.
        kind: What it has in common with others.
        make: Trains it.
        task: Name of its task, see `training.task`.
        threat_model: What it is attacked in.
    """

    name: str
    kind: str
    make: Callable[[], nn.Module]
    task: str = "ten"
    threat_model: ThreatModel = LINF


def dense(
    before: nn.Module | None = None,
    *,
    inputs: int = 64,
    hidden: Callable[[], nn.Module] = nn.ReLU,
    last: Callable[[], nn.Module] | None = None,
    between: nn.Module | None = None,
    outputs: int = 10,
) -> nn.Sequential:
    """Return inputs-128-128-64-outputs with other layers before, between, or instead of the activations."""
    layers = [nn.Flatten(), nn.Linear(inputs, 128), hidden(), *([between] if between else [])]
    layers += [nn.Linear(128, 128), hidden(), nn.Linear(128, 64), (last or hidden)(), nn.Linear(64, outputs)]
    return nn.Sequential(*([before] if before else []), *layers)


def cnn(before: nn.Module | None = None, *, activation: Callable[[], nn.Module] = nn.ReLU, channels: int = 1):
    """Return two convolutions and a linear layer."""
    layers = [nn.Conv2d(channels, 16, 3, padding=1), activation(), nn.Conv2d(16, 32, 3, stride=2, padding=1)]
    return nn.Sequential(*([before] if before else []), *layers, activation(), nn.Flatten(), nn.Linear(512, 10))


class Residual(nn.Module):
    """Convolution with BatchNorm and a skip connection."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def residual() -> nn.Sequential:
    """Return a small residual network."""
    stem = nn.Conv2d(1, 16, 3, stride=2, padding=1)
    return nn.Sequential(stem, Residual(16), Residual(16), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))


def vit() -> nn.Module:
    """Return timm's vision transformer, 2 blocks of width 32 on 2x2 patches."""
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return VisionTransformer(num_classes=10, **sizes)


def convmixer() -> nn.Module:
    """Return timm's ConvMixer, 2 blocks of width 32."""
    return ConvMixer(dim=32, depth=2, kernel_size=3, patch_size=2, in_chans=1, num_classes=10)


def timm_resnet() -> nn.Module:
    """Return timm's ResNet on images of twice the size, with narrow stages."""
    sizes = {"in_chans": 1, "num_classes": 10, "channels": (8, 16, 24, 32)}
    return nn.Sequential(nn.Upsample(scale_factor=2), ResNet(BasicBlock, (1, 1, 1, 1), **sizes))


def mixer() -> nn.Module:
    """Return timm's MLP-Mixer, 2 blocks of width 32."""
    return MlpMixer(num_classes=10, img_size=8, in_chans=1, patch_size=2, num_blocks=2, embed_dim=32)


def fitted(build: Callable[[], nn.Module], loss: Loss = natural, *, epochs: int = 15, on: str = "ten") -> nn.Module:
    """Build and train a model."""
    return trained(build(), task(on), loss=loss, epochs=epochs)


def behind(layer: Callable[[], nn.Module], loss: Loss = natural, *, epochs: int = 15, on: str = "ten") -> nn.Module:
    """Train a dense model without a layer in front of it, and add the layer afterwards."""
    model = fitted(partial(dense, outputs=task(on).classes), loss, epochs=epochs, on=on)
    return nn.Sequential(layer(), model).eval()


def around(wrap: Callable[[nn.Module], nn.Module], loss: Loss = natural, *, epochs: int = 15) -> nn.Module:
    """Train a dense model and wrap it."""
    return wrap(fitted(dense, loss, epochs=epochs)).eval()


def ensemble(combine: Callable[[list[nn.Module]], nn.Module], *, models: int = 5) -> nn.Module:
    """Train dense models and combine them."""
    return combine([fitted(dense) for _ in range(models)]).eval()


def distilled() -> nn.Module:
    """Train a model on the softmax of another, both at temperature 100 (Papernot et al. 2016)."""
    teacher, data = fitted(dense, cooled, epochs=30), task("ten")

    def from_teacher(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            answers = (teacher(images) / 100).softmax(dim=1)
        return cooled(model, images, answers)

    return trained(dense(), data, loss=from_teacher, epochs=30)


def merged() -> nn.Module:
    """Train a binary classifier for each class."""
    data, models = task("ten"), []
    for digit in range(10):
        of_digit = type(data)(data.train_images, (data.train_labels == digit).long(), data.images, data.labels, 2)
        models.append(trained(dense(outputs=2), of_digit, epochs=8))
    return defenses.Merged(models).eval()


def error_correcting() -> nn.Module:
    """Train the units of a code word."""
    return fitted(lambda: defenses.ErrorCorrecting(dense(outputs=15)))


def mean_sparse() -> nn.Module:
    """Sparsify the last hidden layer of an adversarially trained model around its mean."""
    model = fitted(dense, adversarial)
    with torch.no_grad():
        hidden = model[:-1](task("ten").train_images)
    sparse = tricks.MeanSparse(hidden.mean(0), 0.25 * hidden.std(0))
    return nn.Sequential(*model[:-1], sparse, model[-1]).eval()


def quantized() -> nn.Module:
    """Return ReLU and rounding."""
    return nn.Sequential(nn.ReLU(), tricks.Steps(1.0))


def drelu() -> nn.Sequential:
    """Return a dense model whose last activation is a D-ReLU."""
    return dense(last=partial(DReLU, 64, cap=10.0))


def own_caps() -> nn.Sequential:
    """Return the same with `tricks.Capped`."""
    return dense(last=partial(tricks.Capped, 64))


def k_wta(loss: Loss = natural) -> nn.Module:
    """Train a dense model in which a fifth of each layer's units passes."""
    build = partial(dense, hidden=partial(tricks.WinnersTakeAll, 24), last=partial(tricks.WinnersTakeAll, 12))
    return fitted(build, loss, epochs=40)


def tampered(tamper: Callable[[Tensor], Tensor], loss: Loss = natural) -> Callable[[], nn.Module]:
    """Return what trains a dense model behind a layer with a wrong backward pass."""
    return partial(behind, partial(tricks.Tampered, tamper), loss)


def mixture(first: int, loss: Loss) -> nn.Module:
    """Train a model with tricks for four of the ten predicted classes."""
    parts = [tricks.Tampered(torch.zeros_like), tricks.InfiniteSlope(), tricks.Tampered(tricks.flipped)]
    return around(
        lambda model: defenses.Mixture(model, {first + 2 * i: part for i, part in enumerate(parts)}, loud=9 - first),
        loss,
    )


def few(classes: str, loss: Loss, before: Callable[[], nn.Module] | None = None) -> nn.Module:
    """Train a dense model on a task of few classes, with a layer in front."""
    build = lambda: dense(before() if before else None, outputs=task(classes).classes)  # noqa: E731
    return fitted(build, loss, on=classes)


def _pool() -> Tensor:
    return task("ten").train_images


def _training_set() -> tuple[Tensor, Tensor]:
    return task("ten").train_images, task("ten").train_labels


_LIST: tuple[Entry, ...] = (
    # Gradients that are not finite, or not the derivative.
    Entry("half of the gradient is NaN", "not finite", tampered(tricks.half_nan)),
    Entry("infinite slope", "not finite", partial(behind, tricks.InfiniteSlope)),
    Entry("constant backward", "useless backward", tampered(tricks.constant)),
    Entry("random backward", "useless backward", tampered(tricks.random)),
    Entry("permuted backward", "wrong backward", tampered(tricks.permuted)),
    Entry("flipped backward", "wrong backward", tampered(tricks.flipped)),
    Entry("sinus", "shattered", partial(behind, tricks.Sinus)),
    Entry("sawtooth", "shattered", partial(behind, tricks.Sawtooth)),
    Entry("backward of a few pixels", "nearly zero", tampered(tricks.few_pixels)),
    Entry("backward of the smallest pixels", "nearly zero", tampered(tricks.smallest_pixels)),
    Entry("permuted backward, AT", "wrong backward, AT", tampered(tricks.permuted, adversarial)),
    Entry("half-NaN gradient, AT", "wrong backward, AT", tampered(tricks.half_nan, adversarial)),
    Entry(
        "anti-adversary",
        "anti-adversary",
        partial(around, partial(defenses.AntiAdversary, steps=2, step_size=0.15)),
    ),
    Entry(
        "anti-adversary, AT",
        "anti-adversary",
        partial(around, partial(defenses.AntiAdversary, steps=4, step_size=0.05), adversarial),
    ),
    Entry("blind to pixels", "blinded", partial(behind, partial(tricks.Blind, 8))),
    Entry("blind to features", "blinded", lambda: fitted(lambda: dense(between=tricks.Blind(16)))),
    # Unequal classes.
    Entry("quantized inputs, 20 % against 80 %", "unequal", lambda: few("unequal", natural, quarters), "unequal"),
    Entry("thermometer, 10 % against 90 %", "unequal", lambda: rare_thermometer(), "rare"),
    # Randomized and batch-dependent models.
    Entry(
        "test-time dropout of units", "dropout", lambda: fitted(lambda: dense(between=tricks.Dropout(0.5)), epochs=30)
    ),
    Entry("test-time dropout of pixels", "dropout", lambda: fitted(lambda: dense(tricks.Dropout(0.2)), epochs=30)),
    Entry("noise on the image", "noise", lambda: fitted(lambda: dense(Noise(0.3)), epochs=30)),
    Entry("noise on features", "noise", lambda: fitted(lambda: dense(between=Noise(3.0)), epochs=30)),
    Entry("random shift", "random transform", lambda: fitted(lambda: cnn(tricks.Shift()), epochs=20)),
    Entry("random erasing", "random transform", lambda: fitted(lambda: cnn(tricks.Erase()), epochs=20)),
    Entry("stochastic activation pruning", "random outputs", lambda: pruned()),
    Entry("mixup inference", "random outputs", lambda: around(lambda m: defenses.MixupInference(m, _pool()[:200]))),
    Entry(
        "BatchNorm on the batch", "batch-dependent", lambda: fitted(lambda: dense(between=tricks.BatchStandardized()))
    ),
    Entry("centered on the batch", "batch-dependent", lambda: fitted(lambda: dense(tricks.BatchCentered()))),
    # Several small gaps, ensembles, outputs.
    Entry("four small tricks", "small gaps", partial(mixture, 0, natural)),
    Entry("four small tricks, AT", "small gaps", partial(mixture, 1, adversarial)),
    Entry("majority vote", "vote", partial(ensemble, defenses.Vote)),
    Entry("rounded ensemble", "vote", partial(ensemble, defenses.RoundedEnsemble)),
    Entry("merged binary classifiers", "code of classes", merged),
    Entry("error-correcting code", "code of classes", error_correcting),
    Entry("logits times 1e4", "temperature", partial(around, lambda model: nn.Sequential(model, Times(1e4)))),
    Entry("defensive distillation", "temperature", distilled),
    Entry("reverse sigmoid", "perturbed output", partial(around, defenses.ReverseSigmoid)),
    Entry("rounded logits", "perturbed output", partial(around, defenses.RoundedOutput)),
    Entry("nearest neighbours", "memory", lambda: defenses.Neighbours(*_training_set()).eval()),
    Entry("radial basis", "memory", lambda: defenses.RadialBasis(*_training_set()).eval()),
    # Quantization and encoding.
    Entry("thermometer", "encoding", lambda: fitted(lambda: dense(tricks.Thermometer(), inputs=1024))),
    Entry("one-hot levels", "encoding", lambda: fitted(lambda: dense(tricks.OneHotLevels(), inputs=512))),
    Entry("inputs in 8 levels", "quantized inputs", lambda: fitted(lambda: dense(tricks.Steps(1 / 8)))),
    Entry("inputs in 4 levels, CNN", "quantized inputs", lambda: fitted(lambda: cnn(tricks.Steps(1 / 3)))),
    Entry("quantized activations", "quantized units", lambda: fitted(lambda: dense(last=quantized), epochs=30)),
    Entry("sign activation", "quantized units", lambda: fitted(lambda: dense(last=tricks.Sign), epochs=30)),
    Entry("JPEG", "transform coding", lambda: fitted(lambda: dense(tricks.JPEG()))),
    Entry("sparse cosine transform", "transform coding", lambda: fitted(lambda: dense(tricks.SparseDCT()))),
    Entry("projection on components", "purification", lambda: behind(lambda: tricks_projection())),
    Entry("blend of training images", "purification", lambda: behind(lambda: defenses.NearestBlend(_pool()))),
    # Activations.
    Entry("k winners take all", "sparse units", k_wta),
    Entry("k winners take all, AT", "sparse units", partial(k_wta, adversarial)),
    Entry("jump activation", "unusual activation", lambda: fitted(lambda: dense(hidden=tricks.Jump))),
    Entry("tent activation", "unusual activation", lambda: fitted(lambda: dense(hidden=tricks.Tent), epochs=30)),
    Entry("D-ReLU, natural", "caps", lambda: fitted(drelu, epochs=60)),
    Entry("own caps, natural", "caps", lambda: fitted(own_caps, epochs=60)),
    # Honest models.
    Entry("ReLU", "dense", lambda: fitted(dense)),
    Entry("ReLU, trained for long", "dense", lambda: fitted(dense, epochs=100)),
    Entry("GELU", "smooth activation", lambda: fitted(lambda: dense(hidden=nn.GELU))),
    Entry("SiLU", "smooth activation", lambda: fitted(lambda: dense(hidden=nn.SiLU))),
    Entry("ReLU6", "bounded activation", lambda: fitted(lambda: dense(hidden=nn.ReLU6))),
    Entry("tanh", "bounded activation", lambda: fitted(lambda: dense(hidden=nn.Tanh))),
    Entry("AT", "robust dense", lambda: fitted(dense, adversarial)),
    Entry("TRADES", "robust dense", lambda: fitted(dense, trades)),
    Entry("CNN", "CNN", lambda: fitted(cnn)),
    Entry("CNN, AT", "CNN", lambda: fitted(cnn, adversarial)),
    Entry("CNN with GELU, AT", "robust CNN", lambda: fitted(lambda: cnn(activation=nn.GELU), adversarial)),
    Entry("CNN, TRADES", "robust CNN", lambda: fitted(cnn, trades)),
    Entry("residual", "residual", lambda: fitted(residual)),
    Entry("residual, AT", "residual", lambda: fitted(residual, adversarial)),
    Entry("ViT", "ViT", lambda: fitted(vit)),
    Entry("ViT, AT", "ViT", lambda: fitted(vit, adversarial)),
    Entry("ConvMixer", "ConvMixer", lambda: fitted(convmixer)),
    Entry("ConvMixer, AT", "ConvMixer", lambda: fitted(convmixer, adversarial)),
    Entry("timm ResNet", "timm", lambda: fitted(timm_resnet)),
    Entry("MLP-Mixer", "timm", lambda: fitted(mixer)),
    Entry("3 classes", "few classes", lambda: few("three", natural), "three"),
    Entry("2 classes, AT", "few classes", lambda: few("two", adversarial), "two"),
    Entry("honest, 20 % against 80 %", "unequal, honest", lambda: few("unequal", natural), "unequal"),
    Entry("AT, 10 % against 90 %", "unequal, honest", lambda: few("rare", adversarial), "rare"),
    Entry("L2", "L2", lambda: fitted(dense), "ten", L2),
    Entry("L2, AT", "L2", lambda: fitted(dense, adversarial_l2), "ten", L2),
    Entry("D-ReLU, AT", "caps, robust", lambda: fitted(drelu, adversarial, epochs=30)),
    Entry("own caps, AT", "caps, robust", lambda: fitted(own_caps, adversarial, epochs=30)),
    Entry("ensemble", "other honest", partial(ensemble, defenses.Ensemble)),
    Entry("label smoothing", "other honest", lambda: fitted(dense, smoothed, epochs=30)),
    Entry("median filter", "filter", lambda: fitted(lambda: dense(tricks.Median()))),
    Entry("blur", "filter", lambda: fitted(lambda: dense(tricks.Blur()))),
    Entry("MeanSparse, AT", "operator", mean_sparse),
    Entry("loud and robust: AT, logits times 10", "operator", lambda: loud_at()),
)


def quarters() -> nn.Module:
    """Return a layer that rounds to quarters."""
    return tricks.Steps(1 / 4)


def rare_thermometer() -> nn.Module:
    """Train a binary classifier of thermometer codes."""
    return fitted(lambda: dense(tricks.Thermometer(), inputs=1024, outputs=2), on="rare")


def pruned() -> nn.Module:
    """Train a dense model with stochastic activation pruning."""
    return fitted(lambda: dense(between=tricks.ActivationPruning()), epochs=30)


def tricks_projection() -> nn.Module:
    """Return a projection on 16 principal components."""
    return defenses.Projection(_pool(), 16)


def loud_at() -> nn.Module:
    """Train a robust model whose logits are large, but do not saturate for most images."""
    return around(lambda model: nn.Sequential(model, Times(10.0)), adversarial)


def _alternating(entries: tuple[Entry, ...]) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """Split entries alternately within each kind: the first into the development set, the second into the final one."""
    seen: Counter[str] = Counter()
    halves: tuple[list[Entry], list[Entry]] = [], []
    for entry in entries:
        halves[seen[entry.kind] % 2].append(entry)
        seen[entry.kind] += 1
    return tuple(halves[0]), tuple(halves[1])


# Limits and probes of `drelu_timm.evaluation` may be set on the development set; the final set only gives a figure.
DEVELOPMENT, FINAL = _alternating(_LIST)
