"""What a map says of a shard to the node that follows it."""

from __future__ import annotations

import asyncio
from typing import Literal

import msgspec
import pytest

from kvstore.environment import SYSTEM
from kvstore.placement.cluster_map import ClusterMap, Replica
from kvstore.shard.followed_map import Fate, FollowedMap
from kvstore.storage.engine import Identity
from tests.unit.shard.resident_copy import PARTITIONS, STORE_ID, named, promoted

OTHER_STORE = Identity("other", "c", "s1", PARTITIONS)
OWN_STORE = OTHER_STORE._replace(store_id=STORE_ID)


def followed_on(node: str, cluster_map: ClusterMap | None) -> FollowedMap:
    followed = FollowedMap("s1", node, SYSTEM)
    if cluster_map is not None:
        followed.hear(cluster_map)
    return followed


def without_shards() -> ClusterMap:
    return msgspec.structs.replace(named("copy"), shards=[])


def with_copy(state: Literal["in-sync", "joining"]) -> ClusterMap:
    found = named("copy")
    copy = Replica(node="n2", copy_id="copy", state=state, joined=1)
    return msgspec.structs.replace(found, shards=[msgspec.structs.replace(found.shards[0], replicas=[copy])])


@pytest.mark.parametrize("cluster_map", [None, without_shards()])
def test_without_the_shard_in_a_map_nothing_is_concluded_for_a_copy(cluster_map: ClusterMap | None) -> None:
    followed = followed_on("n2", cluster_map)
    assert (followed.config, followed.term, followed.fate) == (None, 0, "wait")
    assert not followed.is_in_sync(1)
    assert not followed.has_lost(OTHER_STORE._replace(cluster_id=None))


@pytest.mark.parametrize(
    ("node", "cluster_map", "fate"),
    [
        ("s1", with_copy("in-sync"), "wait"),  # the copy in sync is to become the primary
        ("s1", with_copy("joining"), "refuse"),
        ("s1", named(None), "refuse"),
        ("s1", promoted("copy"), "rebuild"),
        ("n2", with_copy("in-sync"), "wait"),
        ("n2", with_copy("joining"), "rebuild"),
        ("n2", named(None), "rebuild"),
    ],
)
def test_a_damaged_copy_is_rebuilt_where_another_is_the_primary_and_it_is_not_in_sync(
    node: str, cluster_map: ClusterMap, fate: Fate
) -> None:
    assert followed_on(node, cluster_map).fate == fate


def test_a_copy_is_in_sync_only_since_it_joined_last() -> None:
    assert followed_on("n2", with_copy("in-sync")).is_in_sync(1)
    assert not followed_on("n2", with_copy("in-sync")).is_in_sync(2)
    assert not followed_on("n2", with_copy("joining")).is_in_sync(1)
    assert not followed_on("n3", with_copy("in-sync")).is_in_sync(1)


def test_a_store_served_for_another_home_has_left_once_the_map_has_it_no_more() -> None:
    assert not followed_on("n2", None).has_left(OWN_STORE)
    assert not followed_on("n2", promoted("copy")).has_left(OWN_STORE)
    assert followed_on("n2", without_shards()).has_left(OWN_STORE)
    assert followed_on("n2", promoted("copy")).has_left(OTHER_STORE)
    assert followed_on("n2", promoted("copy")).ends(OTHER_STORE, has_copies=True)


def test_a_guest_whose_file_has_not_applied_its_first_map_yet_has_left_and_is_not_lost() -> None:
    followed = followed_on("n2", promoted("copy"))
    assert followed.ends(OTHER_STORE._replace(cluster_id=None), has_copies=True)
    assert not followed.has_lost(OTHER_STORE._replace(cluster_id=None))


def test_a_home_that_has_left_the_map_goes_on_until_its_process_ends() -> None:
    assert not followed_on("s1", without_shards()).ends(OWN_STORE, has_copies=True)


def test_a_store_of_no_cluster_was_made_for_lost_files_where_the_map_knows_another_and_a_copy_may_have_it() -> None:
    made = OTHER_STORE._replace(cluster_id=None)
    assert followed_on("s1", with_copy("in-sync")).has_lost(made)
    assert followed_on("s1", promoted("copy")).ends(made, has_copies=True)
    assert not followed_on("s1", named(None)).has_lost(made), "nothing could fill it"
    assert not followed_on("s1", with_copy("in-sync")).has_lost(OTHER_STORE), "it is a cluster's"
    assert not followed_on("s1", with_copy("in-sync")).has_lost(OWN_STORE._replace(cluster_id=None))


@pytest.mark.parametrize("copy_id", [STORE_ID, "copy"])
def test_an_order_to_drop_a_copy_that_the_map_names_is_too_late(copy_id: str) -> None:
    followed = followed_on("n2", named("copy"))
    followed.drop(copy_id)
    assert not followed.is_dropped
    followed.drop("an older copy")
    assert followed.is_dropped


async def test_a_wait_ends_with_the_first_change_after_it_began() -> None:
    followed = followed_on("n2", named("copy"))
    followed.wake()
    for change in (followed.wake, lambda: followed.drop("an older copy")):
        waiting = asyncio.create_task(followed.wait_for_change(600))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not waiting.done()
        change()
        await asyncio.wait_for(waiting, 60)
