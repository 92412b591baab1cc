"""The training loop: one epoch after another, each validated on held-out images, logged and saved.

Every random number is keyed by (seed, epoch, step), see `randomness`, so any step can be repeated exactly, by any
number of processes, whatever ran before it in this process.
"""

import shutil
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import inf, isfinite, isnan
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
from ..digests import digest
from ..errors import InputError
from ..files import write_json
from ..models.caps import cap_statistics, unit_shares
from ..models.saved import save_folder
from ..preemption import Preempted, noticed_sigterm
from .checks import check_model
from .config import TrainConfig
from .log import TrainLog
from .sharding import is_sharded
from .state import load_state, read_progress, save_state, write_together
from .update import Update
from .validation import Validation

IMAGES_FOR_UNITS = 256
_ARRANGED = {"num_processes": "{} processes", "grad_accum_steps": "--grad-accum-steps {}", "compile": "--compile {}"}


@dataclass
class Progress:
    """How far a training is, and what of it is in neither weights nor optimiser.

    Attributes:
        epoch: Epochs done.
        step: Steps done in the one that runs.
        best: The best held-out figure so far; the higher, the better.
        best_epoch: After which epoch it was seen.
        rates: Learning rates that this began with, of the optimiser's groups; the last is the caps'.
        sums: Of the loss and its parts, over its steps.
        seconds: What these took.
        waited: Seconds of them that were spent on waiting for the data.
    """

    epoch: int = 0
    step: int = 0
    best: float = -inf
    best_epoch: int = 0
    rates: list[float] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    waited: float = 0.0


class Trainer:
    """Everything one training needs, from the first step or from the last saved one.

    Args:
        config: Resolved, see `config.resolve`.
        data: The training images; a part of them is held out for every choice that training makes.
        generated: Images to mix in, if any.
        model: Takes [0, 1] images; its ``.model`` is the timm model that is saved.
        accelerator: Device, precision and processes.

    Raises:
        InputError: Fewer images than a batch, a batch that cannot be shared, or a model that cannot run on the images.
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
        self.data_digest = digest([data.images, data.labels], generated.digest if generated else "")
        self.samples = to_float(held_out.images[:IMAGES_FOR_UNITS])
        check_model(model, self.samples[:2], config, accelerator.num_processes)
        self.update = Update(model, config, accelerator, self.batches.steps_per_epoch)
        self.validation = Validation(held_out, self.update.objective, self.update.attack, accelerator, config.seed)
        self.progress = Progress()

    @property
    def total_steps(self) -> int:
        """Steps done since the beginning."""
        return self.progress.epoch * self.batches.steps_per_epoch + self.progress.step

    def run(self) -> None:
        """Train to the end; the folder of the best epoch's model is put in place last.

        Raises:
            InputError: A state that does not fit, a loss that is no number, or a disk that is full.
            Preempted: SIGTERM came; the state is saved.
        """
        self._load()
        self.log = TrainLog(self.accelerator, self.output_dir, keep=self.progress.epoch)
        with (
            noticed_sigterm() as sigterm_came,
            tqdm(
                desc=self.config.objective,
                total=self.config.epochs * self.batches.steps_per_epoch,
                initial=self.total_steps,
                unit="step",
                disable=not self.accelerator.is_main_process,
            ) as bar,
        ):
            while self.progress.epoch < self.config.epochs and not self._out_of_patience():
                self._train_epoch(bar, sigterm_came)
                self._end_epoch(bar)
        self._finish()

    def _out_of_patience(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.progress.epoch - self.progress.best_epoch >= patience

    # An epoch

    def _train_epoch(self, bar: tqdm, sigterm_came: Callable[[], bool]) -> None:
        """The steps of an epoch that are not done yet; a state is saved behind the last one.

        That is before the validation, which a launcher that passes SIGTERM on may not wait for.
        """
        progress, device, steps = self.progress, self.accelerator.device, self.batches.steps_per_epoch
        loader = iter(self._loader())
        progress.rates = progress.rates or self.update.rates
        self.update.model.train()
        self.sums = defaultdict(lambda: torch.zeros((), device=device))
        self.sums.update({name: torch.tensor(value, device=device) for name, value in progress.sums.items()})
        unwatched: deque[Tensor] = deque()
        begun = time.perf_counter() - progress.seconds
        while progress.step < steps:
            asked = time.perf_counter()
            images, labels = (each.to(device, non_blocking=True) for each in next(loader))
            progress.waited += time.perf_counter() - asked
            losses = self.update(images, labels, progress.epoch, progress.step)
            for name, value in {"loss": losses.loss, **losses.parts}.items():
                self.sums[name] += value
            progress.step += 1
            bar.update()
            progress.seconds = time.perf_counter() - begun
            unwatched.append(self._seen(losses.loss, sigterm_came()))
            to_save = self._is_to_save()
            preempted = self._watch(unwatched, keep=0 if to_save else 1)
            if to_save or preempted:
                self._save()
            if preempted:
                raise Preempted(f"SIGTERM came: saved after epoch {progress.epoch}, step {progress.step}")

    def _loader(self):
        return self.batches.loader(
            self.progress.epoch,
            self.progress.step,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            workers=self.config.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _is_to_save(self) -> bool:
        every = self.config.save_every
        return self.progress.step == self.batches.steps_per_epoch or bool(every and self.total_steps % every == 0)

    def _seen(self, loss: Tensor, sigterm_came: bool) -> Tensor:
        """Over all processes: the sum of a step's losses, and how many of them SIGTERM has come to."""
        seen = torch.stack([loss, torch.tensor(float(sigterm_came), device=loss.device)])
        reduced = self.accelerator.reduce(seen, "sum")
        assert isinstance(reduced, Tensor)
        return reduced

    def _watch(self, unwatched: deque[Tensor], *, keep: int) -> bool:
        """Stop where a loss is no number; whether SIGTERM has come to any process.

        To look at a figure is to wait for the device, so one step stays behind: its figures are looked at while it
        already works on the next.

        Raises:
            InputError: The loss is no number.
        """
        preempted = False
        while len(unwatched) > keep:
            step = self.progress.step - len(unwatched)
            loss, sigterms = unwatched.popleft().tolist()
            if not isfinite(loss):
                raise self._no_number(f"the loss is {loss}", step)
            preempted |= sigterms > 0
        return preempted

    def _no_number(self, what: str, step: int) -> InputError:
        path = self.output_dir / "no-number.json"
        epoch = self.progress.epoch
        if self.accelerator.is_main_process:
            write_json(path, {"epoch": epoch + 1, "step": step + 1, **self.batches.indices(epoch, step)})
        return InputError(
            f"{what} in epoch {epoch + 1}, step {step + 1}; lower --lr ({self.config.lr:g}) or --cap-weight "
            f"({self.config.cap_weight:g}); {path} names the batch's images, and the last state is kept"
        )

    # The end of an epoch

    def _end_epoch(self, bar: tqdm) -> None:
        progress, config, bare = self.progress, self.config, self.update.bare
        steps = self.batches.steps_per_epoch
        means = self._reduce(torch.stack([*self.sums.values()]) / steps, "mean")
        parts = dict(zip(self.sums, means, strict=True))
        held_out = {"held_out": self._measure(bare)}
        if self.update.average is not None:
            held_out["held_out_ema"] = self._measure(self.update.average)
        *_, figures = held_out.values()
        if not isfinite(held_out["held_out"]["loss"]):
            raise self._no_number(f"the held-out loss is {held_out['held_out']['loss']} after the step", steps - 1)
        caps = cap_statistics(bare)
        entry = {
            "epoch": progress.epoch + 1,
            "steps": self.total_steps,
            "train": parts,
            **held_out,
            "caps": caps,
            "units": unit_shares(bare.eval(), self.samples.to(self.accelerator.device)),
            "lr": progress.rates[0],
            **({"cap_lr": progress.rates[-1]} if caps else {}),
            "images_per_second": steps * config.batch_size / progress.seconds,
            "waited_for_data": progress.waited / progress.seconds,
            "seconds": progress.seconds,
        }
        if isinstance(self.update.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.update.scheduler.step(held_out["held_out"]["loss"])
        self.progress = Progress(progress.epoch + 1, best=progress.best, best_epoch=progress.best_epoch)
        assert config.monitor is not None  # `resolve` fills it in
        self._note_best(-figures["loss"] if config.monitor == "loss" else figures[config.monitor])
        self.log.write({**entry, "best_epoch": self.progress.best_epoch})
        self._save()
        penalty = parts["cap_penalty"]
        loss = f"{parts['loss'] - penalty:.3g}" + (f" + {penalty:.3g} for the caps" if penalty else "")
        shown = f"held out: clean {figures['clean']:.1%}, PGD {figures['pgd']:.1%}"
        shown += f", certified {figures['certified']:.1%}" if "certified" in figures else ""
        bar.set_postfix_str(f"epoch {self.progress.epoch}, loss {loss}, {shown}")

    def _measure(self, model: nn.Module) -> dict[str, float]:
        figures = self.validation.measure(model)
        return {**figures, "loss": figures["loss"] + self.update.penalty(model).item()}

    def _note_best(self, figure: float) -> None:
        """Keep the model if the figure is the best so far (a first one that is no number counts as the worst)."""
        progress = self.progress
        figure = -inf if isnan(figure) else figure
        if progress.best_epoch and figure <= progress.best:
            return
        progress.best, progress.best_epoch = figure, progress.epoch
        self._save_model(self._best_folder)

    @property
    def _best_folder(self) -> Path:
        return self.output_dir / "state" / f"best-{self.progress.best_epoch:05d}"

    def _save_model(self, folder: Path) -> None:
        """Write the averaged model, or the only one, over what a killed process has left there."""
        model: Any = self.update.bare if self.update.average is None else self.update.average
        # In every process, since each has a part of the weights under FSDP.
        whole: dict[str, Any] = self.accelerator.get_state_dict(model)

        def write() -> None:
            if self.accelerator.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
                weights = {name.removeprefix("model."): w for name, w in whole.items() if name.startswith("model.")}
                save_folder(model.model, folder, weights=weights)

        write_together(self.accelerator, folder, write)

    def _finish(self) -> None:
        self._save_model(self.output_dir / "last")
        self.log.close()
        if not self._best_folder.is_dir():
            raise InputError(f"{self._best_folder} is gone; delete {self.output_dir} to train anew")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._best_folder.replace(self.output_dir / "model")
        self.accelerator.wait_for_everyone()

    def _reduce(self, values: Tensor, how: str) -> list[float]:
        """Sum or mean over the processes."""
        reduced = self.accelerator.reduce(values.to(self.accelerator.device), how)
        assert isinstance(reduced, Tensor)
        return reduced.tolist()

    # The state

    def _identity(self) -> dict[str, Any]:
        """What has to be the same when a run goes on, beside its flags."""
        identity = {
            "data": self.data_digest,
            "mixed_precision": self.accelerator.mixed_precision,
            "sharding": "FSDP" if is_sharded(self.accelerator) else "none",
        }
        if self.batches.generated is not None:
            identity["order_of_generated_images"] = ORDER
        return identity

    def _arrangement(self) -> dict[str, Any]:
        """What may be otherwise when a run goes on: the updates are the same up to rounding."""
        return {
            "num_processes": self.accelerator.num_processes,
            "grad_accum_steps": self.config.grad_accum_steps,
            "compile": self.config.compile,
        }

    def _save(self) -> None:
        """Save a state, unless the last step has left weights that are no numbers."""
        progress, scheduler = self.progress, self.update.scheduler
        if not all(parameter.isfinite().all() for parameter in self.update.bare.parameters()):
            raise self._no_number("the weights are no numbers after the step", progress.step - 1)
        if progress.step:
            means = self._reduce(torch.stack([*self.sums.values()]), "mean")
            progress.sums = dict(zip(self.sums, means, strict=True))
        content = {
            **asdict(progress),
            **self._identity(),
            **self._arrangement(),
            "scheduler": scheduler.state_dict() if scheduler else None,
        }
        save_state(self.accelerator, self.output_dir / "state", content, self.update.average)
        if self.accelerator.is_main_process:
            for folder in self._best_folder.parent.glob("best-*"):
                if folder != self._best_folder:
                    shutil.rmtree(folder)

    def _load(self) -> None:
        content = read_progress(self.output_dir / "state")
        if content is None:
            return
        for key, now in self._identity().items():
            before = content.get(key)  # None in a state of before the key was recorded
            if before != now:
                raise InputError(
                    f"--resume of {self.output_dir} with other {key.replace('_', ' ')} ({before} before, {now} "
                    "now); give what it was begun with, or another --output-dir"
                )
        self._say_rearranged(content)
        load_state(self.accelerator, self.output_dir / "state", self.update.average)
        if self.update.scheduler:
            self.update.scheduler.load_state_dict(content["scheduler"])
        self.progress = Progress(**{name: content[name] for name in Progress.__dataclass_fields__})

    def _say_rearranged(self, before: dict[str, Any]) -> None:
        """Say what is arranged otherwise than in a state; of what it does not hold yet, nothing is said."""
        changed = [
            f"{_ARRANGED[key].format(now)}, {before[key]} before"
            for key, now in self._arrangement().items()
            if before.get(key, now) != now
        ]
        if changed:
            self.accelerator.print(
                f"{self.output_dir} goes on with {' and '.join(changed)}: the same batches and updates up to rounding, "
                "but that BatchNorm's statistics are those of the part of a batch that it sees at once"
            )
