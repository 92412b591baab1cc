"""D-ReLU variants of every timm classifier, and an evaluation that detects gradient masking.

    import drelu_timm, timm

    model = timm.create_model("resnet50_drelu", num_classes=10)  # or any nn.Module
    model = drelu_timm.normalized(model).eval()  # from images in [0, 1] to logits
    result = drelu_timm.evaluate_model(model, images, labels, norm="Linf", eps="8/255")
    print(result.clean, result.worst, result.verdict)

The models are registered when timm is imported, before or after this package. The names in ``__all__`` are imported
when they are first used.
"""

import warnings
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import when_imported

from .errors import DReLUWarning, InputError

if TYPE_CHECKING:
    from .evaluation.evaluation import evaluate_model, evaluate_sweep
    from .models.caps import cap_penalty
    from .models.drelu import DReLU, SReLU
    from .models.inference import normalized
    from .models.weights import load_folder, save_folder
    from .zoo.robust_models import register_robust_model

__version__ = version("drelu-timm")

__all__ = [
    "DReLU",
    "DReLUWarning",
    "InputError",
    "SReLU",
    "__version__",
    "cap_penalty",
    "evaluate_model",
    "evaluate_sweep",
    "load_folder",
    "normalized",
    "register_robust_model",
    "save_folder",
]

_HOMES = {
    "DReLU": "models.drelu",
    "SReLU": "models.drelu",
    "cap_penalty": "models.caps",
    "evaluate_model": "evaluation.evaluation",
    "evaluate_sweep": "evaluation.evaluation",
    "load_folder": "models.weights",
    "normalized": "models.inference",
    "register_robust_model": "zoo.robust_models",
    "save_folder": "models.weights",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used (PEP 562)."""
    if name == "attacks":  # as `drelu_timm.attacks.adaptive` is how users register a backward pass
        import_module(".attacks.adaptive", __name__)
        return globals()[name]
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__


# Raised by the import of timm; users cannot fix it.
warnings.filterwarnings("ignore", "`torch.jit.interface` is deprecated", FutureWarning)


# Not "timm.models": registration needs timm.list_models, which timm defines after importing timm.models. A plain
# `import timm.models` imports timm first, so this works for it too.
@when_imported("timm")
def _register(_: ModuleType) -> None:
    """Register the models with timm: now if timm is imported already, else at the end of its import."""
    import_module(".models.registry", __name__)
    import_module(".zoo.robust_models", __name__).register_published()
