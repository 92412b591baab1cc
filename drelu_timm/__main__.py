"""`drelu-timm VERB ...` and `python -m drelu_timm VERB ...`: from a verb to the module that does it."""

import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module

from .errors import InputError, unknown
from .preemption import EXIT_CODE, Preempted

VERBS = {
    "demo": "the whole way on scikit-learn's digits, in under two minutes on two cores: start here",
    "train": "train a timm model, naturally, adversarially or by TRADES; writes a run directory",
    "evaluate": "attack a model by AutoAttack and by what knows how gradients are hidden; writes results into its run",
    "export": "a run as a RobustBench entry, a timm / Hugging Face folder and a model card",
    "sweep": "a grid of trainings and evaluations, the paper's or your own, here or on a cluster",
    "report": "tables, statistics and figures of evaluated runs, beside the paper's",
    "doctor": "what is installed here, what of it clashes, and the commands that mend it",
}

HOW_TO_GO_ON = {
    "demo": "; the same command goes on where it was",
    "train": "; the same command with --resume goes on from the last state",
    "evaluate": "; the same command goes on where the last batch ended",
    "sweep": "; the same command goes on with what is not done",
}

_FIRST_PROCESS_ENDS = 10  # seconds, within which it has met the error that all processes meet

HELP = "usage: drelu-timm VERB [options]\n\n" + "\n".join(f"  {verb:10}{text}" for verb, text in VERBS.items())
HELP += "\n\n`drelu-timm VERB --help` lists a verb's options."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb.

    Returns:
        0 when done, 1 where doctor, sweep or report found something broken, 2 for input that cannot be used, 75 where
        SIGTERM stopped it, 130 for Ctrl-C.
    """
    verb, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help"):
        print(HELP)
        return 0
    try:
        if verb not in VERBS:
            raise unknown("VERB", verb, VERBS)
        return _module(verb).main(rest) or 0
    except InputError as error:
        _say(error)
        return 2
    except Preempted as stopped:
        print(f"{stopped}{HOW_TO_GO_ON.get(verb, '')}", file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        print(f"\nstopped{HOW_TO_GO_ON.get(verb, '')}", file=sys.stderr)
        return 130


def _say(error: InputError) -> None:
    """Print an error, but only once where every process of a launch meets the same.

    The first process says it, and when that has ended the launcher ends the others: one that is still there by then
    has met an error of its own.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)
        return
    time.sleep(_FIRST_PROCESS_ENDS)
    print(f"process {os.environ.get('RANK', '?')}: error: {error}", file=sys.stderr)


def _module(verb: str):
    try:
        return import_module(f"drelu_timm.{verb}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("drelu_timm"):
            raise
        raise InputError(
            f"{verb} needs the package {error.name!r}, which is not installed; pip install 'drelu-timm[all]'"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
