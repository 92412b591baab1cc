"""The training loop: one epoch after another, each validated on held-out images, logged and saved.

Accelerate lives here. Every random number is keyed by (seed, epoch, step), see `randomness`, so any step can be
repeated exactly, by any number of processes, whatever ran before it in this process.
"""

import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from math import inf, isnan
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import lr_scheduler
from tqdm import tqdm

from .awp import kept_statistics, perturbed_weights
from .batches import TrainingBatches
from .caps import CAP_PENALTIES, cap_statistics, check_cap_penalty, unit_shares
from .data import DATASETS, Images, hold_out, to_float
from .errors import InputError, one_line
from .generated import GeneratedImages
from .models import save_folder
from .objectives import InnerAttack, Losses, make_objective
from .optim import BY_STEP, average_gradients, average_statistics, make_optimizer, make_scheduler
from .preemption import Preempted, noticed_sigterm
from .randomness import random_generator
from .rows import digest
from .runs import write_json
from .state import load_state, read_progress, save_state
from .train_config import TrainConfig
from .train_log import TrainLog
from .validation import Validation

# To look at a loss is to wait for a GPU, so it is done every so many steps there.
WATCHED_ON_GPU = 20
IMAGES_FOR_UNITS = 256


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
        config: Resolved, see `train_config.resolve`.
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
        assert config.step_size is not None and config.output_dir is not None
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
        _try(model, self.samples[:2], config)
        check_cap_penalty(config.cap_penalty, model)
        self.penalty = CAP_PENALTIES[config.cap_penalty]
        model.to(accelerator.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if config.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        # Before Accelerate wraps the forward pass: a copy of the wrapped one would run the model it was copied from.
        self.ema = ModelEmaV3(model, config.ema_decay, use_warmup=True) if config.ema_decay else None
        optimizer = make_optimizer(model, config)
        self.scheduler = make_scheduler(optimizer, config, self.batches.steps_per_epoch)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if self.ema is not None:
            accelerator.register_for_checkpointing(self.ema)
        self.bare = accelerator.unwrap_model(self.model)
        if config.compile:
            self.bare.compile()
        self.objective = make_objective(config.objective, beta=config.beta, label_smoothing=config.label_smoothing)
        self.attack = InnerAttack(self.bare, config.threat_model, config.steps, config.step_size)
        self.validation = Validation(
            held_out, self.objective, self.attack, config.threat_model, accelerator, config.seed
        )
        self.progress = Progress()

    @property
    def averaged(self) -> nn.Module:
        """The model that the run is for: that of the averaged weights, if there are any."""
        return self.bare if self.ema is None else self.ema.module

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
        """The steps of an epoch that are not done yet."""
        progress, accelerator, steps = self.progress, self.accelerator, self.batches.steps_per_epoch
        loader = iter(
            self.batches.loader(
                progress.epoch,
                progress.step,
                process_index=accelerator.process_index,
                num_processes=accelerator.num_processes,
                workers=self.config.workers,
                pin_memory=accelerator.device.type == "cuda",
            )
        )
        progress.rates = progress.rates or [group["lr"] for group in self.optimizer.param_groups]
        self.model.train()
        self.sums = defaultdict(lambda: torch.zeros((), device=accelerator.device))
        self.sums.update(
            {name: torch.tensor(value, device=accelerator.device) for name, value in progress.sums.items()}
        )
        unwatched: list[Tensor] = []
        watch_every = WATCHED_ON_GPU if accelerator.device.type == "cuda" else 1
        begun = time.perf_counter() - progress.seconds
        while progress.step < steps:
            asked = time.perf_counter()
            images, labels = next(loader)
            progress.waited += time.perf_counter() - asked
            losses = self._update(images.to(accelerator.device), labels.to(accelerator.device))
            for name, value in {"loss": losses.loss, **losses.parts}.items():
                self.sums[name] += value.detach()
            unwatched.append(losses.loss.detach())
            progress.step += 1
            bar.update()
            progress.seconds = time.perf_counter() - begun
            to_save = bool(self.config.save_every) and self.total_steps % self.config.save_every == 0
            if to_save or progress.step in (steps, 1) or progress.step % watch_every == 0:
                preempted = self._watch(unwatched, sigterm_came())
                unwatched.clear()
                if preempted or (to_save and progress.step < steps):
                    self._save()
                if preempted:
                    raise Preempted(
                        f"SIGTERM came: saved after epoch {progress.epoch}, step {progress.step}; "
                        "the same command with --resume goes on there"
                    )
        progress.seconds = time.perf_counter() - begun

    def _update(self, images: Tensor, labels: Tensor) -> Losses:
        """One step of the optimiser on this process's part of a batch."""
        config, accelerator, parts = self.config, self.accelerator, self.config.grad_accum_steps
        key = (config.seed, self.progress.epoch, self.progress.step)
        _seed(random_generator(*key, accelerator.process_index).initial_seed())
        images = images.contiguous(memory_format=torch.channels_last)
        noise = self._noise(images, random_generator(*key))
        pieces = []
        for piece, y, start in zip(images.chunk(parts), labels.chunk(parts), noise.chunk(parts), strict=True):
            pieces.append((piece, self.objective.adversarial(piece, y, self.attack, start), y))

        with self._perturbed(pieces) if config.awp_gamma else nullcontext():
            losses = []
            for i, piece in enumerate(pieces):
                with nullcontext() if i == parts - 1 else accelerator.no_sync(self.model):
                    losses.append(self._with_penalty(self.objective.losses(self.model, *piece)))
                    accelerator.backward(losses[-1].loss / parts)
        self.optimizer.step()
        self.optimizer.zero_grad()
        average_statistics(self.bare, accelerator)
        if self.ema is not None:
            self.ema.update(self.bare, step=self.total_steps + 1)
        if isinstance(self.scheduler, BY_STEP):
            self.scheduler.step()
        return _mean(losses)

    def _perturbed(self, pieces: list[tuple[Tensor, Tensor, Tensor]]):
        """The weights moved to where the loss of the whole batch is higher (Wu et al. 2020), for a while."""
        with kept_statistics(self.bare):
            for piece in pieces:
                (self.objective.losses(self.bare, *piece).loss / len(pieces)).backward()
        average_gradients(self.bare, self.accelerator)
        return perturbed_weights(self.bare, self.config.awp_gamma)

    def _with_penalty(self, losses: Losses) -> Losses:
        penalty = self.penalty(self.bare).to(self.accelerator.device)
        return Losses(losses.loss + self.config.cap_weight * penalty, {**losses.parts, "cap_penalty": penalty})

    def _noise(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """This process's part of the noise for the whole batch: the same for any number of processes."""
        shape = torch.Size([self.config.batch_size, *images.shape[1:]])
        mine = slice(self.accelerator.process_index * len(images), (self.accelerator.process_index + 1) * len(images))
        return self.config.threat_model.noise(shape, generator)[mine].to(images)

    def _watch(self, unwatched: list[Tensor], sigterm_came: bool) -> bool:
        """Stop where a loss is no number; whether SIGTERM has come to any process.

        Raises:
            InputError: The loss is no number.
        """
        flag = torch.tensor(float(sigterm_came), device=self.accelerator.device)
        preempted, *losses = self._reduce(torch.stack([flag, *unwatched]), "sum")
        for step, loss in enumerate(losses, start=self.progress.step - len(losses)):
            if isnan(loss) or abs(loss) == inf:
                raise self._no_number(step, loss)
        return preempted > 0

    def _no_number(self, step: int, loss: float) -> InputError:
        path = self.output_dir / "no-number.json"
        epoch = self.progress.epoch
        if self.accelerator.is_main_process:
            write_json(path, {"epoch": epoch + 1, "step": step + 1, **self.batches.indices(epoch, step)})
        return InputError(
            f"the loss is {loss} in epoch {epoch + 1}, step {step + 1}; lower --lr ({self.config.lr:g}) or "
            f"--cap-weight ({self.config.cap_weight:g}); {path} names the batch's images, and the last state is kept"
        )

    # The end of an epoch

    def _end_epoch(self, bar: tqdm) -> None:
        progress, config = self.progress, self.config
        steps = self.batches.steps_per_epoch
        names = list(self.sums)
        means = self._reduce(torch.stack([self.sums[name] for name in names]) / steps, "mean")
        parts = dict(zip(names, means, strict=True))
        held_out = {"held_out": self._measure(self.bare)}
        if self.ema is not None:
            held_out["held_out_ema"] = self._measure(self.ema.module)
        *_, figures = held_out.values()
        entry = {
            "epoch": progress.epoch + 1,
            "steps": self.total_steps,
            "train": parts,
            **held_out,
            "caps": cap_statistics(self.bare),
            "units": unit_shares(self.bare.eval(), self.samples.to(self.accelerator.device)),
            "lr": progress.rates[0],
            "cap_lr": progress.rates[-1],
            "images_per_second": steps * config.batch_size / progress.seconds,
            "waited_for_data": progress.waited / progress.seconds,
            "seconds": progress.seconds,
        }
        if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(held_out["held_out"]["loss"])
        self.progress = Progress(progress.epoch + 1, best=progress.best, best_epoch=progress.best_epoch)
        self._note_best(-figures["loss"] if config.monitor == "loss" else figures["pgd"])
        self.log.write({**entry, "best_epoch": self.progress.best_epoch})
        penalty = config.cap_weight * parts["cap_penalty"]
        loss = f"{parts['loss'] - penalty:.3g}" + (f" + {penalty:.3g} for the caps" if penalty else "")
        shown = f"held out: clean {figures['clean']:.1%}, PGD {figures['pgd']:.1%}"
        bar.set_postfix_str(f"epoch {self.progress.epoch}, loss {loss}, {shown}")
        self._save()

    def _measure(self, model: nn.Module) -> dict[str, float]:
        figures = self.validation.measure(model)
        figures["loss"] += self.config.cap_weight * self.penalty(model).item()
        return figures

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
        """Write the averaged model, over what a killed process has left there."""
        if self.accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            model = self.averaged.model
            assert isinstance(model, nn.Module)
            save_folder(model, folder)

    def _finish(self) -> None:
        self._save_model(self.output_dir / "last")
        self.log.close()
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
        return {"data": self.data_digest, "mixed_precision": self.accelerator.mixed_precision}

    def _save(self) -> None:
        progress = self.progress
        if progress.step:
            means = self._reduce(torch.stack([*self.sums.values()]), "mean")
            progress.sums = dict(zip(self.sums, means, strict=True))
        content = {
            **asdict(progress),
            **self._identity(),
            "num_processes": self.accelerator.num_processes,
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
        }
        save_state(self.accelerator, self.output_dir / "state", content)
        if self.accelerator.is_main_process:
            for folder in self._best_folder.parent.glob("best-*"):
                if folder != self._best_folder:
                    shutil.rmtree(folder)

    def _load(self) -> None:
        content = read_progress(self.output_dir / "state")
        if content is None:
            return
        for key, now in self._identity().items():
            if content[key] != now:
                raise InputError(
                    f"--resume of {self.output_dir} with other {key.replace('_', ' ')} ({content[key]} before, {now} "
                    "now); give what it was begun with, or another --output-dir"
                )
        before, now = content["num_processes"], self.accelerator.num_processes
        if before != now:
            self.accelerator.print(
                f"{self.output_dir} goes on with {now} processes, {before} before: the same batches and updates up to "
                "rounding, but BatchNorm without --sync-bn takes its statistics over other parts of a batch"
            )
        load_state(self.accelerator, self.output_dir / "state")
        if self.scheduler:
            self.scheduler.load_state_dict(content["scheduler"])
        self.progress = Progress(**{name: content[name] for name in Progress.__dataclass_fields__})


def _mean(losses: list[Losses]) -> Losses:
    """The mean of the losses of equal parts of a batch."""
    if len(losses) == 1:
        return losses[0]
    parts = {name: torch.stack([one.parts[name] for one in losses]).mean() for name in losses[0].parts}
    return Losses(torch.stack([one.loss for one in losses]).mean(), parts)


def _seed(seed: int) -> None:
    """`torch.manual_seed` for what a model draws itself, such as dropout, without its millisecond of stack traces."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)


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
