"""Recipes of published models repeat trainings, evaluations and exports, and quote every text."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from measurements import KEY, PUBLISHED, REPOSITORY, having, measured_of, trained

from drelu_timm.command_line import read_flags
from drelu_timm.errors import InputError
from drelu_timm.evaluation.config import EvaluateConfig
from drelu_timm.export import ExportConfig
from drelu_timm.files import read_toml
from drelu_timm.publishing.card import Paper, Seed, read_card
from drelu_timm.publishing.recipes import recipe
from drelu_timm.training.config import TrainConfig, resolve, saved
from drelu_timm.training.trainings import read_trainings


@pytest.fixture(scope="module")
def measured(evaluated):
    return measured_of(evaluated)


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Function that writes a recipe and reads its tables and the configs of its commands."""
    monkeypatch.chdir(tmp_path)

    def written(measured):
        path = Path(measured.recipe)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(recipe(measured))
        return path

    return lambda measured: (read_toml(written(measured), "recipe"), *commands_of(written(measured)))


def commands_of(path: Path) -> tuple[list[list[TrainConfig]], list[EvaluateConfig], ExportConfig]:
    """Return the configs of the commands in a recipe's comment."""
    lines = [line[2:] for line in path.read_text().splitlines() if re.match(r"# (drelu-timm|accelerate) ", line)]
    words = [shlex.split(line) for line in lines]
    flags = {
        verb: [one[one.index(verb) + 1 :] for one in words if verb in one[:12]]
        for verb in ("train", "evaluate", "export")
    }
    (export,) = flags["export"]
    return (
        [read_trainings(one) for one in flags["train"]],
        [read_flags(EvaluateConfig, "evaluate", one) for one in flags["evaluate"]],
        read_flags(ExportConfig, "export", export),
    )


def as_saved(config: TrainConfig, tmp_path: Path) -> dict:
    """Return the config.json of a training as it is in a card."""
    resolved = saved(resolve(replace(config, output_dir=tmp_path / "not there")))
    return {name: value for name, value in resolved.items() if name not in ("data_dir", "init_from")}


def test_the_recipe_repeats_the_training(measured, read, tmp_path):
    _, [[config]], _, _ = read(measured)
    assert as_saved(config, tmp_path) == measured.config["train"]
    assert config.output_dir == Path(f"runs/{KEY}/seed0")


def test_earlier_trainings_and_the_launch_are_in_the_recipe(measured, read, tmp_path):
    natural = trained(measured, objective="natural", lr=0.5, monitor="loss").config
    launch = {"num_processes": 2, "mixed_precision": "bf16", "device": "cpu"}
    at = replace(trained(measured, objective="at"), config={**measured.config, "launch": launch, "init_from": natural})
    _, [[first, second]], _, _ = read(at)
    assert as_saved(first, tmp_path) == natural["train"]
    assert as_saved(second, tmp_path) == at.config["train"]
    assert (first.output_dir, second.init_from) == (Path(f"runs/{KEY}/seed0-stage1"),) * 2
    text = recipe(at)
    assert "\n# accelerate launch --num_processes 2 --multi_gpu --mixed_precision bf16 -m drelu_timm train " in text
    assert "\n# Training 1 of 2 was launched by `drelu-timm`.\n" in text


def test_other_seeds_are_trained_and_evaluated_by_the_recipe(measured, read):
    seeds = [Seed(seed, 60, 0.9, 0.5, 0.5, "sound", "0" * 64) for seed in (0, 1, 2)]
    content, trainings, evaluations, export = read(replace(measured, seeds=seeds, curve=None))
    assert [(config.seed, config.output_dir) for (config,) in trainings] == [
        (seed, Path(f"runs/{KEY}/seed{seed}")) for seed in (0, 1, 2)
    ]
    assert [one.run for one in evaluations[:3]] == [f"runs/{KEY}/seed{seed}" for seed in (0, 1, 2)]
    assert export.seeds == (Path(f"runs/{KEY}/seed1"), Path(f"runs/{KEY}/seed2"))
    assert content["export"]["seeds"] == [*map(str, export.seeds)]


HOSTILE = 'a "title"\n\'; touch /tmp/x; \u2028 \x7f \\ """ # ünï'


def test_texts_of_a_run_stay_data_in_its_recipe(measured, read):
    hostile = trained(replace(measured, paper=Paper(HOSTILE, HOSTILE, "https://example.org", "N/A")), eps="0.3")
    hostile = having(hostile, dataset_title=HOSTILE, hardware=HOSTILE, transfer_from=HOSTILE)
    content, trainings, evaluations, export = read(hostile)
    assert (content["export"]["title"], content["evaluate"][0]["transfer_from"]) == (HOSTILE, HOSTILE)
    printable = "".join(character if character.isprintable() else " " for character in HOSTILE)
    assert (export.title, export.authors, evaluations[0].transfer_from) == (printable,) * 3
    assert len(trainings) == 1 and set(content) == {"train", "evaluate", "export"}


@pytest.mark.parametrize("seed", ["0; touch /tmp/x", "$(id)"])
def test_a_seed_that_is_text_is_refused_by_train_and_quoted_in_commands(measured, seed, tmp_path):
    text = recipe(trained(measured, seed=seed))
    assert f"# drelu-timm evaluate {shlex.quote(f'runs/{KEY}/seed{seed}')} " in text
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(InputError, match=r"seed is .+\. It must be an integer from 0 to"):
        read_trainings(["--config", str(tmp_path / "r.toml")])


def test_the_recipe_repeats_the_evaluation(measured, read):
    settings = {"eps": "0.2", "norm": "L2", "precision": "bfloat16", "seed": 3, "transfer_from": "resnet18"}
    training = {**measured.training, "weights": "last"}
    content, _, [first, *_], export = read(replace(having(measured, **settings), training=training))
    assert first == EvaluateConfig(f"runs/{KEY}/seed0/last", "standard", n_examples=60, **settings)
    assert content["evaluate"][0] == {"run": first.run, "suite": "standard", "n_examples": 60, **settings}
    assert (export.eps, export.run) == ("0.2", Path(first.run))


def test_a_folder_exported_as_imagenet_is_named_in_the_recipe(measured, read):
    folder = having(trained(measured, dataset="folder"), dataset="imagenet")
    assert read(folder)[-1].dataset == "imagenet"
    assert read(measured)[-1].dataset is None


@pytest.mark.parametrize(
    "back", [{"optimizer": "adam", "schedule": "constant", "ema_decay": 0.0, "weight_decay": 0.0}, {"step_size": 0.01}]
)
def test_a_preset_with_overriding_flags_is_repeated(measured, read, back, tmp_path):
    given = {"model": "dense_drelu", "dataset": "cifar10", "generated": (Path("a.npz"),), "output_dir": tmp_path / "no"}
    config = resolve(TrainConfig.from_preset("wang2023", **given, **back))
    _, [[again]], _, _ = read(trained(measured, **saved(config)))
    assert as_saved(again, tmp_path) == as_saved(config, tmp_path)


def test_a_preset_with_a_value_overridden_by_none_is_left_out(measured, read, tmp_path):
    config = resolve(TrainConfig.from_preset("paper-drelu", model="dense_drelu", dataset="digits", patience=None))
    _, [[again]], _, _ = read(trained(measured, **saved(config)))
    assert as_saved(again, tmp_path) == as_saved(replace(config, preset=None), tmp_path)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_recipe_gives_the_trainings_of_its_card(path, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    measured = read_card(json.loads(path.read_text()), path)
    [trainings, *others], evaluations, export = commands_of(Path(measured.recipe))
    assert [as_saved(config, tmp_path) for config in trainings] == [one["train"] for one in measured.trainings[::-1]]
    assert [config.seed for (*_, config) in others] == [one.seed for one in measured.seeds if one.seed != 0]
    content = read_toml(Path(measured.recipe), "recipe")
    assert [EvaluateConfig(**table) for table in content["evaluate"]] == evaluations
    paths = {"run": Path(content["export"]["run"]), "seeds": tuple(map(Path, content["export"].get("seeds", ())))}
    assert ExportConfig(**{**content["export"], **paths}) == export
