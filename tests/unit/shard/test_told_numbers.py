"""Told numbers: a store that opens behind what it has told the controller does not serve."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import aiohttp
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from kvstore.config import Limits
from kvstore.controller.document import CLOCK_STEP, ClusterDocument
from kvstore.controller.map_store.interface import Told
from kvstore.controller.map_store.sqlite import SqliteMapStore, open_sqlite
from kvstore.errors import Conflict, LogDamaged, StoreBehind
from kvstore.placement.cluster_map import ClusterMap, Move, Primary, at_home, map_of
from kvstore.protocol import Progress, Receive
from kvstore.shard.hosted import HostedStore, StoreEnd
from kvstore.shard.service import ShardService
from kvstore.shard.told import ToldNumbers
from kvstore.storage.engine import TryLater
from kvstore.store.store import Store
from tests.unit.store.real_files import LIMITS, PARTITIONS, Hands, cluster_map, end, filled, flip, opened
from tests.unit.store.store_with_copies import primary
from tests.unit.waiting import until

FAST = Limits(**LIMITS, told_timeout_s=0.3, told_every_s=0.02)


class Controller:
    """Its part that keeps what stores tell, behind HTTP.

    `is_away`: it answers nothing of use. `goes_on`: while it is not set, requests are taken and not answered.
    """

    def __init__(self, store: SqliteMapStore) -> None:
        self.store = store
        self.is_away = False
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.url = ""

    async def told(self, request: web.Request) -> web.Response:
        await self.goes_on.wait()
        if self.is_away:
            raise web.HTTPServiceUnavailable
        body = await request.json()
        document, told = ClusterDocument(self.store, 10), Told(body["number"], body["version"])
        try:
            kept = await document.tell(body["store_id"], told, body.get("copy_id", ""))
        except Conflict as refused:
            return web.json_response(refused.problem(), status=refused.status)
        return web.json_response(kept._asdict())


@pytest.fixture
async def controller(tmp_path: Path) -> AsyncIterator[Controller]:
    store = await open_sqlite(tmp_path / "controller-0.db")
    found = Controller(store)
    app = web.Application()
    app.router.add_post("/v1/told", found.told)
    async with TestServer(app) as server:
        found.url = str(server.make_url("/"))
        yield found
    await store.close()


@pytest.fixture
async def numbers(controller: Controller) -> AsyncIterator[ToldNumbers]:
    async with aiohttp.ClientSession() as session:
        yield ToldNumbers(session, controller.url, FAST)


async def open_store(path: Path, numbers: ToldNumbers) -> Store:
    store = await Store.open(path, FAST, "s1", PARTITIONS, end, told=numbers.at_opening)
    await store.partitions.adopt(cluster_map(store.served.epoch + 1))
    return store


async def old_copy(path: Path, numbers: ToldNumbers) -> tuple[Path, int]:
    """A copy of a store's files; then the store goes on and tells of it. The copy's folder, and the number told."""
    await filled(path, 5)
    shutil.copytree(path.parent, path.parent.parent / "old")
    store = await open_store(path, numbers)
    await Hands(store).put("newer", b"value")
    await numbers.tell(store)
    number = store.durable
    await store.close()
    return path.parent.parent / "old" / path.name, number


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data" / "shard-s1.db"


async def test_a_store_that_has_all_that_it_told_opens_verified(path: Path, numbers: ToldNumbers) -> None:
    await old_copy(path, numbers)
    store = await open_store(path, numbers)
    assert numbers.is_verified
    assert (await Hands(store).get("newer")).value == b"value"
    await numbers.tell(store)
    await store.close()


async def test_an_older_copy_of_file_and_log_is_refused_and_left_as_it_is(path: Path, numbers: ToldNumbers) -> None:
    old, number = await old_copy(path, numbers)
    before = {file.name: file.read_bytes() for file in old.parent.iterdir() if ".log." in file.name}
    with pytest.raises(StoreBehind, match=f"record {number} was durable") as refused:
        await open_store(old, numbers)
    assert refused.value.members["told"] == number
    assert "accept-old" in refused.value.next_step
    assert {file.name: file.read_bytes() for file in old.parent.iterdir() if ".log." in file.name} == before


async def test_an_older_copy_that_was_accepted_opens(path: Path, numbers: ToldNumbers, controller: Controller) -> None:
    old, _ = await old_copy(path, numbers)
    async with opened(old) as hands:
        store_id = hands.store.identity.store_id
    await controller.store.forget(store_id)
    store = await open_store(old, numbers)
    await numbers.tell(store)
    assert (await Hands(store).get("newer")).status == 404
    await store.close()


async def accept(old: Path, controller: Controller) -> Told:
    """As `accept-old` does; what was told until then."""
    async with opened(old) as hands:
        store_id = hands.store.identity.store_id
    return await ClusterDocument(controller.store, 10).accept_old(store_id)


async def test_an_older_copy_that_was_accepted_gives_no_version_that_was_given_before(
    path: Path, numbers: ToldNumbers, controller: Controller
) -> None:
    old, _ = await old_copy(path, numbers)
    told = await accept(old, controller)
    store = await open_store(old, numbers)
    version = (await Hands(store).put("other", b"value")).version
    assert version > told.version + CLOCK_STEP
    await store.close()
    store = await open_store(old, numbers)
    assert (await Hands(store).put("other", b"value")).version == version + 1
    await store.close()


async def test_an_older_copy_that_opened_while_the_controller_was_away_goes_on_above_before_it_is_confirmed(
    path: Path, numbers: ToldNumbers, controller: Controller
) -> None:
    old, _ = await old_copy(path, numbers)
    told = await accept(old, controller)
    numbers.is_verified = False
    controller.is_away = True
    store = await open_store(old, numbers)
    controller.is_away = False
    await numbers.tell(store)
    assert numbers.is_verified
    assert (await controller.store.tell(store.identity.store_id, Told())).number == store.durable
    assert (await Hands(store).put("other", b"value")).version > told.version + CLOCK_STEP
    await store.close()


async def test_an_old_primary_that_tells_after_a_person_has_gone_on_without_it_neither_ends_nor_counts(
    path: Path, numbers: ToldNumbers, controller: Controller
) -> None:
    """It was cut off, and hears the map a moment later: its number and its clock must not come back for its successor,
    nor must that one's number end it."""
    store = await open_store(path, numbers)
    await Hands(store).put("key", b"value")
    await numbers.tell(store)
    document, store_id = ClusterDocument(controller.store, 10), store.identity.store_id
    elsewhere = at_home("s1", "http://s1", store_id, copy_id="successor")
    found = map_of([elsewhere], cluster_id="c", epoch=9, partitions=PARTITIONS, owners=[0] * PARTITIONS, moves=[])
    await document.accept_old(store_id)
    await document.change(lambda state: msgspec.structs.replace(state, map=found))
    await Hands(store).put("key", b"newer")
    for successor in (0, 100):
        floor = (await document.tell(store_id, Told())).clock_floor
        await document.tell(store_id, Told(successor, floor))
        await numbers.tell(store)
        assert (await document.tell(store_id, Told())).number == successor
        assert store.clock.version < floor
    await store.close()


def shared(epoch: int, owners: list[int], *moves: Move) -> ClusterMap:
    """A map of two shards."""
    members = [at_home(name, f"http://{name}", name) for name in ("s1", "s2")]
    return map_of(members, cluster_id="c", epoch=epoch, partitions=PARTITIONS, owners=owners, moves=list(moves))


async def test_partitions_that_came_after_the_older_copy_was_made_are_named(
    path: Path, numbers: ToldNumbers, controller: Controller, caplog: pytest.LogCaptureFixture
) -> None:
    half, whole = shared(1, [p % 2 for p in range(PARTITIONS)]), shared(9, [0] * PARTITIONS)
    store = await Store.open(path, FAST, "s1", PARTITIONS, end, told=numbers.at_opening)
    await store.partitions.adopt(half)
    assert not store.partitions.missing, "the first partitions of a new store are empty"
    await store.close()
    store = await Store.open(path, FAST, "s1", PARTITIONS, end, told=numbers.at_opening)
    await store.partitions.adopt(whole)
    assert store.partitions.missing == frozenset(range(1, PARTITIONS, 2))
    assert f"the partitions {', '.join(map(str, range(1, PARTITIONS, 2)))} came after this copy" in caplog.text
    await store.partitions.adopt(shared(10, half.owners))
    assert not store.partitions.missing
    await store.close()


async def test_what_an_older_copy_had_half_received_is_named_too(
    path: Path, numbers: ToldNumbers, controller: Controller
) -> None:
    old, _ = await old_copy(path, numbers)
    await accept(old, controller)
    move = Move(id="m", source="s2", to="s1", partitions=[3, 4])
    owners = [1 if partition in move.partitions else 0 for partition in range(PARTITIONS)]
    store = await Store.open(old, FAST, "s1", PARTITIONS, end, told=numbers.at_opening)
    await store.partitions.adopt(shared(9, owners, move))
    await store.partitions.adopt(shared(10, [0] * PARTITIONS))
    assert store.partitions.missing == {3, 4}
    await store.close()


async def test_a_damaged_last_record_that_was_told_is_damage_and_no_torn_end(path: Path, numbers: ToldNumbers) -> None:
    await old_copy(path, numbers)
    path.with_name("shard-s1.log.note").write_bytes((path.parent.parent / "old" / "shard-s1.log.note").read_bytes())
    segment = max(path.parent.glob("shard-s1.log.0*"), key=lambda file: len(file.read_bytes().rstrip(b"\0")))
    flip(segment, len(segment.read_bytes().rstrip(b"\0")) - 2)
    with pytest.raises(LogDamaged):
        await open_store(path, numbers)


async def test_without_an_answer_it_serves_unverified_and_stops_when_it_hears_of_more(
    path: Path, numbers: ToldNumbers, controller: Controller
) -> None:
    old, _ = await old_copy(path, numbers)
    numbers.is_verified = False
    controller.is_away = True
    store = await open_store(old, numbers)
    assert not numbers.is_verified
    assert (await Hands(store).get("key-01")).status == 200
    running = asyncio.create_task(numbers.run(store))
    await asyncio.sleep(0)
    controller.is_away = False
    with pytest.raises(StoreBehind):
        await asyncio.wait_for(running, 20)
    await store.close()


async def test_a_primary_that_has_its_lease_and_ends_below_what_was_told_ends_and_one_without_waits_for_a_map(
    path: Path, numbers: ToldNumbers, controller: Controller
) -> None:
    """What has told more is its successor then, or it has an older copy of its files."""
    async with primary(path.parent) as one:
        await one.make_copy("n2")
        await one.in_sync("n2")
        await controller.store.tell(one.store.identity.store_id, Told(one.store.durable + 5))
        gate = one.hold_up()
        one.environment.lease_step_s = 100.0
        await numbers.tell(one.store)
        assert not numbers.is_verified
        gate.set()
        await until(one.store.tables.may_answer)
        with pytest.raises(StoreBehind):
            await numbers.tell(one.store)


async def test_a_store_opens_in_time_although_the_controller_takes_the_question_and_stands_still(
    path: Path, numbers: ToldNumbers, controller: Controller
) -> None:
    await filled(path, 5)
    controller.goes_on.clear()
    opening = asyncio.create_task(open_store(path, numbers))
    done, _ = await asyncio.wait([opening], timeout=10)
    controller.goes_on.set()
    store = await opening
    was_verified = numbers.is_verified
    await numbers.tell(store)
    await store.close()  # before anything is asserted: an open store would keep the process
    assert done
    assert not was_verified
    assert numbers.is_verified


async def test_a_store_tells_what_is_durable_again_and_again(
    path: Path, numbers: ToldNumbers, controller: Controller
) -> None:
    store = await open_store(path, numbers)
    running = asyncio.create_task(numbers.run(store))
    await Hands(store).put("a", b"1")
    async with asyncio.timeout(20):
        while await controller.store.tell(store.identity.store_id, Told()) != Told(store.durable, store.clock.version):
            await asyncio.sleep(0.01)
    running.cancel()
    await store.close()


async def test_a_store_that_is_stopped_in_order_tells_the_number_of_its_last_record(
    path: Path, numbers: ToldNumbers, controller: Controller
) -> None:
    store = await open_store(path, numbers)
    service = ShardService("s1", store, cast(Any, None), FAST, numbers)
    nothing = cast(Any, None)
    hosted = HostedStore(store, StoreEnd(store), service, numbers, nothing, nothing)
    await Hands(store).put("a", b"1")
    assert await controller.store.tell(store.identity.store_id, Told()) != Told(store.durable, store.clock.version)
    await hosted.end()
    assert await controller.store.tell(store.identity.store_id, Told()) == Told(store.durable, store.clock.version)
    await store.close()


@pytest.mark.parametrize("after_turns", range(1, 6))
async def test_the_end_of_a_store_that_is_broken_off_leaves_no_work_that_uses_its_files(
    path: Path, numbers: ToldNumbers, after_turns: int
) -> None:
    """Who ends it closes the files next."""
    store = await open_store(path, numbers)
    ending = asyncio.create_task(StoreEnd(store).close())
    for _ in range(after_turns):
        await asyncio.sleep(0)
    ending.cancel()
    await asyncio.gather(ending, return_exceptions=True)
    names = {task.get_coro().__qualname__ for task in asyncio.all_tasks()}  # type: ignore[union-attr]
    assert "Store._guard" not in names


# --- what was never received ------------------------------------------------------------------------------------------


class Receiver:
    """That of a shard to which every move is complete."""

    async def receive(self, request: Receive) -> Progress:
        return Progress(request.id, "done", 0, 0, 0)

    def drop_what_is_over(self) -> None:
        """None is kept."""


class Sink:
    """`answer`: what came."""

    closed = False

    def __init__(self) -> None:
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def send(self, reply: Any, /) -> None:
        self.answer.set_result(reply)


def service_of(store: Store, numbers: ToldNumbers) -> ShardService:
    return ShardService("s1", store, Receiver(), FAST, numbers)  # type: ignore[arg-type]


def own_map(store: Store, epoch: int) -> ClusterMap:
    found = cluster_map(epoch)
    primary = Primary(node="s1", copy_id=store.copy_id)
    shards = [
        msgspec.structs.replace(shard, store_id=store.identity.store_id, primary=primary) for shard in found.shards
    ]
    return msgspec.structs.replace(found, shards=shards)


async def test_an_older_copy_that_opened_while_the_controller_was_away_follows_no_newer_map(
    path: Path, numbers: ToldNumbers, controller: Controller
) -> None:
    old, _ = await old_copy(path, numbers)
    numbers.is_verified = False
    controller.is_away = True
    store = await Store.open(old, FAST, "s1", PARTITIONS, end, told=numbers.at_opening)
    service, epoch = service_of(store, numbers), store.served.epoch
    with pytest.raises(TryLater):
        await service.follow(own_map(store, epoch + 1))
    controller.is_away = False
    with pytest.raises(StoreBehind):
        await service.follow(own_map(store, epoch + 1))
    assert store.served.epoch == epoch
    await store.close()


async def test_a_whole_store_that_opened_while_the_controller_was_away_follows_once_it_is_confirmed(
    path: Path, numbers: ToldNumbers, controller: Controller
) -> None:
    await filled(path, 5)
    controller.is_away = True
    store = await Store.open(path, FAST, "s1", PARTITIONS, end, told=numbers.at_opening)
    service, epoch = service_of(store, numbers), store.served.epoch
    controller.is_away = False
    assert await service.follow(own_map(store, epoch + 1))
    assert numbers.is_verified
    await store.close()


async def test_a_move_is_done_only_when_the_controller_has_the_number_of_its_last_record(
    path: Path, numbers: ToldNumbers, controller: Controller
) -> None:
    store = await open_store(path, numbers)
    await Hands(store).put("moved", b"1")
    service = service_of(store, numbers)
    controller.is_away, sink = True, Sink()
    service.handle(Receive(1, "m"), sink)
    assert (await asyncio.wait_for(sink.answer, 20)).status == 503
    controller.is_away, sink = False, Sink()
    service.handle(Receive(2, "m"), sink)
    assert (await asyncio.wait_for(sink.answer, 20)).step == "done"
    assert (await controller.store.tell(store.identity.store_id, Told())).number == store.durable
    await store.close()
