"""The cluster map: every change is a new map, and it survives its way through JSON."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import msgspec
import pytest

from kvstore.placement.cluster_map import (
    ClusterMap,
    Home,
    Primary,
    Replica,
    at_home,
    checked_map,
    first_map,
    with_node_url,
)
from kvstore.placement.ring import ShardWeight, partition_of, place


def member(shard_id: str, weight: int = 1) -> Home:
    return at_home(shard_id, f"http://{shard_id}:9101", f"store-{shard_id}", weight=weight)


def small_map() -> ClusterMap:
    return first_map("cluster", 64, [member("s2"), member("s1"), member("s3", weight=2)])


def test_the_first_map_has_epoch_1_and_its_shards_in_the_order_of_joining() -> None:
    cluster_map = small_map()
    assert (cluster_map.cluster_id, cluster_map.epoch, cluster_map.partitions) == ("cluster", 1, 64)
    assert [m.id for m in cluster_map.shards] == ["s2", "s1", "s3"]
    assert cluster_map.replicas == 1


def test_the_first_map_is_what_the_ring_places() -> None:
    cluster_map = small_map()
    owners = [cluster_map.shards[index].id for index in cluster_map.owners]
    assert owners == place([ShardWeight("s1"), ShardWeight("s2"), ShardWeight("s3", 2)], 64)
    assert Counter(owners) == {"s1": 16, "s2": 16, "s3": 32}


def test_every_key_has_the_owner_of_its_partition() -> None:
    cluster_map = small_map()
    for key in (b"", b"a", "schlüssel".encode(), b"k" * 1024):
        assert partition_of(key, 64) in cluster_map.owned_by(cluster_map.owner_of(key).id)


def test_each_partition_is_owned_by_one_shard_and_listed_ascending() -> None:
    cluster_map = small_map()
    owned = [cluster_map.owned_by(m.id) for m in cluster_map.shards]
    assert all(partitions == sorted(partitions) for partitions in owned)
    assert sorted(chain.from_iterable(owned)) == list(range(64))


def test_a_stranger_is_no_shard_and_owns_nothing() -> None:
    cluster_map = small_map()
    assert cluster_map.shard("s9") is None
    assert cluster_map.owned_by("s9") == []


def test_a_shard_and_its_node_are_found_by_their_ids() -> None:
    cluster_map, (node, shard) = small_map(), member("s3", weight=2)
    assert (cluster_map.node("s3"), cluster_map.shard("s3")) == (node, shard)
    assert cluster_map.node("s9") is None


def test_a_shard_is_reached_at_the_node_of_its_primary() -> None:
    before = small_map()
    promoted = msgspec.structs.replace(before.shards[1], primary=Primary(node="s3", copy_id="c3"), term=2)
    after = msgspec.structs.replace(before, epoch=2, shards=[before.shards[0], promoted, before.shards[2]])
    assert [before.url_of(shard) for shard in before.shards] == [f"http://{s}:9101" for s in ("s2", "s1", "s3")]
    assert [after.url_of(shard) for shard in after.shards] == [f"http://{s}:9101" for s in ("s2", "s3", "s3")]


def test_a_shard_at_home_has_one_copy_there() -> None:
    node, shard = at_home("s1", "http://s1", "the-store", copy_id="the-copy")
    assert (node.id, shard.primary, shard.replicas, shard.nodes) == (
        "s1", Primary(node="s1", copy_id="the-copy"), [], ["s1"],
    )  # fmt: skip


def test_a_map_that_names_a_node_which_is_not_there_is_refused() -> None:
    found = small_map()
    replica = Replica(node="s9", copy_id="c", state="joining", joined=1)
    for change in ({"primary": Primary(node="s9", copy_id="c")}, {"replicas": [replica]}):
        shards = [msgspec.structs.replace(found.shards[0], **change), *found.shards[1:]]
        with pytest.raises(ValueError, match="a copy of shard s2 is on a node that is not there"):
            checked_map(msgspec.structs.replace(found, shards=shards))
    assert checked_map(found) is found


def test_a_new_address_is_a_new_epoch_and_changes_nothing_else() -> None:
    before = small_map()
    after = with_node_url(before, "s1", "http://elsewhere:9999")
    assert after.epoch == 2
    assert [node.url for node in after.nodes] == ["http://s2:9101", "http://elsewhere:9999", "http://s3:9101"]
    assert msgspec.structs.replace(after, epoch=1, nodes=before.nodes) == before


def test_a_map_is_not_changed_by_the_next_one() -> None:
    before = small_map()
    with_node_url(before, "s1", "http://elsewhere:9999")
    assert before == small_map()


def test_a_map_comes_back_from_json_as_it_went() -> None:
    cluster_map = with_node_url(small_map(), "s3", "http://elsewhere:9999")
    assert msgspec.json.decode(msgspec.json.encode(cluster_map), type=ClusterMap) == cluster_map
