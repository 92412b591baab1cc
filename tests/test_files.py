"""Files that are written whole: what a killed process leaves of them."""

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
