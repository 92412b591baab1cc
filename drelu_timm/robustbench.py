"""RobustBench, made to work: ``drelu_timm.robustbench.adapt()``, then everything of ``robustbench`` as it is.

    python -m drelu_timm.robustbench EXPORTED/register.py --model_name KEY --dataset mnist --eps 0.3 ...

is ``python -m robustbench.eval ...`` with the models of those files registered.

RobustBench (Croce et al. 2021, https://arxiv.org/abs/2010.09670) 1.1.1 on PyPI does not import by itself. Nothing here
happens before `adapt` is called, and nothing of RobustBench is copied.
"""

import runpy
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from types import ModuleType

from timm.data import create_transform
from torch import Tensor

from .data.datasets import DATASETS
from .data.images import to_float
from .data.readers import load_images
from .doctor import ROBUSTBENCH, broken_robustbench, pip, robustbench_clashes
from .errors import InputError
from .zoo.robust_models import registered_cfg


@cache
def adapt() -> ModuleType:
    """The package ``robustbench``, imported, with what it lacks.

    - The module ``autoattack``, which robustbench imports but does not declare, is ours, on top of pyautoattack
      (`drelu_timm.attacks.autoattack`), unless the real one is installed.
    - The datasets of `drelu_timm.data` that RobustBench does not know (digits, mnist, ...) become further values of
      its enumeration ``BenchmarkDataset``. So ``load_model(key, dataset="mnist")`` finds a registered model, and
      ``benchmark(model, dataset="mnist")`` images.
    - ImageNet's images are cut for a registered model as its config says: RobustBench would create it, without its
      weights, to see how.

    Raises:
        InputError: RobustBench, or something that it needs, is missing or has been overwritten; the message says how to
            mend it.
    """
    _check_installation()
    if "autoattack" not in sys.modules and find_spec("autoattack") is None:
        _stand_in_for_autoattack()
    try:
        with warnings.catch_warnings():  # of what robustbench imports, which its user cannot mend
            warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)
            robustbench = import_module("robustbench")
    except ImportError as error:
        raise InputError(str(broken_robustbench(error))) from error
    _add_datasets(robustbench)
    _add_preprocessing(robustbench)
    return robustbench


def _check_installation() -> None:
    """Raise what would otherwise be a riddle, each with the command that fixes it."""
    for clash in robustbench_clashes():
        raise InputError(str(clash))


def _stand_in_for_autoattack() -> None:
    """Let ``import autoattack`` and ``import autoattack.state`` find ours."""
    try:
        sys.modules["autoattack.state"] = import_module("pyautoattack.state")
    except ImportError:
        raise InputError(
            f"robustbench needs autoattack or pyautoattack, and neither is installed; {pip(('install', ROBUSTBENCH))}"
        ) from None
    sys.modules["autoattack"] = import_module("drelu_timm.attacks.autoattack")


def _add_datasets(robustbench: ModuleType) -> None:
    """Let ``BenchmarkDataset(name)`` know the datasets of this package."""
    enumeration = robustbench.model_zoo.enums.BenchmarkDataset
    for name in DATASETS.keys() - {member.value for member in enumeration}:
        member = object.__new__(enumeration)
        member._name_ = member._value_ = name
        # As Python keeps an enumeration's members: found by value, and listed, as robustbench.eval's --dataset needs.
        enumeration._value2member_map_[name] = enumeration._member_map_[name] = member
        enumeration._member_names_.append(name)
        # None: timm drops the argument, and the model has the number of classes that it was exported with.
        robustbench.utils.DATASET_CLASSES[member] = None
        robustbench.data._clean_dataset_loaders[member] = _clean_loader(name)


def _clean_loader(dataset: str):
    """What RobustBench calls for its test images: (n_examples, data_dir, preprocessing) -> ([N, C, H, W], [N])."""

    def load(n_examples: int | None, data_dir: str, preprocessing: object) -> tuple[Tensor, Tensor]:
        test = load_images(dataset, data_dir, "test")[:n_examples]
        return to_float(test.images), test.labels

    return load


def _add_preprocessing(robustbench: ModuleType) -> None:
    """Let RobustBench find what makes images [C, H, W] in [0, 1] of ImageNet's files, for registered models too."""
    theirs = robustbench.data.get_timm_model_preprocessing

    def preprocessing(model_name: str):
        cfg = registered_cfg(model_name)
        if cfg is None:
            return theirs(model_name)
        shape = {name: cfg[name] for name in ("interpolation", "crop_pct")}
        return create_transform(cfg["input_size"], mean=(0.0,), std=(1.0,), **shape)  # the model normalises

    robustbench.data.get_timm_model_preprocessing = preprocessing


def main(argv: Sequence[str]) -> None:
    """Run registration files, then RobustBench's own evaluation with the arguments that follow them."""
    files = list(takewhile(lambda argument: not argument.startswith("-"), argv))
    for file in files:
        if not Path(file).is_file():
            raise InputError(f"{file} is no file; give the register.py of an exported folder")
    if not any(argument.startswith(("--model_name", "--help", "-h")) for argument in argv):
        raise InputError("--model_name KEY is needed; --help lists what else robustbench.eval takes")
    adapt()
    for file in files:
        runpy.run_path(file)
    sys.argv = ["robustbench.eval", *argv[len(files) :]]
    runpy.run_module("robustbench.eval", run_name="__main__")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
