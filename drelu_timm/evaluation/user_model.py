"""A user's model, and the one way in which an evaluation calls it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..data.images import as_float
from ..errors import InputError, one_line
from ..hashing import digest, model_digest
from ..models.inference import channels_last, device_of, frozen
from .functions import FunctionModel

AnyModel = nn.Module | Callable[[Tensor], Tensor]

_SAMPLE = 8  # images
_ROUNDING = 1e-3  # of the range of an image's logits: more than another memory layout changes them in float32
_LARGE = 1000  # logits, which float32 resolves to 6e-5
_BELOW = 10  # logits between a class that the model masks and the lowest other class


class Defaults(NamedTuple):
    """Default dtype and device of torch."""

    dtype: torch.dtype
    device: torch.device

    @classmethod
    def current(cls) -> "Defaults":
        """Return the caller's."""
        return cls(torch.get_default_dtype(), torch.get_default_device())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Set them, and restore the previous ones afterwards."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            # Only where it differs: a device context makes every call of torch slower.
            with nullcontext() if self.device == torch.get_default_device() else self.device:
                yield
        finally:
            torch.set_default_dtype(before)


@contextmanager
def opened(
    model: AnyModel, images: Tensor, *, called: str, batch_size: int, seed: int, caller: Defaults
) -> Iterator["UserModel"]:
    """Prepare a model to be attacked; restore it, and the global random state, afterwards.

    It is in eval mode and frozen. Its convolutions are in channels_last where that gives the same logits.

    Args:
        model: A module, or any function from images to logits.
        images: [N, C, H, W] floats in [0, 1] or uint8; the first few are used to find out how to call the model.
        called: Name of the model in errors.
        batch_size: Images per pass, for a model that accepts only batches of that size.
        seed: Seed of the random numbers that the model draws.
        caller: Defaults that the model runs under.

    Raises:
        InputError: A model that cannot be called, or that does not return logits of two or more classes.
    """
    sample = as_float(images[:_SAMPLE])
    with caller.applied():
        module = _as_module(model, sample, called)
    module = _with_usable_weights(module, called)
    device = device_of(module, images.device)
    with frozen(module), _seeded(device, seed):
        user_model = UserModel(module, device, called, caller)
        sample = sample.to(device)
        user_model.find_form(sample, batch_size)
        with channels_last(module) if user_model.is_same_in_channels_last(sample) else nullcontext():
            yield user_model


class UserModel(nn.Module):
    """Wraps a user's model; every one of its forward passes in an evaluation goes through this class.

    - The model gets a copy of the images, on its own device, in its own dtype if it does not accept float32: it may
      write into them.
    - It runs with gradients enabled, since some models need a gradient inside, under the caller's default dtype and
      device, and outside of the caller's autocast.
    - It returns float32 logits [B, K] on the device of the images. The logit of a class that the model masks by -inf
      becomes 10 less than the lowest other logit of the image; NaN and +inf stay.
    - Its errors become an `InputError` of one line.

    Attributes:
        model: The module.
        device: Device of the module.
        called: Name of the model in errors.
        caller: Defaults that it runs under.
        dtype: Of its weights; float32 if it has none.
        num_classes: Number of logits; 0 before `find_form`.
        differentiable: Whether gradients reach the input. If they do not, the logits require none.
        notes: Sentences that a reader of its accuracies has to know.
    """

    def __init__(self, model: nn.Module, device: torch.device, called: str, caller: Defaults):
        super().__init__()
        self.model, self.device, self.called, self.caller = model, device, called, caller
        weights = chain(model.parameters(), model.buffers())
        self.dtype = next((weight.dtype for weight in weights if weight.is_floating_point()), torch.float32)
        self.num_classes, self.differentiable = 0, True
        self.notes: tuple[str, ...] = ()
        # Of the form in which it is called: dtype of the images, size of the only batches that it accepts (0 if any),
        # whether it masks classes.
        self._input_dtype, self._rows, self._masks = torch.float32, 0, False
        self._sample = self._logits = torch.empty(0)

    def train(self, mode: bool = True) -> "UserModel":
        """Do nothing: `frozen` sets the mode."""
        return self

    def _apply(self, fn, recurse: bool = True) -> "UserModel":
        """Do nothing: foolbox would move a model that is spread over several devices to a single one."""
        return self

    @property
    def digest(self) -> str:
        """sha256 of the model; for a function, which may not hold its weights, also of a few of its logits."""
        own = model_digest(self.model)
        return digest([self._logits], own) if isinstance(self.model, FunctionModel) else own

    @property
    def fingerprint(self) -> list[list[float]]:
        """Logits of the sample, coarsely: they distinguish models with equal weights and structure."""
        lowest, highest = self._logits.amin(dim=1, keepdim=True), self._logits.amax(dim=1, keepdim=True)
        # Relative to their range and to two digits, since other machines round differently.
        share = (self._logits - lowest) / (highest - lowest).clamp(min=torch.finfo(torch.float32).tiny)
        return [[round(value, 2) for value in row] for row in share.tolist()]

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] float32 of images [B, C, H, W] in [0, 1].

        Raises:
            InputError: The model raises, or returns something else.
        """
        differentiated = self.differentiable and images.requires_grad and torch.is_grad_enabled()
        own = (images if differentiated else images.detach()).to(self.device, self._input_dtype, copy=True)
        with self.caller.applied(), torch.enable_grad():
            logits = self._in_equal_batches(own) if self._rows else self._call(own)
        if logits.dtype == torch.float64:
            logits = _shifted(logits)
        logits = logits.to(images.device, torch.float32)
        if self._masks:
            logits = _unmasked(logits)
        return logits if differentiated else logits.detach()

    def _in_equal_batches(self, images: Tensor) -> Tensor:
        """Return logits of images in batches of ``_rows``; copies of the last image fill up the last batch."""
        batches = []
        for batch in images.split(self._rows):
            missing = self._rows - len(batch)
            batches.append(self._call(torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])])))
        return torch.cat(batches)[: len(images)]

    def _call(self, images: Tensor) -> Tensor:
        count = len(images)
        try:
            output = self.model(images)
        except InputError:
            raise
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{self.called} runs out of memory on {count} images ({one_line(error)}). Use a smaller batch size."
            ) from error
        except Exception as error:
            size = "x".join(map(str, images.shape[1:]))
            advice = channels_hint(images.shape) or "Use images, or the only batch size, that it accepts."
            raise InputError(f"{self.called} cannot run on {size} images ({_described(error)}). {advice}") from error
        logits = getattr(output, "logits", output)  # transformers' models return an object
        if not isinstance(logits, Tensor):
            kind, part = type(output).__name__, "0"
            if isinstance(output, dict):
                kind += f" of {', '.join(map(str, output))}"
                part = repr("logits" if "logits" in output else next(iter(output), "logits"))
            raise InputError(
                f"{self.called} returns {kind} for {count} images. It must return logits [B, classes]: pass a function "
                f"that picks them, such as lambda images: model(images)[{part}]."
            )
        if logits.ndim != 2 or len(logits) != count:
            raise InputError(
                f"{self.called} returns {list(logits.shape)} for {count} images. It must return logits [B, classes]."
            )
        if self.num_classes and logits.shape[1] != self.num_classes:
            raise InputError(f"{self.called} returns {logits.shape[1]} logits, but returned {self.num_classes} before.")
        return logits

    def find_form(self, sample: Tensor, batch_size: int) -> None:
        """Find out in which dtype and batches the model has to be called, on images [B, C, H, W] float32.

        Raises:
            InputError: It runs in none, or does not return logits of two or more classes.
        """
        self._sample, self._logits = sample, self._first_logits(sample, batch_size)
        if (self._logits == -torch.inf).any():
            self._masks = True
            self._logits = _unmasked(self._logits)
        check_logits(self._logits, self.called)
        self.num_classes = self._logits.shape[1]
        reason = self._why_no_gradient(sample)
        self.differentiable = not reason
        self.notes = tuple(self._noted(reason))

    def _first_logits(self, sample: Tensor, batch_size: int) -> Tensor:
        """Return logits of the sample, in the first form in which the model runs on it and on a single image."""
        dtypes = dict.fromkeys((torch.float32, self.dtype))
        errors: dict[torch.dtype, InputError] = {}
        for self._rows in (0, batch_size, 1):
            for self._input_dtype in dtypes:
                try:
                    logits = self(sample)
                    if len(sample) > 1:  # the last batch may have one image, whose dimension a `squeeze` would remove
                        self(sample[:1])
                    return logits
                except InputError as error:
                    errors.setdefault(self._input_dtype, error)
        raise errors[self.dtype]

    def _why_no_gradient(self, sample: Tensor) -> str:
        """Return why no gradient of the logits reaches the images; empty if one does."""
        try:
            reached = self._has_gradient(sample)
        except InputError as error:
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            if isinstance(cause, torch.OutOfMemoryError):
                raise
            return f"the model raises {_described(cause)} when its input requires a gradient."
        except Exception as error:
            return f"its backward pass raises {_described(error)}."
        return "" if reached else "is there a no_grad, detach or argmax?"

    def _has_gradient(self, sample: Tensor) -> bool:
        images = sample.clone().requires_grad_()
        with torch.enable_grad():
            logits = self(images)
        if not logits.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(logits.sum(), images, allow_unused=True)
        return gradient is not None

    def _noted(self, reason: str) -> Iterator[str]:
        if reason:
            yield (
                f"No gradient reaches the input: {reason} Attacks that follow the gradient find nothing, so accuracies "
                "under them say nothing about robustness."
            )
        if self.dtype != torch.float32:
            yield f"The model computes in {str(self.dtype).removeprefix('torch.')}; its images and logits are float32."
        if self._masks:
            yield f"A logit of -inf, which masks its class, counts as {_BELOW} less than the lowest other logit."
        if self._rows:
            yield f"The model accepts only batches of {self._rows}; smaller ones are filled up."

    def is_same_in_channels_last(self, sample: Tensor) -> bool:
        """Return whether the model runs, forwards and backwards, with channels_last weights and gives equal logits."""
        if not any(weight.ndim == 4 for weight in self.model.parameters()):
            return True  # there is nothing to convert
        with channels_last(self.model):
            try:
                logits = self(sample)
                if self.differentiable:
                    self._has_gradient(sample)
            except Exception:  # for example of `view`, which cannot flatten channels_last feature maps
                return False
        return self._are_same(logits)

    @torch.no_grad()
    def has_changed(self) -> bool:
        """Return whether the model has other logits of the sample than in `find_form`, by more than rounding."""
        return not self._are_same(self(self._sample))

    def _are_same(self, logits: Tensor) -> bool:
        spread = self._logits.amax(dim=1, keepdim=True) - self._logits.amin(dim=1, keepdim=True)
        rounding = max(_ROUNDING, 8 * torch.finfo(self.dtype).eps)
        return bool(((logits - self._logits).abs() <= rounding * spread).all())


def channels_hint(shape: torch.Size) -> str:
    """Return advice for images of a shape [N, C, H, W] that looks like [N, H, W, C]; empty for others."""
    if shape[3] not in (1, 3) or shape[1] in (1, 3):
        return ""
    return f"images {list(shape)} look like [N, H, W, C]. If they are, use images.permute(0, 3, 1, 2)."


def check_logits(logits: Tensor, called: str) -> None:
    """Check that the logits [B, K] of a few images are a classifier's.

    Raises:
        InputError: Fewer than two classes, or probabilities.
    """
    if logits.shape[1] < 2:
        raise InputError(
            f"{called} has 1 output, for which every label is right. Return one logit per class; for a single score s "
            "these are [-s, s]."
        )
    total = logits.sum(dim=1)
    if logits.min() >= 0 and torch.allclose(total, torch.ones_like(total), atol=1e-4):
        raise InputError(
            f"{called} returns probabilities (none below 0, the sum of each image's is 1), whose gradients vanish. Use "
            "the model without its softmax."
        )


def _as_module(model: AnyModel, sample: Tensor, called: str) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, type) or not callable(model):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise InputError(f"{called} is {what}. Pass a torch.nn.Module, or a function from images to logits.")
    return FunctionModel(model, sample)


def _with_usable_weights(module: nn.Module, called: str) -> nn.Module:
    """Return the module, or a copy if its weights were made under `torch.inference_mode` and can have no gradient."""
    for name, weight in chain(module.named_parameters(), module.named_buffers()):
        if is_lazy(weight):
            raise InputError(f"{called} has a lazy layer without weights ({name}). Run it once, then load its weights.")
        if weight.is_meta:
            raise InputError(f"{called} has weights without values, on the meta device ({name}). Load its weights.")
    if not any(weight.is_inference() for weight in chain(module.parameters(), module.buffers())):
        return module
    if isinstance(module, FunctionModel):  # whose copy would call the same modules
        raise InputError(f"{called} has weights made under torch.inference_mode. Make it outside, or pass the module.")
    return deepcopy(module)


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed what a model draws, and restore the caller's random state."""
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if is_cuda else [], device_type="cuda"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every device there is
        if is_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _shifted(logits: Tensor) -> Tensor:
    """Subtract the largest of an image's logits [B, K] if it is so large that float32 would lose the others' distance.

    Attacks and margins depend on differences of logits only. Small logits stay, so that probabilities are recognized.
    """
    highest = logits.detach().amax(dim=1, keepdim=True)
    return logits - highest.where(highest.isfinite() & (highest.abs() > _LARGE), 0)


def _unmasked(logits: Tensor) -> Tensor:
    """Replace -inf in logits [B, K] by a finite number below the others of the image."""
    masked = logits == -torch.inf
    smallest = logits.detach().masked_fill(masked, torch.inf).amin(dim=1, keepdim=True)
    return torch.where(masked & smallest.isfinite(), smallest - _BELOW, logits)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
