"""The verdict on gradient masking from the signals, the probes and the attacks of a suite, and its evidence.

The limits, and the rule that the verdict follows from, are in `results.result.conclusion`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..results.result import CHANCE_TELLS_BELOW, FEWEST, GAPS, Verdict, Word, conclusion, share_interval
from .layers import HidingLayer
from .masking import FAR, STRONGER, WHITE_BOX, is_suspicious

_SENTENCES = {  # by probe; its share counts only examples on which earlier probes failed
    "rescaled": "PGD on rescaled logits, which saturate no softmax, fools the model on {} that PGD left.",
    "margin": "PGD on the margin adds {}.",
    "restarts": "More restarts of fewer steps add {}.",
    "noise": "Random sign noise adds {}.",
    "averaged": "Gradients averaged over noise add {}.",
    "square": "Square, which uses no gradient, adds {}.",
    "annealing": "Cap annealing adds {}.",
    STRONGER: "PGD on gradients estimated from differences adds {}.",
}


def verdict(
    labels: Tensor,
    flags: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    broken: Mapping[str, Tensor],
    hidden: Tensor,
    layers: Sequence[HidingLayer] = (),
    correct: Tensor | None = None,
) -> Verdict:
    """Return the verdict of the signals, the probes and the attacks of a suite.

    Args:
        labels: [n], of the examples that were probed.
        flags: From `masking.signals`, [n] each.
        gradients: From `fidelity.gradient_flags`, on a part of these examples.
        broken: By probe, [n]: the examples on which it fooled the model; False for examples that it did not attack.
        hidden: [n], the examples that only attacks other than white-box ones in the suite fooled.
        layers: Layers that hide the gradient, for the evidence only.
        correct: [N], which of all examples are classified correctly, for the evidence only.
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
    shares["any_gap"] = torch.stack([shares[name] for name in GAPS]).any(dim=0)
    numbers = {"examples": len(labels), "chance": int(labels.bincount().max()) / len(labels)}
    numbers |= {name: float(flag.double().mean()) for name, flag in shares.items()}
    for name in (*GAPS, "any_gap", "stuck"):
        numbers[f"{name}_low"], numbers[f"{name}_high"] = share_interval(int(shares[name].sum()), len(labels))
    numbers["suspicious"] = float(is_suspicious(flags, gradients, broken))
    word = conclusion(numbers)
    evidence = [*_evidence(numbers), *map(str, layers)]
    if word != "sound":
        evidence += [*_upper_bound(numbers, correct), *_advice(numbers, word, layers)]
    return Verdict(word, tuple(evidence), numbers)


def needs_more_examples(found: Verdict) -> bool:
    """Return whether more examples can turn an undecided verdict into another one."""
    return found.verdict == "undecided" and found.numbers["examples"] > 0 and not found.numbers["unsteady"]


def _any(broken: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    return torch.stack([broken[name] for name in names]).any(dim=0)


def _evidence(numbers: Mapping[str, float]) -> Iterator[str]:
    """Yield a sentence per signal; the deciding ones come first."""

    def percent(name: str) -> str:
        return f"{100 * numbers[name]:.1f} %"

    def with_interval(name: str) -> str:
        return f"{percent(name)} (95 % interval {100 * numbers[f'{name}_low']:.1f} to {percent(f'{name}_high')})"

    yield (
        f"Of {numbers['examples']} correctly classified examples, {percent('withstand_pgd')} stay correct under PGD, "
        f"{percent('withstand_white_box')} under every white-box attack, {percent('withstand_all')} under all attacks."
    )
    yield f"Attacks without the gradient, or with a repaired one, fool the model on {with_interval('hidden')} more."
    if numbers["chance"] < CHANCE_TELLS_BELOW:
        yield (
            f"At an eps at which every image can become the same gray image, at most {percent('chance')} (chance) can "
            f"stay correct; white-box PGD leaves {with_interval('stuck')}."
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
        yield "A second forward pass gives the same logits."
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
            yield sentence.format((with_interval if f"broken_by_{name}" in GAPS else percent)(f"broken_by_{name}"))


def _upper_bound(numbers: Mapping[str, float], correct: Tensor | None) -> Iterator[str]:
    """Yield what the worst case means: it counts every example that was not probed as if the probes had failed."""
    yield "The worst case is an upper bound of the robust accuracy: stronger attacks can find more."
    if correct is not None and numbers["examples"] < int(correct.sum()):
        expected = float(correct.double().mean()) * numbers["withstand_all"]
        yield (
            f"Only {numbers['examples']} of {int(correct.sum()):,} correctly classified examples were probed. If the "
            f"others are like them, the robust accuracy is at most about {100 * expected:.1f} %."
        )


def _advice(numbers: Mapping[str, float], word: Word, layers: Sequence[HidingLayer]) -> Iterator[str]:
    """Yield what a user can do next."""
    if kinds := dict.fromkeys(type(hiding.layer).__name__ for hiding in layers if hiding.name):
        yield (
            f"Register a substitute for {' and '.join(kinds)} that attacks can differentiate, such as the identity: "
            f"drelu_timm.attacks.adaptive.backward.register({next(iter(kinds))}, lambda layer, x, clamp: x)."
        )
    if word == "masked":
        yield (
            "Transfer from a model without the defense (transfer_from, --transfer-from): for preprocessing and "
            "purification, the undefended model."
        )
    elif numbers["examples"] < FEWEST:
        yield f"A sound verdict needs at least {FEWEST} correctly classified examples. Evaluate more."
    elif not numbers["unsteady"]:
        yield "A share is too close to its limit. Evaluate more examples."
