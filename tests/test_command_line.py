"""Flags as every verb reads them, and its help."""

import os
import re
import shlex
import subprocess
import sys
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
    ("flags", "message"),
    [
        ([], "Missing from drelu-timm eat: --name STR."),
        (["--name"], "Missing value for argument '--name'. Expected 1 values."),
        (["--name", "x", "--stones", "1.5"], "Error parsing --stones: "),
        (["--name", "x", "z"], "Unrecognized options: z."),
    ],
)
@pytest.mark.parametrize("config", [Fruit, Meal])
def test_what_tyro_refuses_is_one_line(config, flags, message, capsys):
    with pytest.raises(InputError) as caught:
        read_flags(config, "eat", flags)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert str(caught.value).endswith(". drelu-timm eat --help shows all options.") and "--- " not in str(caught.value)
    assert capsys.readouterr().err == ""


# Standard streams

MAIN = "import sys; from drelu_timm.__main__ import main; sys.exit(main(sys.argv[1:]))"


def through_a_shell(arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(MAIN)} {arguments}"
    env = {**os.environ, **environment}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env, check=False)


def test_a_full_disk_behind_the_output_is_one_line():
    done = through_a_shell("--help > /dev/full")
    assert (done.returncode, done.stderr) == (1, "error: [Errno 28] No space left on device\n")


def test_output_that_nobody_reads_ends_quietly():
    done = through_a_shell("--help | (exec 0<&-; sleep 1); exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed):
    assert through_a_shell(f"--version {closed}").returncode == 0
    assert through_a_shell(f"trian {closed}").returncode == 2
    assert through_a_shell(f"train --help {closed}").returncode == 0


@pytest.mark.parametrize("environment", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}])
def test_names_that_the_encoding_of_the_output_lacks_are_printed_escaped(environment):
    done = through_a_shell("report runs/größe", **environment)
    assert done.returncode == 2 and "gr" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (99, "99 s"),
        (720, "12 min"),
        (12_240, "3.4 h"),
        (172_000, "47.8 h"),
        (216_000, "2.5 days"),
        (6.16e9, "195 years"),
    ],
)
def test_durations_are_in_units_that_are_easy_to_read(seconds, text):
    assert duration(seconds) == text
