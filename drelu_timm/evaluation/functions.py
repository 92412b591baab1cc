"""A function from images to logits as a module, with the modules that it calls."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

_DEPTH = 4  # from the function to a module: through what it holds, and what that holds


class FunctionModel(nn.Module):
    """A function as a module.

    The modules that the function reaches (as its object, arguments, attributes, closure or globals) are its children,
    so that they are put into eval mode, frozen and found by adaptive attacks like those of any module.

    Args:
        function: Takes images [B, C, H, W], returns logits [B, K].
    """

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = (function,)  # in a tuple, as an attribute that is a module would be a child
        modules = {id(module): module for module in _modules(function, _DEPTH)}
        self.reached = nn.ModuleList(modules.values())

    def forward(self, images: Tensor) -> Tensor:
        """What the function returns."""
        return self.function[0](images)

    def extra_repr(self) -> str:
        """Name of the function."""
        function = self.function[0]
        return getattr(function, "__qualname__", type(function).__qualname__)


def _modules(value: Any, depth: int) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif depth and not isinstance(value, type | ModuleType):
        for held in _held(value):
            yield from _modules(held, depth - 1)


def _held(value: Any) -> list[Any]:
    """What a function or an object can reach by itself."""
    if isinstance(value, FunctionType):
        variables = inspect.getclosurevars(value)
        return [*variables.nonlocals.values(), *variables.globals.values(), *(value.__defaults__ or ())]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, list | tuple | set):
        return list(value)
    if isinstance(value, dict):
        return list(value.values())
    return list(getattr(value, "__dict__", {}).values())
