"""The alarm for hidden gradients: its test, the models that it sees, and what a training does then."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from launching import config, log
from torch import nn

from drelu_timm.attacks.threat_model import ThreatModel
from drelu_timm.data.images import Images
from drelu_timm.errors import InputError
from drelu_timm.models.drelu import DReLU
from drelu_timm.train import train
from drelu_timm.training import validation
from drelu_timm.training.objectives import InnerAttack, make_objective
from drelu_timm.training.validation import Validation, hides_gradients


@pytest.mark.parametrize(
    ("only_margin", "robust", "single_step", "alarm"),
    [
        (0, 0, False, False),
        (3, 3, False, False),  # too few images to tell
        (5, 5, False, True),
        (60, 500, False, False),  # 12 %, which is within the noise of 10 %
        (172, 612, False, True),  # PGD 61.2 %, margin attack 44.0 %
        (172, 612, True, False),  # but a single step is a weaker attack
        (300, 612, True, True),
    ],
)
def test_the_alarm_is_a_test_of_the_gap_against_that_of_honest_models(only_margin, robust, single_step, alarm):
    assert hides_gradients(only_margin, robust, single_step=single_step) is alarm


def two_classes(cap: float | None) -> nn.Sequential:
    """A model that compares the mean of an image with 0.5; with a cap both logits saturate far from there."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2), nn.Identity() if cap is None else DReLU(2, cap))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 16) * 10 / 16)
        model[1].bias.copy_(torch.tensor([5.0, -5.0]))
    return model


def measured(model: nn.Module, objective: str, eps: str) -> dict:
    """Measure a model on 100 images of means 0.3 and 0.7."""
    labels = torch.arange(100) % 2
    pixels = torch.where(labels == 1, 178, 77).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    threat_model = ThreatModel.parse("Linf", eps)
    update = SimpleNamespace(
        attack=InnerAttack(model, threat_model, steps=10, step_size=threat_model.eps / 4),
        objective=make_objective(objective, beta=6.0),
        accelerator=Accelerator(),
        penalty=lambda model: torch.zeros(()),
    )
    held_out = Images(pixels, labels, ("dark", "bright"), "Two shades")
    return Validation(held_out, update, seed=0).measure(model)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("objective", ["at", "n-fgsm", "trades", "mart"])
def test_caps_that_hide_gradients_are_seen(objective):
    figures = measured(two_classes(cap=0.1), objective, "0.3")
    assert (figures["clean"], figures["pgd"], figures["margin"], figures["hides_gradients"]) == (1, 1, 0, True)


@pytest.mark.parametrize(("eps", "robust"), [("0.1", 1.0), ("0.3", 0.0)])
@pytest.mark.parametrize("cap", [None, 1000.0])
def test_an_honest_model_has_no_alarm(eps, robust, cap):
    figures = measured(two_classes(cap), "at", eps)
    assert (figures["clean"], figures["pgd"], figures["margin"]) == (1, robust, robust)
    assert not figures["hides_gradients"]


def test_natural_training_measures_no_second_attack():
    assert measured(two_classes(None), "natural", "0.1").keys() == {"loss", "clean", "pgd"}


def test_the_alarm_is_printed_and_logged_and_can_stop_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(validation, "hides_gradients", lambda *_, **__: True)
    stopping = config(tmp_path, objective="at", epochs=2, on_masking="stop", resume=True)
    alarm = r"epoch 1: PGD [\d.]+%, margin attack [\d.]+%: this training hides gradients"
    with pytest.raises(InputError, match=rf"^{alarm}\. Stopped by --on-masking stop\. .* continues\.$"):
        train(stopping)
    assert [row["held_out"]["hides_gradients"] for row in log(tmp_path)] == [True]
    assert not (tmp_path / "model").exists()
    train(replace(stopping, on_masking="warn"))
    assert "epoch 2: PGD" in capsys.readouterr().out
    assert [row["epoch"] for row in log(tmp_path)] == [1, 2]
