"""SHA-256 digests of files, tensors and models, which show whether two of them are the same."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_CHUNK = 2**20  # bytes; a file of adversarial images may be larger than the memory


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, as sha256sum prints it."""
    sha256 = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            sha256.update(chunk)
    return sha256.hexdigest()


def digest(tensors: Iterable[Tensor], text: str = "") -> str:
    """Return the SHA-256 of a text followed by the values of tensors, in hexadecimal."""
    sha256 = hashlib.sha256(text.encode())
    for tensor in tensors:
        tensor = tensor.dequantize() if tensor.is_quantized else tensor
        sha256.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def model_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's ``repr`` and of the name, type, shape and values of every entry of its state."""
    state = dict(_entries("", model.state_dict()))
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    about: list[Any] = [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()]
    about += [(name, repr(value)) for name, value in state.items() if name not in tensors]
    return digest(tensors.values(), repr(model) + json.dumps(about))


def _entries(name: str, state: Any) -> Iterator[tuple[str, Any]]:
    """Return the values of a nested state by name; a quantized layer keeps its weight and bias in a tuple."""
    if isinstance(state, Mapping):
        for key, value in state.items():
            yield from _entries(f"{name}.{key}" if name else str(key), value)
    elif isinstance(state, list | tuple):
        for position, value in enumerate(state):
            yield from _entries(f"{name}.{position}", value)
    else:
        yield name, state
