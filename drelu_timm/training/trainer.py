"""The training loop: every epoch is validated on held-out images, logged and saved.

All randomness is keyed by (seed, epoch, step), see `randomness`. Any step can be repeated exactly, by any number of
processes, and of what ran before it in the process.
"""

import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import lr_scheduler
from tqdm import tqdm

from ..data.batches import TrainingBatches
from ..data.datasets import DATASETS
from ..data.generated import ORDER, GeneratedImages
from ..data.images import Images, hold_out, to_float
from ..errors import InputError
from ..files import write_json
from ..hashing import digest
from ..launch import Preempted, noticed_sigterm
from ..models.caps import cap_statistics, unit_shares
from .config import TrainConfig
from .distributed import reduced
from .model import check_model
from .state import Log, Models, Progress, States
from .update import Update
from .validation import Validation

_IMAGES_FOR_UNITS = 256


class Trainer:
    """Everything that one training needs, from the first step or from the last saved one.

    Args:
        config: Resolved, see `config.resolve`.
        data: The training images; a part of them is held out for every choice that training makes.
        generated: Images to mix in, if any.
        model: Takes [0, 1] images; its ``.model`` is the timm model that is saved.
        accelerator: Device, precision and processes.

    Raises:
        InputError: Fewer images than a batch, a batch that the processes cannot share, or a model that cannot run on
            the images.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Images,
        generated: GeneratedImages | None,
        model: nn.Module,
        accelerator: Accelerator,
    ):
        assert config.output_dir is not None
        self.config, self.accelerator = config, accelerator
        self.output_dir: Path = config.output_dir
        training, held_out = hold_out(data, DATASETS[config.dataset].held_out, seed=config.seed)
        self.batches = TrainingBatches(
            training,
            batch_size=config.batch_size,
            seed=config.seed,
            augmentation=config.augmentation,
            generated=generated,
            generated_fraction=config.generated_fraction,
        )
        self.samples = to_float(held_out.images[:_IMAGES_FOR_UNITS])
        check_model(model, self.samples[:2], config, accelerator.num_processes)
        self.update = Update(model, config, accelerator, self.batches.steps_per_epoch)
        self.validation = Validation(held_out, self.update, config.seed)
        identity = {"data": digest([data.images, data.labels], generated.digest if generated else "")}
        if generated is not None:
            identity["order_of_generated_images"] = ORDER
        self.states = States(self.update, self.output_dir, identity)
        self.models = Models(self.update, self.output_dir)
        self.progress = Progress()

    @property
    def total_steps(self) -> int:
        """Steps since the start of the training."""
        return self.progress.epoch * self.batches.steps_per_epoch + self.progress.step

    def run(self) -> None:
        """Train to the end; the folder of the best epoch's model is put in place last.

        Raises:
            InputError: A state that does not fit, a loss that is not finite, or a full disk.
            Preempted: SIGTERM arrived; the state is saved.
        """
        self.progress = self.states.load()
        self.log = Log(self.accelerator, self.output_dir, self.progress)
        with (
            noticed_sigterm() as sigterm_arrived,
            tqdm(
                desc=self.config.objective,
                total=self.config.epochs * self.batches.steps_per_epoch,
                initial=self.total_steps,
                unit="step",
                disable=not self.accelerator.is_main_process,
            ) as bar,
        ):
            while self.progress.epoch < self.config.epochs and not self._out_of_patience():
                self._train_epoch(bar, sigterm_arrived)
                self._end_epoch(bar)
        self.log.close()
        self.models.finish(self.progress)

    def _out_of_patience(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.progress.epoch - self.progress.best_epoch >= patience

    def _train_epoch(self, bar: tqdm, sigterm_arrived: Callable[[], bool]) -> None:
        """Take the remaining steps of the epoch, and save a state after the last one.

        The state comes before the validation: a launcher that passes SIGTERM on may not wait until that is done.
        """
        progress, device, steps = self.progress, self.accelerator.device, self.batches.steps_per_epoch
        batches = self._remaining_batches()
        progress.rates = progress.rates or tuple(self.update.rates)
        self.update.model.train()
        self.sums = defaultdict(lambda: torch.zeros((), device=device))
        self.sums.update({name: torch.tensor(value, device=device) for name, value in progress.sums.items()})
        unwatched: deque[Tensor] = deque()
        started = time.perf_counter() - progress.seconds
        while progress.step < steps:
            asked = time.perf_counter()
            images, labels = (each.to(device, non_blocking=True) for each in next(batches))
            progress.waited += time.perf_counter() - asked
            losses = self.update(images, labels, progress.epoch, progress.step)
            for name, value in {"loss": losses.loss, **losses.parts}.items():
                self.sums[name] += value
            progress.step += 1
            bar.update()
            progress.seconds = time.perf_counter() - started
            watched = torch.stack([losses.loss, torch.tensor(float(sigterm_arrived()), device=device)])
            unwatched.append(reduced(watched, self.accelerator, "sum"))
            to_save = self._is_to_save()
            preempted = self._watch(unwatched, keep=0 if to_save else 1)
            if to_save or preempted:
                self._save()
            if preempted:
                raise Preempted(f"SIGTERM arrived: saved after epoch {progress.epoch}, step {progress.step}")

    def _remaining_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's parts of the batches of the epoch that are not done.

        Raises:
            InputError: A worker was killed, or /dev/shm is full.
        """
        left = self.batches.steps_per_epoch - self.progress.step
        try:
            yield from self.batches.loader(
                self.progress.epoch,
                self.progress.step,
                process_index=self.accelerator.process_index,
                num_processes=self.accelerator.num_processes,
                workers=min(self.config.workers, _cores(), left),
                pin_memory=self.accelerator.device.type == "cuda",
            )
        except (OSError, RuntimeError) as error:
            if not self.config.workers:
                raise
            # An error in a worker comes with its traceback, whose last line is the message.
            reason = str(error).strip().splitlines()[-1]
            raise InputError(
                f"--workers {self.config.workers}: a process that prepares batches has stopped ({reason}). "
                "Free memory and /dev/shm, or use --workers 0."
            ) from error

    def _is_to_save(self) -> bool:
        every = self.config.save_every
        return self.progress.step == self.batches.steps_per_epoch or bool(every and self.total_steps % every == 0)

    def _watch(self, unwatched: deque[Tensor], *, keep: int) -> bool:
        """Stop where a loss is not finite; return whether SIGTERM has arrived at any process.

        Reading a value waits for the device. The newest step is therefore left in the queue, and read while the device
        computes the next one.

        Args:
            unwatched: For each step, over all processes: the sum of the losses, and the number of SIGTERMs.
            keep: Steps to leave in the queue.

        Raises:
            InputError: The loss is not finite.
        """
        preempted = False
        while len(unwatched) > keep:
            step = self.progress.step - len(unwatched)
            loss, sigterms = unwatched.popleft().tolist()
            if not isfinite(loss):
                raise self._diverged(f"the loss is {loss}", step)
            preempted |= sigterms > 0
        return preempted

    def _diverged(self, what: str, step: int) -> InputError:
        path = self.output_dir / "no-number.json"
        epoch = self.progress.epoch
        if self.accelerator.is_main_process:
            with suppress(OSError):  # the message below matters more than a full disk
                write_json(path, {"epoch": epoch + 1, "step": step + 1, **self.batches.indices(epoch, step)})
        return InputError(
            f"{what} in epoch {epoch + 1}, step {step + 1}. Lower --lr ({self.config.lr:g}) or --cap-weight "
            f"({self.config.cap_weight:g}); {path} names the images of the batch, and the last state is kept."
        )

    def _end_epoch(self, bar: tqdm) -> None:
        """Measure the model on held-out images, log the figures, keep the model if it is the best, save a state."""
        progress = self.progress
        losses = self._mean_losses()
        held_out = {"held_out": self.validation.measure(self.update.bare)}
        if self.update.average is not None:
            held_out["held_out_ema"] = self.validation.measure(self.update.average)
        if not isfinite(loss := held_out["held_out"]["loss"]):
            raise self._diverged(f"the held-out loss is {loss} after the step", self.batches.steps_per_epoch - 1)
        row = self._log_row(losses, held_out)
        if isinstance(self.update.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.update.scheduler.step(loss)
        *_, figures = held_out.values()
        assert progress.log is not None
        self.progress = Progress(progress.epoch + 1, best=progress.best, best_epoch=progress.best_epoch)
        monitor = self.config.monitor or "loss"
        self.models.keep_if_best(self.progress, -figures["loss"] if monitor == "loss" else figures[monitor])
        row["best_epoch"] = self.progress.best_epoch
        self.progress.log = (*progress.log, row)
        self.log.write(row)
        self._save()
        self._report(bar, losses, figures)

    def _report(self, bar: tqdm, losses: dict[str, float], figures: dict[str, Any]) -> None:
        """Show the epoch's figures, and warn or stop where the model hides gradients."""
        penalty, epoch = losses["cap_penalty"], self.progress.epoch
        loss = f"{losses['loss'] - penalty:.3g}" + (f" + {penalty:.3g} (cap penalty)" if penalty else "")
        attack = "FGSM" if self.update.objective.single_step else "PGD"
        robust = f"{attack} {figures['pgd']:.1%}"
        if "margin" in figures:
            robust += f", margin attack {figures['margin']:.1%}"
        if "certified" in figures:
            robust += f", certified {figures['certified']:.1%}"
        bar.set_postfix_str(f"epoch {epoch}, loss {loss}, held out: clean {figures['clean']:.1%}, {robust}")
        if not figures.get("hides_gradients"):
            return
        alarm = f"epoch {epoch}: {robust}: this training hides gradients"
        if self.config.on_masking == "stop":
            raise InputError(
                f"{alarm}. Stopped by --on-masking stop. Lower --lr, or use --objective at with more --steps; "
                "--resume --on-masking warn continues."
            )
        if self.accelerator.is_main_process:
            bar.write(alarm)

    def _mean_losses(self) -> dict[str, float]:
        """Return the mean of the loss and its parts over the steps of the epoch and the processes."""
        sums = torch.stack([*self.sums.values()])
        means = reduced(sums / self.batches.steps_per_epoch, self.accelerator, "mean").tolist()
        return dict(zip(self.sums, means, strict=True))

    def _log_row(self, losses: dict[str, float], held_out: dict[str, dict[str, float]]) -> dict[str, Any]:
        progress, steps = self.progress, self.batches.steps_per_epoch
        seconds = max(progress.seconds, 1e-9)  # a stopped clock would be divided by
        caps = cap_statistics(self.update.bare)
        return {
            "epoch": progress.epoch + 1,
            "steps": self.total_steps,
            "train": losses,
            **held_out,
            "caps": caps,
            "units": unit_shares(self.update.bare.eval(), self.samples.to(self.accelerator.device)),
            "lr": progress.rates[0],
            **({"cap_lr": progress.rates[-1]} if caps else {}),
            "images_per_second": steps * self.config.batch_size / seconds,
            "waited_for_data": progress.waited / seconds,
            "seconds": progress.seconds,
        }

    def _save(self) -> None:
        """Save a state, unless the last step has left weights that are not finite."""
        progress = self.progress
        if not all(parameter.isfinite().all() for parameter in self.update.bare.parameters()):
            raise self._diverged("the weights are not finite after the step", progress.step - 1)
        if progress.step:
            means = reduced(torch.stack([*self.sums.values()]), self.accelerator, "mean").tolist()
            progress.sums = dict(zip(self.sums, means, strict=True))
        self.states.save(progress)
        self.models.delete_superseded(progress)


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
