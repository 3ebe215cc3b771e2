"""A file whose entries beside its rows are damaged is refused in words, whatever the damage looks like."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.errors import DataCorrupt, KvError
from tests.unit.store.real_files import filled, flip, opened, place_in


async def test_text_that_is_not_utf8_any_more_in_an_entry_is_damage_and_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "shard-s1.db"
    await filled(path, 3)
    flip(path, place_in(path, "meta", b'"epoch":') + 3, 7)
    async with opened(path) as hands:  # a damaged map alone is asked for again
        assert (await hands.get("key-01")).status == 200


@pytest.mark.parametrize("entry", ["freezes{}", "drops{}", "shard_ids1", "cluster_idc", "partitions64"])
async def test_an_entry_under_a_damaged_name_is_not_taken_for_one_that_never_was(tmp_path: Path, entry: str) -> None:
    path = tmp_path / "shard-s1.db"
    await filled(path, 3)
    flip(path, place_in(path, "meta", entry.encode()) + 3, 1)
    with pytest.raises(DataCorrupt, match="entries"):
        async with opened(path):
            pass


@pytest.mark.parametrize("tree", ["clock", "meta"])
async def test_a_page_of_clock_or_meta_that_cannot_be_read_is_refused_in_words(tmp_path: Path, tree: str) -> None:
    path = tmp_path / "shard-s1.db"
    await filled(path, 3)
    page = place_in(path, tree, b"drops" if tree == "meta" else b"\x0b") // 4096
    flip(path, page * 4096, 4)
    with pytest.raises(KvError, match=r"shard-s1\.db"):
        async with opened(path):
            pass
