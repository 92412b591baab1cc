"""The trainings of a command line: flags over a file over a preset over defaults, files that are refused, stages."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from drelu_timm.errors import InputError
from drelu_timm.files import read_json
from drelu_timm.train import main, train
from drelu_timm.training.config import TrainConfig, resolve, run_directory
from drelu_timm.training.trainings import read_trainings

DIGITS = 'model = "dense_drelu"\ndataset = "digits"\n'


@pytest.fixture
def read(tmp_path):
    """Reads flags over a file of this content."""

    def over(content: str, *flags: str, name: str = "r.toml") -> list[TrainConfig]:
        (tmp_path / name).write_text(content)
        return read_trainings(["--config", str(tmp_path / name), *flags])

    return over


def saved_run(tmp_path: Path, **settings) -> Path:
    """The config.json of a short run in ``tmp_path/run``."""
    settings = {"epochs": 1, "n_train": 200, **settings}
    return train(TrainConfig("dense_drelu", "digits", output_dir=tmp_path / "run", **settings)) / "config.json"


def test_a_file_gives_what_its_flags_give(read):
    (config,) = read(
        f'[train]\n{DIGITS}eps = "0.1"\ncap_lr = 1\ngenerated = ["a.npz"]\nsmall_images = true\nseed = 3\n'
    )
    flags = "--model dense_drelu --dataset digits --eps 0.1 --cap-lr 1 --generated a.npz --small-images --seed 3"
    assert [config] == read_trainings(flags.split())
    assert type(config.cap_lr) is float and config.generated == (Path("a.npz"),)


def test_flags_win_over_the_file_that_wins_over_the_preset_that_wins_over_the_defaults(read):
    file = f'[train]\n{DIGITS}preset = "paper-trades"\nepochs = 7\nlr = 0.5\n'
    (config,) = read(file, "--lr", "0.25")
    assert (config.lr, config.epochs, config.patience, config.batch_size) == (0.25, 7, 10, 128)
    assert (config.preset, config.objective) == ("paper-trades", "trades")
    (other,) = read(file, "--preset", "paper-drelu")  # in the place of the file's, still below its settings
    assert (other.preset, other.objective, other.lr, other.patience) == ("paper-drelu", "natural", 0.5, 10)


def test_another_norm_than_the_files_needs_its_own_eps(read):
    file = f'[train]\n{DIGITS}norm = "Linf"\neps = "0.2"\n'
    assert resolve(*read(file, "--norm", "Linf")).eps == "0.2"
    assert resolve(*read(file, "--norm", "L2", "--eps", "0.2")).norm == "L2"
    with pytest.raises(InputError, match=r"--norm L2 .*--eps"):
        resolve(*read(file, "--norm", "L2"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[train", r"--config \S+r\.toml cannot be read as TOML \(.+\)\. Correct it"),
        ("", r"r\.toml needs a table \[train\], or several \[\[train\]\]"),
        ("train = []", r"r\.toml needs a table \[train\]"),
        ("train = [1]", r"r\.toml: \[\[train\]\] 1: is 1\. It must be a table of names and values\."),
        ("epochs = 5\n[train]\n", r"r\.toml: epochs is outside of a table\. Put it below a line \[train\]\."),
        ("[trian]\n", r"r\.toml: 'trian' is unknown; did you mean train\?"),
        ("[train]\nepoch = 1", r"r\.toml: \[train\] 'epoch' is unknown; did you mean epochs\?"),
        ("[train]\nepochs = 1.5", r"r\.toml: \[train\] epochs is 1\.5\. It must be a whole number above 0\."),
        ("[train]\nepochs = true", r"epochs is True\. It must be a whole number above 0\."),
        ("[train]\nlr = '1'", r"lr is '1'\. It must be a number above 0\."),
        ("[train]\nseed = '; rm -r /'", r"seed is '; rm -r /'\. It must be an integer from 0 to"),
        ("[train]\nmodel = 1979-05-27", r"model is datetime.+\. It must be text in quotes\."),
        ("[train]\ngenerated = 'a.npz'", r"generated is 'a\.npz'\. It must be a list\."),
        ("[train]\ngenerated = [3]", r"generated\[0\] is 3\. It must be a path in quotes\."),
        ('[train]\ndata_dir = "a\\u0000b"', r"data_dir is 'a\\x00b'\. It must be a path in quotes\."),
        (f"[train]\n{DIGITS}preset = 'paper-drleu'", r"--preset 'paper-drleu' is unknown; did you mean paper-drelu"),
        (f"[[train]]\n{DIGITS}[[train]]\nlr = 'x'", r"\[\[train\]\] 2: lr is 'x'\. It must be a number above 0\."),
        (
            f"[[train]]\n{DIGITS}output_dir = 'x'\n[[train]]\n{DIGITS}",
            r"\[\[train\]\] 1: output_dir is not allowed; the ",
        ),
        (
            f"[[train]]\n{DIGITS}[[train]]\n{DIGITS}init_from = 'x'",
            r"\[\[train\]\] 2: init_from is not allowed; it sta",
        ),
    ],
)
def test_an_invalid_file_is_a_one_line_error(read, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read(content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"r\.json cannot be read as JSON"),
        ("{}", r"--config \S+r\.json: train is None\. It must be a table of names and values\."),
        ('{"train": {"epochs": null}}', r"train epochs is None\. It must be a whole number above 0\."),
        ('{"train": {"model": ["x"]}}', r"train model is \['x'\]\. It must be text in quotes\."),
        ('{"train": {"lrr": 1}}', r"train 'lrr' is unknown; did you mean lr"),
        ('{"train": {"norm": "L3", "eps": "0.1"}}', r"L3"),
    ],
)
def test_an_invalid_config_json_is_a_one_line_error(read, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read(content, name="r.json")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_another_format_are_refused(read, tmp_path):
    for name in ("no.toml", "no.json"):
        with pytest.raises(InputError, match=rf"no\.{name[3:]} cannot be read as {name[3:].upper()}"):
            read_trainings(["--config", str(tmp_path / name)])
    with pytest.raises(InputError, match=r"r\.yaml must be a \.toml file, or the config\.json of a run"):
        read("", name="r.yaml")


def test_numbers_too_large_for_a_float_are_refused_in_one_line(read):
    with pytest.raises(InputError, match=r"lr is 1000.+\. It must be a number"):
        resolve(*read(f"[train]\n{DIGITS}lr = 1{'0' * 400}"))


def test_a_value_that_is_missing_is_one_line():
    for name in ("--config", "--preset", "--eps"):
        with pytest.raises(InputError, match=f"^Missing value for argument '{name}'. .*--help shows all options.$"):
            read_trainings(["--model", "dense_drelu", "--dataset", "digits", name])


def test_a_config_json_repeats_its_run(tmp_path):
    path = saved_run(tmp_path, preset="paper-trades", objective="trades", cap_weight=0.1, patience=None, seed=5)
    (again,) = read_trainings(["--config", str(path), "--output-dir", str(tmp_path / "again")])
    assert again.output_dir == tmp_path / "again"
    train(again)
    before, after = read_json(path), read_json(tmp_path / "again" / "config.json")
    assert before["train"] == after["train"]
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("run", "again")]
    assert weights[0] == weights[1]


def test_a_config_json_does_not_give_the_output_folder(tmp_path):
    saved_run(tmp_path)
    (again,) = read_trainings(["--config", str(tmp_path / "run" / "config.json")])
    assert again.output_dir is None


def test_filled_in_settings_follow_other_flags(tmp_path):
    path = str(saved_run(tmp_path, eps="0.2"))
    (again,) = read_trainings(["--config", path, "--eps", "0.1", "--objective", "at"])
    settings = resolve(replace(again, output_dir=tmp_path / "new"))
    assert (settings.step_size, settings.monitor) == (0.025, "margin")


def test_a_setting_given_over_the_preset_stays(tmp_path):
    path = saved_run(tmp_path, preset="paper-trades", objective="trades", monitor="pgd")  # the preset's is loss
    (again,) = read_trainings(["--config", str(path)])
    assert again.monitor == "pgd"


def test_an_older_config_json_without_newer_settings_is_repeated(read):
    (config,) = read(
        json.dumps({"train": {"model": "dense_drelu", "dataset": "digits", "seed": 2}}), name="config.json"
    )
    assert config == TrainConfig("dense_drelu", "digits", seed=2)


STAGES = f"[[train]]\n{DIGITS}n_train = 200\nepochs = 1\n" * 2 + 'objective = "at"\nsteps = 1\noutput_dir = "x/run"\n'


def test_each_stage_starts_from_the_one_before(read):
    first, second = read(STAGES)
    assert (first.output_dir, first.init_from, first.objective) == (Path("x/run-stage1"), None, "natural")
    assert (second.output_dir, second.init_from, second.objective) == (Path("x/run"), Path("x/run-stage1"), "at")
    first, second = read(STAGES, "--seed", "4", "--init-from", "start", "--output-dir", "y")
    assert (first.seed, second.seed) == (4, 4)
    assert (first.init_from, first.output_dir, second.init_from) == (Path("start"), Path("y-stage1"), Path("y-stage1"))
    first, second = read(STAGES.replace('output_dir = "x/run"\n', ""))
    assert second.output_dir is None and second.init_from == first.output_dir
    assert re.fullmatch(r"digits-dense_drelu-natural-seed0-[0-9a-f]{8}", first.output_dir.name)


def test_default_folders_differ_wherever_the_settings_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = TrainConfig("dense_drelu", "digits", objective="at")
    others = [{"lr": 0.01}, {"steps": 5}, {"step_size": 0.01}, {"eps": "0.3"}, {"init_from": Path("x")}, {"width": 64}]
    names = [run_directory(replace(one, **other)).name for other in [{}, *others]]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"digits-dense_drelu-at-seed0-[0-9a-f]{8}", name) for name in names)
    same = [{"resume": True}, {"workers": 2}, {"grad_accum_steps": 2}, {"eps": "0.1", "step_size": 0.025, "steps": 10}]
    assert {resolve(replace(one, **each)).output_dir for each in same} == {Path("runs") / names[0]}


def test_the_stages_of_a_recipe_are_trained_in_order(tmp_path, capsys):
    (tmp_path / "r.toml").write_text(STAGES)
    argv = ["--config", str(tmp_path / "r.toml"), "--output-dir", str(tmp_path / "a run")]
    main(read_trainings(argv))
    out = capsys.readouterr().out
    assert "next: training 2 of 2" in out and f"next: drelu-timm evaluate '{tmp_path}/a run'\n" in out
    config = read_json(tmp_path / "a run" / "config.json")
    assert config["init_from"]["train"]["objective"] == "natural"
    second = read_trainings(argv)[1]
    train(replace(second, output_dir=tmp_path / "alone"))
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("a run", "alone")]
    assert weights[0] == weights[1]  # as two separate trainings
    main(read_trainings([*argv, "--resume"]))  # nothing is left to do
    with pytest.raises(InputError, match=r"a run-stage1 is in use\. Add --resume"):
        main(read_trainings(argv))


def test_a_mistake_in_a_later_stage_is_found_before_the_first_is_trained(tmp_path):
    (tmp_path / "r.toml").write_text(STAGES.replace('"at"', '"art"'))
    with pytest.raises(InputError, match="'art' is unknown"):
        main(read_trainings(["--config", str(tmp_path / "r.toml"), "--output-dir", str(tmp_path / "run")]))
    assert not (tmp_path / "run-stage1").exists()
