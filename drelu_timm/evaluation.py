"""The evaluation of any model under a suite of attacks: the only place where robust accuracies come from.

An attack only searches. What it returns is checked here, brought into the ball, and judged by the model itself.
"""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import chain
from math import isfinite, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .attacks import ThreatModel, frozen, per_image
from .errors import InputError
from .masking import Verdict, ZeroGradients, verdict
from .suites import Attack, Kind, Suite, find_suite


@dataclass(frozen=True)
class CarliniWagner:
    """What a minimum-norm attack says beside a robust accuracy.

    Attributes:
        median_l2: Median L2 distance it needs over the correctly classified examples; None where it breaks fewer
            than half of them.
        budget: An L2 radius: eps for L2; for Linf that of the ball's corners, eps * sqrt(C * H * W).
        accuracy_at_budget: Share of all examples that are right and have no adversarial example found within it.
    """

    median_l2: float | None
    budget: float
    accuracy_at_budget: float


@dataclass(frozen=True)
class Evaluation:
    """How a model did under a suite of attacks.

    Attributes:
        threat_model: The balls.
        suite: Name of the suite.
        seed: Keys all randomness.
        labels: [N].
        predictions: [N], of the clean images.
        robust: For each attack (or column of the suite, such as "autoattack"), [N]: right on the clean image and on
            what the attack returned.
        settings: For each attack, what decides what it finds.
        zero_gradients: Shares of exactly zero input gradients.
        cw_l2: Of the suites that hold "cw-l2".
        verdict: Whether white-box accuracies can be believed.
        seconds: Wall-clock time.
    """

    threat_model: ThreatModel
    suite: str
    seed: int
    labels: Tensor
    predictions: Tensor
    robust: dict[str, Tensor]
    settings: dict[str, dict[str, Any]]
    zero_gradients: ZeroGradients
    cw_l2: CarliniWagner | None
    verdict: Verdict
    seconds: float

    @property
    def clean(self) -> float:
        """Clean accuracy, in [0, 1]."""
        return _share(self.predictions == self.labels)

    @property
    def accuracy(self) -> dict[str, float]:
        """Robust accuracy under each attack, in [0, 1]."""
        return {attack: _share(robust) for attack, robust in self.robust.items()}

    @property
    def zero_gradient_share(self) -> float:
        """Share of the correctly classified examples with an input gradient (cross-entropy) of exactly zero."""
        return self.zero_gradients.cross_entropy

    @property
    def worst(self) -> float:
        """Share of the examples that no attack broke, in [0, 1]: the robust accuracy."""
        return _share(torch.stack(list(self.robust.values())).all(dim=0))


def evaluate_model(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | str,
    norm: str = "Linf",
    suite: str = "quick",
    seed: int = 0,
    batch_size: int = 256,
) -> Evaluation:
    """Measure clean and robust accuracy, and whether the latter can be believed.

    The model is read in eval mode on the device it is on, and is left as it was.

    Args:
        model: Takes [0, 1] images [B, C, H, W] and returns logits [B, K].
        images: [N, C, H, W] floats in [0, 1], on any device.
        labels: [N] integers below K.
        eps: Radius in units of a [0, 1] pixel, e.g. 0.1 or "8/255".
        norm: "Linf" or "L2".
        suite: A name in `drelu_timm.suites.SUITES`.
        seed: Keys the randomness of every example and attack.
        batch_size: Images a pass.

    Raises:
        InputError: Images, labels, a model or options that cannot be used.
    """
    started = time.monotonic()
    threat_model = ThreatModel.parse(norm, eps)
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size} is not possible; give 1 or more")
    _check_data(images, labels)
    with frozen(model):
        driver = _Driver(model, images, labels.cpu().long(), threat_model, seed, batch_size)
        columns = find_suite(suite, driver.num_classes())
        predictions = driver.predictions()
        correct = predictions == driver.labels
        zero_gradients = driver.zero_gradients(correct)
        found = driver.run(columns, correct)
    kinds: dict[str, Kind] = {attack.name: attack.kind for stages in columns.values() for attack in stages}
    return Evaluation(
        threat_model=threat_model,
        suite=suite,
        seed=seed,
        labels=driver.labels,
        predictions=predictions,
        robust=found.robust,
        settings=_settings(columns),
        zero_gradients=zero_gradients,
        cw_l2=_carlini_wagner(found.distances, correct, threat_model, images[0].numel()),
        verdict=verdict(correct, found.broken, kinds, zero_gradients),
        seconds=time.monotonic() - started,
    )


_NO_CLASS = -1  # the prediction where a logit is not finite; no label equals it


@dataclass
class _Found:
    """What a suite found: by column robust or not [N], by attack broken or not [N], and minimum L2 distances [N]."""

    robust: dict[str, Tensor]
    broken: dict[str, Tensor]
    distances: Tensor | None = None


@dataclass(frozen=True)
class _Driver:
    """Runs attacks over examples batch by batch, and judges what they return."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    threat_model: ThreatModel
    seed: int
    batch_size: int

    @property
    def device(self) -> torch.device:
        tensors = chain(self.model.parameters(), self.model.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    def batches(self, examples: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Positions, images and labels of the examples that are marked in [N], the latter two on the device."""
        if not examples.any():
            return  # splitting nothing gives one empty batch
        for batch in examples.nonzero().squeeze(1).split(self.batch_size):
            images = self.images[batch.to(self.images.device)].to(self.device, torch.float32).contiguous()
            yield batch, images, self.labels[batch].to(self.device)

    def num_classes(self) -> int:
        """Number of outputs of the model, which every label must be below."""
        with torch.no_grad():
            logits = self.model(self.images[:1].to(self.device, torch.float32))
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(f"the model returns {got} for one image; it must return logits [B, classes]")
        if self.labels.max() >= logits.shape[1]:
            raise InputError(
                f"the labels go up to {self.labels.max()} but the model has {logits.shape[1]} outputs; "
                "give the dataset that the model was trained on"
            )
        return logits.shape[1]

    def predictions(self) -> Tensor:
        """The class [N] the model puts each clean image into.

        Raises:
            InputError: Logits that are not finite.
        """
        everything = torch.ones_like(self.labels, dtype=torch.bool)
        predictions = torch.cat([_predict(self.model, images).cpu() for _, images, _ in self.batches(everything)])
        if (predictions == _NO_CLASS).any():
            count = int((predictions == _NO_CLASS).sum())
            raise InputError(f"the model returns NaN or infinite logits for {count} of {len(predictions)} clean images")
        return predictions

    def zero_gradients(self, correct: Tensor) -> ZeroGradients:
        """Measured batch by batch on the correctly classified examples [N]."""
        total = max(int(correct.sum()), 1)
        shares = torch.zeros(3, dtype=torch.float64)
        for batch, images, labels in self.batches(correct):
            measured = astuple(ZeroGradients.measure(self.model, images, labels))
            shares += torch.tensor(measured, dtype=torch.float64) * len(batch) / total
        return ZeroGradients(*shares.tolist())

    def run(self, columns: Suite, correct: Tensor) -> _Found:
        """Every column of a suite on the correctly classified examples [N], single attacks before sequences of them."""
        found = _Found({}, {})
        for column, stages in sorted(columns.items(), key=lambda item: len(item[1])):
            left = correct
            for attack in stages:
                if attack.name not in found.broken:  # what it does to all examples, it does to those that are left
                    worst = torch.stack([left, *found.robust.values()]).all(0)
                    found.broken[attack.name], distances = self._attack(attack, left, worst)
                    if attack.minimum_norm:
                        found.distances = distances
                left = left & ~found.broken[attack.name]
            found.robust[column] = left
        return _Found({column: found.robust[column] for column in columns}, found.broken, found.distances)

    def _attack(self, attack: Attack, examples: Tensor, worst: Tensor) -> tuple[Tensor, Tensor]:
        """Which examples [N] an attack breaks inside the ball, and at which L2 distance [N] it breaks them at all."""
        broken = torch.zeros_like(examples)
        distances = torch.full(examples.shape, float("inf"))
        total = int(examples.sum())
        with tqdm(total=total, desc=f"{attack.name:>9}", unit="image", disable=None, leave=False) as progress:
            for batch, images, labels in self.batches(examples):
                seeds = [_example_seed(self.seed, attack.name, index) for index in batch.tolist()]
                adversarial = attack(self.model, images, labels, self.threat_model, seeds).detach()
                admitted, length = self._admit(attack, adversarial, images, labels)
                broken[batch] = (_predict(self.model, admitted) != labels).cpu()
                distances[batch] = length.cpu()
                progress.update(len(batch))
                progress.set_postfix_str(f"robust accuracy so far {100 * _share(worst & ~broken):.1f} %")
        return broken, distances

    def _admit(self, attack: Attack, adversarial: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What counts of an attack's images, and the L2 distance [B] of those that fool the model wherever they lie.

        Images that are not finite count as the clean ones. Those outside the ball are projected onto it, save those
        of a minimum-norm attack, which never aimed at the ball.
        """
        finite = per_image(adversarial.flatten(1).isfinite().all(1), images)
        adversarial = torch.where(finite, adversarial, images)
        length = (adversarial - images).flatten(1).norm(dim=1)
        if attack.minimum_norm:
            length = length.where(_predict(self.model, adversarial) != labels, torch.inf)
        inside = per_image(self.threat_model.contains(adversarial, images), images)
        instead = images if attack.minimum_norm else self.threat_model.project(adversarial, images)
        return torch.where(inside, adversarial, instead), length


@torch.no_grad()
def _predict(model: nn.Module, images: Tensor) -> Tensor:
    """The class [B] of each image, or `_NO_CLASS`."""
    logits = model(images)
    return logits.argmax(dim=1).where(logits.isfinite().all(dim=1), _NO_CLASS)


def _check_data(images: Tensor, labels: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise InputError(
            f"images are {images.dtype} {list(images.shape)}; give floats [N, C, H, W] in [0, 1], uint8 divided by 255"
        )
    if len(images) == 0 or labels.shape != images.shape[:1]:
        raise InputError(f"{len(images)} images and labels of shape {list(labels.shape)}; give one label an image")
    low, high = images.aminmax()
    if not 0 <= low <= high <= 1:  # NaN fails too
        raise InputError(
            f"images lie in [{low:.4g}, {high:.4g}]; give them in [0, 1], normalisation belongs into the model"
        )
    if labels.is_floating_point() or labels.min() < 0:
        raise InputError(f"labels are {labels.dtype} from {labels.min()}; give integers from 0 to classes - 1")


def _example_seed(seed: int, attack: str, example: int) -> int:
    """A seed that depends on nothing but these, so neither on the batch nor on what ran before."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{attack}/{example}".encode()).digest()[:7], "big")


def _settings(columns: Suite) -> dict[str, dict[str, Any]]:
    settings = {attack.name: attack.settings for stages in columns.values() for attack in stages}
    sequences = {column: stages for column, stages in columns.items() if len(stages) > 1}
    return settings | {column: {"stages": [attack.name for attack in stages]} for column, stages in sequences.items()}


def _carlini_wagner(
    distances: Tensor | None, correct: Tensor, threat_model: ThreatModel, pixels: int
) -> CarliniWagner | None:
    if distances is None:
        return None
    median = float(distances[correct].median()) if correct.any() else float("inf")
    budget = threat_model.eps if threat_model.norm == "L2" else threat_model.eps * sqrt(pixels)
    return CarliniWagner(
        median_l2=median if isfinite(median) else None,
        budget=budget,
        accuracy_at_budget=_share(correct & (distances > budget)),
    )


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())
