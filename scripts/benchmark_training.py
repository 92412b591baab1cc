"""Benchmark images per second and peak memory of a training step: drelu_timm against two plain loops.

    python scripts/benchmark_training.py                                      # on the CPU: minutes
    python scripts/benchmark_training.py --dtypes bfloat16 --compile --batch-size 512 --rounds 20

All loops have the same model, batch, inner attack and optimizer. The plain ones are in float32, eager, and in eval mode
for the attack, like most public ones:

    backward         the inner attack calls loss.backward(), so each of its steps also computes all weight gradients
                     (as in AdverTorch)
    input gradient   it uses torch.autograd.grad of the images, and the weights stay trainable (as in TRADES and
                     torchattacks)
    drelu_timm       ours, once for each of --dtypes: frozen weights, channels_last, autocast

The loops take turns in one process, one step each, and the median over the rounds counts, so a disturbance of the
machine affects all loops. Memory is the peak of two steps in a new process, of the GPU or else of the process's
resident memory (Linux), minus the memory before the model was made.
"""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from drelu_timm.attacks.threat_model import ThreatModel
from drelu_timm.errors import InputError, unknown
from drelu_timm.models.inference import normalized
from drelu_timm.runs import environment
from drelu_timm.training.objectives import InnerAttack, make_objective

Name = Literal["natural", "at", "n-fgsm", "trades"]
Dtype = Literal["float32", "bfloat16"]
Step = Callable[[], None]
Attack = Callable[[nn.Module, Tensor, Callable[[Tensor], Tensor], int], Tensor]

EPS, STEP_SIZE, BETA = 8 / 255, 2 / 255, 6.0
IMAGE_SIZE, NUM_CLASSES = 32, 10
MEMORY_STEPS = 2  # the optimizer has its state in the second step


@dataclass(frozen=True)
class BenchmarkConfig:
    """Measure the speed of a training step relative to plain loops, and its memory."""

    model: str = "resnet18_drelu"
    """A `_drelu` variant, with ReLU in its body and a stem for 32x32 images."""
    objectives: tuple[Name, ...] = get_args(Name)
    """Training objectives."""
    dtypes: tuple[Dtype, ...] = get_args(Dtype)
    """Precisions of our loop; the plain loops run in float32."""
    compile: bool = False
    """Use torch.compile in our loop."""
    batch_size: int = 64
    """Images per step."""
    steps: int = 10
    """Steps of the inner attack."""
    rounds: int = 7
    """Measured steps of every loop."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu or cuda."""


@dataclass(frozen=True)
class Loop:
    """One loop.

    Attributes:
        name: As in the table.
        make: (config, objective) to a step on a model, a batch and an optimizer.
    """

    name: str
    make: Callable[[BenchmarkConfig, Name], Step]


def batch(config: BenchmarkConfig) -> tuple[nn.Module, Tensor, Tensor, torch.optim.Optimizer]:
    """Return the model, images [B, 3, 32, 32] in [0, 1], labels [B] and optimizer, equal for every loop."""
    torch.manual_seed(0)
    arguments = {"activation": "relu", "small_images": True, "num_classes": NUM_CLASSES}
    model = normalized(timm.create_model(config.model, **arguments)).to(config.device)
    images = torch.rand(config.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE).to(config.device)
    labels = torch.randint(NUM_CLASSES, (config.batch_size,)).to(config.device)
    return model, images, labels, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def plain(config: BenchmarkConfig, objective: Name, attack: Attack) -> Step:
    """Return a step as in public code, with an inner attack of either kind."""
    model, images, labels, optimizer = batch(config)

    def loss_of_natural() -> Tensor:
        model.train()
        return F.cross_entropy(model(images), labels)

    def loss_of_at() -> Tensor:
        model.eval()
        adversarial = attack(model, images, lambda logits: F.cross_entropy(logits, labels), config.steps)
        model.train()
        return F.cross_entropy(model(adversarial), labels)

    def loss_of_n_fgsm() -> Tensor:  # as in the authors' code, in training mode; there is one kind of it
        model.train()
        start = (images + torch.empty_like(images).uniform_(-2 * EPS, 2 * EPS)).clamp(0, 1).requires_grad_()
        gradient = torch.autograd.grad(F.cross_entropy(model(start), labels), start)[0]
        return F.cross_entropy(model((start.detach() + EPS * gradient.sign()).clamp(0, 1)), labels)

    def loss_of_trades() -> Tensor:
        model.eval()
        clean = F.softmax(model(images), dim=1).detach()
        adversarial = attack(model, images, lambda logits: kl(logits, clean), config.steps)
        model.train()
        logits = model(images)
        divergence = kl(model(adversarial), F.softmax(logits, dim=1)) / len(images)
        return F.cross_entropy(logits, labels) + BETA * divergence

    by_name = {"natural": loss_of_natural, "at": loss_of_at, "n-fgsm": loss_of_n_fgsm, "trades": loss_of_trades}
    loss_of = by_name[objective]

    def step() -> None:
        loss = loss_of()
        optimizer.zero_grad()  # after the attack, which may leave weight gradients
        loss.backward()
        optimizer.step()

    return step


def kl(logits: Tensor, probabilities: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(logits, dim=1), probabilities, reduction="sum")


def attack_by_backward(model: nn.Module, images: Tensor, loss: Callable[[Tensor], Tensor], steps: int) -> Tensor:
    delta = torch.empty_like(images).uniform_(-EPS, EPS).requires_grad_()
    for _ in range(steps):
        loss(model(images + delta)).backward()
        assert delta.grad is not None
        delta.data = (delta.data + STEP_SIZE * delta.grad.sign()).clamp(-EPS, EPS)
        delta.data = (images + delta.data).clamp(0, 1) - images
        delta.grad.zero_()
    return (images + delta).detach()


def attack_by_input_gradient(model: nn.Module, images: Tensor, loss: Callable[[Tensor], Tensor], steps: int) -> Tensor:
    adversarial = (images + torch.empty_like(images).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(steps):
        adversarial.requires_grad_()
        gradient = torch.autograd.grad(loss(model(adversarial)), adversarial)[0]
        adversarial = adversarial.detach() + STEP_SIZE * gradient.sign()
        adversarial = torch.min(torch.max(adversarial, images - EPS), images + EPS).clamp(0, 1)
    return adversarial.detach()


def ours(config: BenchmarkConfig, objective: Name, dtype: Dtype) -> Step:
    """Return a training step of drelu_timm."""
    model, images, labels, optimizer = batch(config)
    model = model.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    if config.compile:
        model.compile()
    threat_model = ThreatModel.parse("Linf", EPS)
    attack = InnerAttack(model, threat_model, config.steps, EPS if objective == "n-fgsm" else STEP_SIZE)
    minimised = make_objective(objective, beta=BETA)
    device_type = torch.device(config.device).type

    def step() -> None:
        model.train()
        with torch.autocast(device_type, torch.bfloat16, enabled=dtype == "bfloat16"):
            noise = threat_model.noise(images.shape).to(images)
            adversarial = minimised.adversarial(images, labels, attack, noise)
            losses = minimised.losses(model, images, adversarial, labels)
        losses.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def loops(config: BenchmarkConfig) -> list[Loop]:
    """Return the two plain loops, then ours in each precision."""
    ways = [
        Loop("backward", lambda config, objective: plain(config, objective, attack_by_backward)),
        Loop("input gradient", lambda config, objective: plain(config, objective, attack_by_input_gradient)),
    ]
    for dtype in config.dtypes:
        name = f"drelu_timm {dtype}" + (", compiled" if config.compile else "")
        ways.append(Loop(name, lambda config, objective, dtype=dtype: ours(config, objective, dtype)))
    return ways


def seconds_a_step(config: BenchmarkConfig, objective: Name) -> list[list[float]]:
    """Return the times of every loop, one per round."""
    steps = [loop.make(config, objective) for loop in loops(config)]
    for step in steps:  # the first step allocates, tunes and compiles
        timed(step, config.device)
    rounds = [[timed(step, config.device) for step in steps] for _ in range(config.rounds)]
    return [list(times) for times in zip(*rounds, strict=True)]


def timed(step: Step, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(config: BenchmarkConfig, objective: Name, index: int) -> float:
    """Return the peak memory of a loop in MiB, measured in a new process."""
    before = held(config.device)
    step = loops(config)[index].make(config, objective)
    for _ in range(MEMORY_STEPS):
        step()
    return (held(config.device) - before) / 2**20


def held(device: str) -> int:
    """Return the peak memory in bytes."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage, whose peak is inherited from the parent process.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def check(config: BenchmarkConfig) -> None:
    """Check that the config can be measured.

    Raises:
        InputError: A model, a device or a number that is not possible.
    """
    if not timm.is_model(config.model):
        raise unknown("--model", config.model, timm.list_models("*_drelu"))
    for flag, value in (("batch-size", config.batch_size), ("steps", config.steps), ("rounds", config.rounds)):
        if value < 1:
            raise InputError(f"--{flag} {value} is not possible; give an integer >= 1")
    if config.device.split(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"--device {config.device!r} is unknown; allowed: cpu, cuda, cuda:1 and so on")
    if config.device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"--device {config.device!r} is not there; take --device cpu")


def main(config: BenchmarkConfig) -> None:
    """Measure, and print a Markdown table."""
    check(config)
    here = environment()
    print(f"{here['hardware']}, {torch.get_num_threads()} threads; {config.device}; {here['versions']}")
    print(
        f"{config.model}, batch {config.batch_size}, {config.steps} attack steps, medians of {config.rounds} rounds\n"
    )
    print("| objective | loop | images/s | slowest to fastest | x backward | x input gradient | peak MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    names, medians_of = [loop.name for loop in loops(config)], {}
    for objective in config.objectives:
        memory = [in_fresh_process(peak_memory, config, objective, index) for index in range(len(names))]
        times = seconds_a_step(config, objective)
        medians = medians_of[objective] = [statistics.median(rounds) for rounds in times]
        for name, median, rounds, peak in zip(names, medians, times, memory, strict=True):
            speeds = [config.batch_size / seconds for seconds in (median, max(rounds), min(rounds))]
            ratios = [f"{reference / median:.2f}" for reference in medians[:2]]
            cells = [objective, name, f"{speeds[0]:.1f}", f"{speeds[1]:.1f} to {speeds[2]:.1f}", *ratios, f"{peak:.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
    if {"at", "n-fgsm"} <= set(medians_of):
        print(f"\nAn epoch of n-fgsm takes the share of one of at with {config.steps} steps:")
        for name, single, several in zip(names, medians_of["n-fgsm"], medians_of["at"], strict=True):
            print(f"{name}: {single / several:.2f}")


if __name__ == "__main__":
    try:
        main(tyro.cli(BenchmarkConfig, description=__doc__))
    except InputError as error:
        sys.exit(str(error))
