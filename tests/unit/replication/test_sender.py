"""What a primary's sender sends its copies: records, snapshots, and the same again when a connection was lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from kvstore.replication import serving
from kvstore.replication.copy_greeting import CopyGreeting
from kvstore.replication.files import make_copy
from kvstore.replication.session import Session
from kvstore.replication.wire import Refused, Wire, WireLost, WireRefused, fetch, greet
from kvstore.storage.log import NotNext
from kvstore.storage.rows import VALUE
from kvstore.storage.segments import DATA_OFFSET, HEADER_BYTES
from loadtest.simulate.disk import SimulatedDisk
from tests.unit.replication.one_copy import STORE_ID, Node, rows_of
from tests.unit.replication.primary_with_copies import TIMES, Cluster, Inline
from tests.unit.waiting import WAIT_S, until


async def test_a_copy_joins_by_records_and_from_then_on_nothing_is_committed_without_it() -> None:
    async with Cluster("n2").running() as cluster:
        for number in range(20):
            cluster.put(f"key-{number}")
        assert cluster.sender.shipping.committed == 21, "without copies the own sync is enough"
        await cluster.in_sync("n2")
        await until(lambda: cluster.copies["n2"].log.synced == cluster.log.last)
        await until(lambda: cluster.sender.shipping.committed == cluster.log.last.number)
        gate = cluster.hold_up("n2")
        number = cluster.put("held up")
        await asyncio.sleep(0.05)
        assert cluster.sender.shipping.committed == number - 1
        gate.set()
        await until(lambda: cluster.committed[-1] == number)
        await until(lambda: "held up" in rows_of(cluster.copies["n2"].engine))


async def test_a_copy_whose_node_takes_no_connection_is_tried_again_and_told_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster, tries = Cluster("n2"), list[str]()

    async def refuse(node: str, session: Session) -> Wire:
        tries.append(node)
        raise WireRefused("it is of another version. Start both with the same one.")

    cluster.connect = refuse  # type: ignore[method-assign]
    async with cluster.running():
        cluster.follow(cluster.replica("n2"))
        await until(lambda: len(tries) > 2)
    (record,) = (each for each in caplog.records if each.levelname == "ERROR")
    assert record.getMessage().endswith("on node n2: it is of another version. Start both with the same one.")


async def test_records_leave_before_the_own_sync() -> None:
    async with Cluster("n2").running() as cluster:
        await cluster.in_sync("n2")
        number = cluster.put("a", sync=False)
        await until(lambda: cluster.copies["n2"].log.synced.number == number)
        await until(lambda: cluster.sender.shipping.committed == number - 1)
        cluster.log.sync()
        cluster.sender.synced(number)
        await until(lambda: cluster.sender.shipping.committed == number)


async def test_a_copy_whose_records_are_kept_no_more_gets_a_snapshot_and_then_records() -> None:
    async with Cluster("n2", segment_bytes=8192).running() as cluster:
        for number in range(200):
            cluster.put(f"key-{number % 50}", b"%05d" % number * 20)
            cluster.log.prepare_segment()
        await cluster.apply()
        cluster.log.release(cluster.engine.applied.position.number)
        assert cluster.log.first > 1
        await cluster.in_sync("n2")
        last = cluster.put("afterwards")
        await until(lambda: cluster.sender.shipping.committed == last)
        await cluster.apply()
        copy = cluster.copies["n2"]
        await until(lambda: rows_of(copy.engine) == rows_of(cluster.engine))
        assert not copy.is_filling
        assert len(rows_of(copy.engine)) == 52
        assert cluster.sender.links.keeps is None


async def test_a_record_that_is_appended_when_the_term_is_over_holds_nothing_up() -> None:
    async with Cluster("n2").running() as cluster:
        await cluster.in_sync("n2")
        await until(lambda: cluster.copies["n2"].log.synced == cluster.log.last)
        cluster.sender.hear(cluster.config._replace(epoch=9, term=9))
        began_s = cluster.environment.monotonic_s()
        number = cluster.put("late")
        await asyncio.sleep(0.05)
        assert cluster.environment.monotonic_s() - began_s < WAIT_S, "a link that turns in circles stops the loop"
        assert cluster.copies["n2"].log.last.number == number - 1


async def test_where_the_disk_of_a_copy_is_quick_no_record_takes_a_hop_to_a_thread() -> None:
    times = TIMES._replace(sync_inline_ms_max=1e6, apply_delay_s=WAIT_S)
    async with Cluster("n2", times=times).running() as cluster:
        await cluster.in_sync("n2")
        await until(lambda: cluster.sender.shipping.committed == cluster.log.last.number)
        hops = cluster.environment.hops
        for number in range(20):
            last = cluster.put(f"key-{number}")
            await until(lambda last=last: cluster.sender.shipping.committed == last)
        assert cluster.environment.hops == hops
        assert cluster.copies["n2"].log.synced == cluster.log.last


@pytest.mark.parametrize("sync_inline_ms_max", [0.0, 1e6], ids=["slow disks", "quick disks"])
async def test_after_a_lost_connection_the_session_begins_again_and_nothing_is_missing(
    sync_inline_ms_max: float,
) -> None:
    async with Cluster("n2", "n3", times=TIMES._replace(sync_inline_ms_max=sync_inline_ms_max)).running() as cluster:
        await cluster.in_sync("n2", "n3")
        generator = random.Random(5)
        for number in range(300):
            cluster.put(f"key-{number}")
            if generator.random() < 0.05:
                await cluster.cut(generator.choice(["n2", "n3"]))
            if generator.random() < 0.3:
                await asyncio.sleep(0.001)
        await until(lambda: cluster.sender.shipping.committed == cluster.log.last.number)
        assert cluster.committed == sorted(cluster.committed)
        for copy in cluster.copies.values():
            assert copy.log.synced == cluster.log.last
            await until(lambda copy=copy: len(rows_of(copy.engine)) == 301)


async def test_of_a_copy_whose_log_is_the_beginning_of_the_primarys_one_checksum_is_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each record further back would have to be read from the disk, and a new term is not open before."""
    asked: list[list[int]] = []
    checksums = CopyGreeting.checksums

    async def noted(greeting: CopyGreeting, numbers: Sequence[int]) -> dict[int, int]:
        asked.append(list(numbers))
        return await checksums(greeting, numbers)

    async with Cluster("n2").running() as cluster:
        await cluster.in_sync("n2")
        for number in range(50):
            cluster.put(f"key-{number}")
        await until(lambda: cluster.sender.shipping.committed == cluster.log.last.number)
        last = cluster.log.last.number
        monkeypatch.setattr(CopyGreeting, "checksums", noted)
        await cluster.cut("n2")
        await until(lambda: bool(asked))
        cluster.put("more")
        await until(lambda: cluster.sender.shipping.committed == cluster.log.last.number)
    assert asked == [[last]]


async def test_an_opening_hears_where_a_copys_log_ends_and_fetches_what_it_lacks() -> None:
    async with Cluster("n2").running() as cluster:
        await cluster.in_sync("n2")
        for number in range(5):
            cluster.put(f"key-{number}")
        await until(lambda: cluster.copies["n2"].log.synced == cluster.log.last)
        session = Session(STORE_ID, 9, "other", cluster.copies["n2"].following.copy_id, 1)
        wire = await cluster.connect("n2", session)
        told = await greet(wire, session)
        assert told.position == cluster.log.last
        entries = list(await fetch(wire, 3))
        assert entries == list(cluster.log.entries(3))
        assert await fetch(wire, told.position.number) == []
        await until(lambda: cluster.sender.shipping.deposed)
        with pytest.raises(Refused) as refused:
            await greet(await cluster.connect("n2", session), session._replace(term=8))
        assert refused.value.promised == 9
        with pytest.raises(Refused) as foreign:
            await greet(await cluster.connect("n2", session), session._replace(copy_id="another"))
        assert foreign.value.promised == 0


async def test_nothing_is_sent_before_the_map_that_names_the_copy_is_durable() -> None:
    """Else this store, restarted without the controller, would serve alone beside a copy that may be promoted."""
    async with Cluster("n2").running() as cluster:
        cluster.config = cluster.config._replace(epoch=2, replicas=(cluster.replica("n2"),))
        number = cluster.put("map", sync=False)
        cluster.sender.follow(cluster.config, number)
        await asyncio.sleep(0.05)
        assert cluster.wires["n2"] == []
        cluster.log.sync()
        cluster.sender.synced(number)
        await until(lambda: cluster.copies["n2"].log.synced.number == number)


async def test_a_copy_that_needs_records_which_cannot_be_read_back_gets_a_snapshot() -> None:
    async with Cluster("n2").running() as cluster:
        for number in range(50):
            cluster.put(f"key-{number}", b"x" * 4000)
        await cluster.apply()
        disk = cluster.log._disk
        assert isinstance(disk, SimulatedDisk)
        segment = next(path for path in disk.files if path.name.endswith(".log.000001"))
        disk.flip(segment, 8 * (DATA_OFFSET + HEADER_BYTES + 1))  # the payload of the first record
        await cluster.in_sync("n2")
        last = cluster.put("afterwards")
        await until(lambda: cluster.sender.shipping.committed == last)
        await cluster.apply()
        await until(lambda: rows_of(cluster.copies["n2"].engine) == rows_of(cluster.engine))


async def test_a_row_of_a_snapshot_that_does_not_match_its_checksum_is_not_taken() -> None:
    copied = (VALUE, "key", 1, 5, 0, b"value", None, 12345)
    with pytest.raises(WireLost, match="checksum"):
        serving._row(copied)


async def test_a_record_that_does_not_match_its_checksum_or_its_predecessor_is_not_taken_from_an_opening() -> None:
    """Nor is anything that follows it."""
    primary = Cluster()
    async with primary.running():
        for number in range(3):
            primary.put(f"key-{number}")
        entries = list(primary.log.entries(0))
    node = Node()
    copy = await make_copy(node.place, STORE_ID, Inline(), TIMES)
    for wrong in (entries[1]._replace(payload=entries[2].payload), entries[1]._replace(previous=7)):
        with pytest.raises(NotNext):
            await copy.opening.extend([entries[0], wrong, *entries[2:]] if copy.log.last.number == 0 else [wrong])
        assert copy.log.last.number == 1
    assert (await copy.opening.extend(entries[1:])).number == entries[-1].number
