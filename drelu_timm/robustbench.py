"""RobustBench with what its release lacks: call ``drelu_timm.robustbench.adapt()``, then use ``robustbench``.

    python -m drelu_timm.robustbench EXPORTED/register.py --model_name KEY --dataset mnist --eps 0.3 ...

runs ``python -m robustbench.eval ...`` with the models of those files registered.

RobustBench (Croce et al. 2021, https://arxiv.org/abs/2010.09670) 1.1.1 on PyPI cannot be imported as it is. `adapt`
adds what is missing, in memory.
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
    """Import ``robustbench``, add what it lacks, and return it.

    - ``autoattack``, which robustbench imports but does not declare, is `drelu_timm.attacks.autoattack`, on top of
      pyautoattack, unless the real one is installed.
    - The datasets of `drelu_timm.data` that RobustBench does not have (digits, mnist, ...) become values of its
      enumeration ``BenchmarkDataset``, as for ``load_model(key, dataset="mnist")``.
    - ImageNet's images are resized for a registered model by its config. RobustBench would create the model without
      its weights to find the size.

    Raises:
        InputError: RobustBench, or a package that it needs, is missing or overwritten; the message has the command that
            fixes it.
    """
    _check_installation()
    if "autoattack" not in sys.modules and find_spec("autoattack") is None:
        _stand_in_for_autoattack()
    try:
        with warnings.catch_warnings():  # about its imports; its user cannot fix them
            warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)
            robustbench = import_module("robustbench")
    except ImportError as error:
        raise InputError(str(broken_robustbench(error))) from error
    _add_datasets(robustbench)
    _add_preprocessing(robustbench)
    return robustbench


def _check_installation() -> None:
    """Raise InputError for clashes that would otherwise be an obscure ImportError."""
    for clash in robustbench_clashes():
        raise InputError(str(clash))


def _stand_in_for_autoattack() -> None:
    """Make ``import autoattack`` and ``import autoattack.state`` import ours."""
    try:
        sys.modules["autoattack.state"] = import_module("pyautoattack.state")
    except ImportError:
        raise InputError(
            f"robustbench needs autoattack or pyautoattack; neither is installed. {pip(('install', ROBUSTBENCH))}"
        ) from None
    sys.modules["autoattack"] = import_module("drelu_timm.attacks.autoattack")


def _add_datasets(robustbench: ModuleType) -> None:
    """Add the datasets of this package to ``BenchmarkDataset``."""
    enumeration = robustbench.model_zoo.enums.BenchmarkDataset
    for name in DATASETS.keys() - {member.value for member in enumeration}:
        member = object.__new__(enumeration)
        member._name_ = member._value_ = name
        # As Python stores the members of an enumeration: found by value, and listed for robustbench.eval's --dataset.
        enumeration._value2member_map_[name] = enumeration._member_map_[name] = member
        enumeration._member_names_.append(name)
        # None: timm drops the argument, and the model keeps its number of classes.
        robustbench.utils.DATASET_CLASSES[member] = None
        robustbench.data._clean_dataset_loaders[member] = _clean_loader(name)


def _clean_loader(dataset: str):
    """Return RobustBench's loader of test images: (n_examples, data_dir, preprocessing) -> ([N, C, H, W], [N])."""

    def load(n_examples: int | None, data_dir: str, preprocessing: object) -> tuple[Tensor, Tensor]:
        test = load_images(dataset, data_dir, "test")[:n_examples]
        return to_float(test.images), test.labels

    return load


def _add_preprocessing(robustbench: ModuleType) -> None:
    """Make RobustBench preprocess ImageNet's files to images [C, H, W] in [0, 1] for registered models too."""
    theirs = robustbench.data.get_timm_model_preprocessing

    def preprocessing(model_name: str):
        cfg = registered_cfg(model_name)
        if cfg is None:
            return theirs(model_name)
        shape = {name: cfg[name] for name in ("interpolation", "crop_pct")}
        return create_transform(cfg["input_size"], mean=(0.0,), std=(1.0,), **shape)  # the model normalizes

    robustbench.data.get_timm_model_preprocessing = preprocessing


def main(argv: Sequence[str]) -> None:
    """Run registration files, then ``robustbench.eval`` with the arguments that follow them."""
    files = list(takewhile(lambda argument: not argument.startswith("-"), argv))
    for file in files:
        if not Path(file).is_file():
            raise InputError(f"{file} does not exist. Pass the register.py of an exported folder.")
    if not any(argument.startswith(("--model_name", "--help", "-h")) for argument in argv):
        raise InputError("--model_name KEY is missing. --help lists the arguments of robustbench.eval.")
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
