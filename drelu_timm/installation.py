"""What is installed beside this package: what of it is missing or clashes, what that breaks, and what mends it.

The bounds are those of the packages' own metadata. Only the standard library is imported at the start, as torch itself
may be what is broken.
"""

import hashlib
import shlex
import shutil
import sys
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .errors import one_line

if TYPE_CHECKING:
    from packaging.requirements import Requirement

US = "drelu-timm"
ROBUSTBENCH = f"{US}[robustbench]"  # the extra


@dataclass(frozen=True)
class Problem:
    """Something that is missing, clashes or does not import.

    Attributes:
        package: What it is about, a normalised name such as "huggingface-hub".
        what: What is wrong.
        breaks: What does not work for it.
        install: Requirements that mend it.
        uninstall: Packages that have to go first.
        fault: Whether something that this package or an installed extra needs is broken.
    """

    package: str
    what: str
    breaks: str
    install: tuple[str, ...]
    uninstall: tuple[str, ...] = ()
    fault: bool = True

    def __str__(self) -> str:
        return f"{self.what}; {self.breaks}; mend it with: {mend([self])}"


@dataclass(frozen=True)
class Extra:
    """An extra of this package.

    Attributes:
        told_by: Packages that are all there where it was installed, as pip does not record that.
        gives: What it adds.
    """

    told_by: tuple[str, ...]
    gives: str


EXTRAS = {
    "cli": Extra(("tyro",), "flags and tables of the command line"),
    "train": Extra(("tyro", "accelerate"), "drelu-timm train, and the datasets"),
    "evaluate": Extra(("tyro", "pyautoattack"), "drelu-timm evaluate and evaluate_model"),
    "robustbench": Extra(("robustbench",), "RobustBench's models and benchmark, entries for its leaderboard"),
    "sweep": Extra(("tyro", "pyautoattack", "submitit"), "drelu-timm sweep on a cluster"),
    "report": Extra(("tyro", "tensorboard"), "drelu-timm report, curves, and --log-with tensorboard"),
}

# What a package breaks that is missing, of a wrong version, or not what it should be.
BREAKS = {
    "timm": "robustbench's models are written for that version: with another some may not load, or not be the same",
    "huggingface-hub": "timm goes on without the hub and does not say so: no hf-hub: model, no pretrained weights of "
    "timm's (timm 1.0.9 cannot import huggingface_hub 2)",
    "setuptools": "robustbench does not import: it needs pkg_resources, which setuptools has no longer from version 81 "
    "on",
    "robustbench": "none of its models can be loaded, and no leaderboard entry checked",
}


def installed_version(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def installed_extras() -> list[str]:
    """The extras of this package that were installed, as far as what is there tells."""
    return [name for name, extra in EXTRAS.items() if all(map(installed_version, extra.told_by))]


def problems() -> list[Problem]:
    """All that is wrong with this package, its installed extras and torchattacks; at most one problem a package."""
    extras = installed_extras()
    found = [*broken_imports(), *(robustbench_problems() if "robustbench" in extras else ())]
    if installed_version("packaging") is None:
        breaks = "huggingface_hub does not import, nor timm's hub; and no versions can be compared here"
        found.append(Problem("packaging", "packaging is not installed", breaks, ("packaging",)))
    else:
        found += [*unmet(US, extras), *unmet("torchattacks", (), fault=False)]
    found += lost_hub()
    by_package: dict[str, Problem] = {}
    for problem in found:
        by_package.setdefault(problem.package, problem)
    return list(by_package.values())


def broken_imports() -> Iterator[Problem]:
    """Torch, torchvision or timm that is installed and does not import, as builds that do not match do not."""
    install = {"torch": ("torch",), "torchvision": _matching_torchvision(), "timm": ("timm",)}
    for package in filter(installed_version, install):
        try:
            import_module(package)
        except Exception as error:  # whatever it is that a broken library raises
            yield _unimportable(package, error, "nothing of this package works", install[package])
            return  # what comes next needs it


def broken_robustbench(error: Exception) -> Problem:
    """What to do about a robustbench that is installed, and raised this when it was imported."""
    return _unimportable("robustbench", error, BREAKS["robustbench"], (ROBUSTBENCH,))


def _unimportable(package: str, error: Exception, breaks: str, install: tuple[str, ...]) -> Problem:
    versions = ", ".join(f"{name} {installed_version(name)}" for name in dict.fromkeys((package, "torch")))
    what = f"{package} cannot be imported ({versions}): {one_line(error)}"
    return Problem(package, what, breaks, install, uninstall=(package,))


def _matching_torchvision() -> tuple[str, ...]:
    """The arguments of pip for the torchvision that was built with the torch that is there."""
    public, _, build = (installed_version("torch") or "").partition("+")
    # Builds with a tag are not on PyPI.
    index = (f"--extra-index-url=https://download.pytorch.org/whl/{build}",) if build else ()
    return ("torchvision", *((f"torch=={public}",) if public else ()), *index)


def robustbench_problems() -> Iterator[Problem]:
    """What keeps robustbench 1.1.1 from being imported and does not explain itself."""
    install = (ROBUSTBENCH,)
    if _overwritten_by_torchattacks():
        what = "robustbench: torchattacks has put its stale copy in the place of the real one"
        yield Problem("robustbench", what, BREAKS["robustbench"], install, uninstall=("torchattacks", "robustbench"))
    elif installed_version("robustbench") is None:
        yield Problem("robustbench", "robustbench is not installed", BREAKS["robustbench"], install)
    if find_spec("pkg_resources") is None:
        what = f"pkg_resources is not there (setuptools {installed_version('setuptools') or 'is missing'})"
        yield Problem("setuptools", what, BREAKS["setuptools"], _our_bound("setuptools"))


def _overwritten_by_torchattacks() -> bool:
    """Whether the robustbench/utils.py that is there is the one out of the torchattacks wheel."""
    try:
        carried = distribution("torchattacks").files or []
    except PackageNotFoundError:
        return False
    for file in carried:
        if file.as_posix() == "robustbench/utils.py" and file.hash is not None:
            path = file.locate()
            return path.is_file() and record_hash(path.read_bytes()) == file.hash.value  # pyright: ignore
    return False


def record_hash(content: bytes) -> str:
    """SHA-256 as a wheel's RECORD writes it."""
    return urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def lost_hub() -> Iterator[Problem]:
    """The hub that timm could not import, which it keeps to itself until something is asked of the hub."""
    installed = installed_version("huggingface_hub")
    try:
        has_hub = import_module("timm.models._hub").has_hf_hub()
    except Exception:  # timm itself does not import, which `broken_imports` says, or its layout is another
        return
    if installed and not has_hub:
        what = f"timm {installed_version('timm')} cannot import huggingface_hub {installed}"
        yield Problem("huggingface-hub", what, BREAKS["huggingface-hub"], _our_bound("huggingface-hub"))


def unmet(package: str, extras: Iterable[str], *, fault: bool = True) -> list[Problem]:
    """The requirements that are not met of a package, of what it requires, and so on; a problem a package.

    Args:
        package: Where to start; nothing is found where it is not installed.
        extras: The package's extras whose requirements count.
        fault: Whether this package needs what is found.
    """
    from packaging.utils import canonicalize_name

    clashes: dict[str, list[tuple[str, Requirement]]] = {}
    for requirer, requirement in _unmet(package, extras):
        clashes.setdefault(canonicalize_name(requirement.name), []).append((requirer, requirement))
    return [_clash(name, found, fault) for name, found in clashes.items()]


def _unmet(package: str, extras: Iterable[str]) -> Iterator[tuple[str, "Requirement"]]:
    """(the package that requires it, the requirement that is not met)."""
    from packaging.utils import canonicalize_name

    todo = [(package, ("", *extras))]
    for requirer, chosen in todo:  # grows meanwhile
        for requirement in _requirements(requirer):
            marker = requirement.marker
            if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in chosen):
                continue
            if not _is_met(requirement):
                yield requirer, requirement
            elif (step := (canonicalize_name(requirement.name), ("", *sorted(requirement.extras)))) not in todo:
                todo.append(step)


def _is_met(requirement: "Requirement") -> bool:
    installed = installed_version(requirement.name)
    try:
        return installed is not None and requirement.specifier.contains(installed, prereleases=True)
    except ValueError:  # a version that is none
        return False


def _requirements(package: str) -> "Iterator[Requirement]":
    from packaging.requirements import Requirement

    for line in (requires(package) or []) if installed_version(package) else []:
        with suppress(ValueError):  # old metadata hold lines that are no requirements
            yield Requirement(line)


def _clash(package: str, clashes: "list[tuple[str, Requirement]]", fault: bool) -> Problem:
    installed = installed_version(package)
    needs = ", ".join(dict.fromkeys(f"{requirer} needs {_bare(requirement)}" for requirer, requirement in clashes))
    what = f"{package} {installed} is installed, but {needs}" if installed else f"{package} is missing: {needs}"
    breaks = f"{' and '.join(dict.fromkeys(requirer for requirer, _ in clashes))} may not import, or fail later"
    if not fault:
        breaks = "nothing of this package is known to break by it; pip calls the environment broken"
    elif package in BREAKS:
        breaks = BREAKS[package]
    return Problem(package, what, breaks, tuple(dict.fromkeys(_bare(each) for _, each in clashes)), fault=fault)


def _bare(requirement: "Requirement") -> str:
    """A requirement without its marker, for pip."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def _our_bound(package: str) -> tuple[str, ...]:
    """The requirement of a package that one of our extras has; the package alone where packaging is not there."""
    try:
        return (next(_bare(each) for each in _requirements(US) if each.name == package),)
    except (ImportError, StopIteration):
        return (package,)


def mend(problems: Iterable[Problem]) -> str:
    """One command line that mends all the problems in the environment that runs this."""
    problems = list(problems)
    uninstall, install = (_all(problems, field) for field in ("uninstall", "install"))
    return pip(*([("uninstall", *uninstall)] if uninstall else []), ("install", *install))


def _all(problems: list[Problem], field: str) -> list[str]:
    return list(dict.fromkeys(each for problem in problems for each in getattr(problem, field)))


def pip(*calls: tuple[str, ...]) -> str:
    """A command line of pip's for this very environment; uv's where it has none, as those that uv makes.

    Args:
        calls: The arguments of each call, such as ("install", "setuptools<81").
    """
    # Not by find_spec: asked for pip, setuptools' import hook turns itself off, and torch.compile fails after that.
    has_pip = installed_version("pip") is not None
    if not has_pip and shutil.which("uv"):
        return " && ".join(
            shlex.join(["uv", "pip", verb, "--python", sys.executable, *arguments]) for verb, *arguments in calls
        )
    modules = [["pip", verb, *(["--yes"] if verb == "uninstall" else []), *arguments] for verb, *arguments in calls]
    return " && ".join(
        shlex.join([sys.executable, "-m", *module]) for module in ([] if has_pip else [["ensurepip"]]) + modules
    )
