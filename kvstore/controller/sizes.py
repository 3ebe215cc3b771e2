"""What moves carry, estimated from what the shards hold.

Owns: how large a group of partitions is, how many keys and bytes a plan moves.
Promises: pure; partitions of a shard are taken for equally large.
Leaves to others: measuring (`shards`), planning (`placement.moves`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

from kvstore.config import Limits
from kvstore.controller.shards import Size
from kvstore.errors import ChangeRefused
from kvstore.placement.cluster_map import ClusterMap
from kvstore.transport.change_documents import Plan, PlannedMove

_UNMEASURED_GROUPS = 64  # into so many groups at least the partitions of a shard that is down are cut


def expected_keys(cluster_map: ClusterMap, sizes: Mapping[str, Size]) -> Callable[[str, int], int | None]:
    """A function of a source and a number of its partitions: how many keys those have.
    None if it was not measured."""
    owned = {shard_id: len(cluster_map.owned_by(shard_id)) for shard_id in sizes}

    def expect(source: str, partitions: int) -> int | None:
        return round(sizes[source].keys * partitions / owned[source]) if owned.get(source) else None

    return expect


def group_partitions(cluster_map: ClusterMap, source: str, size: Size | None, limits: Limits) -> int:
    """How many partitions of `source` have about as many keys and bytes together as a group may; at least 1."""
    owned = len(cluster_map.owned_by(source))
    if size is None:
        return max(1, owned // _UNMEASURED_GROUPS)
    groups = max(size.keys / limits.move_group_keys_max, size.bytes / limits.move_group_bytes_max, 1)
    return max(1, int(owned / groups))


def estimate(cluster_map: ClusterMap, sizes: Mapping[str, Size]) -> Plan:
    """What the moves of the map carry, per source and destination and in sum.
    None where a source was not measured."""
    partitions: defaultdict[tuple[str, str], int] = defaultdict(int)
    for move in cluster_map.moves:
        partitions[move.source, move.to] += len(move.partitions)
    entries: list[PlannedMove] = []
    for (source, to), count in sorted(partitions.items()):
        size, owned = sizes.get(source), len(cluster_map.owned_by(source))
        keys = round(size.keys * count / owned) if size is not None else None
        size_bytes = round(size.bytes * count / owned) if size is not None else None
        entries.append(PlannedMove(source=source, to=to, partitions=count, keys=keys, bytes=size_bytes))
    return Plan(
        partitions=sum(entry.partitions for entry in entries),
        keys=_sum([entry.keys for entry in entries]),
        bytes=_sum([entry.bytes for entry in entries]),
        moves=entries,
    )


def check_room(before: ClusterMap | None, after: ClusterMap, sizes: Mapping[str, Size]) -> None:
    """Raises ChangeRefused, with figures, if a shard's disk has no room for what the plan newly brings it.

    What a row takes in the log while it is on its way is left out: a move that has no room for that waits.
    """
    known = {move.id for move in before.moves} if before is not None else set()
    needed: defaultdict[str, int] = defaultdict(int)
    for move in after.moves:
        size, owned = sizes.get(move.source), len(after.owned_by(move.source))
        if move.id not in known and size is not None and owned:
            needed[move.to] += round(size.bytes * len(move.partitions) / owned)
    free = {shard_id: size.disk_spare_bytes for shard_id, size in sizes.items() if size.disk_spare_bytes is not None}
    short = {to: size_bytes for to, size_bytes in sorted(needed.items()) if size_bytes > free.get(to, size_bytes)}
    if short:
        figures = "; ".join(
            f"{to} needs {size_bytes:,} bytes and has {free[to]:,} free beside its reserve"
            for to, size_bytes in short.items()
        )
        raise ChangeRefused(
            f"the disks have no room for what would move: {figures}. Delete keys, or make room there, and ask again.",
            bytes_needed=short,
            bytes_free={to: free[to] for to in short},
        )


def _sum(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
