"""Attacks for tests, and suites of chosen attacks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from drelu_timm.attacks.attack import Attack, Candidates
from drelu_timm.attacks.suites import SUITES


@dataclass(frozen=True)
class FakeAttack(Attack):
    """Attack that calls ``search(model, batch, threat_model)``, which returns images or `Candidates`."""

    search: Callable[..., Any]

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def run(self, model, batch, threat_model):
        found = self.search(model, batch, threat_model)
        return found if isinstance(found, Candidates) else Candidates(found)


class FakeMinimumNormAttack(FakeAttack):
    """The same, as a minimum-norm attack."""

    minimum_norm = True


def only(monkeypatch, attacks: dict[str, Attack]) -> str:
    """Register a suite of only these attacks and return its name."""
    monkeypatch.setitem(SUITES, "only", {name: {name: attack} for name, attack in attacks.items()})
    return "only"
