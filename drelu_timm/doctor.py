"""`drelu-timm doctor`: what is installed here, what of it clashes, and the commands that mend it.

It needs the standard library only, and what is broken becomes a line of output: `import drelu_timm` leaves torch and
timm alone for it.
"""

import os
import platform
import shutil
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter

from .errors import one_line
from .installation import (
    EXTRAS,
    US,
    Problem,
    broken_robustbench,
    installed_extras,
    installed_version,
    mend,
    pip,
    problems,
)

PACKAGES = (
    *(US, "torch", "torchvision", "timm", "huggingface_hub", "safetensors", "numpy", "accelerate", "tyro", "rich"),
    *("scikit-learn", "psutil", "tqdm", "robustbench", "autoattack", "pyautoattack", "torchattacks", "foolbox"),
    *("setuptools", "requests", "packaging", "matplotlib", "pandas", "tensorboard"),
)
SIDE = 1024  # of the matrices that are multiplied: some 2 GFLOP

Row = tuple[str, str]


def main(argv: Sequence[str]) -> int:
    """Read the flags and look."""
    parser = ArgumentParser("drelu-timm doctor", description=__doc__)
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data"), help="folder to look for datasets in: %(default)s"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the libraries; what matters is printed
        return doctor(parser.parse_args(argv).data_dir)


def doctor(data_dir: Path) -> int:
    """Print what is here and what is wrong with it.

    Returns:
        1 where something that this package or an installed extra needs is broken, else 0.
    """
    _section("Versions", _versions)
    _section("Extras", _extras)
    found = _problems()  # first of all that imports: what failed to import once fails otherwise when it is tried again
    _section("Device", _device)
    _section(f"Data in {data_dir}, and in the folders there", partial(_data, data_dir))
    _report("Broken", [problem for problem in found if problem.fault])
    _report("Clashes that break nothing here", [problem for problem in found if not problem.fault])
    if not any(problem.fault for problem in found):
        print("\nNothing that is installed is broken.")
        return 0
    return 1


def _section(title: str, rows: Callable[[], Iterator[Row]]) -> None:
    """Print rows as they come, and what broke them where something does."""
    print(f"\n{title}", flush=True)
    try:
        for label, text in rows():
            print(f"  {label:17}{text}", flush=True)
    except Exception as error:  # the broken environments that this is for raise whatever they like
        print(f"  cannot be told: {type(error).__name__}: {one_line(error)}")


def _versions() -> Iterator[Row]:
    yield "python", f"{platform.python_version()}  {sys.executable}"
    for package in PACKAGES:
        yield package, installed_version(package) or "-"


def _extras() -> Iterator[Row]:
    installed = installed_extras()
    for name, extra in EXTRAS.items():
        how = "installed" if name in installed else f"not installed; {pip(('install', f'{US}[{name}]'))}"
        yield name, f"{extra.gives}: {how}"


def _device() -> Iterator[Row]:
    """A GPU, bfloat16 and torch.compile, each tried."""
    import torch

    cuda = torch.cuda.is_available()
    for index in range(torch.cuda.device_count() if cuda else 0):
        device = torch.cuda.get_device_properties(index)
        yield "GPU", f"{device.name}, {device.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    if not cuda:
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        yield "GPU", f"none that torch can use, which is built {built}; everything works on the CPU"
    device = "cuda" if cuda else "cpu"
    yield "bfloat16", _tried(partial(_bfloat16, device))
    yield "torch.compile", _tried(partial(_compiled, device)) + _without_compiler()


def _tried(trial: Callable[[], str]) -> str:
    try:
        return trial()
    except Exception as error:
        return f"does not work: {one_line(error).partition(' Set TORCHDYNAMO_VERBOSE')[0]}"


def _bfloat16(device: str) -> str:
    import torch

    def milliseconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(SIDE, SIDE, device=device, dtype=dtype)
        times = []
        for _ in range(4):  # the first is slower
            start = perf_counter()
            (matrix @ matrix)[0, 0].item()  # waits for the GPU
            times.append(1e3 * (perf_counter() - start))
        return min(times)

    times = [milliseconds(dtype) for dtype in (torch.bfloat16, torch.float32)]
    return f"{SIDE} x {SIDE} matrix product in {times[0]:.3g} ms, in float32 {times[1]:.3g} ms ({device})"


def _compiled(device: str) -> str:
    import torch

    def function(values: torch.Tensor) -> torch.Tensor:
        return values.sin().relu() + 1

    values, start = torch.linspace(-1, 1, 64, device=device), perf_counter()
    difference = (torch.compile(function)(values) - function(values)).abs().max().item()
    seconds = perf_counter() - start
    return f"a small function in {seconds:.1f} s ({device})" if difference < 1e-5 else f"is off by {difference:.2g}"


def _without_compiler() -> str:
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    return "" if any(map(shutil.which, compilers)) else "; no C++ compiler is here, which --compile needs: install g++"


def _data(data_dir: Path) -> Iterator[Row]:
    """Where each dataset was found; nothing is downloaded, and at most a test split is opened."""
    try:
        from .data.datasets import DATASETS
        from .data.readers import holds
    except ModuleNotFoundError as error:
        yield "-", f"reading any needs the package {error.name!r}; {pip(('install', f'{US}[train]'))}"
        return
    data_dir = data_dir.expanduser()
    below = sorted(path for path in data_dir.iterdir() if path.is_dir()) if data_dir.is_dir() else []
    for name in DATASETS:
        places = [place for place in (data_dir, *below) if holds(name, place)]
        if name == "digits":
            yield name, "comes with scikit-learn" + ("" if installed_version("scikit-learn") else ", which is missing")
        else:
            yield name, ", ".join(f"--data-dir {place}" for place in places[:3]) or "not found, or not whole"


def _problems() -> list[Problem]:
    """All problems; where there seem to be none this package and RobustBench are imported, as they are to be used."""
    found = problems()
    if any(problem.fault for problem in found):
        return found
    try:
        from .zoo.published import register_published

        register_published()
    except Exception as error:
        what = f"{US} {installed_version(US)} cannot be imported: {type(error).__name__}: {one_line(error)}"
        return [*found, Problem(US, what, "nothing of it works", ("--upgrade", US))]
    if "robustbench" in installed_extras():
        try:
            from .robustbench import adapt

            adapt()
        except Exception as error:
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            found.append(broken_robustbench(cause))
    return found


def _report(title: str, found: Sequence[Problem]) -> None:
    if not found:
        return
    print(f"\n{title}")
    for problem in found:
        print(f"  {problem.what}\n    breaks: {problem.breaks}\n    mend:   {mend([problem])}")
    if len(found) > 1:
        print(f"\nAll of these at once:\n  {mend(found)}")
