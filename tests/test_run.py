"""Scripts in which timm knows the models, run as a user runs them."""

import subprocess
import sys

import pytest

TRAINED = "drelutimm2026_dense_drelu_at_eps01_mnist_linf"
SCRIPT = """
import sys
import neighbour
import timm

if __name__ == "__main__":
    model = timm.create_model(sys.argv[1], num_classes=int(sys.argv[2]))
    print(neighbour.NAME, type(model).__name__, model.num_classes, sys.argv)
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "neighbour.py").write_text("NAME = 'neighbour'\n")

    def start(*arguments):
        command = [sys.executable, "-m", "drelu_timm.run", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path.parent)

    return start


def test_a_script_has_the_models_its_arguments_and_its_neighbours(run, tmp_path):
    arguments = [str(tmp_path / "script.py"), "dense_drelu", "7"]
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (0, f"neighbour Dense 7 {arguments}\n"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: SCRIPT is needed. Give a Python file and its arguments: validate.py --model resnet50_drelu."),
        (["none.py"], "error: SCRIPT none.py is not a file. Give the path of a Python file."),
        (["{tmp}/script.py", TRAINED, "10"], f"error: {TRAINED} is a trained model"),
    ],
)
def test_errors_are_one_line(run, tmp_path, arguments, message):
    done = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
