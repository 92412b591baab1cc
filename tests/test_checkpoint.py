"""The checkpoint of an evaluation: a file per stage and batch, used only for the evaluation that wrote it."""

import resource
import signal
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from drelu_timm.errors import InputError
from drelu_timm.evaluation.checkpoint import Checkpoint, Measurement, _digest

IDENTITY = {"model": "abc", "eps": (0.1, 0.2), "seed": 0}
IMAGES = torch.rand(6, 2, 3, 3, generator=torch.Generator().manual_seed(0))


def of(examples, keep=(), images=IMAGES, **columns):
    """The measurement of a stage on these examples."""
    examples, keep = torch.tensor(examples), torch.tensor(keep)
    columns = {name: torch.tensor(values) for name, values in columns.items()}
    return Measurement.of(examples, columns, images[examples], torch.isin(examples, keep))


@pytest.fixture
def folder(tmp_path):
    checkpoint = Checkpoint(6, tmp_path / "state", IDENTITY)
    checkpoint.add("pgd", of([0, 2], broken_at=[1, 2], margin=[-0.1, torch.inf]))
    checkpoint.add("probe pgd at 8/255", of([2], margin=[torch.nan]))
    return tmp_path / "state"


def test_measurements_come_back(folder):
    again = Checkpoint(6, folder, IDENTITY)
    assert again.known("pgd").tolist() == [True, False, True, False, False, False]
    column, expected = again.column("pgd", "margin"), [-0.1, torch.nan, torch.inf, torch.nan, torch.nan, torch.nan]
    torch.testing.assert_close(column.float(), torch.tensor(expected), equal_nan=True)
    assert column.dtype == torch.float64
    assert again.known("probe pgd at 8/255").sum() == 1
    assert not again.known("square").any() and again.column("square", "margin").isnan().all()
    names = {path.name for path in folder.iterdir()}
    assert names == {"pgd-0000000.safetensors", "probe pgd at 8_255-0000002.safetensors"}


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = Checkpoint(2)
    checkpoint.add("pgd", of([1], margin=[2.0]))
    assert checkpoint.column("pgd", "margin")[1] == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "xyz"}, r"another model \(abc before, xyz now\)\. Use the earlier value, or delete the folder"),
        ({"eps": [0.1]}, r"another eps \(\[0.1, 0.2\] before, \[0.1\] now\)"),
        ({"layout": 1}, r"another layout \(4 before, 1 now\)"),
        ({"seed": 1, "model": "x"}, r"another model \(abc before, x now\), another seed \(0 before, 1 now\)"),
    ],
)
def test_the_checkpoint_of_another_evaluation_is_refused_and_kept(folder, changed, message):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match=message):
        Checkpoint(6, folder, IDENTITY | changed)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path):
    (tmp_path / "process-0.jsonl").write_text('{"identity": {"layout": 2}}\n')
    with pytest.raises(InputError, match=r"was started by an earlier version\. Delete it to evaluate from scratch"):
        Checkpoint(6, tmp_path, IDENTITY)


@pytest.mark.parametrize("spoil", [lambda content: content[:50], lambda _: b"", lambda _: b"hello there" * 10])
def test_a_file_that_cannot_be_read_is_reported(folder, spoil):
    path = folder / "pgd-0000000.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError, match=r"pgd-0000000\.safetensors cannot be read \(.*\)\. Delete it"):
        Checkpoint(6, folder, IDENTITY)
    path.unlink()
    assert not Checkpoint(6, folder, IDENTITY).known("pgd").any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("examples"), "examples"),
        (lambda t, m: t.update(examples=t["examples"].float()), "examples are not ascending integers"),
        (lambda t, m: t.update(examples=t["examples"].flip(0)), "examples are not ascending integers"),
        (lambda t, m: t.update(examples=t["examples"] + 9), "examples are not all in the evaluation"),
        (lambda t, m: t.update(kept=torch.tensor([1])), "kept are not all in the evaluation"),
        (lambda t, m: t.update(kept=torch.tensor([2])), "not one image per kept example"),
        (lambda t, m: t.update({"column margin": torch.zeros(3)}), "not one value per example"),
        (lambda t, m: m.update(identity="[" * 100_000), ""),
        (lambda t, m: m.update(identity="null"), ""),
        (lambda t, m: m.pop("stage"), "stage"),
        (lambda t, m: m.pop("sha256"), "sha256"),
        (lambda t, m: m.update(sha256=""), "its content is not what was written"),
    ],
)
def test_a_malformed_file_is_reported_in_one_line(folder, change, message):
    path = folder / "pgd-0000000.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    intact = dict(metadata)
    change(tensors, metadata)
    if metadata == intact:
        metadata["sha256"] = _digest("pgd", tensors)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(InputError, match=rf"pgd-0000000\.safetensors cannot be read \(.*{message}") as refused:
        Checkpoint(6, folder, IDENTITY)
    assert "\n" not in str(refused.value)


@contextmanager
def no_file_above(size):
    """As on a full disk, fail to write more than so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the limit is an error of the write
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_stops_and_keeps_the_files(folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    checkpoint = Checkpoint(6, folder, IDENTITY)
    message = r"cw-0000000\.safetensors cannot be written \(.*\)\. What was measured is kept: make room"
    with no_file_above(100), pytest.raises(InputError, match=message):
        checkpoint.add("cw", of([0], margin=[1.0]))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    checkpoint.add("cw", of([0], margin=[1.0]))
    assert Checkpoint(6, folder, IDENTITY).column("cw", "margin")[0] == 1


# Images


@pytest.mark.parametrize("folder", ["state", None])
def test_images_come_back(tmp_path, folder):
    checkpoint = Checkpoint(6, folder and tmp_path / folder, IDENTITY)
    checkpoint.add("pgd", of([0, 1, 4], keep=[1, 4], broken_at=[1, 0, 0]))
    checkpoint.add("square", of([0, 2, 4], keep=[2, 4], images=1 - IMAGES, broken_at=[1, 0, 0]))
    asked = {4: "pgd", 2: "square", 1: "pgd"}
    expected = torch.stack([IMAGES[4], 1 - IMAGES[2], IMAGES[1]])
    assert torch.equal(checkpoint.images(asked, IMAGES.shape[1:]), expected)
    assert checkpoint.images({}, IMAGES.shape[1:]).shape == (0, 2, 3, 3)
    if folder:
        assert torch.equal(Checkpoint(6, tmp_path / folder, IDENTITY).images(asked, IMAGES.shape[1:]), expected)


def test_images_of_another_process_are_read(tmp_path):
    here, there = (Checkpoint(6, tmp_path, IDENTITY) for _ in range(2))
    for checkpoint, other, examples in ((here, there, [0, 2]), (there, here, [1, 3])):
        measurement = of(examples, keep=examples, broken_at=[0, 0])
        checkpoint.add("pgd", measurement)
        other.merge("pgd", Measurement(measurement.examples, measurement.columns, measurement.kept, None))
    assert torch.equal(here.images(dict.fromkeys(range(4), "pgd"), IMAGES.shape[1:]), IMAGES[:4])


def test_a_part_of_a_measurement_has_its_own_images():
    part = of([0, 1, 4], keep=[1, 4], margin=[1.0, 2.0, 3.0])[torch.tensor([True, True, False])]
    assert (part.examples.tolist(), part.columns["margin"].tolist(), part.kept.tolist()) == ([0, 1], [1, 2], [1])
    assert torch.equal(part.images, IMAGES[[1]])


def test_images_in_another_memory_format_are_kept_as_they_are(tmp_path):
    checkpoint = Checkpoint(6, tmp_path, IDENTITY)
    checkpoint.add("pgd", of([0], keep=[0], images=IMAGES.contiguous(memory_format=torch.channels_last)))
    assert torch.equal(checkpoint.images({0: "pgd"}, IMAGES.shape[1:])[0], IMAGES[0])


def test_missing_images_are_reported(tmp_path):
    checkpoint = Checkpoint(6, tmp_path, IDENTITY)
    checkpoint.add("pgd", of([0], keep=[0]))
    (tmp_path / "pgd-0000000.safetensors").unlink()
    with pytest.raises(InputError, match=r"pgd-0000000\.safetensors cannot be read \(.*\)"):
        checkpoint.images({0: "pgd"}, IMAGES.shape[1:])
