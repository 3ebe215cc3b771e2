"""Forming the cluster, announcing members, writing the map: the rules, and the rules on a real store."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import aiohttp
import msgspec
import pytest

from kvstore.config import ClusterConfig, Limits, ShardConfig, default_config
from kvstore.controller.document import ClusterDocument
from kvstore.controller.map_store.interface import MapStore, Stored
from kvstore.controller.map_store.sqlite import open_sqlite
from kvstore.controller.membership import Announcement, ClusterState, FirstMembers, check, decide, differences
from kvstore.controller.planning import Planner
from kvstore.controller.recovery import Recovery
from kvstore.controller.service import ClusterService, Waiting
from kvstore.controller.shards import ShardClients
from kvstore.errors import BadBody, Conflict, ControllerBehind, ForeignData, Unavailable
from kvstore.placement.cluster_map import ClusterMap, Primary, Replica
from kvstore.placement.moves import planned

FIRST = FirstMembers(weights={"s1": 1, "s2": 3}, partitions=64, replicas=1)
PLAN = partial(planned, group_partitions=lambda source: 8, new_id=partial(secrets.token_hex, 8))
CONFIG = msgspec.structs.replace(
    default_config(),
    partitions=64,
    replicas=1,
    shards=[ShardConfig("s1", "127.0.0.1:1"), ShardConfig("s2", "127.0.0.1:2", 3)],
)


def announcement(shard_id: str, **changes: object) -> Announcement:
    said = Announcement(id=shard_id, url=f"http://{shard_id}:1", store_id=f"store-{shard_id}")
    return msgspec.structs.replace(said, **changes)


def after(*announcements: Announcement) -> ClusterState:
    state = ClusterState()
    for said in announcements:
        state = decide(state, said, FIRST, "c1", PLAN)
    return state


FORMED = after(announcement("s1"), announcement("s2"))


def the_map(state: ClusterState = FORMED) -> ClusterMap:
    assert state.map is not None
    return state.map


# --- forming ---------------------------------------------------------------------------------------------------------


def test_the_last_first_member_forms_the_cluster_at_epoch_1_in_the_order_of_the_file() -> None:
    assert after(announcement("s2")).map is None
    formed = the_map(after(announcement("s2"), announcement("s1")))
    assert (formed.epoch, formed.cluster_id, formed.partitions, formed.replicas) == (1, "c1", 64, 1)
    assert [(s.id, formed.url_of(s), s.store_id, s.weight) for s in formed.shards] == [
        ("s1", "http://s1:1", "store-s1", 1),
        ("s2", "http://s2:1", "store-s2", 3),
    ]
    assert [len(formed.owned_by(shard)) for shard in ("s1", "s2")] == [16, 48]


def test_before_the_cluster_is_formed_a_first_member_may_come_again_with_another_file_and_address() -> None:
    again = announcement("s1", url="http://other:1", store_id="new")
    found = the_map(after(announcement("s1"), again, announcement("s2")))
    shard = found.shards[0]
    assert (found.url_of(shard), shard.store_id) == ("http://other:1", "new")


def test_the_weight_of_a_first_member_is_that_of_the_file() -> None:
    assert [m.weight for m in the_map(after(announcement("s1", weight=9), announcement("s2"))).shards] == [1, 3]


def test_repeating_an_announcement_changes_nothing() -> None:
    waiting = after(announcement("s1"))
    assert decide(waiting, announcement("s1"), FIRST, "c2", PLAN) == waiting
    assert decide(FORMED, announcement("s1"), FIRST, "c2", PLAN) is FORMED


def test_a_file_with_a_history_is_refused_while_no_cluster_is_formed() -> None:
    with pytest.raises(ControllerBehind, match="knows nothing"):
        decide(ClusterState(), announcement("s1", cluster_id="old"), FIRST, "c1", PLAN)


def test_a_copied_file_is_refused_before_and_after_forming() -> None:
    for state in (after(announcement("s1")), FORMED):
        with pytest.raises(ForeignData, match="copy of that of shard s1"):
            decide(state, announcement("s2", store_id="store-s1"), FIRST, "c1", PLAN)


def test_who_is_no_member_is_refused_before_and_after_forming() -> None:
    for state in (ClusterState(), FORMED):
        with pytest.raises(Conflict, match="not a member"):
            decide(state, announcement("s9"), FIRST, "c1", PLAN)


# --- a formed cluster ------------------------------------------------------------------------------------------------


def test_an_empty_or_foreign_file_is_refused_by_a_formed_cluster() -> None:
    with pytest.raises(ForeignData, match="empty or foreign"):
        decide(FORMED, announcement("s1", store_id="new"), FIRST, "c2", PLAN)
    with pytest.raises(ForeignData, match="belongs to cluster other"):
        decide(FORMED, announcement("s1", cluster_id="other"), FIRST, "c2", PLAN)


def test_a_member_at_another_address_makes_the_next_map_with_the_same_owners() -> None:
    moved = the_map(decide(FORMED, announcement("s1", url="http://new:1", cluster_id="c1"), FIRST, "c2", PLAN))
    assert (moved.epoch, moved.cluster_id, moved.owners) == (2, "c1", the_map().owners)
    assert [node.url for node in moved.nodes] == ["http://new:1", "http://s2:1"]


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "S1"},
        {"id": ""},
        {"id": "s" * 33},
        {"url": "s1:1"},
        {"url": "ftp://s1:1"},
        {"url": "http://s1:1/path"},
        {"url": "http:// s1"},
        {"store_id": ""},
        {"cluster_id": ""},
        {"weight": 0},
    ],
)
def test_an_announcement_without_sense_is_refused(changes: dict[str, object]) -> None:
    check(announcement("s1"))
    with pytest.raises(BadBody):
        check(announcement("s1", **{key: value for key, value in changes.items() if key != "id"}, **_id(changes)))


def _id(changes: dict[str, object]) -> dict[str, object]:
    return {"id": changes["id"]} if "id" in changes else {}


def test_every_difference_between_file_and_map_is_told() -> None:
    assert differences(FIRST, the_map()) == []
    other = FirstMembers(weights={"s2": 1, "s5": 1}, partitions=128, replicas=2)
    assert differences(other, the_map()) == [
        "partitions: the map has 64, cluster.yaml 128",
        "replicas: the map has 1, cluster.yaml 2",
        "shard s5 is in cluster.yaml only",
        "shard s1 is in the map only",
        "shard s2: the map has weight 3, cluster.yaml 1",
    ]


# --- on a store ------------------------------------------------------------------------------------------------------

Serve = Callable[[MapStore, ClusterConfig], ClusterService]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Makes a service on a store."""
    async with aiohttp.ClientSession() as session:
        shards = ShardClients(CONFIG.limits, session)

        def make(store: MapStore, config: ClusterConfig) -> ClusterService:
            document = ClusterDocument(store, config.limits.map_write_tries_max)
            recovery = Recovery(document, shards)
            return ClusterService(
                document, Planner(document, recovery, shards, config.limits), recovery, config, shards
            )

        yield make
        await shards.close()


class Interfering:
    """A store in which another client always swaps first, `times` times."""

    def __init__(self, store: MapStore, times: int) -> None:
        self._store = store
        self._times = times
        self.read, self.watch, self.close = store.read, store.watch, store.close

    async def compare_and_swap(self, revision: int, document: bytes) -> int | None:
        if self._times:
            self._times -= 1
            _, present = await self._store.read()
            await self._store.compare_and_swap(revision, present or msgspec.json.encode(ClusterState()))
        return await self._store.compare_and_swap(revision, document)


async def test_all_first_members_at_once_form_one_cluster(serve: Serve, store: MapStore) -> None:
    shards = [ShardConfig(f"s{i}", f"127.0.0.1:{i}") for i in range(1, 9)]
    service = serve(store, msgspec.structs.replace(CONFIG, shards=shards))
    said = [announcement(shard.id) for shard in shards]
    answers = await asyncio.gather(*(service.announce(one) for one in said))
    (formed,) = [answer for answer in answers if isinstance(answer, ClusterMap)]
    assert formed.epoch == 1
    assert await asyncio.gather(*(service.announce(one) for one in said)) == [formed] * 8


async def test_who_is_waited_for_is_told(serve: Serve, store: MapStore) -> None:
    assert await serve(store, CONFIG).announce(announcement("s2")) == Waiting(["s1"])


async def test_a_lost_race_is_decided_again(serve: Serve, store: MapStore) -> None:
    service = serve(Interfering(store, 3), CONFIG)
    assert await service.announce(announcement("s1")) == Waiting(["s2"])
    assert isinstance(await service.announce(announcement("s2")), ClusterMap)


async def test_tries_are_bounded_and_nothing_is_written_in_vain(serve: Serve, store: MapStore) -> None:
    config = msgspec.structs.replace(CONFIG, limits=Limits(map_write_tries_max=3))
    with pytest.raises(Unavailable) as caught:
        await serve(Interfering(store, 100), config).announce(announcement("s1"))
    assert caught.value.members["retry_after_ms"] > 0
    assert (await store.read()).document == msgspec.json.encode(ClusterState())


async def test_an_announcement_that_changes_nothing_is_not_written(serve: Serve, store: MapStore) -> None:
    service = serve(store, CONFIG)
    await service.announce(announcement("s1"))
    before = await store.read()
    await service.announce(announcement("s1"))
    assert await store.read() == before


async def test_map_after_waits_for_the_forming_and_for_each_later_epoch(serve: Serve, store: MapStore) -> None:
    service = serve(store, CONFIG)
    first, second = asyncio.create_task(service.map_after(0)), asyncio.create_task(service.map_after(1))
    await service.announce(announcement("s1"))
    await service.announce(announcement("s2"))
    assert (await first).epoch == 1
    await store.read()
    assert not second.done()
    await service.announce(announcement("s1", url="http://new:1"))
    assert (await second).epoch == 2
    assert (await service.map_after(0)).epoch == 2


async def test_the_cluster_is_the_same_after_a_restart(serve: Serve, tmp_path: Path) -> None:
    maps = []
    for _ in range(2):
        store = await open_sqlite(tmp_path / "controller-0.db")
        service = serve(store, CONFIG)
        await service.announce(announcement("s1"))
        maps.append(await service.announce(announcement("s2")))
        await store.close()
    assert maps[0] == maps[1]


async def test_the_stored_map_is_the_truth_and_a_different_file_is_reported(
    serve: Serve, store: MapStore, caplog: pytest.LogCaptureFixture
) -> None:
    service = serve(store, CONFIG)
    await service.announce(announcement("s1"))
    await service.announce(announcement("s2"))
    with caplog.at_level(logging.WARNING):
        await service.report_start()
        assert caplog.messages == []
        changed = ClusterConfig(
            routers=CONFIG.routers, controllers=CONFIG.controllers, shards=CONFIG.shards, partitions=128
        )
        await serve(store, changed).report_start()
    assert caplog.messages == [
        "cluster.yaml differs from the stored map, which stands: partitions: the map has 64, cluster.yaml 128"
    ]
    assert (await serve(store, changed).map_after(0)).partitions == 64


async def test_a_stored_state_of_another_shape_is_refused_at_the_start(serve: Serve, store: MapStore) -> None:
    await store.compare_and_swap(0, b'{"from_the_future": 1}')
    with pytest.raises(ForeignData, match="cannot read"):
        await serve(store, CONFIG).report_start()
    assert await store.read() == Stored(1, b'{"from_the_future": 1}')


def test_the_zone_and_host_of_a_node_are_those_that_it_announced_last() -> None:
    said = announcement("s1", cluster_id="c1", zone="a", host="h1")
    named = decide(FORMED, said, FIRST, "c1", PLAN)
    node = the_map(named).node("s1")
    assert node is not None
    assert (node.zone, node.host, the_map(named).epoch) == ("a", "h1", the_map(FORMED).epoch + 1)
    assert decide(named, said, FIRST, "c1", PLAN) == named
    with pytest.raises(BadBody, match="zone"):
        check(msgspec.structs.replace(said, zone="no zone"))


def with_copies(state: ClusterState = FORMED) -> ClusterState:
    """Shard s1 is served by node s2, and has a copy at home."""
    shard = the_map(state).shards[0]
    home = Replica(node="s1", copy_id=shard.primary.copy_id, state="in-sync", joined=2)
    moved = msgspec.structs.replace(shard, primary=Primary(node="s2", copy_id="b"), term=2, replicas=[home])
    changed = msgspec.structs.replace(the_map(state), epoch=2, shards=[moved, the_map(state).shards[1]])
    return msgspec.structs.replace(state, map=changed)


def test_a_node_whose_shard_is_served_elsewhere_announces_its_own_address() -> None:
    again = announcement("s1", url="http://other:1", cluster_id="c1")
    found = the_map(decide(with_copies(), again, FIRST, "c1", PLAN))
    assert [node.url for node in found.nodes] == ["http://other:1", "http://s2:1"]
    assert found.url_of(found.shards[0]) == "http://s2:1"


@pytest.mark.parametrize("other", [{"store_id": "new"}, {"copy_id": "new"}])
def test_a_home_whose_only_copy_is_elsewhere_may_start_with_whatever_it_has(other: dict[str, str]) -> None:
    """Its copy was dropped while it was down."""
    state = with_copies()
    shards = [msgspec.structs.replace(the_map(state).shards[0], replicas=[]), *the_map(state).shards[1:]]
    alone = msgspec.structs.replace(state, map=msgspec.structs.replace(the_map(state), shards=shards))
    said = announcement("s1", cluster_id="c1", **other)
    assert decide(alone, said, FIRST, "c1", PLAN) == alone


@pytest.mark.parametrize("lost", [{"store_id": "new"}, {"copy_id": "new"}])
def test_a_node_with_an_empty_disk_may_start_while_its_shard_has_other_copies(lost: dict[str, str]) -> None:
    said = announcement("s1", **lost)
    assert decide(with_copies(), said, FIRST, "c1", PLAN) == with_copies()
    with pytest.raises(ForeignData):
        decide(FORMED, msgspec.structs.replace(said, cluster_id="c1"), FIRST, "c1", PLAN)
