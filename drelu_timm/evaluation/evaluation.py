"""Evaluation of any model under a suite of attacks: the only place where robust accuracies come from.

An attack only searches: the driver projects its images to within eps, and the model judges them.
"""

import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from ..attacks.adaptive import Transfer, substitutable_layers
from ..attacks.attack import Attack
from ..attacks.suites import SUITES, Suite, find_suite
from ..attacks.threat_model import ThreatModel, parse_threat_models
from ..errors import DReLUWarning, InputError
from ..files import held, remove_leftovers
from ..hashing import digest
from .checkpoint import Checkpoint, Processes
from .config import PRECISIONS
from .driver import Driver
from .pipeline import Evaluation, run, suite_settings
from .user_model import AnyModel, Defaults, UserModel, channels_hint, opened

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Options(TypedDict, total=False):
    """Options of an evaluation, described in `evaluate_model`."""

    suite: str
    seed: int
    batch_size: int
    search_dtype: torch.dtype
    transfer_from: AnyModel | None
    state: Path | str | None


def evaluate_model(
    model: AnyModel,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | str,
    norm: str = "Linf",
    **options: "Unpack[Options]",
) -> Evaluation:
    """Measure clean and robust accuracy, and detect gradient masking.

    The model runs in eval mode on its device. It is restored afterwards, and so are torch's settings and its random
    state; the images are not changed. `UserModel` describes how the model is called.

    Args:
        model: Takes [0, 1] images [B, C, H, W] and returns logits [B, K]: a module or any function, of any
            floating-point dtype.
        images: [N, C, H, W] floats in [0, 1], or uint8, on any device.
        labels: [N] integers below K.
        eps: Radius in units of a [0, 1] pixel, such as 0.1 or "8/255".
        norm: "Linf" or "L2".
        **options: suite: name in `drelu_timm.attacks.suites.SUITES` ("quick" by default). seed: key of the randomness
            of every example and attack (0). batch_size: images per pass, at most (256). search_dtype: used by attacks,
            such as ``torch.bfloat16``; the images that they find are judged in float32 (``torch.float32``).
            transfer_from: a second model of the same classes, whose adversarial images are tried as column "transfer"
            (None). state: folder of a checkpoint, from which the same call resumes; it stays afterwards (None).

    Raises:
        InputError: Images, labels, a model or options that cannot be used, or a checkpoint of another evaluation.
    """
    (evaluation,) = evaluate_sweep(model, images, labels, eps=[eps], norm=norm, **options)
    return evaluation


def evaluate_sweep(
    model: AnyModel,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Sequence[float | str],
    norm: str = "Linf",
    **options: "Unpack[Options]",
) -> list[Evaluation]:
    """Evaluate a model as `evaluate_model` does, at several eps, in any order.

    An image that fools the model at one eps counts at every larger eps and is not attacked again, so that accuracies
    can only fall. Attacks with a starting point start from the images of the eps before.

    Returns:
        One evaluation per eps, from the smallest.
    """
    if not isinstance(norm, str):
        raise InputError(f"norm {norm!r} is not possible. Use Linf or L2.")
    if not isinstance(eps, list | tuple):
        raise InputError(f"eps {eps!r} is not possible. Use a list of radii.")
    return evaluate_under(parse_threat_models(norm, eps), model, images, labels, **options)


def evaluate_under(
    threat_models: Sequence[ThreatModel],
    model: AnyModel,
    images: Tensor,
    labels: Tensor,
    *,
    suite: str = "quick",
    seed: int = 0,
    batch_size: int = 256,
    search_dtype: torch.dtype = torch.float32,
    transfer_from: AnyModel | None = None,
    state: Path | str | None = None,
    called: tuple[str, str] = ("the model", "transfer_from"),
    num_classes: int | None = None,
    processes: Processes | None = None,
) -> list[Evaluation]:
    """Evaluate a model under parsed threat models of one norm, from the smallest eps; see `evaluate_sweep`.

    Args not described there are the names (``called``) of the model and of the second model in errors, the number of
    outputs that they must have (by default any number above the labels), and the ``processes`` that share the work,
    each of which makes the same call.
    """
    started, caller = time.monotonic(), Defaults.current()
    _check_options(suite, seed, batch_size, search_dtype, state)
    state = None if state is None else Path(state)
    with float32_settings(), ExitStack() as stack:
        if processes is None and state is not None:
            stack.enter_context(held(state / ".lock", f"state {state}"))
            remove_leftovers(state)
        processes = processes or Processes()
        images, labels = _checked(images, labels)
        how: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "caller": caller}
        user_model = stack.enter_context(opened(model, images, called=called[0], **how))
        source = None
        if transfer_from is not None:
            source = stack.enter_context(opened(transfer_from, images, called=called[1], **how))
        for one in filter(None, (user_model, source)):
            _check_classes(one, labels, num_classes)
        if hint := channels_hint(images.shape):
            warnings.warn(hint, DReLUWarning, stacklevel=2)
        columns, nothing = _columns(suite, user_model, source), Checkpoint(len(labels))
        driver = Driver(user_model, images, labels, threat_models, seed, batch_size, nothing, search_dtype, processes)
        identity = _identity(driver, user_model, suite, columns)
        evaluations = run(replace(driver, checkpoint=Checkpoint(len(labels), state, identity)), suite, columns)
        # A model that draws random numbers ("unsteady") has other logits each time.
        if evaluations[-1].verdict.numbers.get("unsteady") == 0 and user_model.has_changed():
            raise InputError(
                f"{called[0]} changed during the evaluation: its logits of the first images are others than at the "
                "start. Evaluate a model that stays the same."
            )
    notes = user_model.notes
    if source is not None:
        notes += tuple(f"Of the model of {source.called}: {note}" for note in source.notes)
    common = {"seconds": time.monotonic() - started, "model_dtype": str(user_model.dtype).removeprefix("torch.")}
    return [
        replace(one, **common, verdict=replace(one.verdict, evidence=(*notes, *one.verdict.evidence)))
        for one in evaluations
    ]


def _check_options(suite: Any, seed: Any, batch_size: Any, search_dtype: Any, state: Any) -> None:
    """Check the types and values of options from Python, where annotations bind nobody."""
    dtypes = [getattr(torch, name) for name in PRECISIONS]
    for name, value, holds, allowed in (
        ("suite", suite, isinstance(suite, str), f"one of {', '.join(SUITES)}"),
        ("seed", seed, type(seed) is int and 0 <= seed < 2**63, "an integer from 0 to 2**63 - 1"),
        ("batch_size", batch_size, type(batch_size) is int and batch_size > 0, "an integer above 0"),
        ("search_dtype", search_dtype, search_dtype in dtypes, f"one of {', '.join(map(str, dtypes))}"),
        ("state", state, state is None or isinstance(state, str | Path), "a path"),
    ):
        if not holds:
            raise InputError(f"{name} {value!r} is not possible. Use {allowed}.")


def _columns(suite: str, model: UserModel, source: UserModel | None) -> Suite:
    """Return the columns of a suite for a model, with the attack from a second model if there is one."""
    columns = find_suite(suite, model.num_classes, adaptive=bool(substitutable_layers(model)))
    if source is None:
        return columns
    if source.num_classes != model.num_classes:
        raise InputError(
            f"{source.called} has {source.num_classes} outputs, the attacked model {model.num_classes}. Use a model of "
            "the same classes."
        )
    transfer: dict[str, Attack] = {"transfer": Transfer(source)}
    return columns | {"transfer": transfer}


def _identity(driver: Driver, model: UserModel, suite: str, columns: Suite) -> dict[str, Any]:
    """Return everything that decides the measurements."""
    return {
        "model": model.digest,
        "images": digest([driver.images, driver.labels]),
        "outputs": digest([], json.dumps(model.fingerprint)),
        "norm": driver.threat_models[0].norm,
        "eps": [threat_model.eps for threat_model in driver.threat_models],
        "suite": suite,
        "settings": digest([], json.dumps(suite_settings(columns), sort_keys=True)),
        "seed": driver.seed,
        "precision": str(driver.search_dtype),
    }


def _checked(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the images [N, C, H, W] and labels [N] as plain tensors, the labels as int64 on the CPU.

    The labels are a copy; the images share the memory of the argument, and nothing writes into them.

    Raises:
        InputError: Not tensors, images that are not in [0, 1], or labels that are not classes.
    """
    for name, given in {"images": images, "labels": labels}.items():
        if not isinstance(given, Tensor):
            raise InputError(f"{name} are {type(given).__name__}. Use a torch.Tensor; torch.from_numpy makes one.")
        if given.layout != torch.strided or given.is_meta:
            raise InputError(f"{name} are a tensor of {given.layout} on {given.device}. Use a dense one with values.")
    images, labels = (given.detach().as_subclass(Tensor) for given in (images, labels))
    if images.ndim != 4 or not (images.is_floating_point() or images.dtype == torch.uint8):
        raise InputError(
            f"images are {images.dtype} {list(images.shape)}. Use [N, C, H, W], floats in [0, 1] or uint8."
        )
    if len(images) and not images.numel():
        raise InputError(f"images of shape {list(images.shape)} have no pixels. Use [N, C, H, W].")
    if len(images) == 0 or labels.shape != images.shape[:1]:
        raise InputError(f"{len(images)} images and labels of shape {list(labels.shape)}. Use one label per image.")
    low, high = images.aminmax()
    if images.is_floating_point() and not 0 <= low <= high <= 1:  # NaN fails too
        raise InputError(f"images are in [{low:.4g}, {high:.4g}]. Use [0, 1], and normalize inside the model.")
    if images.dtype == torch.uint8 and 0 < high <= 1:
        raise InputError("images are uint8 from 0 to 1. Use uint8 from 0 to 255, or floats in [0, 1].")
    if labels.dtype == torch.bool or labels.is_complex():
        raise InputError(f"labels are {labels.dtype}. Use integers from 0 to classes - 1.")
    indices = labels.to("cpu", torch.int64, copy=True)  # torch has no minimum of uint16
    if labels.is_floating_point() or indices.min() < 0:
        raise InputError(f"labels are {labels.dtype} from {labels.min()}. Use integers from 0 to classes - 1.")
    return images, indices


def _check_classes(model: UserModel, labels: Tensor, num_classes: int | None) -> None:
    """Check that a model has an output for every label [N], and as many outputs as the dataset has classes."""
    if num_classes not in (None, model.num_classes):
        raise InputError(
            f"{model.called} has {model.num_classes} outputs, the dataset {num_classes} classes. Use the dataset that "
            "the model was trained on."
        )
    if labels.max() >= model.num_classes:
        raise InputError(
            f"{model.called} has {model.num_classes} outputs, the labels go up to {labels.max()}. Use the dataset that "
            "the model was trained on."
        )


@contextmanager
def float32_settings() -> Iterator[None]:
    """Compute in full float32 with gradients, on the CPU by default; the caller's settings of torch are restored.

    `use_deterministic_algorithms` and cuDNN's other flags stay, since they choose among correct kernels.
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
            _full_float32(),
        ):
            stack.enter_context(context)
        yield


@contextmanager
def _full_float32() -> Iterator[None]:
    """Compute float32 products in float32: neither in TF32 on a GPU nor in bfloat16 on a CPU.

    By default PyTorch lets cuDNN round the inputs of a convolution to TF32's 10 bits, which can decide whether an image
    at the decision boundary is misclassified.
    """
    backends: Any = torch.backends
    operations: list[Any] = []
    if hasattr(backends, "fp32_precision"):  # since torch 2.9
        mkldnn, cudnn = backends.mkldnn, backends.cudnn
        operations = [backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
    precisions = [operation.fp32_precision for operation in operations]
    # torch refuses to read the older settings while the newer ones contradict them, so the older are set first and
    # restored first.
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
