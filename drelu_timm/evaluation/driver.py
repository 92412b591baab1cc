"""The driver: runs measurements over examples batch by batch, checkpoints them, and judges what attacks return."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..attacks.adaptive import Transfer
from ..attacks.attack import Attack, Batch, Candidates
from ..attacks.threat_model import ThreatModel, per_image
from ..data.images import as_float
from ..models.inference import device_of
from .attacked import Attacked, label_margin
from .checkpoint import Checkpoint, Measurement
from .processes import Processes

Columns = dict[str, Tensor]  # one value an example, [B], by field


@dataclass(frozen=True)
class AttackOutcome:
    """What an attack did to every example.

    Attributes:
        broken_at: [N], position of the smallest of the threat models in which it broke the example; their number
            where it broke it in none.
        steps: [N], gradients or queries until then, or all of them; NaN where not known.
        margin: [N], logit of the label minus the largest other one on the last image that it gave; NaN where none.
        l2: [N], of a minimum-norm attack: distance of the nearest example that it found; infinite where none.
        seconds: Wall-clock time that it took; None where a part had been measured before.
    """

    broken_at: Tensor
    steps: Tensor
    margin: Tensor
    l2: Tensor
    seconds: float | None


@dataclass(frozen=True)
class Driver:
    """Everything that decides what is measured, and where the measurements go.

    Attributes:
        model: Frozen, see `models.inference.frozen`; one that people bring is a `UserModel`.
        images: [N, C, H, W], floats in [0, 1] or uint8, on any device.
        labels: [N], on the CPU.
        threat_models: The balls, of one norm, from the smallest.
        seed: Keys the randomness of every example and attack.
        batch_size: Images a pass, at most.
        search_dtype: What attacks compute in; what they find is judged in float32 whatever it is.
        checkpoint: What has been measured.
        processes: Who shares the work.
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

    @property
    def device(self) -> torch.device:
        """Where the model is; one without weights is where the images are."""
        return device_of(self.model, self.images.device)

    def measure(
        self,
        stage: str,
        examples: Tensor,
        measurement: Callable[[Tensor, Batch], Measurement],
        *,
        so_far: Callable[[], str] | None = None,
    ) -> None:
        """Measure the examples that are marked in [N], except those that the checkpoint has.

        A batch is measured whole even where a part of it is known: an evaluation that resumes then computes in the
        same batches, and so gets the same numbers, as one that was never stopped.

        Args:
            stage: Name of what is measured.
            examples: [N].
            measurement: Of a batch: the positions [B] of its examples, on the CPU, and the batch.
            so_far: What to show behind the progress bar.
        """
        measured: list[Measurement] = []
        known = self.checkpoint.known(stage).clone()
        with tqdm(
            total=int(examples.sum()),
            desc=f"{stage:>10}",
            unit="image",
            leave=False,
            disable=None if self.processes.index == 0 else True,
        ) as progress:
            for positions, is_mine in self.processes.claimed(stage, self._split(examples)):
                missing = ~known[positions]
                if is_mine and missing.any():
                    of_batch = measurement(positions, self._load(stage, positions))[missing]
                    self.checkpoint.add(stage, of_batch)
                    measured.append(replace(of_batch, images=None))
                if so_far is not None:
                    progress.set_postfix_str(so_far(), refresh=False)
                progress.update(len(positions))
        for by_another in self.processes.others(measured):
            for of_batch in by_another:
                self.checkpoint.merge(stage, of_batch)

    def column(self, stage: str, name: str) -> Tensor:
        """Return a field of a stage, float64 [N]; NaN where it was not measured."""
        return self.checkpoint.column(stage, name)

    def attack(self, stage: str, attack: Attack, limit: Tensor, *, keep: Tensor | None = None) -> AttackOutcome:
        """Attack every example in the threat models before ``limit`` [N], from the smallest, until it is misclassified.

        Args:
            stage: Name of the attack in this evaluation; it keys the randomness.
            attack: The attack.
            limit: [N], positions of threat models.
            keep: [N], of which examples the image that breaks them is kept; by default of none.
        """
        keep = torch.zeros_like(limit, dtype=torch.bool) if keep is None else keep
        count = len(self.threat_models)
        weakest = sum(threat_model.eps == 0 for threat_model in self.threat_models)  # there is nothing to search
        started, from_scratch = time.monotonic(), not self.checkpoint.known(stage).any()

        def so_far() -> str:
            left = torch.minimum(limit, self.column(stage, "broken_at").nan_to_num(count).long())
            return f"robust accuracy so far {100 * float((left == count).double().mean()):.1f} %"

        def search(examples: Tensor, batch: Batch) -> Measurement:
            columns, images = (self._nearest if attack.minimum_norm else self._grow)(attack, limit[examples], batch)
            broken = columns["broken_at"].cpu() < count
            return Measurement.of(examples, columns, images, keep[examples] & broken)

        self.measure(stage, limit > weakest, search, so_far=so_far)
        return AttackOutcome(
            broken_at=self.column(stage, "broken_at").nan_to_num(count).long(),
            steps=self.column(stage, "steps"),
            margin=self.column(stage, "margin"),
            l2=self.column(stage, "l2") if attack.minimum_norm else torch.full(limit.shape, torch.inf),
            seconds=time.monotonic() - started if from_scratch else None,
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
        return Batch(images.contiguous(), self.labels[examples].to(self.device), seeds)

    def _grow(self, attack: Attack, limit: Tensor, batch: Batch) -> tuple[Columns, Tensor]:
        """Attack in one threat model after the other, each from where the last one ended; return the last images."""
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
        """Images in the ball, the steps [B] they took, and their margins [B] on the model itself."""
        seen = Attacked(self.model, self.search_dtype)
        search = attack
        if isinstance(attack, Transfer) and attack.source is not None:
            search = replace(attack, source=Attacked(attack.source, self.search_dtype))
        found = search.run(seen, batch, threat_model)
        images = _admitted(found.images.detach(), batch.images, threat_model)
        steps = _steps(found, batch)
        margins = self._margin(images, batch.labels)
        if self.search_dtype != torch.float32:
            with torch.no_grad():
                seemed = seen(images).argmax(dim=1) != batch.labels
            if found.succeeded is not None:  # a success in another batch may be none in this one, at that precision
                seemed |= found.succeeded
            if (again := seemed & (margins > 0)).any():  # rounding made a success of it: search there in float32
                careful = replace(self, search_dtype=torch.float32)
                images[again], steps[again], margins[again] = careful._search(attack, batch[again], threat_model)
        return images, steps, margins

    def _nearest(self, attack: Attack, limit: Tensor, batch: Batch) -> tuple[Columns, Tensor]:
        """Search once, whatever the radius, and see in which threat models what was found lies; the images too."""
        found = attack.run(Attacked(self.model), batch, self.threat_models[-1])
        images = _finite(found.images.detach(), batch.images)
        margins = self._margin(images, batch.labels)
        broken_at = torch.full_like(batch.labels, len(self.threat_models))
        for position, threat_model in reversed(list(enumerate(self.threat_models))):
            inside = (margins <= 0) & threat_model.contains(images, batch.images)
            broken_at = broken_at.where(~inside, position)
        l2 = (images - batch.images).flatten(1).norm(dim=1).where(margins <= 0, torch.inf)
        return {"broken_at": broken_at, "steps": _steps(found, batch), "margin": margins, "l2": l2}, images

    @torch.no_grad()
    def _margin(self, images: Tensor, labels: Tensor) -> Tensor:
        return label_margin(self.model(images), labels)


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


def _steps(found: Candidates, batch: Batch) -> Tensor:
    """[B]; NaN where they are not known."""
    unknown = torch.full(batch.labels.shape, torch.nan, device=batch.labels.device)
    return unknown if found.steps is None else found.steps.to(unknown)
