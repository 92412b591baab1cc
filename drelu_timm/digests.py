"""What tells whether two files, sets of tensors, or models are the same."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn


def sha256_of(file: Path) -> str:
    """A file's SHA-256, as sha256sum prints it."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):  # a file of adversarial images may be larger than the memory
            digest.update(chunk)
    return digest.hexdigest()


def model_digest(model: nn.Module) -> str:
    """sha256 over a model's structure as printed, and the name, type, shape and values of everything in its state."""
    state = model.state_dict()
    about = [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in state.items()]
    return digest(state.values(), repr(model) + json.dumps(about))


def digest(tensors: Iterable[Tensor], text: str = "") -> str:
    """sha256 over a text and the values of tensors."""
    sha256 = hashlib.sha256(text.encode())
    for tensor in tensors:
        sha256.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()
