"""Benchmark a D-ReLU against a ReLU6, forward and backward: prints a Markdown table.

    python scripts/benchmark_drelu.py
    OMP_NUM_THREADS=1 python scripts/benchmark_drelu.py --rounds 30

The two take turns, and the ratio is between their medians. "kept" is what they keep for the backward pass.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import timm
import torch
import tyro
from torch import Tensor, nn

from drelu_timm import DReLU
from drelu_timm.runs import environment

IMAGES = (4, 3, 96, 96)  # batch of resnet50


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: What is measured.
        shape: Of the input.
        make: Makes a module for "relu6" or "drelu".
        calls: Forward and backward passes in one measurement.
        memory_format: Of the input.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[str], nn.Module]
    calls: int
    memory_format: torch.memory_format = torch.contiguous_format


def layer(num_features: int) -> Callable[[str], nn.Module]:
    return lambda activation: nn.ReLU6() if activation == "relu6" else DReLU(num_features, 2.0)


def resnet50(activation: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("resnet50_drelu", num_classes=10, placement="all", activation=activation, cap=6.0)
    return model.to(memory_format=torch.channels_last)


MAPS = (64, 256, 32, 32)
CASES = [
    Case("head [512, 128]", (512, 128), layer(128), calls=100),
    Case("feature map [64, 256, 32, 32]", MAPS, layer(256), calls=1),
    Case("the same, channels_last", MAPS, layer(256), calls=1, memory_format=torch.channels_last),
    Case(f"resnet50, placement all, {list(IMAGES)}", IMAGES, resnet50, calls=1, memory_format=torch.channels_last),
]


def seconds(module: nn.Module, x: Tensor, gradient: Tensor, calls: int) -> float:
    """Return the mean time of one forward and backward pass over ``calls`` calls."""
    synchronize = torch.cuda.synchronize if x.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        x.grad = None
        module.zero_grad()
        module(x).backward(gradient)
    synchronize()
    return (time.perf_counter() - start) / calls


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """Return the bytes that a forward pass keeps for its backward pass in addition to the parameters."""
    kept = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module(x)
    return sum(kept.values()) - sum(kept.get(p.untyped_storage().data_ptr(), 0) for p in module.parameters())


def row(case: Case, rounds: int, device: torch.device) -> str:
    """Return one line of the table."""
    modules = [case.make(activation).to(device) for activation in ("relu6", "drelu")]
    x = (3 * torch.randn(case.shape, device=device)).contiguous(memory_format=case.memory_format).requires_grad_()
    gradient = torch.randn_like(modules[0](x))
    times: list[list[float]] = [[], []]
    for module in modules:
        seconds(module, x, gradient, case.calls)  # warm-up
    for _ in range(rounds):
        for module, measured in zip(modules, times, strict=True):
            measured.append(seconds(module, x, gradient, case.calls))
    relu6, drelu = map(median, times)
    kept = " | ".join(f"{kept_bytes(module, x) / 2**20:.2f}" for module in modules)
    return f"| {case.name} | {1e3 * relu6:.3f} | {1e3 * drelu:.3f} | {drelu / relu6:.2f} | {kept} |"


def main(rounds: int = 15) -> None:
    """Measure and print the table.

    Args:
        rounds: Measurements of each.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("| forward and backward | ReLU6, ms | D-ReLU, ms | ratio | ReLU6 kept, MiB | D-ReLU kept, MiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for case in CASES:
        print(row(case, rounds, device), flush=True)
    facts = environment()
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("python", "torch", "timm"))
    print(f"\n{facts['hardware']}, {torch.get_num_threads()} threads, {versions}, medians of {rounds}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
