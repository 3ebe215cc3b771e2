"""The forms of the stored cluster map.
Which of them are read, and how an older one becomes the present one.

Owns: decoding a map of any format that this program knows; format 3, which had no `format` and no nodes.
Promises: pure. A map of a format that is not known is refused, never guessed. What is read of format 3 has the same
epoch, owners, moves and strikes, and each of its members has become a shard and the node of its name.
Leaves to others: storing what was converted (the controller), the form of maps in memory (`cluster_map`).

In format 3 a member was shard and process at once. Its copy has the id of its store, and its term is the epoch of the
map that it is read from: with one copy nothing was ever compared with a term.
"""

from __future__ import annotations

from typing import Any

import msgspec

from kvstore.errors import ForeignData
from kvstore.placement.cluster_map import MAP_FORMAT, ClusterMap, Move, ShardState, Strike, at_home, map_of

OLDEST_FORMAT = 3


class _Member(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    url: str
    store_id: str
    weight: int = 1
    state: ShardState = "up"


class _Map3(msgspec.Struct, frozen=True, kw_only=True):
    cluster_id: str
    epoch: int
    partitions: int
    members: list[_Member]
    owners: list[int]
    replicas: int = 1
    moves: list[Move] = []
    strikes: list[Strike] = []


class _Head(msgspec.Struct, frozen=True):
    format: int = OLDEST_FORMAT


_head = msgspec.json.Decoder(_Head).decode
_present = msgspec.json.Decoder(ClusterMap).decode
_format_3 = msgspec.json.Decoder(_Map3).decode


def decode_map(encoded: bytes) -> ClusterMap:
    """The map that was stored or sent. Raises msgspec.DecodeError, and ForeignData for a format that is not known.

    It is not checked for contradictions: see `cluster_map.checked_map`.
    """
    found = format_of(encoded)
    if found == MAP_FORMAT:
        return _present(encoded)
    if found == OLDEST_FORMAT:
        return _converted(_format_3(encoded))
    raise ForeignData(
        f"the cluster map has format {found}, and this version of kvstore reads formats {OLDEST_FORMAT} and "
        f"{MAP_FORMAT}: start the version that has written it, or a newer one."
    )


def format_of(encoded: bytes) -> int:
    """The format that the map says it has. Raises msgspec.DecodeError."""
    return _head(encoded).format


def _converted(older: _Map3) -> ClusterMap:
    homes = [
        at_home(member.id, member.url, member.store_id, weight=member.weight, term=older.epoch)
        for member in older.members
    ]
    rest: dict[str, Any] = {name: getattr(older, name) for name in _Map3.__struct_fields__ if name != "members"}
    converted = map_of(homes, **rest)
    shards = [
        msgspec.structs.replace(shard, state=member.state)
        for shard, member in zip(converted.shards, older.members, strict=True)
    ]
    return msgspec.structs.replace(converted, shards=shards)
