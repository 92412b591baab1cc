"""Which rows were attacked by less than others: their worst cases cannot be ranked, or tested against one another."""

from collections.abc import Sequence

from ..attacks.suites import ATTACKS
from .means import Average
from .outcomes import Outcome
from .paper import net_name

_ADAPTED_TO = ("drelu", "srelu", "relu6")  # activations that adaptive attacks have something to do with


def unequal(averages: Sequence[Average]) -> str:
    """A sentence on the rows that lack attacks which others were attacked with; "" where there are none.

    An attack with other settings is another one. Adaptive attacks are not missing where they do not apply.
    """
    tried = frozenset[tuple[str, str]]().union(*(outcome.at.tried for one in averages for outcome in one.outcomes))
    rows: dict[tuple[str, ...], list[str]] = {}
    for one in averages:
        lacks = {attack for outcome in one.outcomes for attack in tried - outcome.at.tried if _applies(attack, outcome)}
        if lacks:
            names = tuple(sorted(_named(attack, tried) for attack in lacks))
            rows.setdefault(names, []).append(f"{net_name(one.first.net)} {one.training}")
    if not rows:
        return ""
    listed = "; ".join(
        f"{', '.join(of_it)} {'lacks' if len(of_it) == 1 else 'lack'} {', '.join(names)}"
        for names, of_it in rows.items()
    )
    return (
        "Not all rows, or not all seeds of a row, were attacked alike, so that their worst cases cannot be compared "
        f"and have no rank: {listed}."
    )


def _applies(attack: tuple[str, str], outcome: Outcome) -> bool:
    name, _ = attack
    adaptive = name in ATTACKS and ATTACKS[name].kind == "adaptive"
    return not adaptive or outcome.activation in _ADAPTED_TO


def _named(attack: tuple[str, str], tried: frozenset[tuple[str, str]]) -> str:
    """Its name, with its settings where there are others."""
    name, settings = attack
    alike = sum(other == name for other, _ in tried) == 1
    return name if alike else f"{name} ({settings or 'settings not known'})"
