"""The numbers that the D-ReLU paper prints in its tables 1 to 9, under the names of this package.

From Sooksatra and Rivas, Dynamic-Max-Value ReLU Functions for Adversarially Robust Machine Learning Models, Mathematics
2024, 12(22), 3551, https://doi.org/10.3390/math12223551, CC BY 4.0; its text names the models, methods and attacks of
``paper_tables.csv``. Accuracies are means of three trained nets, in percent. Not all ranks are those of the accuracies
printed beside them.
"""

import re
from functools import cache
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

SOURCE = "Sooksatra and Rivas, Mathematics 2024, 12(22), 3551, https://doi.org/10.3390/math12223551 (CC BY 4.0)"
NETS = {
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
# In units of a [0, 1] pixel, Linf; for CIFAR-100 and TinyImageNet no other is given than CIFAR-10's.
EPS = {"mnist": "0.1", "cifar10": "0.01", "cifar100": "0.01", "tiny_imagenet": "0.01"}
CW_BOUND = 18  # L2; not said in which units
_TABLES = {
    ("mnist", False): 1,
    ("cifar10", False): 2,
    ("cifar100", False): 3,
    ("tiny_imagenet", False): 4,
    ("cifar10", True): 6,
    ("cifar100", True): 7,
    ("tiny_imagenet", True): 8,
}
_GENERATED_TRADES = "TRADES-5"  # its text on generated images says beta 5, its tables 6 to 9 nothing


@cache
def read_paper() -> "pd.DataFrame":
    """All printed numbers, a row each.

    Returns:
        Columns ``table`` (1 to 9), ``dataset``, ``net`` (timm's name), ``method`` ("AT", "TRADES-6", "D-ReLU", ...),
        ``training`` (the method with its balancer where one is printed: "D-ReLU-100"), ``column`` (as in `COLUMNS` and
        `SQUARE_COLUMNS`), ``accuracy`` in percent and ``rank``. Not to be changed by the caller.
    """
    import pandas as pd

    with Path(__file__).with_name("paper_tables.csv").open(encoding="utf-8") as file:
        printed = pd.read_csv(file)
    training = printed["training"].replace("TRADES", _GENERATED_TRADES).map(_training)
    names = {printed: net for net, printed in NETS.items()}
    return pd.DataFrame(
        {
            "table": printed["table"],
            "dataset": printed["dataset"],
            "net": printed["model"].map(names),
            "method": training.str.replace(r"^D-ReLU-.*", "D-ReLU", regex=True),
            "training": training,
            "column": printed["attack"].str.replace("_", "-"),
            "accuracy": printed["accuracy_percent"],
            "rank": printed["rank"],
        }
    )


def table_number(dataset: str, *, norm: str, eps: str, generated: bool, square: bool = False) -> int | None:
    """Which of the paper's tables holds a dataset's numbers; None for a dataset or a threat model that it lacks.

    Args:
        dataset: A name such as "cifar10".
        norm: "Linf" or "L2".
        eps: The radius, as in `EPS`.
        generated: Of the nets trained with generated images as well.
        square: The one of the Square attack instead of the white-box attacks.
    """
    if (norm, eps) != ("Linf", EPS.get(dataset)):
        return None
    number = _TABLES.get((dataset, generated))
    if square and number is not None:
        return None if dataset == "mnist" else 9 if generated else 5
    return number


def paper_scores(table: int) -> "pd.DataFrame":
    """A table as its statistics take it: a row a net and column, a column a method, accuracies in percent."""
    printed = read_paper()
    of_table = printed[printed["table"] == table]
    return of_table.pivot(index=["dataset", "net", "column"], columns="method", values="accuracy")


def beside_pgd(attack: str) -> "pd.DataFrame":
    """What the paper prints under PGD and under an attack that knows less, of the same nets, row by row.

    An attack of one step, or without gradients, that leaves less than PGD does is a sign of gradient masking (Athalye
    et al. 2018, https://arxiv.org/abs/1802.00420, section 3.1).

    Args:
        attack: "fgsm" or "square".

    Returns:
        Columns ``method``, ``dataset``, ``net``, ``generated`` (images), ``pgd`` and ``other`` (accuracies in percent).
    """
    printed = read_paper().assign(generated=lambda rows: rows["table"] > 5)
    key = ["method", "dataset", "net", "generated"]
    pgd, other = (
        printed[printed["column"] == column].set_index(key)["accuracy"].rename(name)
        for column, name in (("pgd", "pgd"), (attack, "other"))
    )
    return pgd.to_frame().join(other, how="inner").reset_index()


def net_name(net: str) -> str:
    """As the paper calls a net; one that it lacks keeps timm's name."""
    return NETS.get(net, net)


def paper_order(net: str, method: str) -> tuple[int, str, int, list[tuple[float, str]]]:
    """A key that sorts as the paper's tables do; natural training first, and what they lack last."""
    nets, first = list(NETS), method.split("-")[0] if " + " not in method else ""
    methods = ["natural", "AT", "TRADES", "D"]
    return (
        nets.index(net) if net in nets else len(nets),
        net,
        methods.index(first) if first in methods else len(methods),
        _by_size(method),
    )


def _by_size(method: str) -> list[tuple[float, str]]:
    """A key that sorts the numbers in names by their size: TRADES-6 before TRADES-10."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", method)
    return [(float(part), "") if index % 2 else (inf, part) for index, part in enumerate(parts)]


def _training(printed: str) -> str:
    """A method as the outcomes of this package write it: "D-ReLU-100" for "D-ReLU-10^2"."""
    power = re.fullmatch(r"D-ReLU-10\^(-?\d+)", printed)
    return f"D-ReLU-{10.0 ** int(power[1]):g}" if power else printed
