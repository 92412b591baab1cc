"""D-ReLU variants of every timm classifier: ``import drelu_timm``, then ``timm.create_model("resnet50_drelu")``."""

import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DReLUWarning, InputError


def _is_doctor() -> bool:
    """Whether this is `drelu-timm doctor` or `python -m drelu_timm doctor`, told by the command as it was given.

    The doctor has to run where torch, torchvision or timm do not import, and this file runs before it.
    """
    command = sys.orig_argv[-len(sys.argv) :]  # sys.argv itself has -m in the place of the module, as yet
    return command[1:2] == ["doctor"] and Path(command[0]).stem in ("drelu-timm", "drelu_timm")


if TYPE_CHECKING or not _is_doctor():
    with warnings.catch_warnings():  # before every command's first line otherwise, and nothing that its user can mend
        warnings.filterwarnings("ignore", "`torch.jit.interface` is deprecated", FutureWarning)
        import timm  # noqa: F401

    from .models import registration  # noqa: F401  (importing it registers every `<arch>_drelu`)
    from .models.caps import cap_penalty
    from .models.drelu import DReLU, SReLU
    from .models.normalize import normalized
    from .models.saved import load_folder, save_folder
    from .zoo.published import register_published
    from .zoo.robust_models import register_robust_model

    register_published()

if TYPE_CHECKING:
    from .evaluation.evaluation import evaluate_model, evaluate_sweep

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


def __getattr__(name: str) -> Any:
    """What evaluates, imported when it is asked for: the attack libraries belong to an extra."""
    if name in ("evaluate_model", "evaluate_sweep"):
        from .evaluation import evaluation

        return getattr(evaluation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
