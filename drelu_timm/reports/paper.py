"""Numbers that the D-ReLU paper prints in its tables 1 to 9, under the names of this package.

Source: Sooksatra and Rivas, Dynamic-Max-Value ReLU Functions for Adversarially Robust Machine Learning Models,
Mathematics 2024, 12(22), 3551, https://doi.org/10.3390/math12223551, CC BY 4.0. ``paper_tables.csv`` has the models,
methods and attacks as its text names them. Accuracies are means of three trained models, in percent. Not all printed
ranks agree with the printed accuracies.
"""

import re
from functools import cache
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

SOURCE = "Sooksatra and Rivas, Mathematics 2024, 12(22), 3551, https://doi.org/10.3390/math12223551 (CC BY 4.0)"
MODELS = {
    "dense": "Dense",
    "shallow_cnn": "Shallow CNN",
    "resnet50": "ResNet50",
    "resnet101": "ResNet101",
    "mobilenetv2_100": "MobilenetV2",
    "inception_v3": "InceptionV3",
}
COLUMNS = {
    "clean": "Clean",
    "fgsm": "FGSM",
    "pgd": "PGD",
    "apgd-ce": "APGD_CE",
    "apgd-dlr": "APGD_DLR",
    "cw-l2": "CW_L2",
}
SQUARE_COLUMNS = {"clean": "Clean", "square": "Square"}
# Linf, in units of a [0, 1] pixel. The paper gives none for CIFAR-100 and TinyImageNet other than CIFAR-10's.
EPS = {"mnist": "0.1", "cifar10": "0.01", "cifar100": "0.01", "tiny_imagenet": "0.01"}
CW_BOUND = 18  # L2; the paper does not state the units
# Statistics of table 2, as printed; the critical difference does not follow from its methods and blocks.
PRINTED_STATISTICS = {"F": "17.4", "chi-square": "39.43", "F_F": "20.12", "critical difference": "0.656"}
_TABLES = {
    ("mnist", False): 1,
    ("cifar10", False): 2,
    ("cifar100", False): 3,
    ("tiny_imagenet", False): 4,
    ("cifar10", True): 6,
    ("cifar100", True): 7,
    ("tiny_imagenet", True): 8,
}
_GENERATED_TRADES = "TRADES-5"  # beta of tables 6 to 9, by the text on generated images


@cache
def read_paper() -> "pd.DataFrame":
    """Read all printed numbers, one per row.

    Returns:
        Columns ``table`` (1 to 9), ``dataset``, ``model`` (timm's name), ``method`` ("AT", "TRADES-6", "D-ReLU", ...),
        ``training`` (the method with its cap weight where one is printed: "D-ReLU-100"), ``column`` (as in `COLUMNS`
        and `SQUARE_COLUMNS`), ``accuracy`` in percent and ``rank``. It is cached, so it must not be changed.
    """
    import pandas as pd

    with Path(__file__).with_name("paper_tables.csv").open(encoding="utf-8") as file:
        printed = pd.read_csv(file)
    training = printed["training"].replace("TRADES", _GENERATED_TRADES).map(_training)
    names = {printed: model for model, printed in MODELS.items()}
    return pd.DataFrame(
        {
            "table": printed["table"],
            "dataset": printed["dataset"],
            "model": printed["model"].map(names),
            "method": training.str.replace(r"^D-ReLU-.*", "D-ReLU", regex=True),
            "training": training,
            "column": printed["attack"].str.replace("_", "-"),
            "accuracy": printed["accuracy_percent"],
            "rank": printed["rank"],
        }
    )


def table_number(dataset: str, *, norm: str, eps: str, generated: bool, square: bool = False) -> int | None:
    """Return which table of the paper has a dataset's numbers; None for a dataset or threat model that it lacks.

    Args:
        dataset: A name such as "cifar10".
        norm: "Linf" or "L2".
        eps: As in `EPS`.
        generated: Whether the models were trained with generated images too.
        square: Return the table of the Square attack, not of the white-box attacks.
    """
    if (norm, eps) != ("Linf", EPS.get(dataset)):
        return None
    number = _TABLES.get((dataset, generated))
    if square and number is not None:
        return None if dataset == "mnist" else 9 if generated else 5
    return number


def paper_scores(table: int) -> "pd.DataFrame":
    """Return a table for its statistics: one row per model and attack, one column per method, in percent."""
    printed = read_paper()
    of_table = printed[printed["table"] == table]
    return of_table.pivot(index=["dataset", "model", "column"], columns="method", values="accuracy")


def pgd_and_weaker(attack: str) -> "pd.DataFrame":
    """Return the paper's accuracies under PGD and under a weaker attack, row by row for the same models.

    A lower accuracy under a single step, or without gradients, than under PGD is a sign of gradient masking (Athalye et
    al. 2018, https://arxiv.org/abs/1802.00420, section 3.1).

    Args:
        attack: "fgsm" or "square".

    Returns:
        Columns ``method``, ``dataset``, ``model``, ``generated`` (images), ``pgd`` and ``weaker`` (both in percent).
    """
    printed = read_paper().assign(generated=lambda rows: rows["table"] > 5)
    key = ["method", "dataset", "model", "generated"]
    pgd, weaker = (
        printed[printed["column"] == column].set_index(key)["accuracy"].rename(name)
        for column, name in (("pgd", "pgd"), (attack, "weaker"))
    )
    return pgd.to_frame().join(weaker, how="inner").reset_index()


def model_name(architecture: str) -> str:
    """Return the paper's name of an architecture; one that it lacks keeps timm's name."""
    return MODELS.get(architecture, architecture)


def paper_order(architecture: str, method: str) -> tuple[int, str, int, list[tuple[float, str]]]:
    """Return a key that sorts as in the paper's tables, with natural training first and what they lack last."""
    models, first = list(MODELS), method.split("-")[0] if " + " not in method else ""
    methods = ["natural", "AT", "TRADES", "D"]
    return (
        models.index(architecture) if architecture in models else len(models),
        architecture,
        methods.index(first) if first in methods else len(methods),
        _by_size(method),
    )


def _by_size(method: str) -> list[tuple[float, str]]:
    """Return a key that sorts numbers in names by size: TRADES-6 before TRADES-10."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", method)
    return [(float(part), "") if index % 2 else (inf, part) for index, part in enumerate(parts)]


def _training(printed: str) -> str:
    """Return a method as this package writes it: "D-ReLU-100" for "D-ReLU-10^2"."""
    power = re.fullmatch(r"D-ReLU-10\^(-?\d+)", printed)
    return f"D-ReLU-{10.0 ** int(power[1]):g}" if power else printed
