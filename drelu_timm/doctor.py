"""`drelu-timm doctor`: installed versions, their clashes, and the one command that fixes them.

Only the standard library is imported at the start, as torch, torchvision or timm may be what is broken.
"""

import hashlib
import platform
import shlex
import shutil
import sys
import warnings
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, metadata, requires, version
from importlib.util import find_spec

from .errors import one_line, unknown

US = "drelu-timm"
ROBUSTBENCH = f"{US}[robustbench]"  # the extra
PACKAGES = (
    *(US, "torch", "torchvision", "timm", "huggingface-hub", "safetensors", "numpy", "accelerate", "tyro", "foolbox"),
    *("pyautoattack", "autoattack", "torchattacks", "robustbench", "setuptools", "packaging", "matplotlib", "pandas"),
)
BREAKS = {
    "timm": "RobustBench's models are written for that version: with another one some fail to load, or differ",
    "huggingface-hub": "timm works without the hub and does not say so: no hf-hub: model and no pretrained weights "
    "(timm 1.0.9 cannot import huggingface_hub 2)",
    "setuptools": "robustbench cannot be imported: it needs pkg_resources, which setuptools lacks from version 81 on",
    "robustbench": "none of its models can be loaded, and no leaderboard entry checked",
}


@dataclass(frozen=True)
class Clash:
    """Packages that do not work together.

    Attributes:
        package: The package that has to change, as pip spells it.
        what: What is wrong.
        breaks: What does not work because of it.
        install: Arguments of ``pip install`` that fix it.
        uninstall: Packages that have to be removed first.
    """

    package: str
    what: str
    breaks: str
    install: tuple[str, ...]
    uninstall: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.what}; {self.breaks}; fix it with: {fix([self])}"


def main(argv: Sequence[str]) -> int:
    """Print the versions and the clashes.

    Returns:
        1 if anything clashes, else 0.

    Raises:
        InputError: A flag; doctor has none.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(
            "usage: drelu-timm doctor\n\nPrint versions, what clashes, what that breaks, and the command that fixes it."
        )
        return 0
    if argv:
        raise unknown("flag", argv[0], ["--help"])
    print(f"{'python':17}{platform.python_version()}  {sys.executable}")
    for package in PACKAGES:
        print(f"{package:17}{installed_version(package) or '-'}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from imports; what matters of them is printed below
        found = clashes()
    for clash in found:
        print(f"\n{clash.what}\n  breaks: {clash.breaks}\n  fix:    {fix([clash])}")
    if len(found) > 1:
        print(f"\nAll of these at once:\n  {fix(found)}")
    if not found:
        print("\nNothing clashes.")
    return 1 if found else 0


def installed_version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def clashes() -> list[Clash]:
    """Return what clashes here, at most one entry per package; it imports torch, torchvision, timm and RobustBench."""
    with_robustbench = installed_version("robustbench") is not None
    found = [*broken_imports(), *(robustbench_clashes() if with_robustbench else ()), *version_clashes(), *lost_hub()]
    if not found and with_robustbench:
        from .robustbench import adapt

        try:
            adapt()
        except Exception as error:  # broken environments raise anything
            found.append(broken_robustbench(error.__cause__ if isinstance(error.__cause__, Exception) else error))
    first: dict[str, Clash] = {}
    for clash in found:
        first.setdefault(clash.package, clash)
    return list(first.values())


def broken_imports() -> Iterator[Clash]:
    """Return torch, torchvision or timm if it cannot be imported, as when they are built for different versions."""
    ours = ROBUSTBENCH if installed_version("robustbench") else US
    fixes = {"torch": ("torch",), "torchvision": _matching_torchvision(), "timm": ("--upgrade", "timm", ours)}
    for package, install in fixes.items():
        try:
            import_module(package)  # timm's import registers our models: an error of that is found here
        except Exception as error:  # broken environments raise anything
            yield _unimportable(package, error, "nothing of this package works", install)
            return  # the next one needs it


def broken_robustbench(error: Exception) -> Clash:
    """Return the clash for an installed robustbench whose import raised an error."""
    return _unimportable("robustbench", error, BREAKS["robustbench"], (ROBUSTBENCH,))


def _unimportable(package: str, error: Exception, breaks: str, install: tuple[str, ...]) -> Clash:
    versions = ", ".join(f"{name} {installed_version(name)}" for name in dict.fromkeys((package, "torch")))
    what = f"{package} cannot be imported ({versions}): {one_line(error)}"
    return Clash(package, what, breaks, install, uninstall=(package,))


def _matching_torchvision() -> tuple[str, ...]:
    """Return pip's arguments for the torchvision that was built with the installed torch."""
    public, _, build = (installed_version("torch") or "").partition("+")
    # Builds with a tag, such as +cpu, are not on PyPI.
    index = (f"--extra-index-url=https://download.pytorch.org/whl/{build}",) if build else ()
    return ("torchvision", *((f"torch=={public}",) if public else ()), *index)


def robustbench_clashes() -> Iterator[Clash]:
    """Return what keeps robustbench 1.1.1 from being imported with an error that does not name the cause."""
    if _overwritten_by_torchattacks():
        what = "torchattacks has overwritten robustbench with its own stale copy"
        yield Clash("robustbench", what, BREAKS["robustbench"], (ROBUSTBENCH,), ("torchattacks", "robustbench"))
    elif installed_version("robustbench") is None:
        yield Clash("robustbench", "robustbench is not installed", BREAKS["robustbench"], (ROBUSTBENCH,))
    if find_spec("pkg_resources") is None:
        what = f"pkg_resources is not found (setuptools {installed_version('setuptools') or 'is missing'})"
        yield Clash("setuptools", what, BREAKS["setuptools"], ("setuptools<81",))


def _overwritten_by_torchattacks() -> bool:
    """Return whether the installed robustbench/utils.py is the one out of the torchattacks wheel."""
    with suppress(PackageNotFoundError):
        for file in distribution("torchattacks").files or []:
            if file.as_posix() == "robustbench/utils.py" and file.hash is not None:
                path = file.locate()
                return path.is_file() and record_hash(path.read_bytes()) == file.hash.value  # pyright: ignore
    return False


def record_hash(content: bytes) -> str:
    """Return the SHA-256 as a wheel's RECORD has it."""
    return urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def version_clashes() -> Iterator[Clash]:
    """Return installed packages whose version RobustBench or this package does not work with, by their metadata."""
    if installed_version("packaging") is None:
        breaks = "huggingface_hub cannot be imported, nor can versions be compared here"
        yield Clash("packaging", "packaging is not installed", breaks, ("packaging",))
        return
    from packaging.requirements import Requirement

    extras = {"", *metadata(US).get_all("Provides-Extra", [])}
    if not installed_version("robustbench"):
        extras -= {"robustbench", "all"}  # their upper bounds are RobustBench's
    for requirer in filter(installed_version, ("robustbench", US)):  # the exact pins of RobustBench's first
        for line in requires(requirer) or []:
            with suppress(ValueError):  # metadata may hold lines that are not requirements, and invalid versions
                needed, marker = (requirement := Requirement(line)).specifier, requirement.marker
                found = installed_version(requirement.name)
                applies = marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)
                if found and applies and not needed.contains(found, prereleases=True):
                    name = requirement.name.lower().replace("_", "-")
                    what = f"{name} {found} is installed, but {requirer} needs {name}{needed}"
                    yield Clash(name, what, BREAKS.get(name, f"{requirer} may fail with it"), (f"{name}{needed}",))


def lost_hub() -> Iterator[Clash]:
    """Return the hub if timm could not import it, which timm reports only when a model of the hub is asked for."""
    installed = installed_version("huggingface-hub")
    with suppress(Exception):  # `broken_imports` reports a timm that cannot be imported; its layout may change
        if installed and not import_module("timm.models._hub").has_hf_hub():
            what = f"timm {installed_version('timm')} cannot import huggingface_hub {installed}"
            yield Clash("huggingface-hub", what, BREAKS["huggingface-hub"], ("huggingface-hub<2",))


def fix(found: Iterable[Clash]) -> str:
    """Return one command line that fixes clashes in the environment that runs this."""
    found = list(found)
    uninstall, install = (
        list(dict.fromkeys(each for clash in found for each in getattr(clash, field)))
        for field in ("uninstall", "install")
    )
    return pip(*([("uninstall", *uninstall)] if uninstall else []), ("install", *install))


def pip(*calls: tuple[str, ...]) -> str:
    """Return a command line of pip's for this environment, or of uv's where pip is missing, as in what uv creates.

    Args:
        calls: The arguments of each call, such as ("install", "setuptools<81").
    """
    # Not by find_spec: asked for pip, setuptools' import hook turns itself off, and torch.compile fails after that.
    has_pip = installed_version("pip") is not None
    if not has_pip and shutil.which("uv"):
        return " && ".join(shlex.join(["uv", "pip", verb, "--python", sys.executable, *rest]) for verb, *rest in calls)
    modules = [["pip", verb, *(["--yes"] if verb == "uninstall" else []), *rest] for verb, *rest in calls]
    ensured = [] if has_pip else [["ensurepip"]]
    return " && ".join(shlex.join([sys.executable, "-m", *module]) for module in ensured + modules)
