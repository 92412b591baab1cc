"""Run a Python script in which timm knows this package's models: ``python -m drelu_timm.run SCRIPT [ARGUMENTS]``.

    python -m drelu_timm.run validate.py --model resnet50_drelu --checkpoint model.safetensors --data-dir DIR
    python -m drelu_timm.run onnx_export.py resnet50_drelu.onnx --model resnet50_drelu

timm's ``train.py`` needs only ``--device-modules drelu_timm``; its other scripts have no option that imports a module.
"""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import InputError


def main(argv: Sequence[str]) -> None:
    """Run a script as ``python SCRIPT ARGUMENTS`` does. The models are registered when the script imports timm.

    Raises:
        InputError: ``argv`` has no script, or it is not a file, or the models raise it in the script.
    """
    if not argv:
        raise InputError("SCRIPT is needed. Give a Python file and its arguments: validate.py --model resnet50_drelu.")
    script = Path(argv[0])
    if not script.is_file():
        raise InputError(f"SCRIPT {script} is not a file. Give the path of a Python file.")
    sys.argv = [*argv]
    sys.path[0] = str(script.resolve().parent)  # where Python looks for modules that the script imports
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
