"""The folder of a report, which is made next to its place and moved there when it is complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError, one_line

_NUMBERS = "numbers.json"  # in every report, by which its folder is recognized
_FOLDERS = ("tables", "figures")


@contextmanager
def replaced(output_dir: Path) -> Iterator[Path]:
    """Yield a new folder whose files replace those of an earlier report at the end; with an error nothing is changed.

    Other files in ``output_dir`` are kept, except in its folders tables and figures.

    Args:
        output_dir: Folder of the report. It must not exist, be empty, or hold an earlier report.

    Raises:
        InputError: A folder with other files, or one that cannot be written to.
    """
    output_dir = output_dir.resolve()
    if not output_dir.name:
        raise InputError(f"--output-dir {output_dir} is the root of all folders. Use another.")
    new = output_dir.with_name(f".{output_dir.name}.{os.getpid()}")
    try:
        if output_dir.exists() and any(output_dir.iterdir()) and not (output_dir / _NUMBERS).is_file():
            raise InputError(f"--output-dir {output_dir} has other files, and no report. Use another.")
        new.mkdir(parents=True)
        yield new
        output_dir.mkdir(exist_ok=True)
        for name in _FOLDERS:
            if (output_dir / name).exists():
                shutil.rmtree(output_dir / name)
        for path in new.iterdir():
            path.replace(output_dir / path.name)
    except OSError as error:
        raise InputError(f"--output-dir {output_dir} cannot be written ({one_line(error)}). Use another.") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
