"""The driver: runs measurements batch by batch, checkpoints them, and judges the images that attacks return."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..attacks.adaptive import Transfer
from ..attacks.attack import Attack, Batch, Candidates, margin
from ..attacks.threat_model import ThreatModel, per_image
from ..data.images import as_float
from ..models.inference import device_of
from .checkpoint import Checkpoint, Measurement, Processes

DRAWS = 11  # judgments of an image where a model's output is not a function of the image; odd, so that most decide
_AVERAGED = 4  # draws per pass of attacks that do not have to follow the model's own gradient
Columns = dict[str, Tensor]  # one value per example, [B], by field


class Attacked(nn.Module):
    """Model as attacks see it: float32 logits that depend on the image, with finite gradients.

    Args:
        model: Takes images [B, C, H, W] and returns logits [B, K]. Where it computes them without a gradient, the
            gradient is 0. A user's model is wrapped in a `UserModel`.
        dtype: Computed in by autocast.
        draws: Calls of the model whose logits are averaged.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32, draws: int = 1):
        super().__init__()
        self.model, self.dtype, self.draws = model, dtype, draws
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, C, H, W]."""
        differentiated = images.requires_grad and torch.is_grad_enabled()
        if differentiated:
            images = _FiniteGradient.apply(images)
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = torch.stack([self.model(images) for _ in range(self.draws)]).mean(dim=0)
        if differentiated and not logits.requires_grad:
            logits = logits + 0 * images.flatten(1).sum(dim=1, keepdim=True)
        return logits.float()


class _FiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return images.clone()  # not a view: the model may write into its input

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient.nan_to_num(0, 0, 0)


def label_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the label's logit minus the largest other one, float32 [B]; at most 0 where the model is wrong.

    Minus infinity where a logit is not finite.
    """
    logits = logits.float()
    value = -margin(labels)(logits)
    right = value.clamp(min=torch.finfo(torch.float32).tiny)  # argmax takes the first of two equal logits
    value = value.clamp(max=0).where(logits.argmax(dim=1) != labels, right)
    return value.where(logits.isfinite().all(dim=1), -torch.inf)


@dataclass(frozen=True)
class AttackOutcome:
    """Effect of an attack on every example.

    Attributes:
        broken_at: [N], position of the smallest threat model in which it fooled the model; the number of threat models
            where it did so in none.
        steps: [N], gradients or queries until then, or all of them; NaN where not known.
        margin: [N], logit of the label minus the largest other one on the last image; NaN where there is none.
        l2: [N], of a minimum-norm attack: distance of the nearest adversarial image; infinite where there is none.
        seconds: Wall-clock time; None where a part came from a checkpoint.
    """

    broken_at: Tensor
    steps: Tensor
    margin: Tensor
    l2: Tensor
    seconds: float | None


@dataclass(frozen=True)
class Driver:
    """Runs measurements of a model on examples, batch by batch, and keeps them in a checkpoint.

    Attributes:
        model: Frozen, see `models.inference.frozen`; a user's model is a `UserModel`.
        images: [N, C, H, W], floats in [0, 1] or uint8, on any device.
        labels: [N], on the CPU.
        threat_models: All of one norm, from the smallest eps.
        seed: Key of the randomness of every example and attack.
        batch_size: Images per pass, at most.
        search_dtype: Used by attacks; the images that they find are judged in float32.
        checkpoint: Measurements so far.
        draws: Judgments of every image, the majority of which counts. Each sees the images in another order, and two of
            three in a half or a third of the batch.
        processes: The processes that share the work.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    threat_models: Sequence[ThreatModel]
    seed: int
    batch_size: int
    checkpoint: Checkpoint
    search_dtype: torch.dtype = torch.float32
    processes: Processes = field(default_factory=Processes)
    draws: int = 1

    @property
    def device(self) -> torch.device:
        """Device of the model, or of the images where the model has no weights."""
        return device_of(self.model, self.images.device)

    def measure(
        self,
        stage: str,
        examples: Tensor,
        measurement: Callable[[Tensor, Batch], Measurement],
        *,
        so_far: Callable[[], str] | None = None,
    ) -> None:
        """Measure the examples that are marked in [N], except those in the checkpoint.

        Args:
            stage: Name of the measurement in the checkpoint.
            examples: [N].
            measurement: Function of the positions [B] of a batch's examples, on the CPU, and of the batch.
            so_far: Text behind the progress bar.
        """
        measured: list[Measurement] = []
        known = self.checkpoint.known(stage).clone()
        hidden = None if self.processes.index == 0 else True  # None hides it only outside a terminal
        with tqdm(total=int(examples.sum()), desc=f"{stage:>10}", unit="image", leave=False, disable=hidden) as bar:
            for positions, is_mine in self.processes.claimed(stage, self._split(examples)):
                missing = ~known[positions]
                if is_mine and missing.any():
                    # All of the batch, even if a part of it is known: a resumed evaluation computes in the same
                    # batches, and so gets bit-equal numbers.
                    of_batch = measurement(positions, self._load(stage, positions))[missing]
                    self.checkpoint.add(stage, of_batch)
                    measured.append(replace(of_batch, images=None))
                if so_far is not None:
                    bar.set_postfix_str(so_far(), refresh=False)
                bar.update(len(positions))
        for by_another in self.processes.others(measured):
            for of_batch in by_another:
                self.checkpoint.merge(stage, of_batch)

    def column(self, stage: str, name: str) -> Tensor:
        """Return a field of a stage, float64 [N]; NaN where it was not measured."""
        return self.checkpoint.column(stage, name)

    def attack(self, stage: str, attack: Attack, limit: Tensor, *, keep: Tensor | None = None) -> AttackOutcome:
        """Attack every example in the threat models before ``limit`` [N], from the smallest, until it is misclassified.

        Args:
            stage: Name of the attack in this evaluation, which keys the randomness.
            attack: The attack.
            limit: [N], positions of threat models.
            keep: [N], the examples whose adversarial image is kept; none by default.
        """
        keep = torch.zeros_like(limit, dtype=torch.bool) if keep is None else keep
        count = len(self.threat_models)
        with_nothing_to_search = sum(threat_model.eps == 0 for threat_model in self.threat_models)
        started, from_scratch = time.monotonic(), not self.checkpoint.known(stage).any()

        def so_far() -> str:
            left = torch.minimum(limit, self.column(stage, "broken_at").nan_to_num(count).long())
            return f"robust accuracy so far {100 * float((left == count).double().mean()):.1f} %"

        def search(examples: Tensor, batch: Batch) -> Measurement:
            columns, images = (self._nearest if attack.minimum_norm else self._grow)(attack, limit[examples], batch)
            broken = columns["broken_at"].cpu() < count
            return Measurement.of(examples, columns, images, keep[examples] & broken)

        self.measure(stage, limit > with_nothing_to_search, search, so_far=so_far)
        return AttackOutcome(
            broken_at=self.column(stage, "broken_at").nan_to_num(count).long(),
            steps=self.column(stage, "steps"),
            margin=self.column(stage, "margin"),
            l2=self.column(stage, "l2") if attack.minimum_norm else torch.full(limit.shape, torch.inf),
            seconds=time.monotonic() - started if from_scratch else None,
        )

    def count_invalid(self, examples: Tensor, images: Tensor) -> int:
        """Return how many images [M, C, H, W], of examples [M], do not fool the model in the first threat model."""
        count = 0
        for part in torch.arange(len(examples)).split(self.batch_size):
            batch, adversarial = self._load("", examples[part]), images[part].to(self.device)
            inside = self.threat_models[0].contains(adversarial, batch.images)
            count += int((~inside | (self.margin(adversarial, batch.labels) > 0)).sum())
        return count

    def _split(self, examples: Tensor) -> list[Tensor]:
        """Return the positions marked in [N] in batches of similar size, as many for each process."""
        positions = examples.nonzero().squeeze(1)
        if not len(positions):
            return []
        rounds = -(-len(positions) // (self.batch_size * self.processes.count))
        return list(positions.tensor_split(min(rounds * self.processes.count, len(positions))))

    def _load(self, stage: str, examples: Tensor) -> Batch:
        images = as_float(self.images[examples.to(self.images.device)].to(self.device))
        seeds = [example_seed(self.seed, stage, example) for example in examples.tolist()]
        return Batch(images.contiguous(), self.labels[examples].to(self.device), seeds)

    def _grow(self, attack: Attack, limit: Tensor, batch: Batch) -> tuple[Columns, Tensor]:
        """Attack in one threat model after the other, each from the images of the last; return the last images."""
        limits = limit.to(self.device)
        broken_at = torch.full_like(batch.labels, len(self.threat_models))
        steps, margins = (torch.full(limits.shape, torch.nan, device=self.device) for _ in range(2))
        start: Tensor | None = None
        for position, threat_model in enumerate(self.threat_models):
            left = (broken_at == len(self.threat_models)) & (position < limits)
            if threat_model.eps == 0 or not left.any():
                continue
            images, steps[left], margins[left] = self._search(attack, replace(batch, start=start)[left], threat_model)
            broken_at[left] = broken_at[left].where(margins[left] > 0, position)
            start = batch.images.clone() if start is None else start
            start[left] = images
        columns = {"broken_at": broken_at, "steps": steps, "margin": margins}
        return columns, batch.images if start is None else start

    def _search(self, attack: Attack, batch: Batch, threat_model: ThreatModel) -> tuple[Tensor, Tensor, Tensor]:
        """Return images within eps, the steps [B] they took, and their float32 margins [B]."""
        averaged = _AVERAGED if self.draws > 1 and attack.kind != "white-box" else 1
        seen = Attacked(self.model, self.search_dtype, averaged)
        search = attack
        if isinstance(attack, Transfer) and attack.source is not None:
            search = replace(attack, source=Attacked(attack.source, self.search_dtype))
        found = search.run(seen, batch, threat_model)
        images = _admitted(found.images.detach(), batch.images, threat_model)
        steps = _steps(found, batch)
        margins = self.margin(images, batch.labels)
        if self.search_dtype != torch.float32:
            with torch.no_grad():
                seemed = seen(images).argmax(dim=1) != batch.labels
            if found.succeeded is not None:  # in low precision, logits depend on the batch: a success may not repeat
                seemed |= found.succeeded
            if (again := seemed & (margins > 0)).any():  # only rounding made it a success: search it in float32
                careful = replace(self, search_dtype=torch.float32)
                images[again], steps[again], margins[again] = careful._search(attack, batch[again], threat_model)
        return images, steps, margins

    def _nearest(self, attack: Attack, limit: Tensor, batch: Batch) -> tuple[Columns, Tensor]:
        """Search once, without eps, and determine which threat models contain the images found; return them too."""
        found = attack.run(Attacked(self.model), batch, self.threat_models[-1])
        images = _finite(found.images.detach(), batch.images)
        margins = self.margin(images, batch.labels)
        broken_at = torch.full_like(batch.labels, len(self.threat_models))
        for position, threat_model in reversed(list(enumerate(self.threat_models))):
            inside = (margins <= 0) & threat_model.contains(images, batch.images)
            broken_at = broken_at.where(~inside, position)
        l2 = (images - batch.images).flatten(1).norm(dim=1).where(margins <= 0, torch.inf)
        return {"broken_at": broken_at, "steps": _steps(found, batch), "margin": margins, "l2": l2}, images

    @torch.no_grad()
    def margin(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return `label_margin` [B] of images [B, C, H, W], the median of the draws."""
        if self.draws == 1:
            return label_margin(self.model(images), labels)
        margins = []
        for draw in range(self.draws):
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(draw)).to(images.device)
            logits = torch.cat([self.model(images[part]) for part in order.chunk(1 + draw % 3)])
            margins.append(label_margin(logits, labels[order])[order.argsort()])
        return torch.stack(margins).median(dim=0).values


def example_seed(seed: int, stage: str, example: int) -> int:
    """Return a seed that depends on its arguments only, not on the batch or on earlier attacks."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stage}/{example}".encode()).digest()[:7], "big")


def _admitted(adversarial: Tensor, images: Tensor, threat_model: ThreatModel) -> Tensor:
    """Replace images that are not finite by the clean ones, and project the others to within eps."""
    adversarial = _finite(adversarial, images)
    inside = per_image(threat_model.contains(adversarial, images), images)
    return torch.where(inside, adversarial, threat_model.project(adversarial, images))


def _finite(adversarial: Tensor, images: Tensor) -> Tensor:
    return torch.where(per_image(adversarial.flatten(1).isfinite().all(1), images), adversarial, images)


def _steps(found: Candidates, batch: Batch) -> Tensor:
    """Return steps [B]; NaN where they are not known."""
    unknown = torch.full(batch.labels.shape, torch.nan, device=batch.labels.device)
    return unknown if found.steps is None else found.steps.to(unknown)
