"""What a cell costs at most: held against what its training and its attacks really ask of a model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launching import config
from torch import nn

from drelu_timm.attacks.attack import Batch
from drelu_timm.attacks.suites import ATTACKS
from drelu_timm.attacks.threat_model import ThreatModel
from drelu_timm.evaluation.config import EvaluateConfig
from drelu_timm.models.modes import frozen
from drelu_timm.sweeps.cells import Cell
from drelu_timm.sweeps.cost import GRADIENT, Clock, _of_an_image, cost, evaluation, forwards, training
from drelu_timm.train import train


class Robust(nn.Module):
    """Class 0 whatever is done to the image, and a gradient everywhere; counts what it is asked for."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 5 * 16).reshape(5, 16))
        self.count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += len(x)
        logits = x.flatten(1) @ self.weight.T * 0.01 + torch.tensor([5.0, 0, 0, 0, 0])
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def _backward(self, gradient: torch.Tensor) -> None:
        self.count += (GRADIENT - 1) * len(gradient)


FEW = {"steps": 4, "n_iter": 5, "n_queries": 30, "restarts": 3, "rounds": 3, "n_target_classes": 3}
FEW |= {"binary_search_steps": 2}


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "transfer"])
def test_an_attack_asks_for_no_more_than_its_settings_say(name):
    attack, model = ATTACKS[name], Robust()
    attack = replace(attack, **{key: FEW.get(key, value) for key, value in attack.settings.items()})
    images = torch.full((1, 1, 4, 4), 0.5)
    with frozen(model):
        attack.run(model, Batch(images, torch.tensor([0]), [0]), ThreatModel.parse("Linf", "0.1"))
    assert model.count <= forwards(attack)
    assert forwards(attack) <= 2 * model.count + GRADIENT + 2


def test_robust_objectives_pay_for_their_inner_attack(tmp_path):
    def of(objective: str, **settings) -> int:
        return _of_an_image(config(tmp_path, objective=objective, **settings))

    steps = 2 * GRADIENT
    assert of("natural") == GRADIENT
    assert of("at") == steps + GRADIENT
    assert of("trades") == 1 + steps + 2 * GRADIENT
    assert of("trades", awp_gamma=0.01) == 1 + steps + 4 * GRADIENT


@pytest.mark.parametrize("objective", ["natural", "trades"])
def test_the_bound_of_a_training_holds(tmp_path, objective, monkeypatch):
    settings = config(tmp_path / "x", objective=objective)
    asked = count_images(monkeypatch)
    train(settings)
    passes = sum(asked)  # forward passes alone, a third of what a gradient counts for
    assert training(settings) / GRADIENT <= passes * 1.2
    assert passes <= training(settings)


def count_images(monkeypatch) -> list[int]:
    from drelu_timm.models.nets import Dense

    asked, forward = [], Dense.forward_features
    monkeypatch.setattr(Dense, "forward_features", lambda self, x: asked.append(len(x)) or forward(self, x))
    return asked


def test_more_examples_radii_and_attacks_cost_more(tmp_path):
    settings = config(tmp_path)
    model = Clock(1).model(settings)

    def of(**changes) -> int:
        return evaluation(settings, EvaluateConfig("x", **{"n_examples": 20, **changes}), model)

    assert of() < of(n_examples=40) < of(n_examples=40, eps="0.05,0.1") < of(n_examples=40, eps="0.05,0.1", suite="all")
    plain = Clock(1).model(replace(settings, activation="relu"))
    assert evaluation(settings, EvaluateConfig("x", n_examples=20), plain) < of()  # nothing to adapt to


def test_a_cell_is_the_sum_and_a_forward_pass_is_timed_once(tmp_path, monkeypatch):
    settings, clock = config(tmp_path), Clock(1)
    cell = Cell("x", settings, (EvaluateConfig("x"), EvaluateConfig("x", suite="paper")))
    model = clock.model(settings)
    parts = [evaluation(settings, one, model) for one in cell.evaluations]
    assert (bound := cost(cell, model)).evaluation == sum(parts)
    assert bound.forwards == training(settings) + sum(parts)
    seconds = clock.seconds(settings)
    assert seconds > 0
    monkeypatch.setattr(clock, "_timed", None)
    assert clock.seconds(replace(settings, seed=1, output_dir=Path("y"))) == seconds
