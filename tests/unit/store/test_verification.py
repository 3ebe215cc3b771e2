"""Background verification: a key that was acknowledged is never "not there" because of damage."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import DataCorrupt
from kvstore.placement.ring import partition_of
from kvstore.protocol import Count, Scan
from kvstore.storage import schema
from kvstore.storage.disk import OsDisk
from kvstore.storage.log_check import read_log
from kvstore.storage.sqlite_writer import SIGNED
from kvstore.storage.verification import VerifyQuery
from tests.unit.store.real_files import (
    PARTITIONS,
    Hands,
    filled,
    flip,
    hide_from_unique_index,
    killed,
    opened,
    place_in,
)

NEVER = {"verify_share": 0.000_001}  # only what is asked for is verified within a test
AT_ONCE = {"verify_share": 0.999}


def code(answer: Any) -> str:
    return str((answer.problem or {}).get("code", answer.status))


def home(key: str) -> int:
    return partition_of(key.encode(), PARTITIONS)


async def verified(hands: Hands) -> None:
    """Wait until the first round is over."""
    async with asyncio.timeout(20):
        while not hands.store.tables.verification.rounds:
            await asyncio.sleep(0.005)


def count_looks(hands: Hands) -> list[VerifyQuery]:
    """The queries of the verification from now on."""
    engine: Any = hands.store.tables.engine
    looks, verify = [], engine.verify

    async def counted(query: VerifyQuery | None) -> Any:
        if query is not None:
            looks.append(query)
        return await verify(query)

    engine.verify = counted
    return looks


async def test_a_key_that_the_unique_index_has_lost_is_data_corrupt_and_not_absent(tmp_path: Path) -> None:
    path = tmp_path / "shard-s1.db"
    values = await filled(path, 20)
    hide_from_unique_index(path, "key-07")
    async with opened(path, **NEVER) as hands:
        assert code(await hands.get("key-07")) == "data-corrupt"
        for key, value in values.items():
            answer = await hands.get(key)
            assert answer.value == value or code(answer) == "data-corrupt"


async def test_a_write_never_takes_a_lost_key_for_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "shard-s1.db"
    await filled(path, 20)
    hide_from_unique_index(path, "key-07")
    async with opened(path, **NEVER) as hands:
        await verified_enough(hands)
        hands.store.tables.verification.file_damage = None  # as if only the look at the partition could tell
        assert code(await hands.put("key-07", b"new")) == "data-corrupt"
        assert code(await hands.delete("key-07")) == "data-corrupt"


async def test_other_partitions_of_a_damaged_file_still_tell_what_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "shard-s1.db"
    await filled(path, 20)
    hide_from_unique_index(path, "key-07")
    async with opened(path, **AT_ONCE) as hands:
        await verified(hands)
        damaged = hands.store.tables.verification.damaged
        assert home("key-07") in damaged
        other = next(key for key in map("other-{}".format, range(1000)) if home(key) not in damaged)
        same = next(key for key in map("same-{}".format, range(1000)) if home(key) == home("key-07"))
        assert (await hands.get(other)).status == 404
        assert code(await hands.get(same)) == "data-corrupt"


async def test_listings_and_counts_of_a_damaged_partition_say_so(tmp_path: Path) -> None:
    path = tmp_path / "shard-s1.db"
    await filled(path, 20)
    hide_from_unique_index(path, "key-07")
    async with opened(path, **AT_ONCE) as hands:
        await verified(hands)
        with pytest.raises(DataCorrupt, match="partition"):
            await hands.store.scans.scan(Scan(1, "", "", 100))
        with pytest.raises(DataCorrupt):
            await hands.store.scans.count(Count(1, ""))


async def test_a_listing_without_values_does_not_show_a_damaged_row_that_was_not_verified_yet(tmp_path: Path) -> None:
    path = tmp_path / "shard-s1.db"
    values = await filled(path, 20)
    flip(path, place_in(path, "rows", values["key-07"]))
    async with opened(path, **NEVER) as hands:
        with pytest.raises(DataCorrupt, match="key-07"):
            await hands.store.scans.scan(Scan(1, "", "", 100))
        page = await hands.store.scans.scan(Scan(1, "key-1", "", 100))
        assert [item[2] for item in page.items] == [None] * 10


async def test_a_row_that_the_index_of_partitions_has_lost_is_found_by_table(tmp_path: Path) -> None:
    path = tmp_path / "shard-s1.db"
    await filled(path, 1)
    partition = home("key-00")
    record = bytes([3, 1, 9, partition])  # of one row: length, types of partition and rowid (9: the number 1)
    flip(path, place_in(path, "rows_partition", record) + 3)
    async with opened(path, **AT_ONCE) as hands:
        await verified(hands)
        assert partition in hands.store.tables.verification.damaged
        assert (await hands.get("key-00")).status == 200


async def test_a_damaged_value_guards_itself_and_leaves_its_partition_usable(tmp_path: Path) -> None:
    path = tmp_path / "shard-s1.db"
    values = await filled(path, 20)
    flip(path, place_in(path, "rows", values["key-07"]))
    async with opened(path, **AT_ONCE) as hands:
        await verified(hands)
        assert not hands.store.tables.verification.damaged
        assert code(await hands.get("key-07")) == "data-corrupt"
        same = next(key for key in map("same-{}".format, range(1000)) if home(key) == home("key-07"))
        assert (await hands.get(same)).status == 404


async def test_a_partition_is_looked_at_once_however_many_of_its_keys_are_missed(tmp_path: Path) -> None:
    path = tmp_path / "shard-s1.db"
    await filled(path, 20)
    async with opened(path, **NEVER) as hands:
        looks = count_looks(hands)
        same = [key for key in map("same-{}".format, range(3000)) if home(key) == home("key-07")]
        answers = await asyncio.gather(*map(hands.get, same[:20]), *(hands.put(key, b"") for key in same[20:]))
        assert {answer.status for answer in answers} == {404, 201}
        for key in same[:20]:
            assert (await hands.put(key, b"")).status == 201
        assert [look.partition for look in looks].count(home("key-07")) == 1


async def test_a_new_store_is_verified_without_a_look(tmp_path: Path) -> None:
    async with opened(tmp_path / "shard-s1.db") as hands:
        looks = count_looks(hands)
        assert (await hands.get("a")).status == 404
        assert (await hands.put("a", b"")).status == 201
        assert looks == []


async def test_a_whole_file_is_verified_after_opening_and_again_now_and_then(tmp_path: Path) -> None:
    path = tmp_path / "shard-s1.db"
    await filled(path, 20)
    async with opened(path, **AT_ONCE, verify_every_s=0.02) as hands:
        verification = hands.store.tables.verification
        async with asyncio.timeout(20):
            while verification.rounds < 3:
                await asyncio.sleep(0.005)
        assert not verification.damaged
        assert all(map(verification.is_verified, range(PARTITIONS)))


async def test_a_damaged_partition_does_not_leave_for_another_shard(tmp_path: Path) -> None:
    path = tmp_path / "shard-s1.db"
    await filled(path, 20)
    hide_from_unique_index(path, "key-07")
    async with opened(path, **AT_ONCE) as hands:
        await verified(hands)
        partitions = hands.store.partitions
        partitions.view = partitions.view._replace(
            leaving={"whole": frozenset({home("key-15")}), "damaged": frozenset({home("key-07")})}
        )
        hands.store.tables.verification.file_damage = None
        with pytest.raises(DataCorrupt, match="partition"):
            await partitions.freeze("damaged")
        assert hands.store.served.generations[home("key-07")]


# --- a file that must not be written to -------------------------------------------------------------------------------


def lose_by_key(path: Path) -> None:
    """The unique index leads to one row less than there are."""
    hide_from_unique_index(path, "key-07")


async def test_nothing_more_is_written_into_a_file_whose_index_is_damaged_and_reads_go_on(tmp_path: Path) -> None:
    path = tmp_path / "shard-s1.db"
    values = await filled(path, 20)
    lose_by_key(path)
    async with opened(path) as hands:
        await verified_enough(hands)
        assert code(await hands.put("key-15", b"new")) == "data-corrupt"
        assert (await hands.get("key-15")).value == values["key-15"]


async def test_records_are_not_replayed_into_a_damaged_file(tmp_path: Path) -> None:
    live = tmp_path / "live" / "shard-s1.db"
    await filled(live, 20)
    async with opened(live, apply_delay_s=60.0) as hands:
        await hands.store.applier.flush()
        assert (await hands.put("key-07", b"newer")).status == 204
        path = killed(live, tmp_path / "killed")
    async with opened(path) as hands:  # whole, it opens
        assert (await hands.get("key-07")).value == b"newer"
    path = killed_again(live, tmp_path)
    with pytest.raises(DataCorrupt, match="cannot be applied"):
        async with opened(path):
            pass


def killed_again(live: Path, folder: Path) -> Path:
    """The files of the store as they were, with an index that has lost a key, and a log with more than the file."""
    path = killed(live, folder / "again")
    lose_by_key(path)
    with closing(sqlite3.connect(path)) as connection, connection:
        *clock, number, check = schema.read_clock(connection)
        entries = list(read_log(OsDisk(), path.parent, path.stem))
        before = entries[-2].entry
        assert (number, check + SIGNED) == (entries[-1].entry.number, entries[-1].entry.checksum)
        schema.set_clock(connection, (*clock, before.number, before.checksum - SIGNED))
    return path


async def verified_enough(hands: Hands) -> None:
    """Wait until the file was examined."""
    with contextlib.suppress(DataCorrupt):
        await hands.store.tables.verification.writable()


async def test_damage_that_shows_as_rows_are_applied_ends_the_writing_and_not_the_process(tmp_path: Path) -> None:
    path = tmp_path / "shard-s1.db"
    values = await filled(path, 20)
    page = place_in(path, "rows_partition", b"\x03") // 4096 * 4096
    async with opened(path, apply_delay_s=60.0) as hands:
        await verified_enough(hands)  # it was whole then
        flip(path, page, 4)
        assert (await hands.put("another", b"new")).status == 201
        with contextlib.suppress(DataCorrupt):
            await hands.store.applier.flush()
        hands.store.applier._something.set()
        async with asyncio.timeout(20):
            while (damage := hands.store.tables.verification.file_damage) is None:
                await asyncio.sleep(0.005)
        assert "Nothing more is written" in damage.detail
        assert code(await hands.put("key-15", b"new")) == "data-corrupt"
        assert (await hands.get("key-15")).value == values["key-15"]
        assert (await hands.get("another")).value == b"new"
