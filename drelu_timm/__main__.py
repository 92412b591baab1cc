"""Command line, `drelu-timm VERB ...` or `python -m drelu_timm VERB ...`: import the module of a verb and run it."""

import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType

from . import __version__
from .errors import InputError, one_line, unknown
from .launch import PREEMPTED_EXIT_CODE, Preempted

VERBS = {
    "demo": "train, attack and export three models on scikit-learn's digits: start here, it takes two minutes",
    "train": "train a timm model (natural, adversarial, TRADES, MART) and write a run directory",
    "evaluate": "attack a model with AutoAttack and adaptive attacks; report accuracies and a verdict on masking",
    "export": "write an evaluated run as a RobustBench entry, a timm / Hugging Face folder and a model card",
    "sweep": "train and evaluate a grid of settings, the paper's or your own, here or on a SLURM cluster",
    "report": "write tables, statistics and figures of evaluated runs, next to the paper's numbers",
    "doctor": "print installed versions, what clashes, and the one command that fixes it",
}

HOW_TO_RESUME = {
    "demo": "; the same command resumes it",
    "train": "; the same command with --resume continues from the last state",
    "evaluate": "; the same command continues after the last finished batch",
    "sweep": "; the same command continues with the cells that are not done",
}

HELP = "usage: drelu-timm VERB [options]\n\n" + "\n".join(f"  {verb:10}{text}" for verb, text in VERBS.items())
HELP += "\n\n`drelu-timm VERB --help` lists a verb's options, `drelu-timm --version` prints the version."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb.

    Returns:
        0 for success, 1 if doctor, sweep or report found something broken, 2 for input that cannot be used, 75 after
        SIGTERM, 130 after Ctrl-C, 141 if the reader of the output has closed it (`| head -1`).
    """
    _prepare_streams()
    try:
        code = _main(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        code = 128 + 13
    except OSError as error:  # a disk that is full or read-only, or a path that is not possible
        with suppress(OSError):
            print(f"{_process()}error: {one_line(error)}", file=sys.stderr)
        code = 1
    with suppress(OSError, ValueError):  # the flush at exit would fail once more
        sys.stdout.flush()
        return code
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _prepare_streams() -> None:
    """Replace closed standard streams (`>&-`), and let names be printed that the encoding of the output lacks."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # also so that no other file gets its number, to which C code may print
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _main(argv: Sequence[str] | None) -> int:
    verb, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help"):
        print(HELP)
        return 0
    if verb == "--version":
        print(f"drelu-timm {__version__}")
        return 0
    try:
        return _run(verb, rest)
    except InputError as error:
        print(f"{_process()}error: {error}", file=sys.stderr)
        return 2
    except Preempted as stopped:
        print(f"{stopped}{HOW_TO_RESUME.get(verb, '')}", file=sys.stderr)
        return PREEMPTED_EXIT_CODE
    except KeyboardInterrupt:
        print(f"\nstopped{HOW_TO_RESUME.get(verb, '')}", file=sys.stderr)
        return 130


def _run(verb: str, argv: Sequence[str]) -> int:
    """Read the flags of a verb before its module is imported: help and mistyped flags need neither torch nor timm."""
    if verb not in VERBS:
        raise unknown("VERB" if not verb.startswith("-") else "flag", verb, [*VERBS, "--help", "--version"])
    if verb == "doctor":  # also runs without tyro, in the light base
        return _import("doctor", verb).main(argv)
    config = _import("flags", verb).read(verb, argv)
    return _import(verb, verb).main(config) or 0


def _import(module: str, verb: str) -> ModuleType:
    try:
        return import_module(f"drelu_timm.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("drelu_timm"):
            raise
        raise InputError(
            f"{verb} needs the package {error.name!r}, which is not installed. Run pip install 'drelu-timm[all]'."
        ) from error


def _process() -> str:
    """Return the prefix of messages: the rank, except in the first process on a machine."""
    return "" if os.environ.get("LOCAL_RANK", "0") == "0" else f"process {os.environ.get('RANK', '?')}: "


if __name__ == "__main__":
    sys.exit(main())
