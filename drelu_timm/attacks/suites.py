"""Every attack with its settings, and the suites that put them together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import unknown
from . import adaptive, library, pgd
from .pgd import Found
from .square import square
from .threat_model import ThreatModel

Kind = Literal["white-box", "black-box", "adaptive", "transfer"]


@dataclass(frozen=True)
class Attack:
    """A search for adversarial images, with everything that decides what it finds.

    Attributes:
        name: As in tables and files.
        kind: What it uses: the model's own gradients, its outputs only, knowledge of its caps, or another model.
        search: ``(model, images, labels, threat_model, seeds, **settings) -> Found``.
        settings: What ``search`` gets, and what is saved beside the result.
        minimum_norm: It looks for the nearest example and knows no radius.
        warm_start: ``search`` takes ``start``, a point in the ball to begin from.
        source: A second model, which ``search`` takes where it is given.
    """

    name: str
    kind: Kind
    search: Callable[..., Found]
    settings: dict[str, Any] = field(default_factory=dict)
    minimum_norm: bool = False
    warm_start: bool = False
    source: nn.Module | None = None

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        threat_model: ThreatModel,
        seeds: Sequence[int],
        start: Tensor | None = None,
    ) -> Found:
        """Adversarial images [B, C, H, W], to be judged by the caller; ``start`` is used by those that can."""
        more: dict[str, Any] = {}
        if self.warm_start and start is not None:
            more["start"] = start
        if self.source is not None:
            more["source"] = self.source
        return self.search(model, images, labels, threat_model, seeds, **more, **self.settings)

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
_APGD = {"n_iter": 100, "rho": 0.75}
_BPDA = {"loss": "scaled-ce", "substitute": "leaky"}
_BRIEF = {"steps": 20, "relative_step_size": 0.2}
_ANNEALING = {"rounds": 10, "steps": 10, "relative_step_size": 0.1}
_TARGETED_ANNEALING = {"n_target_classes": 9, "rounds": 5, "steps": 10, "relative_step_size": 0.2}

# The settings of apgd-ce, apgd-t, fab-t and square are those of AutoAttack standard; each has one restart.
ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        Attack("fgsm", "white-box", pgd.fgsm),
        Attack("pgd", "white-box", pgd.random_start_pgd, {"loss": "ce", **_PGD}, warm_start=True),
        Attack("apgd-ce", "white-box", library.apgd, {"loss": "ce", **_APGD}, warm_start=True),
        Attack("apgd-dlr", "white-box", library.apgd, {"loss": "dlr", **_APGD}, warm_start=True),
        Attack(
            "apgd-t",
            "white-box",
            library.apgd_targeted,
            {"loss": "dlr", "n_target_classes": 9, **_APGD},
            warm_start=True,
        ),
        Attack("fab-t", "white-box", library.fab_targeted, {"n_iter": 100, "n_target_classes": 9}),
        Attack(
            "cw-l2",
            "white-box",
            library.carlini_wagner,
            {"binary_search_steps": 5, "steps": 200, "stepsize": 0.01, "initial_const": 1.0, "confidence": 0.0},
            minimum_norm=True,
        ),
        Attack("square", "black-box", square, {"n_queries": 5000, "p_init": 0.8}),
        Attack("noise", "black-box", pgd.sign_noise),
        Attack("restarts", "white-box", adaptive.restarts, {"loss": "ce", "restarts": 10, **_BRIEF}),
        Attack("bpda", "adaptive", adaptive.bpda, {**_BPDA, **_BRIEF}, warm_start=True),
        Attack("bpda-soft", "adaptive", adaptive.bpda, {**_BPDA, "substitute": "soft", **_BRIEF}, warm_start=True),
        Attack(
            "bpda-straight-through",
            "adaptive",
            adaptive.bpda,
            {**_BPDA, "substitute": "straight-through", **_BRIEF},
            warm_start=True,
        ),
        Attack(
            "bpda-apgd", "adaptive", adaptive.bpda_apgd, {"loss": "ce", "substitute": "leaky", **_APGD}, warm_start=True
        ),
        Attack("twin", "adaptive", adaptive.twin, {**_BPDA, **_BRIEF}, warm_start=True),
        Attack("annealing", "adaptive", adaptive.annealing, {"loss": "scaled-ce", **_ANNEALING}, warm_start=True),
        Attack("annealing-t", "adaptive", adaptive.targeted_annealing, _TARGETED_ANNEALING, warm_start=True),
        # Of a second model, which `evaluate --transfer-from` names.
        Attack("transfer", "transfer", adaptive.transfer, {"loss": "margin", **_PGD}, warm_start=True),
    )
}

Suite = dict[str, tuple[Attack, ...]]  # column of the result -> attacks, each on what the ones before it left


def _single(*names: str) -> Suite:
    return {name: (ATTACKS[name],) for name in names}


def _with(name: str, **settings: Any) -> Attack:
    return replace(ATTACKS[name], settings={**ATTACKS[name].settings, **settings})


_AUTOATTACK: Suite = {"autoattack": tuple(ATTACKS[name] for name in ("apgd-ce", "apgd-t", "fab-t", "square"))}
_PAPER = _single("fgsm", "pgd", "apgd-ce", "apgd-dlr", "cw-l2", "square")
_SHORT_APGD = (_with("apgd-ce", n_iter=20), _with("apgd-t", n_iter=20, n_target_classes=3))
# So that no white-box number stands alone; for models that have anything to adapt to.
_ADAPTIVE = _single("bpda", "bpda-soft", "twin")
_ALL_ADAPTIVE = _single("restarts", "noise") | _ADAPTIVE
_ALL_ADAPTIVE |= _single("bpda-straight-through", "bpda-apgd", "annealing", "annealing-t")

# The probes for masking (`evaluation.masking`) come on top, and what they break is broken.
SUITES: dict[str, Suite] = {
    "quick": {"apgd-ce": _SHORT_APGD[:1], "apgd": _SHORT_APGD} | _ADAPTIVE,
    "paper": _PAPER | _ADAPTIVE,
    "autoattack": _AUTOATTACK,
    "standard": _single("pgd") | _AUTOATTACK | _ADAPTIVE,
    "adaptive": _single("pgd") | _ALL_ADAPTIVE,
    "all": _PAPER | _AUTOATTACK | _ALL_ADAPTIVE,
}


def find_suite(name: str, num_classes: int, *, adaptive: bool = True) -> Suite:
    """The columns of a suite, each with its attacks set for a number of classes.

    Args:
        name: Of the suite.
        num_classes: Of the model.
        adaptive: Whether the model has anything that adaptive attacks know of; without, they are left out.

    Raises:
        InputError: No suite of that name.
    """
    if name not in SUITES:
        raise unknown("--suite", name, SUITES)
    return {
        column: tuple(attack.for_classes(num_classes) for attack in stages)
        for column, stages in SUITES[name].items()
        if adaptive or not any(attack.kind == "adaptive" for attack in stages)
    }
