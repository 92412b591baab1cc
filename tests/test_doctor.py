"""The doctor: what it finds in environments made of metadata alone, and in this one."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import packaging.requirements
import pytest
import timm.models._hub
from fake_packages import install

from drelu_timm import __main__, doctor, robustbench
from drelu_timm.doctor import Clash, clashes, fix, pip

OURS = importlib.metadata.requires("drelu-timm")
EXTRAS = importlib.metadata.metadata("drelu-timm").get_all("Provides-Extra")
SOUND = {
    "robustbench": "1.1.1",
    "setuptools": "80.9.0",
    "huggingface-hub": "1.33.0",
    "timm": "1.0.9",
}


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Makes an environment with all of the extra robustbench, in the versions given; None for one that is missing."""

    def make(**versions: str | None) -> Path:
        names = {packaging.requirements.Requirement(line).name for line in OURS} - {"drelu-timm"} | {"pip", "packaging"}
        versions = {**dict.fromkeys(names, "99.0"), **SOUND, **{k.replace("_", "-"): v for k, v in versions.items()}}
        install(tmp_path, "drelu-timm", requires=OURS, about="".join(f"Provides-Extra: {name}\n" for name in EXTRAS))
        for name, version in versions.items():
            if version is not None:
                install(tmp_path, name, version, requires=["timm ==1.0.9"] if name == "robustbench" else ())
        if (versions["setuptools"] or "84") < "81":
            (tmp_path / "pkg_resources.py").touch()
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        monkeypatch.delitem(sys.modules, "pkg_resources", raising=False)
        monkeypatch.setattr(robustbench, "adapt", lambda: None)  # nothing to import
        return tmp_path

    return make


def test_a_sound_environment_has_no_clashes(environment):
    environment()
    assert clashes() == []


def test_setuptools_84_and_huggingface_hub_2_are_named_and_fixed_by_one_command(environment):
    environment(setuptools="84.0.0", huggingface_hub="2.4.0")
    setuptools, hub = clashes()
    assert "setuptools 84.0.0" in setuptools.what and "pkg_resources" in setuptools.breaks
    assert hub.what == "huggingface-hub 2.4.0 is installed, but drelu-timm needs huggingface-hub<2"
    assert "no hf-hub: model" in hub.breaks
    assert fix([setuptools, hub]) == f"{sys.executable} -m pip install 'setuptools<81' 'huggingface-hub<2'"


def test_robustbench_without_setuptools_clashes(environment):
    environment(setuptools=None)
    (clash,) = clashes()
    assert "setuptools is missing" in clash.what and clash.install == ("setuptools<81",)


@pytest.mark.parametrize(
    ("versions", "what", "installed"),
    [
        ({"timm": "1.0.31"}, "timm 1.0.31 is installed, but robustbench needs timm==1.0.9", "timm==1.0.9"),
        ({"torch": "2.4.1"}, "torch 2.4.1 is installed, but drelu-timm needs torch>=2.6", "torch>=2.6"),
        ({"accelerate": "0.9"}, "accelerate 0.9 is installed, but drelu-timm needs accelerate>=1.0", "accelerate>=1.0"),
        ({"packaging": None}, "packaging is not installed", "packaging"),
    ],
)
def test_versions_are_compared_with_what_the_metadata_require(environment, versions, what, installed):
    environment(**versions)
    (clash,) = clashes()
    assert (clash.what, clash.install) == (what, (installed,))


def test_metadata_that_cannot_be_parsed_are_no_crash(environment):
    folder = environment(robustbench=None, accelerate=None)
    install(folder, "accelerate", "unknown")
    install(folder, "robustbench", "1.1.1", requires=["colorama (platform_system = Windows", "timm ==1.0.10"])
    assert {"timm==1.0.10"} <= {each for clash in clashes() for each in clash.install}  # what can be read


def test_bounds_of_robustbench_count_only_where_it_is_installed(environment):
    environment(robustbench=None, setuptools="84.0.0", huggingface_hub="2.4.0", timm="1.0.31", tensorboard=None)
    assert clashes() == []


def test_the_stale_robustbench_out_of_torchattacks_is_removed_first(environment):
    folder = environment()
    install(folder, "torchattacks", files={"robustbench/utils.py": b"def load_model(): ..."})
    (clash,) = clashes()
    assert "torchattacks has overwritten robustbench" in clash.what
    python = sys.executable
    assert fix([clash]) == (
        f"{python} -m pip uninstall --yes torchattacks robustbench && {python} -m pip install 'drelu-timm[robustbench]'"
    )


def test_a_hub_that_timm_lost_is_found_without_any_extra(environment, monkeypatch):
    environment(robustbench=None, huggingface_hub="2.4.0")
    monkeypatch.setattr(timm.models._hub, "_has_hf_hub", False)
    (clash,) = clashes()
    assert clash.what == "timm 1.0.9 cannot import huggingface_hub 2.4.0"
    assert clash.install == ("huggingface-hub<2",)


def test_a_torchvision_of_another_build_is_installed_again_to_match_torch(environment, monkeypatch):
    environment(torch="2.15.0+cpu")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    (clash,) = clashes()
    assert "torchvision cannot be imported (torchvision 99.0, torch 2.15.0+cpu)" in clash.what
    index = "--extra-index-url=https://download.pytorch.org/whl/cpu"
    assert (clash.uninstall, clash.install) == (("torchvision",), ("torchvision", "torch==2.15.0", index))


def test_a_robustbench_that_cannot_be_imported_is_installed_again(environment, monkeypatch):
    def adapt():
        raise ImportError("No module named 'geotorch'")

    environment()
    monkeypatch.setattr(robustbench, "adapt", adapt)
    (clash,) = clashes()
    assert clash.what.endswith("No module named 'geotorch'") and clash.install == ("drelu-timm[robustbench]",)


@pytest.mark.parametrize(
    ("version", "uv", "command"),
    [
        ("99.0", "/bin/uv", "{python} -m pip install 'a<2'"),
        (None, "/bin/uv", "uv pip install --python {python} 'a<2'"),
        (None, None, "{python} -m ensurepip && {python} -m pip install 'a<2'"),
    ],
)
def test_commands_are_for_the_installer_of_this_environment(environment, monkeypatch, version, uv, command):
    environment(pip=version)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: uv)
    assert pip(("install", "a<2")) == command.format(python=sys.executable)


def test_clashes_are_printed_with_the_command_for_each_and_for_all(monkeypatch, capsys):
    found = [Clash(name, f"{name} 2 is installed", "b cannot be imported", (f"{name}<2",)) for name in ("a", "c")]
    monkeypatch.setattr(doctor, "clashes", lambda: found)
    assert __main__.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"a 2 is installed\n  breaks: b cannot be imported\n  fix:    {fix(found[:1])}\n" in out
    assert out.endswith(f"All of these at once:\n  {fix(found)}\n")


def test_doctor_has_no_flags(capsys):
    assert __main__.main(["doctor", "--data-dir", "x"]) == 2
    assert capsys.readouterr().err == "error: flag '--data-dir' is unknown; allowed: --help\n"


@pytest.fixture
def broken(tmp_path):
    """Runs Python where a package raises as soon as it is imported."""

    def run(package: str, *arguments: str) -> subprocess.CompletedProcess:
        (tmp_path / package).mkdir(exist_ok=True)
        (tmp_path / package / "__init__.py").write_text('raise RuntimeError("built for another torch")')
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)

    return run


@pytest.mark.parametrize("package", ["torch", "torchvision"])
def test_the_doctor_runs_where_what_we_need_does_not_import(broken, package):
    done = broken(package, "-m", "drelu_timm", "doctor")
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"\n{package} cannot be imported ({package} " in done.stdout
    assert "): built for another torch\n  breaks: nothing of this package works\n  fix:    " in done.stdout
    assert not done.stderr


def test_the_doctor_runs_by_its_command_too(broken):
    script = shutil.which("drelu-timm", path=Path(sys.executable).parent)
    if script is None:
        pytest.skip("no drelu-timm next to this Python")
    assert "\ntorch cannot be imported" in broken("torch", script, "doctor").stdout


@pytest.mark.parametrize(
    "arguments",
    [("-c", "import drelu_timm; drelu_timm.DReLU"), ("-m", "drelu_timm", "train", "--model", "a", "--dataset", "b")],
    ids=["import", "train"],
)
def test_all_else_raises_there(broken, arguments):
    done = broken("torch", *arguments)
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: built for another torch\n")


def test_the_doctor_of_this_environment(tmp_path):
    command = [sys.executable, "-m", "drelu_timm", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    assert f"\ntimm             {timm.__version__}\n" in done.stdout and done.stdout.endswith("\nNothing clashes.\n")
