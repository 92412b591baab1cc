"""The driver: runs measurements over examples batch by batch, keeps what they gave, and judges what attacks return."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .attacks import Found, ThreatModel, margin, per_image
from .checks import device_of
from .data import as_float
from .processes import Processes
from .rows import Rows
from .suites import Attack

Columns = dict[str, Tensor]  # what a stage measures: one value an example, by field


@dataclass(frozen=True)
class Batch:
    """Some of the examples, on the model's device.

    Attributes:
        examples: [B], their positions among all; on the CPU.
        images: [B, C, H, W] float32 in [0, 1].
        labels: [B].
        seeds: One an example.
    """

    examples: Tensor
    images: Tensor
    labels: Tensor
    seeds: list[int]

    def __getitem__(self, kept: Tensor) -> "Batch":
        """The examples that are marked in [B]."""
        seeds = [seed for seed, keep in zip(self.seeds, kept.tolist(), strict=True) if keep]
        return Batch(self.examples[kept.cpu()], self.images[kept], self.labels[kept], seeds)


@dataclass(frozen=True)
class Outcome:
    """What an attack did to every example.

    Attributes:
        broken_at: [N], position of the smallest of the threat models in which it broke the example; their number
            where it broke it in none.
        steps: [N], gradients or queries until then, or all of them; NaN where not known.
        margin: [N], logit of the label minus the largest other one on the last image that it gave; NaN where none.
        l2: [N], of a minimum-norm attack: distance of the nearest example that it found; infinite where none.
    """

    broken_at: Tensor
    steps: Tensor
    margin: Tensor
    l2: Tensor


@dataclass(frozen=True)
class Driver:
    """Everything that decides what is measured, and where the rows go.

    Attributes:
        model: Frozen, see `attacks.frozen`.
        images: [N, C, H, W], floats in [0, 1] or uint8, on any device.
        labels: [N], on the CPU.
        threat_models: The balls, of one norm, from the smallest.
        seed: Keys the randomness of every example and attack.
        batch_size: Images a pass, at most.
        search_dtype: What attacks compute in; what they find is judged in float32 whatever it is.
        rows: What has been measured.
        processes: Who shares the work.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    threat_models: Sequence[ThreatModel]
    seed: int
    batch_size: int
    search_dtype: torch.dtype = torch.float32
    rows: Rows = field(default_factory=Rows)
    processes: Processes = field(default_factory=Processes)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self.model)

    def measure(
        self,
        stage: str,
        examples: Tensor,
        measurement: Callable[[Batch], Columns],
        *,
        so_far: Callable[[], str] | None = None,
    ) -> None:
        """Measure the examples that are marked in [N], save those whose rows are there already.

        A batch is measured whole even where a part of it is known: an evaluation that goes on then computes in the
        same batches, and so gets the same numbers, as one that was never stopped.

        Args:
            stage: Name of what is measured.
            examples: [N].
            measurement: From a batch to its columns.
            so_far: What to say behind the progress bar.
        """
        known = set(self.rows.stages[stage])
        mine: dict[int, dict[str, float]] = {}
        with tqdm(
            total=int(examples.sum()),
            desc=f"{stage:>10}",
            unit="image",
            leave=False,
            disable=None if self.processes.index == 0 else True,
        ) as progress:
            for batch, is_mine in self.processes.claimed(stage, self._split(examples)):
                missing = set(batch.tolist()) - known
                if is_mine and missing:
                    rows = _by_example(batch, measurement(self._load(stage, batch)))
                    mine |= (fresh := {example: rows[example] for example in rows if example in missing})
                    self.rows.append(stage, fresh)
                if so_far is not None:
                    progress.set_postfix_str(so_far(), refresh=False)
                progress.update(len(batch))
        self.rows.merge(stage, self.processes.gather(mine))

    def column(self, stage: str, name: str) -> Tensor:
        """A field of a stage, float64 [N]; NaN where it was not measured."""
        return self.rows.column(stage, name, len(self.labels))

    def attack(self, attack: Attack, limit: Tensor, *, stage: str | None = None) -> Outcome:
        """Attack every example in the threat models before ``limit`` [N], from the smallest, until it breaks."""
        stage = stage or attack.name
        count = len(self.threat_models)
        weakest = sum(threat_model.eps == 0 for threat_model in self.threat_models)  # there is nothing to search

        def so_far() -> str:
            left = torch.minimum(limit, self.column(stage, "broken_at").nan_to_num(count).long())
            return f"robust accuracy so far {100 * float((left == count).double().mean()):.1f} %"

        search = self._nearest if attack.minimum_norm else self._grow
        self.measure(stage, limit > weakest, partial(search, attack, limit), so_far=so_far)
        return Outcome(
            broken_at=self.column(stage, "broken_at").nan_to_num(count).long(),
            steps=self.column(stage, "steps"),
            margin=self.column(stage, "margin"),
            l2=self.column(stage, "l2") if attack.minimum_norm else torch.full(limit.shape, torch.inf),
        )

    def _split(self, examples: Tensor) -> list[Tensor]:
        """Positions of the examples that are marked in [N], in batches of like size, as many for each process."""
        positions = examples.nonzero().squeeze(1)
        if not len(positions):
            return []
        rounds = -(-len(positions) // (self.batch_size * self.processes.count))
        return list(positions.tensor_split(min(rounds * self.processes.count, len(positions))))

    def _load(self, stage: str, examples: Tensor) -> Batch:
        images = as_float(self.images[examples.to(self.images.device)].to(self.device))
        seeds = [example_seed(self.seed, stage, example) for example in examples.tolist()]
        return Batch(examples, images.contiguous(), self.labels[examples].to(self.device), seeds)

    def _grow(self, attack: Attack, limit: Tensor, batch: Batch) -> Columns:
        """Attack in one threat model after the other, each beginning where the last one ended."""
        limits = limit[batch.examples].to(self.device)
        broken_at = torch.full_like(batch.labels, len(self.threat_models))
        steps, margins = (torch.full(limits.shape, torch.nan, device=self.device) for _ in range(2))
        start: Tensor | None = None
        for position, threat_model in enumerate(self.threat_models):
            left = (broken_at == len(self.threat_models)) & (position < limits)
            if threat_model.eps == 0 or not left.any():
                continue
            begin = None if start is None else start[left]
            images, steps[left], margins[left] = self._search(attack, batch[left], threat_model, begin)
            broken_at[left] = broken_at[left].where(margins[left] > 0, position)
            start = batch.images.clone() if start is None else start
            start[left] = images
        return {"broken_at": broken_at, "steps": steps, "margin": margins}

    def _search(
        self, attack: Attack, batch: Batch, threat_model: ThreatModel, start: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images in the ball, the steps [B] they took, and their margins [B] on the model itself."""
        seen = Attacked(self.model, self.search_dtype)
        found = attack(seen, batch.images, batch.labels, threat_model, batch.seeds, start)
        images = _admitted(found.images.detach(), batch.images, threat_model)
        steps = _steps(found, batch)
        margins = self._margin(images, batch.labels)
        if self.search_dtype != torch.float32:
            with torch.no_grad():
                seemed = seen(images).argmax(dim=1) != batch.labels
            if (again := seemed & (margins > 0)).any():  # rounding made a success of it: search there in float32
                careful = replace(self, search_dtype=torch.float32)
                begin = None if start is None else start[again]
                images[again], steps[again], margins[again] = careful._search(attack, batch[again], threat_model, begin)
        return images, steps, margins

    def _nearest(self, attack: Attack, limit: Tensor, batch: Batch) -> Columns:
        """Search once, whatever the radius, and see in which threat models what was found lies."""
        found = attack(Attacked(self.model), batch.images, batch.labels, self.threat_models[-1], batch.seeds)
        images = _finite(found.images.detach(), batch.images)
        margins = self._margin(images, batch.labels)
        broken_at = torch.full_like(batch.labels, len(self.threat_models))
        for position, threat_model in reversed(list(enumerate(self.threat_models))):
            inside = (margins <= 0) & threat_model.contains(images, batch.images)
            broken_at = broken_at.where(~inside, position)
        l2 = (images - batch.images).flatten(1).norm(dim=1).where(margins <= 0, torch.inf)
        return {"broken_at": broken_at, "steps": _steps(found, batch), "margin": margins, "l2": l2}

    @torch.no_grad()
    def _margin(self, images: Tensor, labels: Tensor) -> Tensor:
        return label_margin(self.model(images), labels)


class Attacked(nn.Module):
    """A model as attacks see it: float32 logits that hang on the image, with finite gradients.

    Args:
        model: Takes images [B, C, H, W], gives logits [B, K]; it may compute them without a gradient, which is 0 then.
        dtype: What it computes in, by autocast.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model, self.dtype = model, dtype
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W]."""
        differentiated = images.requires_grad and torch.is_grad_enabled()
        if differentiated:
            images = _FiniteGradient.apply(images)
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(images)
        if differentiated and not logits.requires_grad:
            logits = logits + 0 * images.flatten(1).sum(dim=1, keepdim=True)
        return logits.float()


class _FiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return images.view_as(images)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient.nan_to_num(0, 0, 0)


def label_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's logit minus the largest other one, float32 [B]; at most 0 where the model is wrong.

    Minus infinity where a logit is not finite.
    """
    logits = logits.float()
    value = -margin(labels)(logits)
    right = value.clamp(min=torch.finfo(torch.float32).tiny)  # of two equal logits argmax takes the first
    value = value.clamp(max=0).where(logits.argmax(dim=1) != labels, right)
    return value.where(logits.isfinite().all(dim=1), -torch.inf)


def example_seed(seed: int, stage: str, example: int) -> int:
    """A seed that depends on nothing but these, so neither on the batch nor on what ran before."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stage}/{example}".encode()).digest()[:7], "big")


def _admitted(adversarial: Tensor, images: Tensor, threat_model: ThreatModel) -> Tensor:
    """What counts of an attack's images: those not finite are the clean ones, those outside the ball are projected."""
    adversarial = _finite(adversarial, images)
    inside = per_image(threat_model.contains(adversarial, images), images)
    return torch.where(inside, adversarial, threat_model.project(adversarial, images))


def _finite(adversarial: Tensor, images: Tensor) -> Tensor:
    return torch.where(per_image(adversarial.flatten(1).isfinite().all(1), images), adversarial, images)


def _steps(found: Found, batch: Batch) -> Tensor:
    """[B]; NaN where they are not known."""
    unknown = torch.full(batch.labels.shape, torch.nan, device=batch.labels.device)
    return unknown if found.steps is None else found.steps.to(unknown)


def _by_example(examples: Tensor, columns: Columns) -> dict[int, dict[str, float]]:
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return {example: dict(zip(columns, row, strict=True)) for example, row in zip(examples.tolist(), rows, strict=True)}
