"""The verdict on gradient masking from the signals, the probes and the attacks of a suite, and its evidence."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from scipy.stats import binomtest
from torch import Tensor

from ..results.result import Verdict, Word
from .layers import HidingLayer
from .masking import FAR, STRONGER, WHITE_BOX, is_suspicious

# Set on the models of scripts/masking_battery.py and on the development set of scripts/verdict_test.
_MASKED_ABOVE = 0.05  # share of examples that some attacks miss and others do not; 4 % on long-trained ReLU models
_SOUND_BELOW = 0.10
_UNION_MASKED_ABOVE = 0.08  # the same for all gaps together
_UNION_SOUND_BELOW = 0.13
_FEWEST = 100  # examples for "sound"
# Adversarial training with caps, whose zero gradients hide nothing at eps, leaves some 20 % there.
_STUCK_ABOVE = 1 / 3  # of the examples beyond chance that stay correct at an eps where nothing can be robust
_CHANCE_TELLS_BELOW = 0.7  # above it, too few examples are beyond chance

# Shares of examples that an attack misses, and that another one finds by scaled logits, by more starting points, or
# without following the gradient at the point alone.
_GAPS = ("broken_by_rescaled", "broken_by_restarts", "hidden")

_SENTENCES = {  # by probe, on examples that the earlier ones left
    "rescaled": "PGD on rescaled logits, which saturate no softmax, fools the model on {} that PGD left.",
    "margin": "PGD on the margin adds {}.",
    "restarts": "More restarts of fewer steps add {}.",
    "noise": "Random sign noise adds {}.",
    "averaged": "Gradients averaged over noise add {}.",
    "square": "Square, which uses no gradient, adds {}.",
    "annealing": "Caps that sharpen during the attack add {}.",
    STRONGER: "PGD on gradients estimated from differences adds {}.",
}


def verdict(
    labels: Tensor,
    flags: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    broken: Mapping[str, Tensor],
    hidden: Tensor,
    layers: Sequence[HidingLayer] = (),
) -> Verdict:
    """Return the verdict of the signals, the probes and the attacks of a suite.

    Args:
        labels: [n], of the examples that were probed.
        flags: Those of `masking.signals`, [n] each.
        gradients: Those of `fidelity.gradient_flags`, on a part of these examples.
        broken: By probe, [n]: the examples on which it fooled the model; False for examples that it did not get.
        hidden: [n], the examples that the suite's white-box attacks left and another of its attacks did not.
        layers: Layers that hide the gradient, for the evidence only.
    """
    if not len(labels):
        nothing = "No example is classified correctly, so there is nothing to attack."
        return Verdict("undecided", (nothing,), {"examples": 0})
    white_box = _any(broken, WHITE_BOX)
    others = hidden | _any(broken, broken.keys() - {*WHITE_BOX, FAR})
    shares = {
        **flags,
        **gradients,
        **{f"broken_by_{name}": flag for name, flag in broken.items()},
        "withstand_pgd": ~broken["pgd"],
        "withstand_white_box": ~white_box,
        "withstand_all": ~white_box & ~others,
        "hidden": ~white_box & others,
        "stuck": ~white_box & ~broken[FAR],
    }
    shares["any_gap"] = torch.stack([shares[name] for name in _GAPS]).any(dim=0)
    numbers = {"examples": len(labels), "chance": int(labels.bincount().max()) / len(labels)}
    numbers |= {name: float(flag.double().mean()) for name, flag in shares.items()}
    for name in (*_GAPS, "any_gap", "stuck"):
        # Of a binomial share (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953).
        interval = binomtest(int(shares[name].sum()), len(labels)).proportion_ci(0.95, method="wilson")
        numbers[f"{name}_low"], numbers[f"{name}_high"] = float(interval.low), float(interval.high)
    numbers["suspicious"] = float(is_suspicious(flags, gradients, broken))
    word = _conclusion(numbers)
    return Verdict(word, (*_evidence(numbers), *map(str, layers), *_advice(numbers, word, layers)), numbers)


def needs_more_examples(found: Verdict) -> bool:
    """Return whether more examples can turn an undecided verdict into another one."""
    return found.verdict == "undecided" and found.numbers["examples"] > 0 and not found.numbers["unsteady"]


def _any(broken: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    return torch.stack([broken[name] for name in names]).any(dim=0)


def _limits(numbers: Mapping[str, float]) -> Iterator[tuple[str, float, float]]:
    """Yield shares by name, above which limit the model is masked, and below which one it can be sound."""
    for gap in _GAPS:
        yield gap, _MASKED_ABOVE, _SOUND_BELOW
    yield "any_gap", _UNION_MASKED_ABOVE, _UNION_SOUND_BELOW
    if numbers["chance"] < _CHANCE_TELLS_BELOW:
        above = numbers["chance"] + (1 - numbers["chance"]) * _STUCK_ABOVE
        yield "stuck", above, above


def _conclusion(numbers: Mapping[str, float]) -> Word:
    limits = list(_limits(numbers))
    if any(numbers[f"{name}_low"] > masked_above for name, masked_above, _ in limits):
        return "masked"
    found_all = all(numbers[f"{name}_high"] < sound_below for name, _, sound_below in limits)
    looked = not numbers["suspicious"] or f"broken_by_{STRONGER}" in numbers
    enough = numbers["examples"] >= _FEWEST
    return "sound" if found_all and looked and enough and not numbers["unsteady"] else "undecided"


def _evidence(numbers: Mapping[str, float]) -> Iterator[str]:
    """Yield a sentence per signal; those that decide come first."""

    def percent(name: str) -> str:
        return f"{100 * numbers[name]:.1f} %"

    def with_interval(name: str) -> str:
        return f"{percent(name)} (95 % interval {100 * numbers[f'{name}_low']:.1f} to {percent(f'{name}_high')})"

    yield (
        f"Of {numbers['examples']} correctly classified examples, {percent('withstand_pgd')} stay correct under PGD, "
        f"{percent('withstand_white_box')} under every white-box attack, {percent('withstand_all')} under all attacks."
    )
    yield f"Attacks without the gradient, or with a repaired one, fool the model on {with_interval('hidden')} more."
    if numbers["chance"] < _CHANCE_TELLS_BELOW:
        yield (
            f"At an eps that reaches the gray image from everywhere, at most {percent('chance')} (chance) can stay "
            f"correct; white-box PGD leaves {with_interval('stuck')}."
        )
    else:
        yield (
            f"{percent('chance')} of the examples are of one class, so that an eps at which nothing can be robust "
            "does not show whether attacks fail."
        )
    if numbers["unsteady"]:
        yield (
            f"In other batches, {percent('unsteady')} get other logits and {percent('changed')} another class: the "
            "forward pass is not deterministic or depends on the other images of a batch. The verdict cannot be sound."
        )
    else:
        yield "The forward pass is deterministic."
    yield (
        f"The input gradient is zero, or not finite, for {percent('zero_gradient_ce')} (cross-entropy) and "
        f"{percent('zero_gradient_margin')} (margin)."
    )
    if numbers["misleading"] or numbers["not_finite"]:
        yield (
            f"The input gradient is not the derivative of the margin, measured by differences, for "
            f"{percent('misleading')}; a part of it is NaN or infinite for {percent('not_finite')}."
        )
    for name, sentence in _SENTENCES.items():
        if f"broken_by_{name}" in numbers:
            yield sentence.format((with_interval if f"broken_by_{name}" in _GAPS else percent)(f"broken_by_{name}"))


def _advice(numbers: Mapping[str, float], word: Word, layers: Sequence[HidingLayer]) -> Iterator[str]:
    """Yield what a user can do next."""
    if word == "sound":
        return
    yield "The worst case is an upper bound of the robust accuracy: stronger attacks can find more."
    if kinds := dict.fromkeys(type(hiding.layer).__name__ for hiding in layers if hiding.name):
        yield (
            f"Register what attacks differentiate instead of {' and '.join(kinds)}, for example the identity: "
            f"attacks.adaptive.backward.register({next(iter(kinds))}, lambda layer, x, clamp: x)."
        )
    if word == "masked":
        yield (
            "Evaluate with --transfer-from a model without the trick: for preprocessing and purification, the "
            "undefended model."
        )
    elif numbers["examples"] < _FEWEST:
        yield f"A verdict can be sound from {_FEWEST} correctly classified examples on. Evaluate more."
    elif not numbers["unsteady"]:
        yield "A share is too close to its limit. Evaluate more examples."
