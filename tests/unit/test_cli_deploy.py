"""`kvstore deploy`: the files that come with the package, written without replacing a file of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvstore.cli.commands import main
from kvstore.cli.deploy import FILES


def test_all_files_are_written_into_a_new_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "monitoring"
    assert main(["deploy", str(folder), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"written": [str(folder / name) for name in FILES]}
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert all(path.read_bytes() for path in folder.iterdir())


def test_a_file_that_is_there_is_kept_and_nothing_is_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "prometheus.yml"
    mine.write_text("mine")
    assert main(["deploy", str(tmp_path)]) == 2
    assert str(mine) in capfd.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_with_force_it_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "prometheus.yml").write_text("mine")
    assert main(["deploy", str(tmp_path), "--force"]) == 0
    assert "kvstore" in (tmp_path / "prometheus.yml").read_text()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["deploy", str(tmp_path / "file" / "below")]) == 2
    said = capfd.readouterr().err
    assert "Not a directory" in said
    assert "Traceback" not in said
