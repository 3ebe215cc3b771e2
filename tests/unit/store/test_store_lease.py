"""A store that has copies answers only with their lease: reads, moves, locks, and once it was given back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvstore.errors import OutcomeUnknown, Unavailable
from kvstore.model import Attempt
from kvstore.placement.cluster_map import ClusterMap, Move, at_home
from kvstore.placement.ring import partition_of
from kvstore.protocol import (
    ApplyIntents,
    Count,
    Delete,
    Explain,
    Freeze,
    Get,
    Pull,
    ReadLock,
    Reads,
    ReadUnlock,
    Request,
    Scan,
    ScanLeases,
)
from kvstore.replication import messages
from kvstore.shard.service import ShardService
from tests.unit.store.conftest import Gate
from tests.unit.store.harness import PARTITIONS, Sink, asked, next_id
from tests.unit.store.store_with_copies import TIMES, primary
from tests.unit.waiting import until


def with_a_move(cluster_map: ClusterMap, move_id: str, partition: int) -> ClusterMap:
    """A move of that partition to shard s2 stands, too."""
    to = at_home("s2", "http://s2", "s2")
    nodes, shards = [*cluster_map.nodes, to.node], [*cluster_map.shards, to.shard]
    move = Move(id=move_id, source="s1", to="s2", partitions=[partition])
    return msgspec.structs.replace(cluster_map, nodes=nodes, shards=shards, moves=[move])


def free_of(*keys: str) -> int:
    """A partition in which none of these keys is."""
    return min(set(range(PARTITIONS)) - {partition_of(key.encode(), PARTITIONS) for key in keys})


async def test_what_no_record_carries_is_answered_only_with_the_lease(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await one.make_copy("n2")
        replicas = await one.in_sync("n2")
        await one.put("a", b"1").answer()
        service = ShardService("s1", one.store, None, one.limits)  # type: ignore[arg-type]
        assert (await one.get("a").answer()).value == b"1"
        await one.store.partitions.adopt(with_a_move(one.map(*replicas), "m", free_of("a", "absent")))
        await one.store.partitions.freeze("m")
        service.handle(ReadLock(next_id(), Attempt(100, 100, "router01"), ["a"]), sink := Sink())
        await until(lambda: sink.replies)
        (read,) = sink.replies
        assert isinstance(read, Reads)
        gate = one.hold_up()
        one.environment.lease_step_s += TIMES.lease_s
        assert not one.store.tables.may_answer()
        looks: list[Request] = [
            Get(1, "a"),
            Delete(2, "absent"),
            Scan(3, "", "", 10, True),
            Get(4, "absent"),
            Count(5, ""),
            ScanLeases(6, "", "", 10),
            Explain(7, "a"),
            Freeze(8, "m"),
            ApplyIntents(9, Attempt(101, 101, "router01"), ["absent"], 1, True, 1),
            ReadUnlock(10, ["a"], read.lock),
        ]
        for look in looks:
            service.handle(look, sink := Sink())
            answer = await sink.answer(5)
            assert (answer.id, answer.status) == (look.id, 503), look
            assert answer.problem is not None
            assert answer.problem["code"] == Unavailable.code
        gate.set()
        await until(one.store.tables.may_answer)
        for look, status in zip(looks[:2], (200, 404), strict=True):
            service.handle(look, sink := Sink())
            assert (await sink.answer()).status == status


async def test_the_lease_is_looked_at_behind_the_read_of_the_file(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await one.make_copy("n2")
        await one.in_sync("n2")
        await one.put("a", b"1").answer()
        await one.store.applier.flush()
        one.store.tables.cache.clear()
        engine: Any = one.store.tables.engine
        engine.read = gate = Gate(engine.read)
        read = one.get("a")
        await asyncio.wait_for(gate.arrived.wait(), 60)
        one.hold_up()
        one.environment.lease_step_s += TIMES.lease_s
        gate.open()
        assert (await read.answer()).status == 503


async def test_a_lease_is_given_back_once_the_copy_has_all_and_then_nothing_is_answered(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        copy = await one.make_copy("n2")
        await one.in_sync("n2")
        await one.put("a", b"1").answer()
        gate = one.hold_up()
        held = one.put("b")
        copy_id = copy.following.copy_id
        assert not await one.store.replicas.give_back(copy_id, 0.02), "the copy has not answered"
        gate.set()
        assert (await held.answer()).status == 201
        assert (await one.put("c").answer()).status == 201, "it goes on where the change has failed"
        assert await one.store.replicas.give_back(copy_id, 60)
        assert copy.log.last == one.store.tables.log.last
        number = one.store.durable
        assert (await one.put("d").answer()).status == 503
        assert (await one.get("a").answer()).status == 503
        version = one.store.clock.version
        step = asyncio.create_task(one.store.pipeline.step(lambda batch: batch.changes.see(version + 1)))
        await until(lambda: one.store.durable > number)
        await asyncio.sleep(0.02)
        assert not step.done(), "not even what every copy has"
        await until(copy.lease.may_be_promoted)
        await one.store.close()
        one.is_closed = True
        with pytest.raises(OutcomeUnknown):
            await asyncio.wait_for(step, 60)


async def test_pages_of_a_move_are_given_only_with_the_lease(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await one.make_copy("n2")
        await one.in_sync("n2")
        service = ShardService("s1", one.store, None, one.limits)  # type: ignore[arg-type]
        one.hold_up()
        one.environment.lease_step_s += TIMES.lease_s

        async def page(pull: Pull) -> Any:
            return messages.Ack(0)

        one.store.migration.pull = page  # type: ignore[method-assign, assignment]
        service.handle(Pull(7, [1], 0, 0, 10), sink := Sink())
        answer = await sink.answer()
        assert (answer.id, answer.status) == (7, 503)


async def test_locks_of_reads_that_were_refused_without_the_lease_keep_no_writer_out(tmp_path: Path) -> None:
    """The router was not told of the locks, so it cannot let them go, and its connection goes on."""
    async with primary(tmp_path) as one:
        await one.make_copy("n2")
        await one.in_sync("n2")
        one.store.tables.limits = msgspec.structs.replace(one.limits, txn_timeout_s=600, request_timeout_s=600)
        gate = one.hold_up()
        one.environment.lease_step_s += TIMES.lease_s
        refused = asked(one.store, ReadLock(next_id(), Attempt(100, 100, "router01"), ["k"]))
        assert (await refused.answer()).status == 503
        gate.set()
        await until(one.store.tables.may_answer)
        assert (await one.put("k").answer()).status == 201
