"""Every attack with its settings, and the suites that put them together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from . import adaptive, attacks, library_attacks
from .attacks import ThreatModel
from .errors import unknown

Kind = Literal["white-box", "black-box", "adaptive"]


@dataclass(frozen=True)
class Attack:
    """A search for adversarial images, with everything that decides what it finds.

    Attributes:
        name: As in tables and files.
        kind: What it uses: the model's own gradients, its outputs only, or knowledge of its caps.
        search: ``(model, images, labels, threat_model, seeds, **settings) -> adversarial images``.
        settings: What ``search`` gets, and what is saved beside the result.
        minimum_norm: It looks for the nearest example and knows no radius.
    """

    name: str
    kind: Kind
    search: Callable[..., Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    minimum_norm: bool = False

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat_model: ThreatModel, seeds: Sequence[int]
    ) -> Tensor:
        """Adversarial images [B, C, H, W], to be judged by the caller."""
        return self.search(model, images, labels, threat_model, seeds, **self.settings)

    def for_classes(self, num_classes: int) -> "Attack":
        """The attack with settings that this number of classes allows.

        There are at most ``num_classes - 1`` targets. The DLR loss divides by a difference to the third largest
        logit, its targeted form by one to the fourth: with fewer classes the margin takes its place.
        """
        settings = dict(self.settings)
        if "n_target_classes" in settings:
            settings["n_target_classes"] = min(settings["n_target_classes"], num_classes - 1)
        needed = 4 if "n_target_classes" in settings else 3
        if settings.get("loss") == "dlr" and num_classes < needed:
            settings["loss"] = "margin"
        return replace(self, settings=settings)


_PGD = {"steps": 40, "relative_step_size": 0.1}
_APGD = {"n_iter": 100, "n_restarts": 1, "rho": 0.75}

# The settings of apgd-ce, apgd-t, fab-t and square are those of AutoAttack standard.
ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        Attack("fgsm", "white-box", attacks.fgsm),
        Attack("pgd", "white-box", attacks.random_start_pgd, {"loss": "ce", **_PGD}),
        Attack("apgd-ce", "white-box", library_attacks.apgd, {"loss": "ce", **_APGD}),
        Attack("apgd-dlr", "white-box", library_attacks.apgd, {"loss": "dlr", **_APGD}),
        Attack("apgd-t", "white-box", library_attacks.apgd_targeted, {"loss": "dlr", "n_target_classes": 9, **_APGD}),
        Attack(
            "fab-t",
            "white-box",
            library_attacks.fab_targeted,
            {"n_iter": 100, "n_restarts": 1, "n_target_classes": 9},
        ),
        Attack(
            "cw-l2",
            "white-box",
            library_attacks.carlini_wagner,
            {"binary_search_steps": 5, "steps": 200, "stepsize": 0.01, "initial_const": 1.0, "confidence": 0.0},
            minimum_norm=True,
        ),
        Attack("square", "black-box", library_attacks.square, {"n_queries": 5000, "n_restarts": 1, "p_init": 0.8}),
        Attack("noise", "black-box", attacks.sign_noise),
        Attack("bpda", "adaptive", adaptive.bpda, {"loss": "scaled-ce", **_PGD}),
        Attack("twin", "adaptive", adaptive.twin, {"loss": "scaled-ce", **_PGD}),
        Attack(
            "annealing",
            "adaptive",
            adaptive.annealing,
            {"loss": "scaled-ce", "rounds": 10, "steps": 10, "relative_step_size": 0.1},
        ),
    )
}

Suite = dict[str, tuple[Attack, ...]]  # column of the result -> attacks, each on what the ones before it left


def _single(*names: str) -> Suite:
    return {name: (ATTACKS[name],) for name in names}


_AUTOATTACK: Suite = {"autoattack": tuple(ATTACKS[name] for name in ("apgd-ce", "apgd-t", "fab-t", "square"))}
_PAPER = _single("fgsm", "pgd", "apgd-ce", "apgd-dlr", "cw-l2", "square")
_SHORT_SQUARE = replace(ATTACKS["square"], settings={**ATTACKS["square"].settings, "n_queries": 500})
# Part of every suite, so that no white-box number stands alone.
_ADAPTIVE = _single("noise", "bpda", "twin", "annealing")

SUITES: dict[str, Suite] = {
    "quick": _single("pgd", "apgd-ce") | {"square": (_SHORT_SQUARE,)} | _ADAPTIVE,
    "paper": _PAPER | _ADAPTIVE,
    "standard": _single("pgd") | _AUTOATTACK | _ADAPTIVE,
    "all": _PAPER | _AUTOATTACK | _ADAPTIVE,
}


def find_suite(name: str, num_classes: int) -> Suite:
    """The columns of a suite, each with its attacks set for a number of classes.

    Raises:
        InputError: No suite of that name.
    """
    if name not in SUITES:
        raise unknown("--suite", name, SUITES)
    return {
        column: tuple(attack.for_classes(num_classes) for attack in attacks) for column, attacks in SUITES[name].items()
    }
