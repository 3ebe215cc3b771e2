"""The folder in which a new shard would start, looked at before that is promised."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from kvstore.config import Limits
from kvstore.controller.launch_place import LaunchPlace
from kvstore.errors import ChangeRefused


def refusal(folder: Path, limits: Limits | None = None) -> str:
    with pytest.raises(ChangeRefused) as refused:
        LaunchPlace(folder, limits or Limits()).spare_bytes("s5", "ours")
    assert refused.value.detail.endswith(".")
    return refused.value.detail


def store_file(path: Path, cluster_id: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE meta (name, value)")
        connection.execute("INSERT INTO meta VALUES ('cluster_id', ?)", (cluster_id,))


def test_what_is_free_beside_the_reserve_is_told_and_nothing_is_changed(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    spare = LaunchPlace(tmp_path, Limits(disk_reserve_bytes=1)).spare_bytes("s5", "ours")
    assert 0 < spare < disk.f_blocks * disk.f_frsize
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_beside_the_reserve_refuses_with_figures(tmp_path: Path) -> None:
    detail = refusal(tmp_path, Limits(disk_reserve_bytes=2**60))
    assert f"{2**60:,} are kept (disk_reserve_bytes)" in detail
    assert str(tmp_path) in detail


def test_a_folder_in_place_of_the_file_refuses(tmp_path: Path) -> None:
    (tmp_path / "shard-s5.db").mkdir()
    assert "it is a folder; move it away" in refusal(tmp_path)


def test_a_link_to_nothing_refuses(tmp_path: Path) -> None:
    (tmp_path / "shard-s5.db").symlink_to(tmp_path / "gone")
    assert "a link to" in refusal(tmp_path)


def test_a_file_of_another_cluster_refuses_and_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "shard-s5.db"
    store_file(path, "theirs")
    before = path.read_bytes()
    assert f"{path} is there already and belongs to cluster theirs; move it away" in refusal(tmp_path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_data_file_refuses(tmp_path: Path) -> None:
    (tmp_path / "shard-s5.db").write_bytes(b"what a person has put there" * 100)
    assert "is no data file of a shard" in refusal(tmp_path)


@pytest.mark.parametrize("cluster_id", ["ours", ""])
def test_a_file_of_a_former_member_or_of_none_yet_does_not_refuse(tmp_path: Path, cluster_id: str) -> None:
    store_file(tmp_path / "shard-s5.db", cluster_id)
    assert LaunchPlace(tmp_path, Limits(disk_reserve_bytes=1)).spare_bytes("s5", "ours") > 0


def test_a_folder_that_is_gone_refuses(tmp_path: Path) -> None:
    assert "cannot be" in refusal(tmp_path / "gone")
