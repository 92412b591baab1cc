"""The predicted cost of a cell, compared with the passes of its training and its attacks."""

from dataclasses import replace

import pytest
import torch
from launching import config
from torch import nn

from drelu_timm.attacks.attack import Batch
from drelu_timm.attacks.suites import ATTACKS
from drelu_timm.attacks.threat_model import ThreatModel
from drelu_timm.evaluation.config import EvaluateConfig
from drelu_timm.models.inference import frozen
from drelu_timm.sweeps.cell import GRADIENT, Cell, attack_cost
from drelu_timm.train import train


class Robust(nn.Module):
    """Always class 0, with a gradient everywhere; counts its passes."""

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
def test_an_attack_costs_at_most_what_its_settings_predict(name):
    attack, model = ATTACKS[name], Robust()
    attack = replace(attack, **{key: FEW.get(key, value) for key, value in attack.settings.items()})
    images = torch.full((1, 1, 4, 4), 0.5)
    with frozen(model):
        attack.run(model, Batch(images, torch.tensor([0]), [0]), ThreatModel.parse("Linf", "0.1"))
    assert model.count <= attack_cost(attack)
    assert attack_cost(attack) <= 2 * model.count + GRADIENT + 2


@pytest.mark.parametrize("objective", ["natural", "at", "n-fgsm", "trades", "mart"])
@pytest.mark.parametrize("awp_gamma", [0.0, 0.01])
def test_the_bound_of_a_training_holds(tmp_path, objective, awp_gamma, monkeypatch):
    settings = config(tmp_path / "x", objective=objective, awp_gamma=awp_gamma, epochs=1)
    settings = replace(settings, steps=1) if objective == "n-fgsm" else settings
    forwards, gradients = count_images(monkeypatch)
    train(settings)
    passes = sum(forwards) + (GRADIENT - 1) * sum(gradients)
    bound = Cell("x", settings, ()).training_cost()
    assert bound is not None and passes <= bound <= 1.25 * passes


def count_images(monkeypatch) -> tuple[list[int], list[int]]:
    """Count the images of every forward and every backward pass of `Dense`."""
    from drelu_timm.models.architectures import Dense

    forwards, gradients, forward = [], [], Dense.forward_features

    def counted(self, x):
        forwards.append(len(x))
        features = forward(self, x)
        if features.requires_grad:
            features.register_hook(lambda gradient: gradients.append(len(gradient)))
        return features

    monkeypatch.setattr(Dense, "forward_features", counted)
    return forwards, gradients


def test_the_number_of_images_in_a_folder_is_unknown(tmp_path):
    settings = config(tmp_path, dataset="folder", img_size=8, n_train=None)
    assert Cell("x", settings, ()).training_cost() is None
    assert Cell("x", replace(settings, n_train=100), ()).training_cost()


def test_more_examples_radii_and_attacks_cost_more(tmp_path):
    def of(**changes) -> int:
        return Cell("x", config(tmp_path), (EvaluateConfig("x", **{"n_examples": 20, **changes}),)).evaluation_cost()

    assert of() < of(n_examples=40) < of(n_examples=40, eps="0.05,0.1") < of(n_examples=40, eps="0.05,0.1", suite="all")


def test_the_evaluations_of_a_cell_add_up(tmp_path):
    evaluations = EvaluateConfig("x"), EvaluateConfig("x", suite="paper")
    parts = [Cell("x", config(tmp_path), (one,)).evaluation_cost() for one in evaluations]
    assert Cell("x", config(tmp_path), evaluations).evaluation_cost() == sum(parts)
