"""The training loop: one epoch after another, each validated on held-out images, logged and saved.

Accelerate lives here. Every random number is keyed by (seed, epoch, step), see `randomness`, so an epoch can
be repeated exactly, by any number of processes.
"""

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from tqdm import tqdm

from .attacks import cross_entropy
from .batches import TrainingBatches
from .data import DATASETS, Images, hold_out, to_float
from .drelu import cap_penalty, cap_statistics, drelu_layers, unit_shares
from .errors import InputError, one_line
from .models import save_folder
from .objectives import InnerAttack, Objective, make_objective
from .randomness import random_generator
from .runs import write_text
from .state import load_state, save_state
from .train_config import TrainConfig

# Held-out images that are attacked after every epoch: enough to see robustness come, cheap beside an epoch.
ATTACKED_HELD_OUT = 512
EVALUATION_BATCH = 256
# A loss that is no number is looked for every so many steps: to look is to wait for the device.
CHECK_LOSS_EVERY = 20


class Trainer:
    """Everything one training needs, from the first epoch or from the last saved one.

    Args:
        config: Resolved, see `train_config.resolve`.
        data: The training images; a part of them is held out for every choice that training makes.
        model: Takes [0, 1] images; its ``.model`` is the timm model that is saved.
        accelerator: Device, precision and processes.

    Raises:
        InputError: Fewer images than a batch, or a model that cannot run on them.
    """

    def __init__(self, config: TrainConfig, data: Images, model: nn.Module, accelerator: Accelerator):
        dataset = DATASETS[config.dataset]
        self.config, self.accelerator = config, accelerator
        training, self.held_out = hold_out(data, dataset.held_out, seed=config.seed)
        self.batches = TrainingBatches(
            training,
            batch_size=config.batch_size,
            seed=config.seed,
            crop_padding=dataset.crop_padding,
            flip=dataset.flip,
        )
        _try(model, to_float(self.held_out.images[:2]), config)
        optimizer = make_optimizer(model, config)
        self.scheduler = make_scheduler(optimizer, config, self.batches.steps_per_epoch)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.bare = accelerator.unwrap_model(self.model)
        self.objective = make_objective(config.objective, beta=config.beta)
        assert config.step_size is not None and config.output_dir is not None
        self.attack = InnerAttack(self.bare, config.threat_model, config.steps, config.step_size)
        self.output_dir: Path = config.output_dir
        self.epoch, self.best_loss, self.best_epoch = 0, float("inf"), 0

    def run(self) -> None:
        """Train to the end; the model's folder is written last."""
        self._load()
        steps = self.batches.steps_per_epoch
        with tqdm(
            desc=self.config.objective,
            total=self.config.epochs * steps,
            initial=self.epoch * steps,
            unit="step",
            disable=not self.accelerator.is_main_process,
        ) as progress:
            while self.epoch < self.config.epochs and not self._out_of_patience():
                self._run_epoch(progress)
        if self.accelerator.is_main_process:
            save_folder(self.bare.model, self.output_dir / "model")
        self.accelerator.wait_for_everyone()

    def _out_of_patience(self) -> bool:
        return self.config.patience is not None and self.epoch - self.best_epoch >= self.config.patience

    def _run_epoch(self, progress: tqdm) -> None:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        start = time.perf_counter()
        parts = self._train_epoch(progress)
        seconds = time.perf_counter() - start
        held_out = self._validate()
        self.epoch += 1
        if held_out["loss"] < self.best_loss:
            self.best_loss, self.best_epoch = held_out["loss"], self.epoch
        if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(held_out["loss"])
        units = unit_shares(self.bare.eval(), self._on_device(self.held_out.images[:EVALUATION_BATCH]))
        self._log(
            {
                "epoch": self.epoch,
                "train": parts,
                "held_out": held_out,
                "caps": cap_statistics(self.bare),
                "units": units,
                "lr": rates[0],
                "cap_lr": rates[-1],
                "images_per_second": self.batches.steps_per_epoch * self.config.batch_size / seconds,
                "seconds": seconds,
            }
        )
        penalty = self.config.cap_weight * parts["cap_penalty"]
        loss = f"{parts['loss'] - penalty:.3g}" + (f" + {penalty:.3g} for the caps" if penalty else "")
        figures = f"held out: clean {held_out['clean']:.1%}, PGD {held_out['pgd']:.1%}"
        progress.set_postfix_str(f"epoch {self.epoch}, loss {loss}, {figures}")
        self._save()

    def _train_epoch(self, progress: tqdm) -> dict[str, float]:
        """All steps of an epoch; the mean of the loss and of each of its parts."""
        self.model.train()
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.accelerator.device))
        steps = self.batches.steps_per_epoch
        for step in range(steps):
            objective = self._step(step)
            for name, value in {"loss": objective.loss, **objective.parts}.items():
                sums[name] += value.detach()
            last = step == steps - 1
            if (last or step % CHECK_LOSS_EVERY == 0) and not torch.isfinite(sums["loss"]):
                raise InputError(
                    f"the loss is {sums['loss'].item()} in epoch {self.epoch + 1}, step {step + 1}; lower --lr "
                    f"({self.config.lr:g}) or --cap-weight ({self.config.cap_weight:g}); the last state is kept"
                )
            progress.update()
        self._average_buffers()
        names = list(sums)
        means = self._reduce(torch.stack([sums[name] for name in names]) / steps, "mean")
        return dict(zip(names, means, strict=True))

    def _step(self, step: int) -> Objective:
        config, accelerator = self.config, self.accelerator
        images, labels = self.batches.batch(
            self.epoch, step, process_index=accelerator.process_index, num_processes=accelerator.num_processes
        )
        images, labels = images.to(accelerator.device), labels.to(accelerator.device)
        _seed(random_generator(config.seed, self.epoch, step, accelerator.process_index).initial_seed())
        objective = self.objective(self.model, images, labels, self.attack, self._noise(images, step))
        objective.parts["cap_penalty"] = penalty = cap_penalty(self.bare).to(accelerator.device)
        objective = Objective(objective.loss + config.cap_weight * penalty, objective.parts)
        accelerator.backward(objective.loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if isinstance(self.scheduler, lr_scheduler.CosineAnnealingLR):
            self.scheduler.step()
        return objective

    def _noise(self, images: Tensor, step: int) -> Tensor:
        """This process's part of the noise for the whole batch: the same for any number of processes."""
        generator = random_generator(self.config.seed, self.epoch, step)
        shape = torch.Size([self.config.batch_size, *images.shape[1:]])
        mine = slice(self.accelerator.process_index * len(images), (self.accelerator.process_index + 1) * len(images))
        return self.config.threat_model.noise(shape, generator)[mine].to(images)

    def _average_buffers(self) -> None:
        """BatchNorm's running statistics, which each process kept from its own part of the batches."""
        if self.accelerator.num_processes > 1:
            for buffer in self.bare.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.accelerator.reduce(buffer, "mean"))

    def _validate(self) -> dict[str, float]:
        """Loss and clean accuracy on the held-out images, accuracy under PGD on the first of them."""
        self.bare.eval()
        sums = torch.zeros(3)
        total, attacked = len(self.held_out.labels), min(ATTACKED_HELD_OUT, len(self.held_out.labels))
        starts = range(0, total, EVALUATION_BATCH)
        for start in starts[self.accelerator.process_index :: self.accelerator.num_processes]:
            batch = slice(start, start + EVALUATION_BATCH)
            images = self._on_device(self.held_out.images[batch])
            labels = self.held_out.labels[batch].to(images.device)
            # The same noise after every epoch: a change of the figures is a change of the model.
            generator = random_generator(self.config.seed, start)
            noise = self.config.threat_model.noise(images.shape, generator).to(images)
            loss = self.objective(self.bare, images, labels, self.attack, noise).loss.item() * len(labels)
            robust = self._robust(images, labels, noise) if start < attacked else 0
            sums += torch.tensor([loss, self._correct(images, labels), robust])
        loss, clean, robust = self._reduce(sums, "sum")
        attacked = sum(min(EVALUATION_BATCH, total - start) for start in starts if start < attacked)
        penalty = self.config.cap_weight * cap_penalty(self.bare).item()
        return {"loss": loss / total + penalty, "clean": clean / total, "pgd": robust / attacked}

    def _reduce(self, values: Tensor, how: str) -> list[float]:
        """Sum or mean over the processes."""
        reduced = self.accelerator.reduce(values.to(self.accelerator.device), how)
        assert isinstance(reduced, Tensor)
        return reduced.tolist()

    def _robust(self, images: Tensor, labels: Tensor, noise: Tensor) -> int:
        return self._correct(self.attack(images, cross_entropy(labels), noise), labels)

    @torch.no_grad()
    def _correct(self, images: Tensor, labels: Tensor) -> int:
        return int((self.bare(images).argmax(1) == labels).sum())

    def _on_device(self, images: Tensor) -> Tensor:
        return to_float(images.to(self.accelerator.device))

    def _log(self, entry: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with (self.output_dir / "log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")

    def _save(self) -> None:
        progress = {
            "epoch": self.epoch,
            "best_loss": self.best_loss,
            "best_epoch": self.best_epoch,
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
        }
        save_state(self.accelerator, self.output_dir / "state", progress)

    def _load(self) -> None:
        progress = load_state(self.accelerator, self.output_dir / "state")
        if progress is None:
            return
        self.epoch, self.best_loss, self.best_epoch = (progress[key] for key in ("epoch", "best_loss", "best_epoch"))
        if self.scheduler:
            self.scheduler.load_state_dict(progress["scheduler"])
        self._cut_log()

    def _cut_log(self) -> None:
        """Drop the lines of epochs that were logged but not saved, and will come again."""
        log = self.output_dir / "log.jsonl"
        if self.accelerator.is_main_process and log.exists():
            write_text(log, "".join(line + "\n" for line in log.read_text().splitlines()[: self.epoch]))


def _seed(seed: int) -> None:
    """`torch.manual_seed` for what a model draws itself, such as dropout, without its millisecond of stack traces."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """timm's optimiser of that name; biases, norms and caps are spared weight decay, caps have their own rate.

    Raises:
        InputError: timm has no optimiser of that name.
    """
    caps = [layer.cap for layer in drelu_layers(model)]
    known = {id(cap) for cap in caps}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
        {"params": caps, "weight_decay": 0.0, "lr": config.cap_lr},
    ]
    groups = [group for group in groups if group["params"]]
    try:
        return create_optimizer_v2(groups, opt=config.optimizer, lr=config.lr)
    except (AssertionError, ValueError) as error:
        raise InputError(
            f"--optimizer {config.optimizer!r} is no optimiser of timm; adam, adamw and sgd are"
        ) from error


Scheduler = lr_scheduler.CosineAnnealingLR | lr_scheduler.ReduceLROnPlateau


def make_scheduler(optimizer: Optimizer, config: TrainConfig, steps_per_epoch: int) -> Scheduler | None:
    """torch's scheduler for ``config.schedule``: stepped every step (cosine) or every epoch (plateau).

    timm's own plateau scheduler passes torch an argument that it no longer takes, and does not save its patience.
    """
    if config.schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * steps_per_epoch)
    if config.schedule == "plateau":
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=5)
    return None


def _try(model: nn.Module, images: Tensor, config: TrainConfig) -> None:
    """A forward pass before any work.

    Raises:
        InputError: The model cannot run on images of this size.
    """
    try:
        with torch.no_grad():
            model.eval()(images)
    except (RuntimeError, AssertionError, ValueError) as error:
        size = "x".join(map(str, images.shape[2:]))
        raise InputError(
            f"--model {config.model} cannot run on {size} images ({one_line(error)}); try --small-images"
        ) from error
