"""What the README shows works: its Python runs, its commands parse."""

import re
import shlex
from pathlib import Path

import list_cards
import pytest
import timm
import torch

import drelu_timm
from drelu_timm.command_line import read_flags
from drelu_timm.evaluate import EvaluateConfig
from drelu_timm.export import ExportConfig
from drelu_timm.train_config import TrainConfig, preset_in, resolve

README = (Path(__file__).parents[1] / "README.md").read_text()
CONFIGS = {"train": TrainConfig, "evaluate": EvaluateConfig, "export": ExportConfig}


def python_block(text: str) -> str:
    """The README's Python block that holds ``text``, without the lines that need a network."""
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if text in block)
    return "\n".join(line for line in block.splitlines() if "pretrained=True" not in line)


def commands() -> list[str]:
    return [line.split("#")[0] for line in README.splitlines() if re.match(r"(drelu-timm|accelerate launch) ", line)]


def test_first_lines_give_a_drelu():
    scope = {}
    exec(python_block('model = timm.create_model("resnet50_drelu"'), scope)
    assert isinstance(scope["model"].fc.activation, drelu_timm.DReLU)


def test_models_shown_are_created():
    exec(python_block('placement="stem"'), {})


def test_evaluation_shown_runs(capsys):
    torch.manual_seed(0)
    model = drelu_timm.normalized(timm.create_model("dense_drelu", num_classes=10, img_size=8)).eval()
    images = torch.rand(8, 1, 8, 8)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    exec(python_block("evaluate_model"), {"drelu_timm": drelu_timm, "model": model, "images": images, "labels": labels})
    assert re.match(r"1.0 \S+ \S+ (sound|masked|undecided)", capsys.readouterr().out)


@pytest.mark.parametrize("command", commands())
def test_commands_shown_are_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command)
    verb = next(argument for argument in arguments if argument in CONFIGS)
    flags = arguments[arguments.index(verb) + 1 :]
    config = read_flags(CONFIGS[verb], verb, flags, preset_in(flags) if verb == "train" else None)
    if verb == "train":
        assert resolve(config).output_dir


def test_the_published_models_are_those_of_the_cards():
    shown = README.partition("<!-- cards -->")[2].partition("<!-- /cards -->")[0]
    assert shown.strip() == list_cards.table()
