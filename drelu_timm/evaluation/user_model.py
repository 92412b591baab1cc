"""The model that a caller brings, and the one way in which an evaluation calls it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..data.images import Images, as_float
from ..errors import InputError, one_line
from ..hashing import digest, model_digest
from ..models.inference import channels_last, device_of, frozen
from .checks import channels_hint, check_labels
from .functions import FunctionModel
from .torch_state import Defaults

AnyModel = nn.Module | Callable[[Tensor], Tensor]

_TRIED = 8  # images
_ROUNDING = 1e-3  # of the spread of an image's logits: more than another memory layout makes of them in float32
_BELOW = 10  # by how much a class that the model masks is less likely than every other one, in logits


@contextmanager
def opened(
    model: AnyModel,
    images: Tensor,
    *,
    called: str = "the model",
    batch_size: int = 1,
    seed: int = 0,
    caller: Defaults | None = None,
) -> Iterator["UserModel"]:
    """The model ready to be attacked; afterwards it, and the global random state, are what they were.

    It is in eval mode and frozen, its convolutions in the fastest memory layout in which it gives the same logits, and
    numbers that it draws are keyed by ``seed``.

    Args:
        model: A module, or any function from images to logits.
        images: [N, C, H, W] floats in [0, 1] or uint8: a few are used to find out how the model is to be called.
        called: What errors call the model.
        batch_size: Images per pass, for a model that takes no other number of them.
        seed: Keys what the model draws.
        caller: What the model runs under; by default what is in force.

    Raises:
        InputError: A model that cannot be called, or that does not return logits of two classes or more.
    """
    caller = caller or Defaults.current()
    sample = as_float(images[:_TRIED])
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
    """A model that a caller brings; every one of its forward passes in an evaluation is a call of this class.

    Whatever the model does,

    - it works on a copy: it may change its input in place;
    - it runs with gradients enabled, also where nobody asks for one, since some models take a gradient inside;
    - it runs under the default dtype and device of the caller, and outside of the caller's autocast;
    - it gets images on its own device, and in its own dtype where it does not take float32;
    - it returns finite float32 logits [B, K] on the device of the images: those of a class that it masks by -inf are
      10 below the others of the image (NaN and +inf stay);
    - what it raises becomes an `InputError` of one line.

    Attributes:
        model: The module.
        device: Where its images have to be.
        called: What errors call it.
        caller: The defaults that it runs under.
        dtype: Of its weights; float32 where it has none.
        num_classes: Number of logits; 0 before `find_form`.
        differentiable: Whether gradients reach the input. Where they do not, the logits have none.
        notes: A sentence for everything that a reader of its accuracies has to know.
    """

    def __init__(self, model: nn.Module, device: torch.device, called: str, caller: Defaults):
        super().__init__()
        self.model, self.device, self.called, self.caller = model, device, called, caller
        self.dtype = _dtype_of(model)
        self.num_classes, self.differentiable = 0, True
        self.notes: tuple[str, ...] = ()
        self._input_dtype, self._rows, self._masks = torch.float32, 0, False
        self._logits = torch.empty(0)  # of the sample

    def train(self, mode: bool = True) -> "UserModel":
        """Leave the model's mode to `frozen`."""
        return self

    def _apply(self, fn, recurse: bool = True) -> "UserModel":
        """Leave the model where it is: foolbox would move one that is spread over several devices to a single one."""
        return self

    @property
    def digest(self) -> str:
        """sha256 of the model; for a function, which need not hold its weights, also of a few of its logits."""
        own = model_digest(self.model)
        return digest([self._logits], own) if isinstance(self.model, FunctionModel) else own

    @property
    def fingerprint(self) -> list[list[float]]:
        """Logits of the sample to two digits: they tell models apart whose weights and structure are equal."""
        lowest, highest = self._logits.amin(dim=1, keepdim=True), self._logits.amax(dim=1, keepdim=True)
        # Relative and coarse, as other machines round otherwise.
        share = (self._logits - lowest) / (highest - lowest).clamp(min=torch.finfo(torch.float32).tiny)
        return [[round(value, 2) for value in row] for row in share.tolist()]

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] float32 of images [B, C, H, W] in [0, 1].

        Raises:
            InputError: The model raises, or returns something else.
        """
        differentiated = self.differentiable and images.requires_grad and torch.is_grad_enabled()
        own = (images if differentiated else images.detach()).to(self.device, self._input_dtype, copy=True)
        with self.caller.applied(), torch.enable_grad():
            logits = self._in_equal_batches(own) if self._rows else self._called(own)
        logits = logits.to(images.device, torch.float32)
        if self._masks:
            logits = _unmasked(logits)
        return logits if differentiated else logits.detach()

    def _in_equal_batches(self, images: Tensor) -> Tensor:
        """Logits of images in batches of ``_rows``, the last one filled up with copies of its last image."""
        batches = []
        for batch in images.split(self._rows):
            missing = self._rows - len(batch)
            batches.append(self._called(torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])])))
        return torch.cat(batches)[: len(images)]

    def _called(self, images: Tensor) -> Tensor:
        count = len(images)
        try:
            output = self.model(images)
        except InputError:
            raise
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{self.called} runs out of memory on {count} images ({one_line(error)}); give a smaller --batch-size"
            ) from error
        except Exception as error:
            size = "x".join(map(str, images.shape[1:]))
            advice = channels_hint(images.shape) or "give such as it takes, and the --batch-size if it takes only one"
            raise InputError(f"{self.called} cannot run on {size} images ({_described(error)}); {advice}") from error
        logits = getattr(output, "logits", output)  # of transformers' models
        if not isinstance(logits, Tensor):
            raise InputError(
                f"{self.called} returns {_kind(output)} for {count} images; it must return logits [B, classes]: give a "
                "function that picks them, such as lambda images: model(images)[0]"
            )
        if logits.ndim != 2 or len(logits) != count:
            raise InputError(
                f"{self.called} returns {list(logits.shape)} for {count} images; it must return logits [B, classes]"
            )
        if self.num_classes and logits.shape[1] != self.num_classes:
            raise InputError(f"{self.called} returns {logits.shape[1]} logits, and {self.num_classes} at first")
        return logits

    def find_form(self, sample: Tensor, batch_size: int) -> None:
        """Find out how the model is to be called, on images [B, C, H, W] float32: in which dtype and batches.

        Raises:
            InputError: It cannot run in any way, or does not return logits of two classes or more.
        """
        self._logits = self._first_logits(sample, batch_size)
        if (self._logits == -torch.inf).any():
            self._masks = True
            self._logits = _unmasked(self._logits)
        check_logits(self._logits, self.called)
        self.num_classes = self._logits.shape[1]
        reason = self._why_no_gradient(sample)
        self.differentiable = not reason
        self.notes = tuple(self._noted(reason))

    def _first_logits(self, sample: Tensor, batch_size: int) -> Tensor:
        """Logits of the sample, in the first form in which the model runs on it and on a single image."""
        dtypes = dict.fromkeys((torch.float32, self.dtype))
        errors: dict[torch.dtype, InputError] = {}
        for self._rows in (0, batch_size, 1):
            for self._input_dtype in dtypes:
                try:
                    logits = self(sample)
                    if len(sample) > 1:  # batches shrink as examples fall; `squeeze` may take a batch of one for none
                        self(sample[:1])
                    return logits
                except InputError as error:
                    errors.setdefault(self._input_dtype, error)
        raise errors[self.dtype]

    def _why_no_gradient(self, sample: Tensor) -> str:
        """Why no gradient of the logits reaches the images; empty where it does."""
        try:
            reached = self._has_gradient(sample)
        except InputError as error:
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            if isinstance(cause, torch.OutOfMemoryError):
                raise
            return f"the model raises {_described(cause)} where one is asked for."
        except Exception as error:  # of a backward pass
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
                f"No gradient reaches the input: {reason} What follows the gradient finds nothing, and its accuracies "
                "say nothing of robustness."
            )
        if self.dtype != torch.float32:
            yield f"The model computes in {_name(self.dtype)}; its images and logits are float32."
        if self._masks:
            yield f"A logit of -inf, which masks a class, counts as {_BELOW} less than every other logit of its image."
        if self._rows:
            yield f"The model takes only batches of {self._rows}; smaller ones are filled up."

    def is_same_in_channels_last(self, sample: Tensor) -> bool:
        """Whether the model runs, forwards and backwards, and gives the same logits, with its weights in channels_last.

        It need not: `view` refuses to flatten the maps that such convolutions return.
        """
        if not any(weight.ndim == 4 for weight in self.model.parameters()):
            return True  # there is nothing to change
        with channels_last(self.model):
            try:
                logits = self(sample)
                if self.differentiable:
                    self._has_gradient(sample)
            except Exception:
                return False
        spread = self._logits.amax(dim=1, keepdim=True) - self._logits.amin(dim=1, keepdim=True)
        rounding = max(_ROUNDING, 8 * torch.finfo(self.dtype).eps)
        return bool(((logits - self._logits).abs() <= rounding * spread).all())


def check_classes(model: nn.Module, data: Images, *, called: str) -> None:
    """Check that a model has an output for each class of a dataset, and no more.

    Raises:
        InputError: It has not, or it does not return logits.
    """
    with opened(model, data.images, called=called) as user_model:
        outputs = user_model.num_classes
    check_labels(data.labels, outputs, called=called)
    if outputs != len(data.classes):
        raise InputError(
            f"{called} has {outputs} outputs, {data.title} has {len(data.classes)} classes; give the --dataset that "
            "the model was trained on"
        )


def check_logits(logits: Tensor, called: str) -> None:
    """Check that the logits [B, K] of a few images are those of a classifier.

    Raises:
        InputError: Fewer than two classes, or probabilities.
    """
    if logits.shape[1] < 2:
        raise InputError(
            f"{called} has {logits.shape[1]} output, for which every label is right; give one with a logit per class: "
            "of a single score s these are [-s, s]"
        )
    total = logits.sum(dim=1)
    if logits.min() >= 0 and torch.allclose(total, torch.ones_like(total), atol=1e-4):
        raise InputError(
            f"{called} returns probabilities (none below 0, each image's adding up to 1), whose gradients vanish; "
            "give the model without its softmax"
        )


def _as_module(model: AnyModel, sample: Tensor, called: str) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, type) or not callable(model):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise InputError(f"{called} is {what}; give a torch.nn.Module, or a function from images to logits")
    return FunctionModel(model, sample)


def _with_usable_weights(module: nn.Module, called: str) -> nn.Module:
    """The module, or a copy of one whose weights were made under `torch.inference_mode` and can have no gradient."""
    for name, weight in chain(module.named_parameters(), module.named_buffers()):
        if is_lazy(weight):
            raise InputError(f"{called} has a lazy layer without weights ({name}); run it once, then load its weights")
        if weight.is_meta:
            raise InputError(f"{called} has weights on the meta device ({name}), which hold no values; load them")
    if not any(weight.is_inference() for weight in chain(module.parameters(), module.buffers())):
        return module
    if isinstance(module, FunctionModel):  # whose copy would call the same modules
        raise InputError(f"{called} has weights made under torch.inference_mode; make it outside, or give the module")
    return deepcopy(module)


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Key what a model draws by a seed; the caller's random state is restored."""
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if is_cuda else [], device_type="cuda"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every device there is
        if is_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _dtype_of(model: nn.Module) -> torch.dtype:
    weights = chain(model.parameters(), model.buffers())
    return next((weight.dtype for weight in weights if weight.is_floating_point()), torch.float32)


def _unmasked(logits: Tensor) -> Tensor:
    """Logits [B, K] with a finite one, which is the smallest of its image, wherever one is -inf."""
    masked = logits == -torch.inf
    smallest = logits.detach().masked_fill(masked, torch.inf).amin(dim=1, keepdim=True)
    return torch.where(masked & smallest.isfinite(), smallest - _BELOW, logits)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _kind(output: object) -> str:
    if isinstance(output, dict):
        return f"{type(output).__name__} of {', '.join(map(str, output))}"
    return type(output).__name__


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
