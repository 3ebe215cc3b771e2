"""Terms of a store that has copies: how one is opened, and what is left when it has ended."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvstore.errors import ForeignData, OutcomeUnknown
from kvstore.storage.engine import Application
from kvstore.storage.segments import Position
from kvstore.store.opening import open_files
from kvstore.store.store import Store
from tests.unit.store.harness import PARTITIONS
from tests.unit.store.store_with_copies import Primary, fatal, primary
from tests.unit.waiting import until


async def test_a_store_whose_own_map_names_a_copy_is_not_opened_without_a_new_term(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await one.make_copy("n2")
        await one.store.partitions.adopt(one.map(one.replica("n2", "joining", 3)))
        await one.store.close()
        with pytest.raises(ForeignData, match="has copies"):
            await one.open()
        await one.make_copy("n2")
        one.store = await _opened_in_term(one, "n2")


async def _opened_in_term(one: Primary, *nodes: str) -> Store:
    opened = await open_files(one.path, "s1", PARTITIONS, one.limits, one.environment)
    one.store = Store(opened, one.limits, one.environment, fatal, one.replicating)
    one.store.begin()
    term = one.epoch + 1
    replicas = [one.replica(node, "in-sync", 3) for node in nodes]
    await asyncio.wait_for(one.store.partitions.restore(one.map(*replicas, term=term)), 60)
    return one.store


async def test_a_term_is_open_once_every_copy_in_sync_has_the_record_that_opens_it(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await one.put("a", b"1").answer()
        copy = await one.make_copy("n2")
        replicas = await one.in_sync("n2")
        await one.store.close()
        opened = await open_files(one.path, "s1", PARTITIONS, one.limits, one.environment)
        one.store = Store(opened, one.limits, one.environment, fatal, one.replicating)
        one.store.begin()
        copies, one.copies = one.copies, {}  # the node is away
        opens = one.map(*replicas, term=9)
        one.epoch = 9
        opening = asyncio.create_task(one.store.partitions.restore(opens))
        await until(lambda: one.store.tables.sender is not None and one.store.tables.log.durable > copy.log.last.number)
        assert not opening.done()
        assert (await one.get("a").answer()).status in (421, 503)
        assert (await one.put("b").answer()).status in (421, 503)
        one.copies = copies
        await asyncio.wait_for(opening, 60)
        assert one.store.tables.log.last.term == 9 == copy.log.last.term == copy.following.promised
        await until(one.store.tables.may_answer)
        assert (await one.get("a").answer()).value == b"1"
        assert (await one.put("b").answer()).status == 201


async def test_an_older_copy_that_was_promoted_gives_versions_above_all_that_was_told(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await one.put("a", b"1").answer()
        before = one.store.clock.version
        await one.store.close()
        opened = await open_files(one.path, "s1", PARTITIONS, one.limits, one.environment)
        one.store = Store(opened, one.limits, one.environment, fatal, one.replicating)
        one.store.begin()
        opens = one.map(term=9)
        shard = msgspec.structs.replace(opens.shards[0], clock_floor=before + (1 << 32))
        one.epoch = 9
        await one.store.partitions.restore(msgspec.structs.replace(opens, shards=[shard, *opens.shards[1:]]))
        await one.put("b").answer()
        assert one.store.clock.version > before + (1 << 32)


async def test_a_store_whose_term_has_ended_answers_nothing_more_and_closes(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await one.make_copy("n2")
        replicas = await one.in_sync("n2")
        await one.put("a", b"1").answer()
        one.hold_up()
        written = one.put("lost?")
        await until(lambda: one.store.tables.log.durable > one.store.durable)
        assert not one.store.replicas.hear(one.map(*replicas, term=7))
        assert one.news > 0
        assert (await one.put("b").answer()).status == 503
        assert (await one.get("a").answer()).status == 503
        await one.store.close()
        one.is_closed = True
        answer = await written.answer()
        assert answer.problem is not None
        assert answer.problem["code"] == OutcomeUnknown.code


async def test_a_store_that_leaves_its_files_open_waits_for_what_is_under_way_in_them(tmp_path: Path) -> None:
    """A thread cannot be ended, and what applies to the file from then on must see all that it did."""
    async with primary(tmp_path) as one:
        await one.make_copy("n2")
        replicas = await one.in_sync("n2")
        engine: Any = one.store.tables.engine
        apply, began, may_end = engine.apply, asyncio.Event(), asyncio.Event()
        threads: list[asyncio.Task[None]] = []
        positions: list[Position] = []

        async def in_thread(application: Application) -> None:
            began.set()
            await may_end.wait()
            await apply(application)
            positions.append(application.position)

        async def slow(application: Application) -> None:
            threads.append(asyncio.create_task(in_thread(application)))
            await asyncio.shield(threads[-1])

        engine.apply = slow
        await one.put("a", b"1").answer()
        await began.wait()
        assert not one.store.replicas.hear(one.map(*replicas, term=7))
        closing = asyncio.create_task(one.store.close(keeps_files=True))
        await asyncio.sleep(0.05)
        assert not closing.done()
        may_end.set()
        await asyncio.wait_for(closing, 60)
        assert all(thread.done() for thread in threads)
        engine.apply = apply
        files = one.store.opened
        assert files.engine.applied.position == positions[-1]
        assert await files.engine.occupied() is not None, "the file is open"
        assert files.log.append(b"x") == files.log.last.number, "and so is the log"
        await files.close()
        one.is_closed = True


async def test_a_work_whose_step_is_given_up_with_the_term_ends_no_process(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await one.make_copy("n2")
        replicas = await one.in_sync("n2")
        one.hold_up()
        store, failed = one.store, list[BaseException]()
        store._on_fatal = lambda error: failed.append(error)  # type: ignore[assignment,return-value]
        version = store.clock.version
        work = store._guard(store.pipeline.step(lambda batch: batch.changes.see(version + 1)))
        store._tasks["work"] = asyncio.create_task(work)
        await until(lambda: store.tables.log.durable > store.durable)
        assert not store.replicas.hear(one.map(*replicas, term=7))
        async with store.applier.turn:
            closing = asyncio.create_task(store.close())
            await asyncio.sleep(0.05)  # the end waits for the file
        await asyncio.wait_for(closing, 60)
        one.is_closed = True
        assert failed == []
