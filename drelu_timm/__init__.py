"""D-ReLU variants of every timm classifier: ``import drelu_timm``, then ``timm.create_model("resnet50_drelu")``."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from .drelu import DReLU, SReLU, cap_penalty
from .errors import DReLUWarning, InputError
from .models import load_folder, normalized, save_folder
from .robust_models import register_robust_model

if TYPE_CHECKING:
    from .evaluation import evaluate_model

__version__ = version("drelu-timm")

__all__ = [
    "DReLU",
    "DReLUWarning",
    "InputError",
    "SReLU",
    "__version__",
    "cap_penalty",
    "evaluate_model",
    "load_folder",
    "normalized",
    "register_robust_model",
    "save_folder",
]


def __getattr__(name: str) -> Any:
    """`evaluate_model`, imported when it is asked for: the attack libraries belong to an extra."""
    if name == "evaluate_model":
        from .evaluation import evaluate_model

        return evaluate_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
