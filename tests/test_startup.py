"""What is imported when: by the command line before its work, and by this package and timm in every order.

Each test runs in a fresh process, and asks which modules it has imported, not how long that took.
"""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import drelu_timm
from drelu_timm.flags import CONFIGS

HEAVY = {"torch", "torchvision", "timm", "numpy", "accelerate", "robustbench", "foolbox", "matplotlib", "pandas"}
ASK = "import sys\nprint(*{name.partition('.')[0] for name in sys.modules})"


def run(program: str, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def printed(program: str, folder: Path | None = None) -> str:
    done = run(program, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The command line

MAIN = """
import atexit, sys
atexit.register(lambda: print(*{name.partition(".")[0] for name in sys.modules}))
from drelu_timm.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("arguments", "returncode", "said"),
    [
        (["--help"], 0, "usage: drelu-timm VERB [options]"),
        (["--version"], 0, f"drelu-timm {drelu_timm.__version__}"),
        (["trian"], 2, "error: VERB 'trian' is unknown; did you mean train?"),
        (["--hepl"], 2, "error: flag '--hepl' is unknown; did you mean --help?"),
        (["train", "--objectiv", "at"], 2, "error: flag '--objectiv' is unknown; did you mean --objective?"),
        (["evaluate", "x", "--n_exampels=3"], 2, "error: flag '--n_exampels' is unknown; did you mean --n-examples?"),
        (["doctor", "--hepl"], 2, "error: flag '--hepl' is unknown; did you mean --help?"),
        (["doctor", "--help"], 0, "usage: drelu-timm doctor"),
        (["train", "--preset", "wang2023", "--help"], 0, "usage: drelu-timm train"),
        *(([verb, "--help"], 0, f"usage: drelu-timm {verb}") for verb in CONFIGS),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_needs_no_work_imports_neither_torch_nor_timm(arguments, returncode, said):
    done = run(MAIN, *arguments)
    *lines, modules = done.stdout.splitlines()
    assert done.returncode == returncode
    assert (done.stderr.splitlines() if returncode else lines)[0].startswith(said)
    assert not (done.stderr if returncode == 0 else lines)
    assert not HEAVY & set(modules.split())


def test_errors_come_without_the_warnings_of_what_is_imported():
    done = subprocess.run(
        [sys.executable, "-m", "drelu_timm", "train", "--model", "dense_drelu", "--dataset", "minst"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (2, "error: --dataset 'minst' is unknown; did you mean mnist?\n")


# The package


def test_importing_the_package_imports_neither_torch_nor_timm():
    assert not HEAVY & set(printed(f"import drelu_timm\n{ASK}").split())


def test_the_public_names_are_listed_and_are_those_of_the_modules_that_they_come_from():
    assert set(dir(drelu_timm)) == set(drelu_timm.__all__) >= {"evaluate_model", "evaluate_sweep", "__version__"}
    for name in drelu_timm.__all__:
        value = getattr(drelu_timm, name)
        assert name == "__version__" or (value.__name__ == name and value.__module__.startswith("drelu_timm."))
    with pytest.raises(AttributeError, match="has no attribute 'evaluate_modle'"):
        drelu_timm.evaluate_modle  # noqa: B018


# Registration

CREATE = "print(type(timm.create_model('dense_drelu')).__name__, *map(timm.is_model, ['resnet50_drelu', PUBLISHED]))"
CREATE = CREATE.replace("PUBLISHED", repr("drelutimm2026_dense_drelu_at_eps01_mnist_linf"))
REGISTERED = "Dense True True"


ORDERS = (
    "import drelu_timm, timm",
    "import timm, drelu_timm",
    "import timm.models, drelu_timm, timm",
    "import drelu_timm, timm.models",
    "import drelu_timm; from timm import create_model; import timm",
    "import drelu_timm; from timm.models import create_model; import timm",
    "import drelu_timm; drelu_timm.DReLU; import timm",
    "import drelu_timm; drelu_timm.register_robust_model; import timm",
    # As timm's scripts do for --device-modules.
    "import importlib, timm; importlib.import_module('drelu_timm')",
    # A module of ours that needs timm is the first to import it.
    "import drelu_timm.models.architectures, timm",
    "import drelu_timm.models.variants, timm",
    "import drelu_timm.models.registry, timm",
    "import drelu_timm.zoo.robust_models, timm",
)
FORKS = """
import os, sys, torch, torchvision  # for all
for program in sys.argv[1:]:
    if os.fork() == 0:
        exec(program, {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


def test_models_are_registered_in_every_order_of_imports():
    programs = [f"{order}\nprint({order!r}, end=': ')\n{CREATE}" for order in ORDERS]
    done = run(FORKS, *programs)
    assert done.stdout.splitlines() == [f"{order}: {REGISTERED}" for order in ORDERS], done.stderr


def test_every_module_that_registration_needs_is_in_a_package_that_imports_timm_first():
    program = """
import sys, drelu_timm, timm
for name, module in list(sys.modules.items()):
    if name.startswith("drelu_timm.") and module.__file__ and "timm" in open(module.__file__).read():
        lines = open(module.__file__).read().splitlines()
        if any(line.startswith(("import timm", "from timm")) for line in lines):
            print(name)
"""
    packages = {name.split(".")[1] for name in printed(program).split()}
    assert packages == {"models", "zoo"}
    for package in packages:
        assert "\nimport timm" in (Path(drelu_timm.__file__).parent / package / "__init__.py").read_text()


def test_an_error_of_registration_is_that_of_the_import():
    done = run("import sys\nsys.modules['drelu_timm.models.registry'] = None\nimport drelu_timm, timm")
    assert done.returncode == 1
    assert "import of drelu_timm.models.registry halted" in done.stderr


def test_a_pickled_model_is_loaded_in_a_process_that_has_imported_nothing_as_a_spawned_worker_does(tmp_path):
    import timm  # here, as the other tests of this file do without

    (tmp_path / "model").write_bytes(pickle.dumps(timm.create_model("dense_drelu")))
    load = "import pickle; model = pickle.load(open('model', 'rb')); import timm"
    assert printed(f"{load}; print(type(model).__name__)\n{CREATE}", tmp_path) == f"Dense\n{REGISTERED}"
