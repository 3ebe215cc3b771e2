"""The cluster map: every change is a new map, and it survives its way through JSON."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import msgspec

from kvstore.placement.cluster_map import ClusterMap, Member, first_map, with_member_url
from kvstore.placement.ring import Node, partition_of, place


def member(shard_id: str, weight: int = 1) -> Member:
    return Member(id=shard_id, url=f"http://{shard_id}:9101", store_id=f"store-{shard_id}", weight=weight)


def small_map() -> ClusterMap:
    return first_map("cluster", 64, [member("s2"), member("s1"), member("s3", weight=2)])


def test_the_first_map_has_epoch_1_and_its_members_in_the_order_of_joining() -> None:
    cluster_map = small_map()
    assert (cluster_map.cluster_id, cluster_map.epoch, cluster_map.partitions) == ("cluster", 1, 64)
    assert [m.id for m in cluster_map.members] == ["s2", "s1", "s3"]
    assert cluster_map.replicas == 1


def test_the_first_map_is_what_the_ring_places() -> None:
    cluster_map = small_map()
    owners = [cluster_map.members[index].id for index in cluster_map.owners]
    assert owners == place([Node("s1"), Node("s2"), Node("s3", 2)], 64)
    assert Counter(owners) == {"s1": 16, "s2": 16, "s3": 32}


def test_every_key_has_the_owner_of_its_partition() -> None:
    cluster_map = small_map()
    for key in (b"", b"a", "schlüssel".encode(), b"k" * 1024):
        assert partition_of(key, 64) in cluster_map.owned_by(cluster_map.owner_of(key).id)


def test_each_partition_is_owned_by_one_member_and_listed_ascending() -> None:
    cluster_map = small_map()
    owned = [cluster_map.owned_by(m.id) for m in cluster_map.members]
    assert all(partitions == sorted(partitions) for partitions in owned)
    assert sorted(chain.from_iterable(owned)) == list(range(64))


def test_a_stranger_is_no_member_and_owns_nothing() -> None:
    cluster_map = small_map()
    assert cluster_map.member("s9") is None
    assert cluster_map.owned_by("s9") == []


def test_a_member_is_found_by_its_id() -> None:
    assert small_map().member("s3") == member("s3", weight=2)


def test_a_new_address_is_a_new_epoch_and_changes_nothing_else() -> None:
    before = small_map()
    after = with_member_url(before, "s1", "http://elsewhere:9999")
    assert after.epoch == 2
    assert [m.url for m in after.members] == ["http://s2:9101", "http://elsewhere:9999", "http://s3:9101"]
    assert msgspec.structs.replace(after, epoch=1, members=before.members) == before


def test_a_map_is_not_changed_by_the_next_one() -> None:
    before = small_map()
    with_member_url(before, "s1", "http://elsewhere:9999")
    assert before == small_map()


def test_a_map_comes_back_from_json_as_it_went() -> None:
    cluster_map = with_member_url(small_map(), "s3", "http://elsewhere:9999")
    assert msgspec.json.decode(msgspec.json.encode(cluster_map), type=ClusterMap) == cluster_map
