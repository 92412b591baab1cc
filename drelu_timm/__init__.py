"""D-ReLU variants of every timm classifier: ``import drelu_timm``, then ``timm.create_model("resnet50_drelu")``."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from .caps import cap_penalty
from .drelu import DReLU, SReLU
from .errors import DReLUWarning, InputError
from .models import load_folder, normalized, save_folder
from .published import register_published
from .robust_models import register_robust_model

if TYPE_CHECKING:
    from .evaluation import evaluate_model, evaluate_sweep

__version__ = version("drelu-timm")
register_published()

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


def __getattr__(name: str) -> Any:
    """What evaluates, imported when it is asked for: the attack libraries belong to an extra."""
    if name in ("evaluate_model", "evaluate_sweep"):
        from . import evaluation

        return getattr(evaluation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
