"""Commands and Python code of the README run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import list_cards
import pytest
import timm
import torch
from launching import Launched

import drelu_timm
from drelu_timm.flags import CONFIGS, read
from drelu_timm.sweeps.grids import read_grid
from drelu_timm.training.config import resolve

README = (Path(__file__).parents[1] / "README.md").read_text()
# What the README's commands need that a test lacks: other data, a GPU, a network, time; all else runs unchanged.
ON_DIGITS = {
    "--num_processes 4": "--num_processes 1 --cpu",
    "preact_resnet18_drelu --dataset cifar10": "dense_drelu --dataset digits --epochs 2",
    "--n-examples 10000": "--n-examples 60",
    "0,2/255,4/255,8/255,16/255": "0,8/255 --n-examples 20",
    "paper-mnist-smoke --jobs 2": "digits.toml",
    "runs/paper-mnist-smoke": "runs/digits",
}
LEFT_OUT = ("Carmon2019Unlabeled", "resnet50.a1_in1k", "--push", "paper-cifar10")  # a network, or a cluster
GRID = """
title = "digits"
source = "a test"
[train]
dataset = "digits"
model = "dense_drelu"
epochs = 1
cap_weight = {weights}
[[evaluate]]
n_examples = 20
"""


def python_block(text: str) -> str:
    """The README's Python block that holds ``text``, without the lines that need a network."""
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if text in block)
    return "\n".join(line for line in block.splitlines() if "pretrained=True" not in line)


def commands(text: str = README) -> list[str]:
    return [line.split("#")[0] for line in text.splitlines() if re.match(r"(drelu-timm|accelerate launch) ", line)]


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
    assert re.search(
        r"worst case .*^verdict: (sound|masked|undecided)", capsys.readouterr().out, re.DOTALL | re.MULTILINE
    )


def test_the_output_shown_is_that_of_the_example():
    """Equal but for digits, which differ between CPUs."""
    example = Path(list_cards.REPOSITORY / "scripts" / "audit_your_model.py")
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, check=True)
    shown = README.partition("<!-- audit -->\n```\n")[2].partition("```\n<!-- /audit -->")[0]
    printed, *parts = (re.sub(r"[\d.]+", "#", text) for text in (done.stdout, *shown.split("  ...\n")))
    places = [printed.index(part) for part in parts]
    assert len(parts) == 4 and places == sorted(places)


@pytest.mark.parametrize("command", commands())
def test_commands_shown_are_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command)
    verb = next(argument for argument in arguments if argument in CONFIGS)
    flags = arguments[arguments.index(verb) + 1 :]
    read_config = read(verb, flags)
    configs = read_config if verb == "train" else [read_config]
    if verb == "train":
        assert all(resolve(config).output_dir for config in configs)
    if verb == "sweep":
        assert read_grid(configs[0].grid).train


def run_forked(words: list[str]) -> tuple[int, str]:
    """Run the command in a fork of a process that has imported torch; the launcher's commands without the launcher."""
    process = Launched(*words[words.index("drelu_timm") + 1 :] if words[0] == "accelerate" else words[1:])
    printed = "\n".join(process.communicate())
    return process.returncode, printed


def run_as_shown(words: list[str]) -> tuple[int, str]:
    program = ["accelerate.commands.launch", *words[2:]] if words[0] == "accelerate" else ["drelu_timm", *words[1:]]
    done = subprocess.run([sys.executable, "-m", *program], capture_output=True, text=True)
    return done.returncode, f"{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize(
    ("run", "weights"), [(run_forked, [0.1]), pytest.param(run_as_shown, [0.0, 0.1], marks=pytest.mark.slow)]
)
def test_five_things_run_on_digits(tmp_path, monkeypatch, run, weights):
    """Every command of the README's five things, in its order, in one folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paper.toml").write_text('title = "A"\nauthors = "B"\nlink = "https://example.org"\nvenue = "C"\n')
    (tmp_path / "digits.toml").write_text(GRID.format(weights=weights))
    things = README.partition("## Five things")[2].partition("## Published models")[0]
    for command in [command for command in commands(things) if not any(word in command for word in LEFT_OUT)]:
        for said, instead in ON_DIGITS.items():
            command = command.replace(said, instead)
        code, printed = run(shlex.split(command))
        assert code == 0, f"{command}\n{printed}"
    assert (tmp_path / "runs" / "digits" / "report" / "report.html").is_file()
    assert len(list(tmp_path.glob("runs/x/results/*.json"))) == 2


@pytest.mark.parametrize(
    ("file", "table"),
    [("README.md", list_cards.short_table), ("model_cards/README.md", list_cards.full_table)],
)
def test_published_models_are_those_of_the_cards(file, table):
    text = (list_cards.REPOSITORY / file).read_text()
    shown = text.partition("<!-- cards -->")[2].partition("<!-- /cards -->")[0]
    assert shown.strip() == table()
    assert all(((list_cards.REPOSITORY / file).parent / link).is_file() for link in re.findall(r"\]\(([^)]+)\)", shown))
