"""Flags as every verb reads them, and its help."""

import re
from dataclasses import dataclass, field

import pytest

from drelu_timm.__main__ import VERBS, main
from drelu_timm.command_line import duration, group, read_flags
from drelu_timm.errors import InputError
from drelu_timm.flags import CONFIGS


@dataclass(frozen=True)
class Fruit:
    """What is eaten."""

    name: str
    """Its name."""
    stones: int | None = None
    """How many stones; by default one."""


@dataclass(frozen=True)
class Meal:
    """Eat."""

    name: str = field(metadata=group("dish", "What is eaten."))
    """Its name."""
    stones: int | None = field(default=None, metadata=group("rest", "What is left."))
    """How many stones; by default one."""


@pytest.mark.parametrize("config", [Fruit, Meal])
def test_flags_become_the_config(config):
    assert read_flags(config, "eat", ["--name", "plum"]) == config("plum")
    assert read_flags(config, "eat", [], default=config("fig", stones=0)) == config("fig", stones=0)
    assert read_flags(config, "eat", ["--stones", "2"], default=config("fig", stones=0)) == config("fig", stones=2)


@pytest.mark.parametrize("verb", CONFIGS)
def test_a_help_shows_defaults_where_they_say_something(verb, capsys):
    with pytest.raises(SystemExit) as done:
        main([verb, "--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0
    assert "--help" in out
    assert not re.search(r"\(default:\s*(None|False|'')?\s*\)", out)


def test_the_help_of_train_shows_defaults_and_groups(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "(default: data)" in out
    assert "optimization options" in out and "Length, learning rates, the best epoch." in out
    assert "Units of the added dense layer" in out


def test_every_verb_but_doctor_has_flags():
    assert VERBS.keys() - CONFIGS.keys() == {"doctor"} and list(CONFIGS) == [verb for verb in VERBS if verb in CONFIGS]


def test_an_unknown_flag_is_one_line_with_the_nearest():
    with pytest.raises(InputError, match=r"^flag '--nmae' is unknown; did you mean --name\?$"):
        read_flags(Fruit, "eat", ["--nmae=plum"])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (720, "12 min"), (12_240, "3.4 h"), (172_000, "47.8 h"), (216_000, "2.5 days")],
)
def test_durations_are_in_units_that_are_easy_to_read(seconds, text):
    assert duration(seconds) == text
