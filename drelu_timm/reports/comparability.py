"""Which rows of a net were attacked otherwise than others: these cannot be ranked, or tested against one another."""

from collections.abc import Iterable, Sequence
from typing import Any

from ..attacks.suites import ATTACKS
from .averages import Average
from .outcomes import Outcome
from .paper import net_name

_ADAPTED_TO = ("drelu", "srelu", "relu6")  # activations that adaptive attacks have something to do with
_SINGULAR = {"lack": "lacks", "have": "has"}


def incomparable(averages: Iterable[Average], columns: Iterable[str]) -> set[tuple[str, str]]:
    """Each net and column in which the net's rows cannot be ranked.

    They can where all seeds of all rows have the column by the same attack, with the same settings and on as many test
    images; in the worst case, where `unequal` has nothing to say.
    """
    return {
        (net, column)
        for net, rows in _by_net(averages).items()
        for column in columns
        if (_differences(rows) if column == "worst" else len(_ways(rows, column)) > 1)
    }


def unequal(averages: Iterable[Average]) -> str:
    """A sentence on rows that lack attacks, or test images, which others of their net have; "" where there are none.

    An attack with other settings is another one. Adaptive attacks are not missing where they do not apply.
    """
    listed = "; ".join(
        f"{', '.join(of_it)} {_SINGULAR[verb] if len(of_it) == 1 else verb} {what}"
        for rows in _by_net(averages).values()
        for (verb, what), of_it in _differences(rows).items()
    )
    if not listed:
        return ""
    return (
        "Not all rows, or not all seeds of a row, were attacked alike, so that their worst cases cannot be compared "
        f"and have no rank: {listed}."
    )


def _by_net(averages: Iterable[Average]) -> dict[str, list[Average]]:
    nets: dict[str, list[Average]] = {}
    for one in averages:
        nets.setdefault(one.first.net, []).append(one)
    return nets


def _ways(rows: Sequence[Average], column: str) -> set[tuple[Any, ...]]:
    """How the seeds of a net's rows come to a column: whether at all, on how many images, by what settings."""
    return {
        (
            column in outcome.at.columns,
            outcome.at.n_examples,
            frozenset(settings for attack, settings in outcome.at.tried if attack == column),
        )
        for one in rows
        for outcome in one.outcomes
    }


def _differences(rows: Sequence[Average]) -> dict[tuple[str, str], list[str]]:
    """What rows of a net lack, or have otherwise than the rest: ("lack", attacks) or ("have", test images), by row."""
    lacking = {row: _lacking(one, rows) for row, one in enumerate(rows)}
    known = frozenset().union(*lacking.values(), *(outcome.at.tried for one in rows for outcome in one.outcomes))
    images = {count for one in rows for count in one.n_examples}
    differences: dict[tuple[str, str], list[str]] = {}
    for row, one in enumerate(rows):
        found = []
        if lacking[row]:
            found.append(("lack", ", ".join(sorted(_named(attack, known) for attack in lacking[row]))))
        if len(images) > 1:
            found.append(("have", f"{' or '.join(map(str, one.n_examples))} test images"))
        for difference in found:
            differences.setdefault(difference, []).append(f"{net_name(one.first.net)} {one.training}")
    return differences


def _lacking(one: Average, rows: Sequence[Average]) -> set[tuple[str, str]]:
    """Attacks, with their settings, that other rows have and a row, or a seed of it, has not.

    What was tried on other images is asked for in the other rows' runs of that seed only: with them a row is alike.
    """
    others = [outcome for other in rows for outcome in other.outcomes]
    lacking: set[tuple[str, str]] = set()
    for outcome in one.outcomes:
        here, elsewhere = outcome.at.tried, outcome.at.tried_elsewhere
        lacking |= {attack for other in others for attack in other.at.tried - here}
        lacking |= {
            (attack, f"{settings}, on {images} images")
            for other in others
            if other.seed == outcome.seed
            for attack, settings, images in other.at.tried_elsewhere - elsewhere
            if (attack, settings) not in here
        }
    return {(attack, settings) for attack, settings in lacking if _applies(attack, one.first)}


def _applies(attack: str, outcome: Outcome) -> bool:
    adaptive = attack in ATTACKS and ATTACKS[attack].kind == "adaptive"
    return not adaptive or outcome.activation in _ADAPTED_TO


def _named(attack: tuple[str, str], tried: frozenset[tuple[str, str]]) -> str:
    """Its name, with its settings where there are others."""
    name, settings = attack
    alike = sum(other == name for other, _ in tried) == 1
    return name if alike else f"{name} ({settings or 'settings not known'})"
