"""One step of training: from a batch to new weights, on one process or many."""

from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..models.caps import CAP_PENALTIES
from ..randomness import random_generator
from .awp import kept_statistics, perturbed_weights
from .config import TrainConfig
from .objectives import InnerAttack, Losses, Objective, make_objective
from .optim import BY_STEP, average_gradients, average_statistics, make_optimizer, make_scheduler
from .sharding import is_sharded

_Piece = tuple[Tensor, Tensor, Tensor]  # images, adversarial images, labels


class Update:
    """What changes in a step: the weights, their average, the optimiser and its schedule.

    Args:
        model: Takes [0, 1] images.
        config: Resolved.
        accelerator: Device, precision and processes.
        steps_per_epoch: For the schedule.

    Attributes:
        model: Wrapped for all processes; its backward pass averages the gradients over them.
        bare: The same weights without the wrapper, for the attack and everything that is measured.
        average: The model with averaged weights, if there is one.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, accelerator: Accelerator, steps_per_epoch: int):
        assert config.step_size is not None
        self.config, self.accelerator = config, accelerator
        if config.sync_bn:
            model = convert_sync_batchnorm(model)  # timm's: torch's would drop the activations of BatchNormAct2d
        # FSDP takes contiguous weights only.
        memory_format = torch.contiguous_format if is_sharded(accelerator) else torch.channels_last
        model.to(accelerator.device, memory_format=memory_format)  # pyright: ignore[reportCallIssue]
        # Before Accelerate wraps the forward pass: a copy of the wrapped one would run the model it was copied from.
        self._ema = ModelEmaV3(model, config.ema_decay, use_warmup=True) if config.ema_decay else None
        optimizer = make_optimizer(model, config)
        self.scheduler = make_scheduler(optimizer, config, steps_per_epoch)
        if is_sharded(accelerator):  # Accelerate wraps the forward passes of other models only
            model.forward = accelerator.autocast()(model.forward)  # pyright: ignore[reportAttributeAccessIssue]
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.bare = accelerator.unwrap_model(self.model)
        if config.compile:
            self.bare.compile()
        self.objective = make_objective(
            config.objective,
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            ibp_eps=config.bounded_eps,
            ibp_clean_weight=config.ibp_clean_weight,
            ibp_ramp=config.ibp_ramp,
        )
        self.attack = InnerAttack(self.bare, config.threat_model, config.steps, config.step_size)
        self._penalty = CAP_PENALTIES[config.cap_penalty]
        self._steps_per_epoch = steps_per_epoch

    @property
    def average(self) -> nn.Module | None:
        """The model with averaged weights, in eval mode."""
        return None if self._ema is None else self._ema.module

    @property
    def rates(self) -> list[float]:
        """The learning rates of the optimiser's groups; the last is the caps', if there are any."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def penalty(self, model: nn.Module) -> Tensor:
        """The penalty on a model's caps as it stands in the loss, weighted."""
        return self.config.cap_weight * self._penalty(model).to(self.accelerator.device)

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> Losses:
        """Take a step on this process's part of a batch.

        Args:
            images: float32 [B, C, H, W] in [0, 1].
            labels: int64 [B], or probabilities [B, K].
            epoch: From 0; with ``step`` it keys all that is random.
            step: From 0, in the epoch.

        Returns:
            The loss with its parts: of the objective, and ``cap_penalty`` with its weight in it.
        """
        _seed(random_generator(self.config.seed, epoch, step, self.accelerator.process_index).initial_seed())
        pieces = self._pieces(images.contiguous(memory_format=torch.channels_last), labels, epoch, step)
        objective = self.objective.at((epoch + step / self._steps_per_epoch) / self.config.epochs)
        with self._perturbed(objective, pieces) if self.config.awp_gamma else nullcontext():
            losses = self._backward(objective, pieces)
        self.optimizer.step()
        self.optimizer.zero_grad()
        average_statistics(self.bare, self.accelerator)
        if self._ema is not None:
            self._ema.update(self.bare, step=epoch * self._steps_per_epoch + step + 1)
        if isinstance(self.scheduler, BY_STEP):
            self.scheduler.step()
        return losses

    def _pieces(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> list[_Piece]:
        """The parts of a batch that gradients are accumulated over, attacked."""
        parts = self.config.grad_accum_steps
        noise = self._noise(images, epoch, step) if self.objective.raised is not None else images
        return [
            (piece, self.objective.adversarial(piece, y, self.attack, start), y)
            for piece, y, start in zip(images.chunk(parts), labels.chunk(parts), noise.chunk(parts), strict=True)
        ]

    def _noise(self, images: Tensor, epoch: int, step: int) -> Tensor:
        """This process's part of the noise for the whole batch: the same for any number of processes."""
        generator = random_generator(self.config.seed, epoch, step, device=images.device)
        shape = torch.Size([self.config.batch_size, *images.shape[1:]])
        mine = slice(self.accelerator.process_index * len(images), (self.accelerator.process_index + 1) * len(images))
        return self.config.threat_model.noise(shape, generator)[mine].to(images)

    def _perturbed(self, objective: Objective, pieces: list[_Piece]) -> Any:
        """The weights moved to where the loss of the whole batch is higher, for a while."""
        with kept_statistics(self.bare):
            for piece in pieces:
                (objective.losses(self.bare, *piece).loss / len(pieces)).backward()
        if not is_sharded(self.accelerator):
            average_gradients(self.bare, self.accelerator)
        return perturbed_weights(self.bare, self.config.awp_gamma)

    def _backward(self, objective: Objective, pieces: list[_Piece]) -> Losses:
        """The gradients of the loss, averaged over the pieces and the processes; the mean loss of the pieces."""
        losses = []
        for number, piece in enumerate(pieces, start=1):
            with nullcontext() if number == len(pieces) else self.accelerator.no_sync(self.model):
                one = objective.losses(self.model, *piece)
                penalty = self.penalty(self.bare)
                losses.append(Losses(one.loss + penalty, {**one.parts, "cap_penalty": penalty}))
                self.accelerator.backward(losses[-1].loss / len(pieces))
        return _mean(losses)


def _mean(losses: list[Losses]) -> Losses:
    """The mean of the losses of equal parts of a batch, without their graphs."""
    parts = {name: torch.stack([one.parts[name].detach() for one in losses]).mean() for name in losses[0].parts}
    return Losses(torch.stack([one.loss.detach() for one in losses]).mean(), parts)


def _seed(seed: int) -> None:
    """`torch.manual_seed` for what a model draws itself, such as dropout, without its millisecond of stack traces."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)
