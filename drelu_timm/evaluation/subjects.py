"""What can be attacked by name: a run, a timm model with pretrained weights, a model of RobustBench."""

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
from ..zoo.robust_models import robust_model_name

MODEL_DIR = "models"  # where RobustBench keeps its checkpoints: models/<dataset>/<norm>/<key>.pt


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated, and what goes with it.

    Attributes:
        run: Run directory, timm name, or RobustBench's key.
        model: Architecture, or the name again.
        load: Makes the model, which takes [0, 1] images.
        digest: sha256 of its weights file; None for weights that timm or RobustBench downloads.
        defaults: Dataset, data_dir, norm and eps where they are not given.
        img_size: Side of the images, in pixels; None for the dataset's own.
        in_chans: Channels of the images; None for the dataset's own.
        classes: Names of the classes that it was trained on, in the order of its outputs; None where the dataset
            determines them, or where they are not known.
        results_folder: Where results go.
    """

    run: str
    model: str
    load: Callable[[], nn.Module]
    digest: str | None
    defaults: dict[str, Any]
    img_size: int | None
    in_chans: int | None
    results_folder: Path
    classes: tuple[str, ...] | None = None


def find_subject(flag: str, name: str, *, dataset: str | None = None, norm: str | None = None) -> Subject:
    """The run in a directory, else the timm model, else the RobustBench model of a name.

    Args:
        flag: What errors call the name.
        name: Path, timm name, or RobustBench's key (one in its model zoo, or one of `register_robust_model`).
        dataset: Chooses among RobustBench's models of that key.
        norm: Likewise, where the key stands for several models of the dataset.

    Raises:
        InputError: Nothing has that name, several models have it, or RobustBench is needed and not installed.
    """
    if Path(name).exists():
        return _run_subject(name, Run.open(name))
    if timm.is_model(name.partition(".")[0]):
        check_tag(flag, name)
        return _timm_subject(flag, name)
    return _robustbench_subject(flag, name, dataset, norm)


def _run_subject(name: str, run: Run) -> Subject:
    train = run.config["train"]
    return Subject(
        run=name,
        model=train["model"],
        load=run.load_model,
        digest=run.model_digest,
        defaults=train,
        img_size=run.config["img_size"],
        in_chans=run.config["in_chans"],
        results_folder=run.results_folder,
        classes=tuple(run.config["classes"]) if "classes" in run.config else None,
    )


def _timm_subject(flag: str, name: str) -> Subject:
    architecture = name.partition(".")[0]
    if architecture.endswith(
        "_drelu"
    ):  # its pretrained cfg is the base's, whose classifier does not fit behind the head
        raise InputError(
            f"{flag} {name!r} has trained weights for all but its head, which would be a random one; train it and give "
            f"the run, or evaluate {architecture.removesuffix('_drelu')}"
        )
    cfg = timm.get_pretrained_cfg(name)
    return Subject(
        run=name,
        model=name,
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
        if cfg is not None:  # a registered robust model has none, and looks for its files itself
            check_weights(name.partition(".")[0], cfg, called=f"{flag} {name}")
        model = timm.create_model(name, pretrained=True).eval()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{flag} {name!r} is a timm model whose weights cannot be read ({one_line(error)})") from error
    return model if hasattr(model, "normalize") else normalized(model).eval()  # registered robust models normalise


class _Place(NamedTuple):
    """A model in RobustBench: the board that it stands on."""

    dataset: str
    norm: str

    def __str__(self) -> str:
        return f"{self.dataset} {self.norm}"


# The radii of RobustBench's boards; on other datasets the dataset's own.
_EPS = {("cifar10", "Linf"): "8/255", ("cifar10", "L2"): "0.5", ("cifar100", "Linf"): "8/255"}


def _robustbench_subject(flag: str, key: str, dataset: str | None, norm: str | None) -> Subject:
    try:
        robustbench = adapt()
    except InputError as error:
        raise InputError(
            f"{flag} {key!r} is neither a run directory nor a timm model, and not looked for in RobustBench ({error})"
        ) from error
    place = _place(flag, key, _zoo(robustbench), dataset, norm)
    norm = norm or place.norm
    return Subject(
        run=key,
        model=key,
        load=lambda: _load_robustbench(robustbench, flag, key, place),
        digest=None,
        defaults={"dataset": place.dataset, "norm": norm, "eps": _EPS.get((place.dataset, norm))},
        img_size=None,
        in_chans=None,
        results_folder=Path("runs") / f"{key}_{place.dataset}_{place.norm}" / "results",
    )


def _zoo(robustbench: ModuleType) -> dict[_Place, set[str]]:
    """The keys of RobustBench's model zoo on every board that has a norm."""
    return {
        _Place(dataset.value, threat_model.value): set(models)
        for dataset, boards in robustbench.model_zoo.model_dicts.items()
        for threat_model, models in boards.items()
        if threat_model.value in get_args(Norm)
    }


def _place(flag: str, key: str, zoo: dict[_Place, set[str]], dataset: str | None, norm: str | None) -> _Place:
    """The one board that has the model of a key: of ``dataset`` if given, and of ``norm`` where that leaves several."""
    boards = {*zoo, *(_Place(name, each) for name in DATASETS for each in get_args(Norm))}
    everywhere = sorted(board for board in boards if key in zoo.get(board, ()) or _is_registered(key, board))
    places = [place for place in everywhere if dataset in (None, place.dataset)]
    if len(places) > 1:
        places = [place for place in places if place.norm == norm]
    if len(places) == 1:
        return places[0]
    if everywhere:
        raise InputError(
            f"{flag} {key!r} is RobustBench's name of models for {', '.join(map(str, everywhere))}; "
            "give the --dataset and the --norm of one of them"
        )
    near = get_close_matches(key, {*timm.list_models(), *chain.from_iterable(zoo.values())})
    hint = f"did you mean {' or '.join(near)}?" if near else "give a folder made by train"
    raise InputError(f"{flag} {key!r} is neither a run directory nor a model of timm or RobustBench; {hint}")


def _is_registered(key: str, place: _Place) -> bool:
    """Whether `register_robust_model`, or anybody else, gave timm the model that RobustBench looks for."""
    return "." not in key and "/" not in key and timm.is_model(robust_model_name(key, *place))


def _load_robustbench(robustbench: ModuleType, flag: str, key: str, place: _Place) -> nn.Module:
    try:
        return robustbench.utils.load_model(
            model_name=key, dataset=place.dataset, threat_model=place.norm, model_dir=MODEL_DIR
        )
    except InputError:
        raise
    except Exception as error:  # a download, an archive, a pickle or a state dict: each fails in its own way
        raise InputError(
            f"{flag} {key!r} is RobustBench's model for {place}, which cannot be read ({one_line(error)}); "
            f"put its weights at {Path(MODEL_DIR, *place, key)}.pt"
        ) from error
