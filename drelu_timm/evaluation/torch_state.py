"""Context managers for the global settings of torch that an evaluation depends on; the caller's are restored."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch


@contextmanager
def evaluation_state() -> Iterator[None]:
    """Compute in full float32 with gradients, on the CPU where no device is named, whatever the caller has set.

    Left as they are: ``use_deterministic_algorithms`` and cuDNN's flags, which choose among kernels that are all right.
    """
    autocast = [kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.is_autocast_enabled(kind)]
    with ExitStack() as stack:
        for context in (
            torch.inference_mode(False),
            torch.enable_grad(),
            # Anomaly mode raises at a gradient of NaN, which `Attacked` replaces by 0.
            torch.autograd.set_detect_anomaly(False),
            *(torch.autocast(kind, enabled=False) for kind in autocast),
            Defaults(torch.float32, torch.device("cpu")).applied(),
            full_float32(),
        ):
            stack.enter_context(context)
        yield


class Defaults(NamedTuple):
    """The dtype and the device of tensors for which nothing else is asked."""

    dtype: torch.dtype
    device: torch.device

    @classmethod
    def current(cls) -> "Defaults":
        """Return those in force."""
        return cls(torch.get_default_dtype(), torch.get_default_device())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Create tensors so."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            # A device as context slows every call of torch down.
            with nullcontext() if self.device == torch.get_default_device() else self.device:
                yield
        finally:
            torch.set_default_dtype(before)


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 products in float32: neither in TF32 on a GPU nor in bfloat16 on a CPU.

    PyTorch lets cuDNN round what enters a convolution to TF32's 10 bits by default. What is judged in float32, and at a
    boundary, must not depend on that; nor may a search in float32 end at what it only takes for a success.
    """
    backends: Any = torch.backends
    names = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
    has_names = hasattr(backends, "fp32_precision")  # since torch 2.9
    operations = [_named(backends, name) for name in names] if has_names else []
    precisions = [operation.fp32_precision for operation in operations]
    # torch refuses to read the older settings while the newer ones contradict them, so these are set after those.
    matmul = convolutions = None
    with suppress(RuntimeError):
        matmul = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        convolutions = backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
        for operation in operations:
            operation.fp32_precision = "ieee"
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if convolutions is not None:
            backends.cudnn.allow_tf32 = convolutions
        for operation, precision in zip(operations, precisions, strict=True):
            operation.fp32_precision = precision


def _named(backends: Any, name: str) -> Any:
    backend, operation = name.split(".")
    return getattr(getattr(backends, backend), operation)
