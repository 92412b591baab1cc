"""The folder of a report: made beside its place, then moved there file by file; what no report wrote is left alone."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError, one_line
from ..files import read_json, write_json

FILES = "files.json"  # what the last report wrote, relative to its folder


@contextmanager
def replaced(output_dir: Path) -> Iterator[Path]:
    """A new folder whose files take the place of an earlier report's at the end; with an error nothing is changed.

    Args:
        output_dir: Where they go.

    Raises:
        InputError: A place that cannot be written to, or files in the way that no report wrote.
    """
    output_dir = output_dir.resolve()
    if not output_dir.name:
        raise InputError(f"--output-dir {output_dir} is the root of all folders; give another one")
    before = _written_before(output_dir)
    new = output_dir.with_name(f".{output_dir.name}.{os.getpid()}")
    try:
        new.mkdir(parents=True)
        yield new
        files = {path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file()}
        for name in sorted(files - before):
            if (output_dir / name).exists():
                raise InputError(
                    f"{output_dir / name} is in the way, and no report wrote it; give another --output-dir"
                )
        write_json(output_dir / FILES, {"files": sorted(before | files)})  # whatever stops this, all stay known
        for name in sorted(files):
            (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).replace(output_dir / name)
        for name in before - files:
            (output_dir / name).unlink(missing_ok=True)
        write_json(output_dir / FILES, {"files": sorted(files)})
    except OSError as error:
        raise InputError(
            f"--output-dir {output_dir} cannot be written ({one_line(error)}); give another one"
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _written_before(output_dir: Path) -> set[str]:
    """The files of an earlier report, by their paths relative to its folder."""
    path = output_dir / FILES
    if not path.is_file():
        return set()
    files = read_json(path).get("files")
    if not isinstance(files, list) or not all(
        isinstance(name, str) and (output_dir / name).resolve().is_relative_to(output_dir) for name in files
    ):
        raise InputError(f"{path} is no list of a report's files; move it away, or give another --output-dir")
    return set(files)
