"""The rows of an evaluation: kept line by line, and taken up again only where they belong."""

import json
import os
import resource
import signal
from contextlib import contextmanager

import pytest
import torch

from drelu_timm.errors import InputError
from drelu_timm.evaluation.rows import Rows

IDENTITY = {"model": "abc", "eps": [0.1, 0.2], "seed": 0}


@pytest.fixture
def rows(tmp_path):
    rows = Rows(tmp_path / "state", IDENTITY)
    rows.append("pgd", {0: {"broken_at": 1, "margin": -0.1}, 2: {"broken_at": 2, "margin": float("inf")}})
    rows.append("square", {2: {"broken_at": 0, "margin": float("nan")}})
    return rows


def test_rows_come_back(rows):
    again = Rows(rows.folder, IDENTITY)
    assert again.stages["pgd"] == rows.stages["pgd"]
    column = again.column("pgd", "margin", 4)
    assert column.dtype == torch.float64
    torch.testing.assert_close(column, torch.tensor([-0.1, torch.nan, torch.inf, torch.nan]).double(), equal_nan=True)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = Rows()
    rows.append("pgd", {1: {"margin": 2.0}})
    assert rows.column("pgd", "margin", 2)[1] == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_cut_line_is_dropped_and_the_next_one_is_whole(rows, cut):
    whole = rows.path.read_bytes()
    os.truncate(rows.path, len(whole) - cut)
    again = Rows(rows.folder, IDENTITY)
    kept = rows.path.read_bytes()
    assert whole.startswith(kept)
    assert kept.endswith(b"\n")
    assert 2 not in again.stages["square"]
    assert again.stages["pgd"][0] == rows.stages["pgd"][0]
    again.append("square", {2: {"broken_at": 0, "margin": 1.0}})
    assert Rows(rows.folder, IDENTITY).stages["square"] == {2: {"broken_at": 0, "margin": 1.0}}


def test_rows_of_every_process_are_read_and_ones_own_appended(rows):
    other = Rows(rows.folder, IDENTITY, process=1)
    assert other.stages["pgd"].keys() == {0, 2}
    other.append("pgd", {1: {"broken_at": 0, "margin": 0.0}})
    assert Rows(rows.folder, IDENTITY).stages["pgd"].keys() == {0, 1, 2}
    assert {path.name for path in rows.folder.iterdir()} == {"process-0.jsonl", "process-1.jsonl"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "xyz"}, r"another model \(abc before, xyz now\); give what it was begun with, or delete it"),
        ({"eps": [0.1]}, r"another eps \(\[0.1, 0.2\] before, \[0.1\] now\)"),
        ({"layout": 1}, r"another layout \(2 before, 1 now\)"),
        ({"seed": 1, "model": "x"}, r"another model \(abc before, x now\), another seed \(0 before, 1 now\)"),
    ],
)
def test_rows_of_something_else_are_refused_and_left(rows, changed, message):
    before = rows.path.read_bytes()
    with pytest.raises(InputError, match=message):
        Rows(rows.folder, IDENTITY | changed)
    assert rows.path.read_bytes() == before


def test_a_file_that_is_no_rows_is_named(rows):
    rows.path.write_text("hello\nthere\n")
    with pytest.raises(InputError, match=r"process-0.jsonl holds a line that is no JSON \('hello'\); delete the file"):
        Rows(rows.folder, IDENTITY)


@contextmanager
def no_file_above(size):
    """As on a full disk, writing beyond so many bytes is an error."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the limit is an error of the write
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_stops_and_keeps_what_is_there(rows):
    before = rows.path.read_bytes()
    message = r"process-0.jsonl cannot be written \(.*\); what is there is kept: make room"
    with no_file_above(len(before) + 20), pytest.raises(InputError, match=message):
        rows.append("cw", {0: {"margin": 1.0}})
    assert rows.path.read_bytes()[: len(before)] == before
    again = Rows(rows.folder, IDENTITY)
    assert not again.stages["cw"]
    again.append("cw", {0: {"margin": 1.0}})
    lines = rows.path.read_text().splitlines()
    assert [json.loads(line) for line in lines][-1] == {"stage": "cw", "example": 0, "margin": 1.0}


# Images


PICTURES = torch.rand(6, 2, 3, 3, generator=torch.Generator().manual_seed(0))


def broken(*examples):
    """What a stage appends that broke these."""
    return {example: {"broken_at": 0} for example in examples}, {example: PICTURES[example] for example in examples}


@pytest.mark.parametrize("folder", ["state", None])
def test_images_come_back(tmp_path, folder):
    rows = Rows(folder and tmp_path / folder, IDENTITY)
    rows.append("pgd", *broken(4, 1))
    rows.append("square", *broken(2))
    asked = {1: "pgd", 2: "square", 4: "pgd"}
    assert torch.equal(rows.images(asked, PICTURES.shape[1:]), PICTURES[[1, 2, 4]])
    assert rows.images({}, PICTURES.shape[1:]).shape == (0, 2, 3, 3)
    assert rows.column("pgd", "broken_at", 6).isnan().tolist() == [True, False, True, True, False, True]


def test_images_of_every_process_are_read(tmp_path):
    for process in range(2):
        Rows(tmp_path, IDENTITY, process).append("pgd", *broken(process, process + 2))
    again = Rows(tmp_path, IDENTITY)
    assert torch.equal(again.images(dict.fromkeys(range(4), "pgd"), PICTURES.shape[1:]), PICTURES[:4])


def test_images_that_lie_otherwise_in_memory_are_kept_as_they_are(tmp_path):
    rows = Rows(tmp_path, IDENTITY)
    image = PICTURES[:1].contiguous(memory_format=torch.channels_last)[0]
    assert not image.is_contiguous()
    rows.append("pgd", {0: {"broken_at": 0}}, {0: image})
    assert torch.equal(rows.images({0: "pgd"}, image.shape)[0], image)


def test_an_image_is_there_before_its_row(tmp_path):
    """Where the image cannot be written, its row is not, and the example is measured again."""
    rows = Rows(tmp_path, IDENTITY)
    rows.append("pgd", *broken(0))
    message = r"process-0.images cannot be written \(.*\); what is there is kept: make room"
    with no_file_above(rows.path.stat().st_size + 200), pytest.raises(InputError, match=message):
        rows.append("pgd", *broken(1, 5))
    again = Rows(tmp_path, IDENTITY)
    assert again.stages["pgd"].keys() == {0}
    assert torch.equal(again.images({0: "pgd"}, PICTURES.shape[1:])[0], PICTURES[0])


def test_rows_of_a_time_before_images_are_refused(rows):
    first, *rest = rows.path.read_text().splitlines(keepends=True)
    rows.path.write_text("".join([first.replace('"layout": 2, ', ""), *rest]))
    with pytest.raises(InputError, match=r"another layout \(None before, 2 now\); give .*, or delete it"):
        Rows(rows.folder, IDENTITY)


def test_images_that_are_gone_or_cut_are_named(tmp_path):
    rows = Rows(tmp_path, IDENTITY)
    rows.append("pgd", *broken(0, 5))
    file = tmp_path / "process-0.images"
    os.truncate(file, 100)
    assert torch.equal(rows.images({0: "pgd"}, PICTURES.shape[1:])[0], PICTURES[0])
    with pytest.raises(InputError, match=r"process-0.images cannot be read \(it is cut\); delete .* to evaluate anew"):
        rows.images({5: "pgd"}, PICTURES.shape[1:])
    file.unlink()
    with pytest.raises(InputError, match=r"process-0.jsonl lacks its images, process-0.images; delete .* to evaluate"):
        Rows(tmp_path, IDENTITY)
