"""Maps that an older program has stored are read with all that they say, and maps of an unknown format are refused."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from kvstore.errors import ForeignData
from kvstore.placement.cluster_map import MAP_FORMAT, ClusterMap, Primary, at_home, checked_map, first_map
from kvstore.placement.map_format import decode_map, format_of
from tests.old_data import state_of_format_3

OLD: dict[str, Any] = json.loads(state_of_format_3())["map"]


def encoded(document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode()


def test_a_map_of_the_present_format_comes_back_as_it_went() -> None:
    present = first_map("c", 64, [at_home("s1", "http://s1", "1"), at_home("s2", "http://s2", "2", zone="z")])
    assert decode_map(msgspec.json.encode(present)) == present
    assert format_of(msgspec.json.encode(present)) == MAP_FORMAT


def test_a_map_of_format_3_says_the_same_as_before() -> None:
    found = decode_map(encoded(OLD))
    assert (found.format, format_of(encoded(OLD))) == (MAP_FORMAT, 3)
    for name in ("cluster_id", "epoch", "partitions", "owners", "replicas"):
        assert getattr(found, name) == OLD[name]
    assert [msgspec.to_builtins(each) for each in found.moves] == [each | {"change": ""} for each in OLD["moves"]]
    assert [msgspec.to_builtins(each) for each in found.strikes] == OLD["strikes"]
    for name in ("moves", "strikes"):
        assert OLD[name], f"the stored map has {name}"
    assert checked_map(found) is found


def test_a_member_of_format_3_becomes_a_shard_and_the_node_of_its_name() -> None:
    found = decode_map(encoded(OLD))
    assert [(node.id, node.url) for node in found.nodes] == [(old["id"], old["url"]) for old in OLD["members"]]
    for shard, old in zip(found.shards, OLD["members"], strict=True):
        assert {name: getattr(shard, name) for name in ("id", "store_id", "weight", "state")} == {
            name: old[name] for name in ("id", "store_id", "weight", "state")
        }
        assert (shard.primary, shard.term) == (Primary(node=old["id"], copy_id=old["store_id"]), OLD["epoch"])
        assert (shard.replicas, found.url_of(shard)) == ([], old["url"])
    assert {shard.state for shard in found.shards} == {"up", "joining"}, "the stored map has both"


def test_two_that_read_the_same_old_map_have_the_same_new_one() -> None:
    assert decode_map(encoded(OLD)) == decode_map(encoded(OLD))
    assert decode_map(msgspec.json.encode(decode_map(encoded(OLD)))) == decode_map(encoded(OLD))


@pytest.mark.parametrize("unknown", [0, 2, 5, 99])
def test_a_map_of_an_unknown_format_is_refused_with_the_mend(unknown: int) -> None:
    present = first_map("c", 64, [at_home("s1", "http://s1", "1")])
    for document in (OLD, msgspec.to_builtins(present)):
        with pytest.raises(ForeignData, match=f"has format {unknown}, .* reads formats 3 and 4"):
            decode_map(encoded(document | {"format": unknown}))


@pytest.mark.parametrize("damage", ["{}", "null", "[]", '{"format": "4"}', '{"format": 4}', "\xff", "{"])
def test_what_is_no_map_is_refused(damage: str) -> None:
    with pytest.raises((msgspec.DecodeError, UnicodeDecodeError)):
        decode_map(damage.encode("latin-1"))


def test_the_present_map_is_no_map_to_the_program_before() -> None:
    """It fails there instead of being read as a map without members."""

    class Older(msgspec.Struct):
        members: list[Any]

    present = msgspec.json.encode(first_map("c", 64, [at_home("s1", "http://s1", "1")]))
    with pytest.raises(msgspec.ValidationError, match="members"):
        msgspec.json.decode(present, type=Older)
    assert msgspec.json.decode(present, type=ClusterMap).shards
