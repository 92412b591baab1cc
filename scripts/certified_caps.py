"""Certified accuracy of runs that IBP trained, paired by seed, and what caps change in their intervals.

    drelu-timm sweep certified-caps --data-dir data --output-dir runs/certified-caps
    python scripts/certified_caps.py runs/certified-caps/runs/strided_cnn-0.3-*

prints two Markdown tables. Runs that differ in the seed alone are one method; the method of the first run is the one
that the others are compared with. All figures are of the last epoch, which is past the ramp in every run.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import tyro
from scipy import stats
from torch import Tensor, nn

from drelu_timm.data.images import Images, to_float
from drelu_timm.data.readers import load_images
from drelu_timm.models.drelu import DReLU, SReLU, along_channels
from drelu_timm.models.inference import frozen
from drelu_timm.models.intervals import Interval, bounds, certified
from drelu_timm.runs import Run, environment

IMAGES_FOR_INTERVALS = 500
ACTIVATIONS = (DReLU, SReLU, nn.ReLU, nn.ReLU6)
_NOT_A_METHOD = ("seed", "data_dir", "workers", "monitor")
KINDS = ("zero", "linear", "capped", "unstable")


@dataclass(frozen=True)
class Measured:
    """A run, with its model in float64, for which a certificate is not a matter of rounding."""

    run: Run
    data_dir: Path

    @property
    def config(self) -> dict[str, Any]:
        return self.run.config["train"]

    @property
    def eps(self) -> float:
        numerator, _, denominator = self.config["eps"].partition("/")
        return float(numerator) / float(denominator or 1)

    @cached_property
    def model(self) -> nn.Module:
        return Run.open(self.run.path / "last").load_model().double().eval()

    @cached_property
    def data(self) -> Images:
        return load_images(self.config["dataset"], self.data_dir, "test", img_size=self.config["img_size"])

    @cached_property
    def clean(self) -> Tensor:
        """Whether each test image [N] is classified correctly."""
        images = to_float(self.data.images).double()
        with torch.no_grad():
            return torch.cat([self.model(part).argmax(1) for part in images.split(500)]) == self.data.labels

    @cached_property
    def certified(self) -> Tensor:
        """Whether each test image [N] is certified at the run's eps."""
        return certified(self.model, to_float(self.data.images).double(), self.data.labels, self.eps)

    @property
    def hours(self) -> float:
        entries = (self.run.path / "log.jsonl").read_text().splitlines()
        return sum(json.loads(entry)["seconds"] for entry in entries) / 3600

    @cached_property
    def layers(self) -> list[dict[str, float]]:
        """Of each activation layer, in the order of the forward pass: widths, kinds of units, caps."""
        layers: list[dict[str, float]] = []

        def measure(layer: nn.Module, inputs: tuple[Interval], output: Interval) -> None:
            layers.append(_layer(layer, inputs[0], output))

        found = [module for module in self.model.modules() if isinstance(module, ACTIVATIONS)]
        hooks = [module.register_forward_hook(measure) for module in found]
        images = to_float(self.data.images[:IMAGES_FOR_INTERVALS]).double()
        with frozen(self.model), torch.no_grad():
            bounds(self.model, images, self.eps)
        for hook in hooks:
            hook.remove()
        return layers


def _layer(layer: nn.Module, before: Interval, after: Interval) -> dict[str, float]:
    """Describe a layer by the interval before and after its activation.

    A unit is stable where the activation is linear on the whole interval: zero, between 0 and the cap, or at the cap.
    """
    cap = torch.tensor(float("inf"))
    if isinstance(layer, DReLU):
        cap = along_channels(layer.cap.clamp(min=0), before.lower, layer.channel_dim)
    elif isinstance(layer, SReLU | nn.ReLU6):
        cap = torch.tensor(layer.cap if isinstance(layer, SReLU) else 6.0)
    zero = (before.upper <= 0) | (cap <= 0)
    linear = (before.lower >= 0) & (before.upper <= cap) & ~zero
    capped = (before.lower >= cap) & ~zero
    shares = dict(zip(KINDS, (zero, linear, capped, ~(zero | linear | capped)), strict=True))
    width = (after.upper - after.lower).mean().item()
    spread = after.value.std(0).mean().item()
    caps = layer.cap.detach() if isinstance(layer, DReLU) else torch.full((1,), cap.max().item())
    return {
        "width": width,
        "width per spread": width / spread if spread else float("nan"),
        **{name: share.double().mean().item() for name, share in shares.items()},
        "cap": caps[caps > 0].mean().item(),
        "dead": (caps <= 0).double().mean().item(),
    }


def main(runs: tuple[Path, ...], /, data_dir: Path = Path("data")) -> None:
    """Print the tables of run directories.

    Args:
        runs: Finished runs of the objective ibp, all at one eps; the method of the first one is the baseline.
        data_dir: Folder of the dataset.
    """
    methods = _methods([Measured(Run.open(path), data_dir) for path in runs])
    first = next(iter(methods.values()))
    n = len(first[0].clean)
    print(f"eps {first[0].config['eps']}, {n:,} test images, in %\n")
    print("| method | seeds | clean | certified | certified, difference | p | hours per run |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name, measured in methods.items():
        print("| " + " | ".join([name, *_accuracies(measured, first)]) + " |")
    print(f"\nIntervals of the first {IMAGES_FOR_INTERVALS} test images, seed {first[0].config['seed']}\n")
    print(
        f"| method | layer | width | width / spread of clean values | {' | '.join(KINDS)} | mean cap > 0 | dead units |"
    )
    print("| --- | ---: |" + " ---: |" * 8)
    for name, (measured, *_) in methods.items():
        for number, layer in enumerate(measured.layers, start=1):
            print("| " + " | ".join([name, str(number), *_intervals(layer)]) + " |")
    facts = environment()
    print(f"\n{facts['hardware']}, torch {facts['versions']['torch']}, timm {facts['versions']['timm']}")


def _methods(measured: Sequence[Measured]) -> dict[str, list[Measured]]:
    """Group runs that differ in the seed alone, by a name made of the settings in which the groups differ."""
    settings = [{**one.config, "resume": None} for one in measured]
    varying = [
        key for key in settings[0] if key not in _NOT_A_METHOD and len({str(one.get(key)) for one in settings}) > 1
    ]
    methods: dict[str, list[Measured]] = {}
    for one in measured:
        given = [f"{key} {one.config[key]}" for key in varying if one.config[key] not in (None, False)]
        methods.setdefault(", ".join(given) or "all", []).append(one)
    return methods


def _accuracies(measured: Sequence[Measured], baseline: Sequence[Measured]) -> list[str]:
    by_seed = {one.config["seed"]: _percent(one.certified) for one in baseline}
    pairs = [
        (_percent(one.certified), by_seed[one.config["seed"]]) for one in measured if one.config["seed"] in by_seed
    ]
    differences = [one - other for one, other in pairs]
    compared = measured is not baseline
    p = stats.ttest_1samp(differences, 0).pvalue if compared and len(differences) > 1 else None
    return [
        ", ".join(str(one.config["seed"]) for one in measured),
        _mean_and_deviation([_percent(one.clean) for one in measured]),
        _mean_and_deviation([_percent(one.certified) for one in measured]),
        _mean_and_deviation(differences, sign="+") if compared and differences else "",
        "" if p is None else f"{p:.3f}",
        f"{mean(one.hours for one in measured):.2f}",
    ]


def _percent(flags: Tensor) -> float:
    return 100 * flags.double().mean().item()


def _mean_and_deviation(values: Sequence[float], sign: str = "") -> str:
    deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.2f}{deviation}"


def _intervals(layer: dict[str, float]) -> list[str]:
    cells = [f"{layer['width']:.3g}", f"{layer['width per spread']:.2f}"]
    cells += [f"{100 * layer[kind]:.1f}" for kind in KINDS]
    return [*cells, f"{layer['cap']:.3g}", f"{100 * layer['dead']:.1f}"]


if __name__ == "__main__":
    tyro.cli(main)
