"""Every timm architecture supports the head or is refused with a reason: one per family, all with ``-m slow``."""

import gc
from collections import Counter

import pytest
import timm
import torch
from torch.overrides import TorchFunctionMode

from drelu_timm import InputError


class DropPathRatesOnCPU(TorchFunctionMode):
    """Return `torch.linspace` on the CPU: timm 1.0.9 reads drop path rates from it, which meta does not support."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.linspace:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


@torch.no_grad()
def check(architecture: str, device: str) -> None:
    """Build the variant, and check its output after every change of its classifier."""
    with torch.device(device), DropPathRatesOnCPU():
        model = timm.create_model(f"{architecture}_drelu", num_classes=10).eval()
        features = []
        forward_head = model.forward_head
        model.forward_head = lambda x, **kwargs: features.append(x) or forward_head(x, **kwargs)
        images = torch.zeros(1, *model.pretrained_cfg["input_size"])
        assert model(images).shape == (1, 10)
        features = features or [model.forward_features(images)]
        assert model.get_classifier() is not None
        assert forward_head(*features, pre_logits=True).shape == (1, 128)
        model.reset_classifier(7)
        assert forward_head(*features).shape == (1, 7)
        model.reset_classifier(0)
        assert forward_head(*features).shape == (1, 128)


def built_on(architecture: str) -> str:
    """Return the device of the check: meta, or the CPU for models that read values, which meta does not have."""
    try:
        check(architecture, "meta")
        return "meta"
    except (RuntimeError, TypeError):
        check(architecture, "cpu")
        return "cpu"


def outcome(architecture: str) -> tuple[str, str]:
    """Return "built" and the device, "refused" and the reason, or "failed" and the error."""
    try:
        return "built", built_on(architecture)
    except InputError as error:
        return "refused", str(error)
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}"[:500]
    finally:
        gc.collect()


def architectures() -> list[str]:
    return timm.list_models(exclude_filters=["*_drelu", "drelutimm2026_*"])  # without the published, trained ones


# timm's names of small models, the smallest first.
HINTS = (
    "atto",
    "femto",
    "pico",
    "nano",
    "xx",
    "tiny",
    "_m0",
    "_t0",
    "_s0",
    "_b0",
    "002",
    "035",
    "050",
    "_xs",
    "_s",
    "_t",
)


def one_of_each_family() -> list[str]:
    """Return a small model per module of timm, by name and image size, and two of ours."""
    modules = [module for module in timm.list_modules() if module != "drelu_timm"]
    families = [timm.list_models(module=module, exclude_filters="*_drelu") for module in modules]
    return [*(min(family, key=_size) for family in families if family), "shallow_cnn", "preact_resnet18"]


def _size(architecture: str) -> tuple[int, int, str]:
    cfg = timm.get_pretrained_cfg(architecture)
    hints = [index for index, hint in enumerate(HINTS) if hint in architecture]
    return min(hints, default=len(HINTS)), cfg.input_size[1] if cfg else 1000, architecture


@pytest.mark.parametrize("architecture", one_of_each_family())
def test_one_of_each_family(architecture):
    if architecture.endswith("_enc"):
        with pytest.raises(InputError, match="needs a classifier layer"):
            built_on(architecture)
    else:
        assert built_on(architecture) in ("meta", "cpu")


def sweep(names: list[str]) -> dict[str, dict]:
    """Return the outcome of each architecture."""
    table = {}
    for name in names:
        verdict, detail = outcome(name)
        table[name] = {"outcome": verdict, "detail": detail}
        print(f"{len(table):5} {name}: {verdict} ({detail})", flush=True)
    return table


def summary(table: dict[str, dict]) -> str:
    counts = Counter(row["outcome"] for row in table.values())
    lines = [f"timm {timm.__version__}: {len(table)} architectures, {dict(counts)}"]
    lines += [f"  {name}: {row['detail']}" for name, row in table.items() if row["outcome"] != "built"]
    return "\n".join(lines)


@pytest.mark.slow
def test_every_architecture(capsys):
    with capsys.disabled():
        table = sweep(architectures())
        print(summary(table))
    assert [name for name, row in table.items() if row["outcome"] == "failed"] == []
    refused = {name for name, row in table.items() if row["outcome"] == "refused"}
    assert all(name.endswith("_enc") for name in refused), refused
