"""What cannot be evaluated: found before any attack, said in a line."""

import torch
from torch import Tensor, nn

from ..data.images import Images, as_float
from ..errors import InputError, one_line
from ..models.modes import device_of


def check_data(images: Tensor, labels: Tensor) -> None:
    """Look at the images [N, C, H, W] and their labels [N].

    Raises:
        InputError: No tensors, images that are not in [0, 1], or labels that are no classes.
    """
    for name, given in {"images": images, "labels": labels}.items():
        if not isinstance(given, Tensor):
            raise InputError(f"{name} are {type(given).__name__}; give a torch.Tensor, as torch.from_numpy makes one")
    if images.ndim != 4 or not (images.is_floating_point() or images.dtype == torch.uint8):
        raise InputError(
            f"images are {images.dtype} {list(images.shape)}; give [N, C, H, W], floats in [0, 1] or uint8"
        )
    if len(images) == 0 or labels.shape != images.shape[:1]:
        raise InputError(f"{len(images)} images and labels of shape {list(labels.shape)}; give one label an image")
    low, high = images.aminmax()
    if images.is_floating_point() and not 0 <= low <= high <= 1:  # NaN fails too
        raise InputError(
            f"images lie in [{low:.4g}, {high:.4g}]; give them in [0, 1], normalisation belongs into the model"
        )
    if labels.is_floating_point() or labels.min() < 0:
        raise InputError(f"labels are {labels.dtype} from {labels.min()}; give integers from 0 to classes - 1")


def count_classes(model: nn.Module, images: Tensor, labels: Tensor, *, called: str = "the model") -> int:
    """Number of outputs of the model, tried on a few images.

    Args:
        model: In eval mode.
        images: [N, C, H, W].
        labels: [N].
        called: What errors call the model.

    Raises:
        InputError: A model that cannot run on the images, does not return logits, or has fewer outputs than the labels
            need.
    """
    device = device_of(model)
    try:
        with torch.no_grad():
            logits = model(as_float(images[:8]).to(device))
    except (RuntimeError, ValueError, AssertionError) as error:
        size = "x".join(map(str, images.shape[1:]))
        raise InputError(f"{called} cannot run on {size} images ({one_line(error)}); give such as it takes") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"{called} returns {got} for {len(images[:8])} images; it must return logits [B, classes]")
    if labels.max() >= logits.shape[1]:
        raise InputError(
            f"the labels go up to {labels.max()} but {called} has {logits.shape[1]} outputs; "
            "give the dataset that the model was trained on"
        )
    if logits.min() >= 0 and torch.allclose(logits.sum(dim=1), torch.ones(len(logits), device=device), atol=1e-4):
        raise InputError(
            f"{called} returns probabilities (none below 0, each image's adding up to 1), whose gradients vanish; "
            "give the model without its softmax"
        )
    return logits.shape[1]


def check_classes(model: nn.Module, data: Images, *, called: str) -> None:
    """Look whether a model, in eval mode, has an output for each class of a dataset, and no more.

    Raises:
        InputError: It has not, or it returns no logits.
    """
    outputs = count_classes(model, data.images, data.labels, called=called)
    if outputs != len(data.classes):
        raise InputError(
            f"{called} has {outputs} outputs, {data.title} has {len(data.classes)} classes; give the --dataset that "
            "the model was trained on"
        )
