"""Files that are written whole: what a killed process and a lost machine leave of them."""

import os
from pathlib import Path

import pytest

from drelu_timm.files import written_whole


@pytest.mark.parametrize("name", ["config.json", "rows.csv", "picture.png"])
def test_what_a_killed_process_leaves_is_taken_for_nothing(tmp_path, name):
    with written_whole(tmp_path / name) as beside:
        beside.touch()
        assert not list(tmp_path.glob(f"*{Path(name).suffix}"))
        assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_is_on_disk_before_it_has_its_name_and_the_name_before_all_that_follows(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, Path.replace

    def synced(file: int) -> None:
        events.append(os.fstat(file).st_ino)
        fsync(file)

    def renamed(path: Path, target: Path) -> Path:
        events.append("renamed")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    with written_whole(tmp_path / "x") as beside:
        beside.write_text("whole")
    assert events == [(tmp_path / "x").stat().st_ino, "renamed", tmp_path.stat().st_ino]
