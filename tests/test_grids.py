"""Grids: product, names, short versions, errors, and the grids in the package."""

import re
from pathlib import Path

import pytest
import torch

from drelu_timm.command_line import read_flags
from drelu_timm.data.datasets import DATASETS
from drelu_timm.data.images import Images
from drelu_timm.errors import InputError
from drelu_timm.evaluation.config import EvaluateConfig
from drelu_timm.launch import Launch
from drelu_timm.results import plotting
from drelu_timm.sweeps.grids import Grid, read_grid, shipped
from drelu_timm.training.config import TrainConfig
from drelu_timm.training.model import create_model
from drelu_timm.training.trainings import read_trainings

GRID = """
title = "Balancers on digits"
source = "a test"
[train]
dataset = "digits"
seed = [0, 1]
cap_lr = 1
[[evaluate]]
suite = "quick"
[[evaluate]]
eps = "0,0.05,0.1"
[[net]]
name = "dense"
model = "dense_drelu"
[[net]]
name = "cnn"
model = "shallow_cnn_drelu"
epochs = 5
[[method]]
name = "natural"
activation = "relu"
[[method]]
name = "at"
activation = "relu"
objective = "at"
init_from = "natural"
[[method]]
name = "drelu"
cap_weight = [0.0, 0.001]
[smoke]
net = ["cnn"]
[smoke.train]
epochs = 1
n_train = 100
cap_weight = 0.01
seed = 0
[[smoke.evaluate]]
n_examples = 20
"""


@pytest.fixture
def grid_of(tmp_path):
    def read(text: str, smoke: bool = False):
        (tmp_path / "g.toml").write_text(text)
        return read_grid(str(tmp_path / "g.toml") + ("-smoke" if smoke else ""))

    return read


def cells_of(grid, **options) -> dict:
    return {cell.name: cell for cell in grid.cells(Path("runs/g"), data_dir=Path("data"), **options)}


def test_cells_are_the_product_and_are_named_by_what_they_hold(grid_of):
    cells = cells_of(grid_of(GRID))
    methods = ("natural", "at", "drelu-cap_weight0", "drelu-cap_weight0.001")
    assert list(cells) == [f"{net}-{m}-seed{s}" for net in ("dense", "cnn") for m in methods for s in (0, 1)]
    cell = cells["cnn-drelu-cap_weight0.001-seed1"]
    assert cell.train == TrainConfig(
        model="shallow_cnn_drelu",
        dataset="digits",
        epochs=5,
        cap_weight=0.001,
        cap_lr=1.0,
        seed=1,
        output_dir=Path("runs/g/cnn-drelu-cap_weight0.001-seed1"),
        resume=True,
    )
    run = str(cell.path)
    assert cell.evaluations == (EvaluateConfig(run, suite="quick"), EvaluateConfig(run, eps="0,0.05,0.1"))


def test_init_from_is_the_cell_that_differs_in_the_method_alone(grid_of):
    cells = cells_of(grid_of(GRID))
    assert cells["cnn-at-seed1"].start == "cnn-natural-seed1"
    assert cells["cnn-at-seed1"].train.init_from == Path("runs/g/cnn-natural-seed1")
    assert cells["cnn-natural-seed1"].start is None


def test_a_list_that_an_alternative_overrides_is_no_axis_of_its_cells(grid_of):
    cells = cells_of(
        grid_of(
            GRID.replace('name = "natural"', 'name = "natural"\nseed = 7').replace('"at"\ninit', '"at"\nseed = 7\ninit')
        )
    )
    assert {"dense-natural", "dense-at", "dense-drelu-cap_weight0-seed1"} <= cells.keys()
    assert cells["dense-natural"].train.seed == 7 and cells["dense-at"].start == "dense-natural"


def test_text_names_itself_and_a_slash_cannot_be_in_a_name(grid_of):
    cells = cells_of(grid_of(GRID.replace("seed = [0, 1]", 'eps = ["2/255"]\nnorm = ["Linf", "L2"]')))
    assert "dense-drelu-cap_weight0-2_255-L2" in cells


def test_the_short_version_replaces_keys_where_they_are_and_keeps_the_named_alternatives(grid_of):
    grid = grid_of(GRID, smoke=True)
    cells = cells_of(grid)
    assert grid.name == "g-smoke"
    assert list(cells) == ["cnn-natural", "cnn-at", "cnn-drelu"]
    train = cells["cnn-drelu"].train
    assert (train.epochs, train.n_train, train.cap_weight) == (1, 100, 0.01)
    assert cells["cnn-natural"].train.cap_weight == 0
    assert cells["cnn-at"].evaluations == (EvaluateConfig("runs/g/cnn-at", n_examples=20),)


def test_a_preset_is_laid_under_a_cell(grid_of):
    cells = cells_of(grid_of(GRID.replace("cap_lr = 1", 'preset = "paper-drelu"\ncap_lr = 1')))
    train = cells["dense-natural-seed0"].train
    assert (train.preset, train.patience, train.cap_lr) == ("paper-drelu", 10, 1.0)


def test_commands_are_typed_back_into_the_same_flags(grid_of):
    text = GRID.replace("cap_lr = 1", 'preset = "paper-drelu"\nsmall_images = true\ncap_lr = 1')
    for cell in [*cells_of(grid_of(text)).values()][::3]:
        train, *evaluations = [command[3:] for command in cell.commands(Launch())]
        assert train[0] == "train"
        assert read_trainings(train[1:]) == [cell.train]
        assert [read_flags(EvaluateConfig, "evaluate", words[1:]) for words in evaluations] == [*cell.evaluations]


def test_commands_hold_only_what_is_not_the_default(grid_of):
    train, evaluation, _ = cells_of(grid_of(GRID))["dense-natural-seed0"].commands(Launch())
    assert " ".join(train) == (
        "python -m drelu_timm train --model dense_drelu --dataset digits "
        "--output-dir runs/g/dense-natural-seed0 --resume --activation relu --cap-lr 1.0"
    )
    assert " ".join(evaluation) == "python -m drelu_timm evaluate runs/g/dense-natural-seed0"


@pytest.mark.parametrize(
    ("launch", "program"),
    [
        (Launch(1, "no", on_cpu=True), "-m drelu_timm"),
        (Launch(1, "bf16"), "--num_processes 1 --mixed_precision bf16 -m drelu_timm"),
        (Launch(1, "bf16", on_cpu=True), "--num_processes 1 --cpu --mixed_precision bf16 -m drelu_timm"),
        (
            Launch(2, "bf16"),
            "--num_processes 2 --multi_gpu --mixed_precision bf16 --main_process_port 0 -m drelu_timm",
        ),
    ],
)
def test_processes_and_precision_go_through_accelerate(launch, program, grid_of):
    command = " ".join(cells_of(grid_of(GRID))["dense-natural-seed0"].commands(launch)[0])
    through = "" if launch.mixed_precision == "no" else "-m accelerate.commands.launch "
    assert command.startswith(f"python {through}{program} train --model dense_drelu")


def test_generated_images_go_to_the_cells_that_mix_them_in(grid_of):
    grid = grid_of(GRID.replace('name = "natural"', 'name = "natural"\ngenerated_fraction = 0.5'))
    with pytest.raises(InputError, match=r"^g, cell dense-natural-seed0: --generated-fraction 0.5 .*--generated FILE"):
        cells_of(grid)
    cells = cells_of(grid, generated=[Path("edm.npz")])
    assert cells["dense-natural-seed0"].train.generated == (Path("edm.npz"),)
    assert cells["dense-at-seed0"].train.generated == ()


def test_a_preset_can_be_what_mixes_them_in(grid_of):
    text = GRID.replace('"digits"', '"cifar10"').replace('e = "drelu"\n', 'e = "drelu"\npreset = "paper-drelu-edm"\n')
    with pytest.raises(InputError, match=r"--generated-fraction 0.7 .*--generated FILE"):
        cells_of(grid_of(text))
    cells = cells_of(grid_of(text), generated=[Path("edm.npz")])
    assert cells["dense-drelu-cap_weight0-seed0"].train.generated == (Path("edm.npz"),)
    assert cells["dense-natural-seed0"].train.generated == ()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[train]", "[train", r"cannot be read as TOML \(.+\)\. Correct it"),
        ("[train]", "[trian]", "'trian' is unknown; did you mean train"),
        ("seed =", "sed =", r"\[train\] 'sed' is unknown; did you mean seed"),
        ("cap_weight = [", "cap_wieght = [", r"\[\[method\]\] drelu: 'cap_wieght' is unknown; did you mean cap_weight"),
        ("cap_lr = 1", 'data_dir = "x"', r"\[train\] 'data_dir' is unknown"),
        ('suite = "quick"', 'siute = "quick"', r"\[\[evaluate\]\] 'siute' is unknown; did you mean suite"),
        ('net = ["cnn"]', 'nte = ["cnn"]', r"\[smoke\] 'nte' is unknown; did you mean net"),
        ('source = "a test"', "", r'needs source = "\.\.\.", not empty'),
        ("[[evaluate]]", "[[smoke.evaluate]]", r"needs \[\[evaluate\]\], not empty"),
        ("[0, 1]", "[]", r"\[train\] seed is \[\]\. It must be one value, or a list of values\."),
        ("[0, 1]", '["a"]', r"\[train\] seed\[0\] is 'a'\. It must be an integer from 0 to 4294967295\."),
        ("[0, 1]", "[0, 0]", "g has two cells called dense-natural-seed0. Give them other names or values"),
        ("cap_lr = 1", "cap_lr = true", r"\[train\] cap_lr is True\. It must be a number or a list\."),
        ("cap_lr = 1", "eps = 0.1", r"\[train\] eps is 0\.1\. It must be text in quotes or a list\."),
        ('name = "at"', 'name = "natural"', r"init_from goes in a circle: natural -> natural"),
        ('init_from = "natural"', 'init_from = "natrual"', "'natrual' is unknown; did you mean natural"),
        ('init_from = "natural"', 'init_from = ["natural"]', r"\['natural'\]. is unknown; did you mean natural"),
        ('dataset = "digits"', 'dataset = "folder"', "g, cell dense-natural-seed0: --img-size is needed for --dataset"),
        ('init_from = "natural"', 'init_from = "drelu"', 'init_from = "drelu" fits 2 cells'),
        ('name = "at"', 'name = "a/t"', r"\[\[method\]\] needs a name of letters, digits and \. _ \+ -, not 'a/t'"),
        ('model = "dense_drelu"', "", r"cell dense-natural-seed0: it has no model. Set it in \[train\] or \[\[net\]\]"),
        ("cap_lr = 1", "cap_lr = -1", r"\[train\] cap_lr is -1\. It must be a number above 0\."),
        ('suite = "quick"', 'suite = "quik"', "g, cell dense-natural-seed0: --suite 'quik' is unknown; did you mean"),
        ('"0,0.05,0.1"', '"0,x"', "g, cell dense-natural-seed0: .*'x'"),
        ('"0,0.05,0.1"', '"0.1,0.10"', "--eps 0.1,0.10 names 0.10 twice. Name each radius once"),
        ('"0,0.05,0.1"', '"0"', "--eps 0 leaves nothing to attack. Use a radius above 0"),
        ('"0,0.05,0.1"', '"0.1"', "two .*would write results/quick-Linf-0.1.json. Give them other suites"),
        ('suite = "quick"', 'eps = "0.2/2,0.1"', "names 0.1 twice"),
        ('suite = "quick"', 'norm = "L2"', "g, cell .*: --norm L2 needs --eps: the default 0.1 is a radius for Linf"),
        ('suite = "quick"', 'eps = "0.01,0.1"', "two .*would write sweeps/quick-Linf-up-to-0.1.json"),
        ('suite = "quick"', 'dataset = "mnits"', "--dataset 'mnits' is unknown; did you mean mnist"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(grid_of, old, new, message):
    assert old in GRID
    with pytest.raises(InputError, match=message) as caught:
        cells_of(grid_of(GRID.replace(old, new)))
    assert "\n" not in str(caught.value)


def test_a_grid_of_several_radii_needs_what_draws_them(grid_of, monkeypatch):
    monkeypatch.setattr(plotting, "find_spec", lambda name: None)
    cells_of(grid_of(GRID.replace('eps = "0,0.05,0.1"', 'eps = "0.05"')))
    with pytest.raises(InputError, match="g, cell dense-natural-seed0: matplotlib, which draws the pictures, is missi"):
        cells_of(grid_of(GRID))


def test_a_circle_of_several_methods(grid_of):
    text = GRID.replace('name = "natural"', 'name = "natural"\ninit_from = "at"')
    with pytest.raises(InputError, match="init_from goes in a circle: natural -> at -> natural"):
        grid_of(text)


def test_a_short_version_has_an_evaluation(grid_of):
    with pytest.raises(InputError, match=r"\[smoke\] evaluate = \[\] leaves no evaluation"):
        grid_of(GRID.replace("[smoke]", "[smoke]\nevaluate = []").replace("[[smoke.evaluate]]\nn_examples = 20", ""))


def test_the_short_version_names_alternatives_that_are_there(grid_of):
    with pytest.raises(InputError, match=r"\[smoke\] net 'cnm' is unknown; did you mean cnn"):
        grid_of(GRID.replace('["cnn"]', '["cnm"]'), smoke=True)
    with pytest.raises(InputError, match=r"has no table \[smoke\]"):
        grid_of(GRID[: GRID.index("[smoke]")], smoke=True)


def test_a_grid_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="GRID 'paper-minst' is unknown; did you mean paper-mnist"):
        read_grid("paper-minst")
    with pytest.raises(
        InputError,
        match=r"GRID .*no\.toml does not exist\. Use a TOML file or one of activations, bounded-activations, ",
    ):
        read_grid(str(tmp_path / "no.toml"))


PAPER = {"cifar10", "cifar100", "tiny-imagenet"}


def test_the_grids_that_come_with_the_package():
    edm = {f"edm-{name}" for name in PAPER}
    assert {*shipped()} == {"activations", "bounded-activations", "certified-caps"} | {
        f"paper-{name}" for name in PAPER | edm | {"mnist", "placement", "eps"}
    }


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_grid_resolves(name):
    whole, short = (cells_of(read_grid(one), generated=[Path("edm.npz")]) for one in (name, f"{name}-smoke"))
    assert len(short) <= 20 < len(whole)
    by_adam = {(cell.train.cap, cell.train.cap_lr) for cell in whole.values() if cell.train.optimizer == "adam"}
    certified = {(cap, 0.01) for cap in (None, 0.5, 1.0)}  # ten times the learning rate of the weights
    expected = {"activations": set(), "bounded-activations": set(), "certified-caps": certified}
    assert by_adam == expected.get(name, {(10.0, 2e-3)})
    assert re.search(r"caps .*learning rate", re.sub(r"\s+", " ", read_grid(name).source))
    last = [*whole.values()][-1]
    train = last.commands(Launch())[0][4:]
    assert read_trainings(train) == [last.train]


def test_table_1_is_all_there():
    cells = cells_of(read_grid("paper-mnist"))
    assert len(cells) == 2 * (1 + 1 + 2 + 7) * 3
    best = cells["dense-drelu-cap_weight100-seed2"]
    assert (best.train.schedule, best.train.patience, best.train.epochs) == ("plateau", 10, 2000)
    assert best.evaluations == (EvaluateConfig(str(best.path), suite="all", n_examples=1000),)
    assert cells["shallow_cnn-at-seed2"].train.epochs == 10
    assert cells["shallow_cnn-at-seed2"].start == "shallow_cnn-natural-seed2"


def test_every_model_of_the_shipped_grids_is_built():
    models = {}
    for name in shipped():
        for cell in cells_of(read_grid(name), generated=[Path("edm.npz")]).values():
            train = cell.train
            if train.dataset in ("mnist", "cifar10"):  # the others differ in the number of classes, or in the size
                models[train.model, train.placement, train.dataset] = train
    with torch.device("meta"):  # shapes without arithmetic
        for train in models.values():
            dataset = DATASETS[train.dataset]
            side = dataset.side(train.img_size)
            pixels = torch.zeros(1, dataset.in_chans, side, side, dtype=torch.uint8, device="cpu")
            images = Images(pixels, torch.tensor([0], device="cpu"), tuple("0123456789"), dataset.title)
            assert create_model(train, images).model.num_classes == 10


def test_a_huge_product_is_refused_before_it_is_listed(grid_of, monkeypatch):
    monkeypatch.setattr(Grid, "_points", None)
    values = ", ".join(map(str, range(1, 1001)))
    text = GRID.replace("seed = [0, 1]", f"seed = [{values}]\nepochs = [{values}]\nsteps = [{values}]")
    # "cnn" sets epochs itself.
    with pytest.raises(InputError, match=r"^g has 4,004,000,000 cells\. .*10,000 is the most\.$"):
        cells_of(grid_of(text))


def test_every_objective_has_a_name_in_reports_and_recipes():
    from drelu_timm.publishing import recipes
    from drelu_timm.reports import training_settings
    from drelu_timm.training import objectives

    with pytest.raises(InputError, match="'x' is unknown") as refused:
        objectives.make_objective("x", beta=1.0)
    names = set(str(refused.value).partition("allowed: ")[2].split(", "))
    assert len(names) >= 6
    assert names == set(recipes.OBJECTIVES) == set(training_settings._OBJECTIVES)
