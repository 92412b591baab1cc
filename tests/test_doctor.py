"""The doctor: what it finds in environments made of metadata alone, and the whole of it in this one."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import packaging.requirements
import packaging.utils
import pytest
import timm.models._hub
from fake_packages import install

from drelu_timm import __main__, doctor, installation
from drelu_timm.installation import EXTRAS, Problem, mend, pip, problems
from drelu_timm.zoo import published

OURS = importlib.metadata.requires("drelu-timm")
SOUND = {
    "robustbench": "1.1.1",
    "setuptools": "80.9.0",
    "huggingface-hub": "1.33.0",
    "timm": "1.0.9",
    "requests": "2.34",
}


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Makes an environment with all of the extra robustbench, in the versions given; None for one that is missing."""

    def make(**versions: str | None) -> Path:
        names = {packaging.requirements.Requirement(line).name for line in OURS} | {"pip", "packaging"}
        versions = {**dict.fromkeys(names, "99.0"), **SOUND, **{k.replace("_", "-"): v for k, v in versions.items()}}
        pins = {"robustbench": ["timm ==1.0.9", "requests>=2.25.0"], "torchattacks": ["requests ~=2.25.1"]}
        install(tmp_path, "drelu-timm", requires=OURS)
        for name, version in versions.items():
            if version is not None:
                install(tmp_path, name, version, requires=pins.get(name, ()))
        if (versions["setuptools"] or "84") < "81":
            (tmp_path / "pkg_resources.py").touch()
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        monkeypatch.delitem(sys.modules, "pkg_resources", raising=False)
        return tmp_path

    return make


def test_a_sound_environment_has_no_problems(environment):
    environment()
    assert problems() == []


def test_setuptools_84_and_huggingface_hub_2_are_named_and_mended_by_one_command(environment):
    environment(setuptools="84.0.0", huggingface_hub="2.4.0")
    setuptools, hub = problems()
    assert "setuptools 84.0.0" in setuptools.what and "pkg_resources" in setuptools.breaks and setuptools.fault
    assert "huggingface-hub 2.4.0 is installed, but drelu-timm needs huggingface-hub<2" in hub.what
    assert "no hf-hub: model" in hub.breaks and hub.fault
    assert mend([setuptools, hub]) == f"{sys.executable} -m pip install 'setuptools<81' 'huggingface-hub<2'"


def test_robustbench_without_setuptools_is_broken(environment):
    environment(setuptools=None)
    (problem,) = problems()
    assert "setuptools is missing" in problem.what and problem.install == ("setuptools<81",)


@pytest.mark.parametrize(
    ("versions", "what", "installed"),
    [
        ({"timm": "1.0.31"}, "timm 1.0.31 is installed, but robustbench needs timm==1.0.9", "timm==1.0.9"),
        ({"foolbox": None}, "foolbox is missing: drelu-timm needs foolbox>=3.3.4", "foolbox>=3.3.4"),
        ({"accelerate": "0.9"}, "accelerate 0.9 is installed, but drelu-timm needs accelerate>=1.0", "accelerate>=1.0"),
        ({"packaging": None}, "packaging is not installed", "packaging"),
    ],
)
def test_what_an_installed_extra_requires_is_followed(environment, versions, what, installed):
    environment(**versions)
    (problem,) = problems()
    assert (problem.what, problem.install, problem.fault) == (what, (installed,), True)


def test_metadata_that_cannot_be_parsed_are_no_crash(environment):
    folder = environment(tqdm=None)
    install(folder, "tqdm", "unknown", requires=["colorama (platform_system = Windows", "no-such-package-is-there"])
    assert problems() != []  # the requirement that can be read


def test_what_belongs_to_an_extra_that_is_not_installed_is_no_problem(environment):
    environment(robustbench=None, setuptools="84.0.0", tensorboard=None, matplotlib=None)
    assert problems() == []


def test_the_requests_that_torchattacks_pins_is_said_and_no_fault(environment):
    environment(torchattacks="3.5.1")
    (problem,) = problems()
    assert problem.what == "requests 2.34 is installed, but torchattacks needs requests~=2.25.1"
    assert not problem.fault


def test_the_stale_robustbench_out_of_torchattacks_goes_first(environment):
    folder = environment()
    install(folder, "torchattacks", files={"robustbench/utils.py": b"def load_model(): ..."})
    (problem,) = problems()
    assert "torchattacks has put its stale copy" in problem.what
    python = sys.executable
    assert mend([problem]) == (
        f"{python} -m pip uninstall --yes torchattacks robustbench && {python} -m pip install 'drelu-timm[robustbench]'"
    )


def test_a_hub_that_timm_lost_is_found_without_any_extra(environment, monkeypatch):
    environment(robustbench=None, huggingface_hub="2.4.0")
    monkeypatch.setattr(timm.models._hub, "_has_hf_hub", False)
    (problem,) = problems()
    assert problem.what == "timm 1.0.9 cannot import huggingface_hub 2.4.0"
    assert problem.install == ("huggingface-hub<2",)


def test_a_torchvision_of_another_build_is_installed_anew_to_match_torch(environment, monkeypatch):
    environment(torch="2.15.0+cpu")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    (problem,) = problems()
    assert "torchvision cannot be imported (torchvision 99.0, torch 2.15.0+cpu)" in problem.what
    index = "--extra-index-url=https://download.pytorch.org/whl/cpu"
    assert (problem.uninstall, problem.install) == (("torchvision",), ("torchvision", "torch==2.15.0", index))


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
    monkeypatch.setattr(installation.shutil, "which", lambda name: uv)
    assert pip(("install", "a<2")) == command.format(python=sys.executable)


def test_extras_are_those_of_the_metadata_and_told_by_what_they_require():
    assert EXTRAS.keys() | {"all"} == set(importlib.metadata.metadata("drelu-timm").get_all("Provides-Extra"))
    for name, extra in EXTRAS.items():
        required = {packaging.requirements.Requirement(line).name for line in OURS if f"'{name}'" in line}
        assert set(extra.told_by) <= required


@pytest.fixture
def quick(monkeypatch):
    """The doctor without what takes seconds."""
    monkeypatch.setattr(doctor, "_device", lambda: iter(()))
    monkeypatch.setattr(doctor, "installed_extras", lambda: [])


@pytest.mark.parametrize("fault", [True, False])
def test_the_exit_code_is_1_for_faults_only(quick, monkeypatch, capsys, tmp_path, fault):
    found = Problem("a", "a 2 is installed, but b needs a<2", "b does not import", ("a<2",), fault=fault)
    monkeypatch.setattr(doctor, "problems", lambda: [found])

    assert __main__.main(["doctor", "--data-dir", str(tmp_path)]) == int(fault)

    out = capsys.readouterr().out
    assert "a 2 is installed, but b needs a<2\n    breaks: b does not import\n    mend:   " in out
    assert ("Nothing that is installed is broken." in out) == (not fault)


def test_missing_extras_are_offered_and_no_fault(quick, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "problems", list)
    assert doctor.doctor(tmp_path) == 0
    out = capsys.readouterr().out
    assert all(f"'drelu-timm[{name}]'" in out for name in EXTRAS)


def test_what_raises_is_a_line_and_no_traceback(quick, monkeypatch, capsys, tmp_path):
    def device():
        yield "GPU", "none"
        raise RuntimeError("operator torchvision::nms\ndoes not exist")

    monkeypatch.setattr(doctor, "problems", list)
    monkeypatch.setattr(doctor, "_device", device)
    monkeypatch.setitem(sys.modules, "drelu_timm.data.datasets", None)

    assert doctor.doctor(tmp_path) == 0

    out = capsys.readouterr().out
    assert "cannot be told: RuntimeError: operator torchvision::nms does not exist" in out
    assert "reading any needs the package 'drelu_timm.data.datasets'" in out


def test_data_are_found_in_the_folder_and_in_those_below(tmp_path):
    for split in ("train", "test"):
        for name in ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"):
            (tmp_path / "jpeg" / split / name).mkdir(parents=True)
            (tmp_path / "jpeg" / split / name / "0.jpg").touch()
    (tmp_path / "tiny-imagenet-200").mkdir()
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)

    found = dict(doctor._data(tmp_path))

    assert found["cifar10"] == found["folder"] == f"--data-dir {tmp_path / 'jpeg'}"
    assert found["tiny_imagenet"] == f"--data-dir {tmp_path}"
    assert found["mnist"] == found["cifar100"] == "not found, or not whole"


def test_a_folder_that_is_not_there_holds_nothing(tmp_path):
    found = dict(doctor._data(tmp_path / "missing"))
    assert found.pop("digits") == "comes with scikit-learn"
    assert set(found.values()) == {"not found, or not whole"}


def test_a_package_of_ours_that_does_not_import_is_a_fault(quick, monkeypatch, capsys, tmp_path):
    def register():
        raise AttributeError("module 'timm.models._registry' has no attribute '_model_default_cfgs'")

    monkeypatch.setattr(doctor, "problems", list)
    monkeypatch.setattr(published, "register_published", register)
    assert doctor.doctor(tmp_path) == 1
    assert "cannot be imported: AttributeError: module 'timm.models._registry' has no" in capsys.readouterr().out


@pytest.fixture
def broken(tmp_path):
    """Runs Python where a package raises as soon as it is imported."""

    def run(package: str, *arguments: str) -> subprocess.CompletedProcess:
        (tmp_path / package).mkdir(exist_ok=True)
        (tmp_path / package / "__init__.py").write_text('raise RuntimeError("built for another torch")')
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TORCHDYNAMO_DISABLE": "1"}  # compiling takes seconds
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)

    return run


DOCTOR = ("-m", "drelu_timm", "doctor", "--data-dir", ".")


@pytest.mark.parametrize("package", ["torch", "torchvision"])
def test_the_doctor_runs_where_what_we_need_does_not_import(broken, package):
    done = broken(package, *DOCTOR)
    assert done.returncode == 1, done.stdout + done.stderr
    _, _, found = done.stdout.partition("\nBroken\n")
    assert found.startswith(f"  {package} cannot be imported ({package} ")
    assert "): built for another torch\n    breaks: nothing of this package works\n    mend:   " in found
    assert "Traceback" not in done.stderr


def test_the_doctor_runs_by_its_command_too(broken):
    script = shutil.which("drelu-timm", path=Path(sys.executable).parent)
    if script is None:
        pytest.skip("no drelu-timm beside this Python")
    assert "\nBroken\n  torch cannot be imported" in broken("torch", script, *DOCTOR[2:]).stdout


@pytest.mark.parametrize(
    "arguments", [("-c", "import drelu_timm", "doctor"), ("-m", "drelu_timm", "train")], ids=["import", "train"]
)
def test_all_else_raises_there(broken, arguments):
    done = broken("torch", *arguments)
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: built for another torch\n")


def test_the_doctor_of_this_environment(tmp_path):
    command = [sys.executable, "-m", "drelu_timm", "doctor", "--data-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for line in ("Versions", "Extras", "Device", "Data in", "  bfloat16  ", "Nothing that is installed is broken."):
        assert line in done.stdout
