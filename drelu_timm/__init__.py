"""D-ReLU variants of every timm classifier: ``import drelu_timm``, then ``timm.create_model("resnet50_drelu")``."""

from importlib.metadata import version

from .drelu import DReLU, SReLU, cap_penalty
from .errors import DReLUWarning, InputError
from .models import load_folder, normalized, save_folder
from .robust_models import register_robust_model

__version__ = version("drelu-timm")

__all__ = [
    "DReLU",
    "DReLUWarning",
    "InputError",
    "SReLU",
    "__version__",
    "cap_penalty",
    "load_folder",
    "normalized",
    "register_robust_model",
    "save_folder",
]
