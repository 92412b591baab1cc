"""One training step, from a batch to new weights: inner attack, loss, AWP, optimizer, learning rates."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from ..errors import InputError
from ..models.caps import CAP_PENALTIES
from ..models.drelu import cap_layers
from ..randomness import random_generator
from .config import TrainConfig
from .distributed import average_gradients, average_statistics, is_sharded
from .ibp import bounded_eps
from .objectives import InnerAttack, Losses, Objective, make_objective

Part = tuple[Tensor, Tensor, Tensor]  # images, adversarial images, labels
_STEPPED_BY_STEP = (lr_scheduler.CosineAnnealingLR, lr_scheduler.OneCycleLR)
Scheduler = lr_scheduler.CosineAnnealingLR | lr_scheduler.OneCycleLR | lr_scheduler.ReduceLROnPlateau


class Update:
    """Everything that a step changes: the weights, their average, the optimizer and its schedule.

    Args:
        model: Takes [0, 1] images; its ``.model`` is the timm model.
        config: Resolved.
        accelerator: Device, precision and processes.
        steps_per_epoch: For the schedule.

    Attributes:
        model: Wrapped for all processes; its backward pass averages the gradients over them.
        bare: The same weights without the wrapper, for the attack and for all measurements.
        objective: What training minimizes.
        attack: The inner attack on ``bare``.
        scheduler: Changes the learning rates; None for constant ones.
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
            ibp_eps=bounded_eps(config),
            ibp_clean_weight=config.ibp_clean_weight,
            ibp_ramp=config.ibp_ramp,
        )
        self.attack = InnerAttack(self.bare, config.threat_model, config.steps, config.step_size)
        self._steps_per_epoch = steps_per_epoch

    @property
    def average(self) -> nn.Module | None:
        """The model with averaged weights, in eval mode; None without --ema-decay."""
        return None if self._ema is None else self._ema.module

    @property
    def rates(self) -> list[float]:
        """Learning rates of the optimizer's groups; the last one is for the caps, if there are any."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def penalty(self, model: nn.Module) -> Tensor:
        """Return the weighted penalty on a model's caps, as it is added to the loss."""
        penalty = CAP_PENALTIES[self.config.cap_penalty](model)
        return self.config.cap_weight * penalty.to(self.accelerator.device)

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> Losses:
        """Take a step on this process's part of a batch.

        Args:
            images: float32 [B, C, H, W] in [0, 1].
            labels: int64 [B], or probabilities [B, K].
            epoch: From 0; keys all randomness together with ``step``.
            step: From 0, in the epoch.

        Returns:
            The loss with its parts: the objective's, and the weighted ``cap_penalty``.
        """
        _seed(random_generator(self.config.seed, epoch, step, self.accelerator.process_index).initial_seed())
        parts = self._attacked(images.contiguous(memory_format=torch.channels_last), labels, epoch, step)
        objective = self.objective.at((epoch + step / self._steps_per_epoch) / self.config.epochs)
        with self._perturbed(objective, parts) if self.config.awp_gamma else nullcontext():
            losses = self._backward(objective, parts)
        self.optimizer.step()
        self.optimizer.zero_grad()
        average_statistics(self.bare, self.accelerator)
        if self._ema is not None:
            self._ema.update(self.bare, step=epoch * self._steps_per_epoch + step + 1)
        if isinstance(self.scheduler, _STEPPED_BY_STEP):
            self.scheduler.step()
        return losses

    def _attacked(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> list[Part]:
        """Split a batch into the parts that gradients are accumulated over, and attack them."""
        count = self.config.grad_accum_steps
        noise = self._noise(images, epoch, step) if self.objective.raised is not None else images
        return [
            (part, self.objective.adversarial(part, y, self.attack, start), y)
            for part, y, start in zip(images.chunk(count), labels.chunk(count), noise.chunk(count), strict=True)
        ]

    def _noise(self, images: Tensor, epoch: int, step: int) -> Tensor:
        """Return this process's part of the noise, which is drawn for the whole batch of all processes."""
        generator = random_generator(self.config.seed, epoch, step, device=images.device)
        shape = torch.Size([self.config.batch_size, *images.shape[1:]])
        first = self.accelerator.process_index * len(images)
        return self.config.threat_model.noise(shape, generator)[first : first + len(images)].to(images)

    def _perturbed(self, objective: Objective, parts: list[Part]) -> AbstractContextManager[None]:
        """Return a context in which the weights are moved to where the loss of the whole batch is higher."""
        with kept_statistics(self.bare):
            for part in parts:
                (objective.losses(self.bare, *part).loss / len(parts)).backward()
        if not is_sharded(self.accelerator):
            average_gradients(self.bare, self.accelerator)
        return perturbed_weights(self.bare, self.config.awp_gamma)

    def _backward(self, objective: Objective, parts: list[Part]) -> Losses:
        """Compute the gradients of the mean loss over parts and processes; return the mean over the parts."""
        losses = []
        for number, part in enumerate(parts, start=1):
            with nullcontext() if number == len(parts) else self.accelerator.no_sync(self.model):
                one = objective.losses(self.model, *part)
                penalty = self.penalty(self.bare)
                losses.append(Losses(one.loss + penalty, {**one.parts, "cap_penalty": penalty}))
                self.accelerator.backward(losses[-1].loss / len(parts))
        means = {name: torch.stack([one.parts[name].detach() for one in losses]).mean() for name in losses[0].parts}
        return Losses(torch.stack([one.loss.detach() for one in losses]).mean(), means)


def _seed(seed: int) -> None:
    """Seed dropout and the like; `torch.manual_seed` itself spends a millisecond on stack traces."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)


# Optimizer and learning rates


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """Return timm's optimizer with a separate learning rate for the caps.

    Weight decay leaves out biases, norms, caps, and the parameters that timm's model names in ``no_weight_decay``.

    Args:
        model: Takes [0, 1] images; its ``.model`` is the timm model.
        config: Resolved.

    Raises:
        InputError: timm has no optimizer of that name, or it needs second derivatives.
    """
    caps = [layer.cap for layer in cap_layers(model)]
    known = {id(cap) for cap in caps}
    # Without weight decay the names are not asked for: saved states depend on the order of the groups' parameters.
    named = _named_without_decay(model) if config.weight_decay else ()
    others = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in known}
    undecayed = {name for name, parameter in others.items() if parameter.ndim <= 1 or name in named}
    groups = [
        {"params": [p for name, p in others.items() if name not in undecayed], "weight_decay": config.weight_decay},
        {"params": [p for name, p in others.items() if name in undecayed], "weight_decay": 0.0},
        {"params": caps, "weight_decay": 0.0, "lr": config.cap_lr},
    ]
    groups = [group for group in groups if group["params"]]
    try:
        optimizer = create_optimizer_v2(groups, opt=config.optimizer, lr=config.lr)
    except (AssertionError, ValueError) as error:
        raise InputError(
            f"--optimizer {config.optimizer!r} is not an optimizer of timm. Use adam, adamw or sgd, for example."
        ) from error
    if getattr(optimizer, "is_second_order", False):
        raise InputError(f"--optimizer {config.optimizer} needs second derivatives. Use adam or sgd, for example.")
    return optimizer


def _named_without_decay(model: nn.Module) -> set[str]:
    bare: Any = model.model
    return {f"model.{name}" for name in bare.no_weight_decay()} if hasattr(bare, "no_weight_decay") else set()


def make_scheduler(optimizer: Optimizer, config: TrainConfig, steps_per_epoch: int) -> Scheduler | None:
    """Return torch's scheduler for ``config.schedule``: stepped after every step, or after every epoch (plateau)."""
    steps = config.epochs * steps_per_epoch
    if config.schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if config.schedule == "onecycle":
        highest = [group["lr"] for group in optimizer.param_groups]
        cycled = "momentum" in optimizer.defaults or "betas" in optimizer.defaults
        warmup = config.warmup if config.warmup * steps > 1.5 else 0.0  # torch divides by the warm-up steps minus one
        return lr_scheduler.OneCycleLR(
            optimizer, highest, total_steps=max(steps, 2), pct_start=warmup, cycle_momentum=cycled
        )
    if config.schedule == "plateau":
        # Keras's rule, as the paper used it: 5 epochs that are not lower by 1e-4. torch waits one epoch more than its
        # patience. timm's own plateau scheduler fails with current torch and does not save its patience.
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=4, threshold=1e-4, threshold_mode="abs")
    return None


# Adversarial weight perturbation (AWP): Wu, Xia and Wang, "Adversarial Weight Perturbation Helps Robust
# Generalization", NeurIPS 2020, https://arxiv.org/abs/2004.05884. A step computes the gradient of the loss, moves the
# weights uphill, computes the gradient there, moves the weights back, and applies the second gradient. The authors'
# code applies it at the moved weights and subtracts the move afterwards, so that weight decay shrinks the moved
# weights; without weight decay both are the same.


@contextmanager
def perturbed_weights(model: nn.Module, gamma: float) -> Iterator[None]:
    """Move every weight tensor w to ``w + gamma * |w| * g / |g|``, and back afterwards.

    Biases, norms, caps and weights without a gradient stay. Gradients are cleared inside, so that a backward pass
    leaves the gradients at the moved weights.

    Args:
        model: With the gradient g of the loss in ``.grad``, equal on all processes; its scale does not matter.
        gamma: Length of the move relative to the weight tensor's own, >= 0; the authors use 0.01, for TRADES 0.005.
    """
    moved = [weight for weight in model.parameters() if weight.ndim > 1 and weight.grad is not None]
    before = [weight.detach().clone() for weight in moved]
    try:
        with torch.no_grad():
            for weight in moved:
                assert weight.grad is not None
                # The clamp leaves a gradient of zeros at zero.
                direction = weight.grad / weight.grad.norm().clamp(min=torch.finfo(weight.grad.dtype).tiny)
                weight += gamma * weight.norm() * direction
        model.zero_grad()
        yield
    finally:
        _restore(moved, before)


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """Restore all buffers of a model, such as BatchNorm's running statistics, at the end.

    The backward pass belongs inside: it needs the buffers of its forward pass.
    """
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        _restore(buffers, before)


@torch.no_grad()
def _restore(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
