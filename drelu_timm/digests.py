"""What tells whether two files, sets of tensors, or models are the same."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

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
    state = dict(_leaves("", model.state_dict()))
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    about: list[Any] = [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()]
    about += [(name, repr(value)) for name, value in state.items() if name not in tensors]
    return digest(tensors.values(), repr(model) + json.dumps(about))


def _leaves(name: str, state: Any) -> Iterator[tuple[str, Any]]:
    """The tensors and other values of a state by name; a quantised layer keeps its weight and bias in a tuple."""
    if isinstance(state, Mapping):
        for key, value in state.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), value)
    elif isinstance(state, list | tuple):
        for position, value in enumerate(state):
            yield from _leaves(f"{name}.{position}", value)
    else:
        yield name, state


def digest(tensors: Iterable[Tensor], text: str = "") -> str:
    """sha256 over a text and the values of tensors."""
    sha256 = hashlib.sha256(text.encode())
    for tensor in tensors:
        tensor = tensor.dequantize() if tensor.is_quantized else tensor
        sha256.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()
