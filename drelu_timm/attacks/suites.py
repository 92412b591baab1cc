"""Every attack with its settings, and the suites that combine them."""

from ..errors import unknown
from .adaptive import BPDA, Annealing, BPDAWithAPGD, Restarts, Surrogate, TargetedAnnealing, Transfer
from .apgd import APGD, TargetedAPGD
from .attack import Attack
from .estimated import EstimatedPGD
from .minimum_norm import CarliniWagner, TargetedFAB
from .pgd import FGSM, PGD, SignNoise
from .square import Square

# By the name in tables and files. apgd-ce, apgd-t, fab-t and square have the settings of AutoAttack standard;
# each has one restart.
ATTACKS: dict[str, Attack] = {
    "fgsm": FGSM(),
    "pgd": PGD(),
    "apgd-ce": APGD(),
    "apgd-dlr": APGD(loss="dlr"),
    "apgd-t": TargetedAPGD(),
    "fab-t": TargetedFAB(),
    "cw-l2": CarliniWagner(),
    "square": Square(),
    "estimated": EstimatedPGD(n_queries=4850, samples=48),
    "noise": SignNoise(),
    "restarts": Restarts(),
    "bpda": BPDA(),
    "bpda-soft": BPDA(substitute="soft"),
    "bpda-straight-through": BPDA(substitute="straight-through"),
    "bpda-apgd": BPDAWithAPGD(),
    "twin": Surrogate(),  # its name in published results, which are sealed by digests
    "annealing": Annealing(),
    "annealing-t": TargetedAnnealing(),
    "transfer": Transfer(),  # its second model is named by `evaluate --transfer-from`
}

# For each column of the result its attacks by name, each on the examples that the ones before it left.
Suite = dict[str, dict[str, Attack]]


def _single(*names: str) -> Suite:
    return {name: {name: ATTACKS[name]} for name in names}


_AUTOATTACK: Suite = {"autoattack": {name: ATTACKS[name] for name in ("apgd-ce", "apgd-t", "fab-t", "square")}}
_PAPER = _single("fgsm", "pgd", "apgd-ce", "apgd-dlr", "cw-l2", "square")
_SHORT_APGD: dict[str, Attack] = {"apgd-ce": APGD(n_iter=20), "apgd-t": TargetedAPGD(n_iter=20, n_target_classes=3)}
# Run on every model with layers that they know, so that a white-box accuracy is never reported alone.
_ADAPTIVE = _single("bpda", "bpda-soft", "twin")
_ALL_ADAPTIVE = _single("restarts", "noise") | _ADAPTIVE
_ALL_ADAPTIVE |= _single("bpda-straight-through", "bpda-apgd", "annealing", "annealing-t", "estimated")

# The probes for masking (`evaluation.masking`) run in addition, and the examples on which they fool the model count.
SUITES: dict[str, Suite] = {
    "quick": {"apgd-ce": {"apgd-ce": _SHORT_APGD["apgd-ce"]}, "apgd": _SHORT_APGD} | _ADAPTIVE,
    "paper": _PAPER | _ADAPTIVE,
    "autoattack": _AUTOATTACK,
    "standard": _single("pgd") | _AUTOATTACK | _ADAPTIVE,
    "adaptive": _single("pgd") | _ALL_ADAPTIVE,
    "all": _PAPER | _AUTOATTACK | _ALL_ADAPTIVE,
}


def single_attacks(suite: Suite) -> dict[str, Attack]:
    """Return the attacks of a suite by name, each once."""
    return {name: attack for attacks in suite.values() for name, attack in attacks.items()}


def find_suite(name: str, num_classes: int, *, adaptive: bool = True) -> Suite:
    """Return the columns of a suite, with the settings of each attack adapted to a number of classes.

    Args:
        name: Name of the suite.
        num_classes: Classes of the model.
        adaptive: Whether the model has layers that adaptive attacks know. Without any, these attacks are left out.

    Raises:
        InputError: Unknown suite.
    """
    if name not in SUITES:
        raise unknown("--suite", name, SUITES)
    return {
        column: {attack_name: attack.for_classes(num_classes) for attack_name, attack in attacks.items()}
        for column, attacks in SUITES[name].items()
        if adaptive or not any(attack.kind == "adaptive" for attack in attacks.values())
    }
