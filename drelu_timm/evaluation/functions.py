"""A function from images to logits as a module, with the modules that it calls."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

_DEPTH = 4  # references from the function to a module, at most


class FunctionModel(nn.Module):
    """Wraps a function.

    The modules that the function references (by its object, arguments, attributes, closure or globals), and the modules
    that run when it is called, become children, so that they are put into eval mode, frozen, and found by adaptive
    attacks.

    Args:
        function: Takes images [B, C, H, W] and returns logits [B, K].
        sample: Images [B, C, H, W] for one call.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], sample: Tensor):
        super().__init__()
        self.function = (function,)  # in a tuple, since a module as an attribute would become a child
        modules = {id(module): module for module in (*_modules(function, _DEPTH), *_called(function, sample))}
        self.reached = nn.ModuleList(modules.values())

    def forward(self, images: Tensor) -> Tensor:
        """Call the function."""
        return self.function[0](images)

    def extra_repr(self) -> str:
        """Return the name of the function."""
        function = self.function[0]
        return getattr(function, "__qualname__", type(function).__qualname__)


def _called(function: Callable[[Tensor], Tensor], sample: Tensor) -> list[nn.Module]:
    """Return the modules that run in a call of a function."""
    modes: dict[nn.Module, bool] = {}

    def into_eval_mode(module: nn.Module, args: Any) -> None:  # so that the call changes no batch statistics
        modes.setdefault(module, module.training)
        module.training = False

    hook = register_module_forward_pre_hook(into_eval_mode)
    try:
        # `UserModel` reports errors. Here they may only mean that the sample is on another device.
        with suppress(Exception), torch.no_grad(), torch.random.fork_rng(devices=[]):
            function(sample.clone())
    finally:
        hook.remove()
        for module, training in modes.items():
            module.training = training
    return list(modes)


def _modules(value: Any, depth: int) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif depth and not isinstance(value, type | ModuleType):
        for held in _references(value):
            yield from _modules(held, depth - 1)


def _references(value: Any) -> list[Any]:
    if isinstance(value, FunctionType):
        try:
            variables = inspect.getclosurevars(value)
        except ValueError:  # a variable of the closure has no value yet
            return []
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
