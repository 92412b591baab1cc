"""Models that are evaluated by name: a run, a timm model with pretrained weights, a RobustBench model."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, get_args

import timm
from torch import nn

from ..attacks.threat_model import Norm
from ..data.datasets import DATASETS
from ..errors import InputError, one_line
from ..models.inference import normalized
from ..models.registry import check_tag
from ..models.weights import check_weights
from ..robustbench import adapt
from ..runs import Run
from ..training.config import variant_base
from ..zoo.robust_models import robust_model_name

MODEL_DIR = "models"  # RobustBench's folder of checkpoints: models/<dataset>/<norm>/<key>.pt


@dataclass(frozen=True)
class NamedModel:
    """A model that was found by its name, and the defaults of its evaluation.

    Attributes:
        name: Run directory, timm name, or RobustBench's key.
        architecture: Of a run; otherwise the name again.
        load: Creates the model, which takes [0, 1] images.
        digest: sha256 of its weights file; None for weights that timm or RobustBench downloads.
        defaults: Dataset, data_dir, norm and eps, where they are not given.
        img_size: Side of the images, in pixels; None for the dataset's.
        in_chans: Channels of the images; None for the dataset's.
        results_folder: Folder of its results.
        classes: Names of the classes that it was trained on, in the order of its outputs; None where the dataset
            determines them, or where they are not known.
    """

    name: str
    architecture: str
    load: Callable[[], nn.Module]
    digest: str | None
    defaults: dict[str, Any]
    img_size: int | None
    in_chans: int | None
    results_folder: Path
    classes: tuple[str, ...] | None = None


def find_model(flag: str, name: str, *, dataset: str | None = None, norm: str | None = None) -> NamedModel:
    """Find a run directory, else a timm model, else a RobustBench model.

    Args:
        flag: Flag of the name, for errors.
        name: Path, timm name, or RobustBench's key (of its model zoo, or of `register_robust_model`).
        dataset: Selects among the RobustBench models of a key.
        norm: Likewise, if the key names several models of the dataset.

    Raises:
        InputError: Nothing or several models have that name, or RobustBench is needed and not installed.
    """
    if Path(name).exists():
        return _run(name, Run.open(name))
    if timm.is_model(name.partition(".")[0]):
        check_tag(flag, name)
        return _timm_model(flag, name)
    return _robustbench_model(flag, name, dataset, norm)


def _run(name: str, run: Run) -> NamedModel:
    train = run.config["train"]
    return NamedModel(
        name=name,
        architecture=train["model"],
        load=run.load_model,
        digest=run.model_digest,
        defaults=train,
        img_size=run.config["img_size"],
        in_chans=run.config["in_chans"],
        results_folder=run.results_folder,
        classes=tuple(run.config["classes"]) if "classes" in run.config else None,
    )


def _timm_model(flag: str, name: str) -> NamedModel:
    if (base := variant_base(name)) is not None:  # its pretrained cfg is the base's, whose classifier does not fit
        raise InputError(
            f"{flag} {name!r} has pretrained weights for all but its head, which would be random. Train it and use the "
            f"run, or evaluate {base}."
        )
    cfg = timm.get_pretrained_cfg(name)
    return NamedModel(
        name=name,
        architecture=name,
        load=lambda: _load_timm(flag, name),
        digest=None,
        defaults={},
        img_size=cfg.input_size[-1] if cfg else None,
        in_chans=cfg.input_size[0] if cfg else None,
        results_folder=Path("runs") / name / "results",
    )


def _load_timm(flag: str, name: str) -> nn.Module:
    try:
        cfg = timm.get_pretrained_cfg(name)
        if cfg is not None:  # a registered robust model has none, and finds its files itself
            check_weights(name.partition(".")[0], cfg, called=f"{flag} {name}")
        model = timm.create_model(name, pretrained=True).eval()
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{flag} {name!r} is a timm model whose weights cannot be read ({one_line(error)})."
        ) from error
    return model if hasattr(model, "normalize") else normalized(model).eval()  # registered robust models normalize


class _Board(NamedTuple):
    """One of RobustBench's leaderboards."""

    dataset: str
    norm: str

    def __str__(self) -> str:
        return f"{self.dataset} {self.norm}"


# RobustBench's eps; for other datasets the default of the dataset applies.
_EPS = {("cifar10", "Linf"): "8/255", ("cifar10", "L2"): "0.5", ("cifar100", "Linf"): "8/255"}


def _robustbench_model(flag: str, key: str, dataset: str | None, norm: str | None) -> NamedModel:
    try:
        robustbench = adapt()
    except InputError as error:
        raise InputError(
            f"{flag} {key!r} is neither a run directory nor a timm model, and RobustBench cannot be used ({error})"
        ) from error
    board = _board(flag, key, _zoo(robustbench), dataset, norm)
    norm = norm or board.norm
    return NamedModel(
        name=key,
        architecture=key,
        load=lambda: _load_robustbench(robustbench, flag, key, board),
        digest=None,
        defaults={"dataset": board.dataset, "norm": norm, "eps": _EPS.get((board.dataset, norm))},
        img_size=None,
        in_chans=None,
        results_folder=Path("runs") / f"{key}_{board.dataset}_{board.norm}" / "results",
    )


def _zoo(robustbench: ModuleType) -> dict[_Board, set[str]]:
    """Return the keys of RobustBench's model zoo, by leaderboard, for one norm."""
    return {
        _Board(dataset.value, threat_model.value): set(models)
        for dataset, boards in robustbench.model_zoo.model_dicts.items()
        for threat_model, models in boards.items()
        if threat_model.value in get_args(Norm)
    }


def _board(flag: str, key: str, zoo: dict[_Board, set[str]], dataset: str | None, norm: str | None) -> _Board:
    """Return the one board of a key: of ``dataset`` if given, and of ``norm`` if several are left."""
    boards = {*zoo, *(_Board(name, each) for name in DATASETS for each in get_args(Norm))}
    everywhere = sorted(board for board in boards if key in zoo.get(board, ()) or _is_registered(key, board))
    found = [board for board in everywhere if dataset in (None, board.dataset)]
    if len(found) > 1:
        found = [board for board in found if board.norm == norm]
    if len(found) == 1:
        return found[0]
    if everywhere:
        raise InputError(
            f"{flag} {key!r} is a RobustBench key for {', '.join(map(str, everywhere))}. Give the --dataset and the "
            "--norm of one of them."
        )
    near = get_close_matches(key, {*timm.list_models(), *chain.from_iterable(zoo.values())})
    hint = f"Did you mean {' or '.join(near)}?" if near else "Give a folder made by train."
    raise InputError(f"{flag} {key!r} is neither a run directory nor a model of timm or RobustBench. {hint}")


def _is_registered(key: str, board: _Board) -> bool:
    """Return whether timm has, for example from `register_robust_model`, the model that RobustBench asks it for."""
    return "." not in key and "/" not in key and timm.is_model(robust_model_name(key, *board))


def _load_robustbench(robustbench: ModuleType, flag: str, key: str, board: _Board) -> nn.Module:
    try:
        return robustbench.utils.load_model(
            model_name=key, dataset=board.dataset, threat_model=board.norm, model_dir=MODEL_DIR
        )
    except InputError:
        raise
    except Exception as error:  # of a download, an archive, a pickle or a state dict, all of different types
        raise InputError(
            f"{flag} {key!r} is RobustBench's model for {board}, which cannot be read ({one_line(error)}). Put its "
            f"weights at {Path(MODEL_DIR, *board, key)}.pt."
        ) from error
