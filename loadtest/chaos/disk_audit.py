"""What lies in the files of the shards: every row in the file of its partition's owner, and nowhere else.

With copies, the owner's file is its primary's, and every copy has the same rows, as of the same record of the log.

Owns: reading the SQLite files beside the processes that have them open, and comparing them with the cluster's map.
Promises: changes nothing.
Leaves to others: what the rows should say: the listing (loadtest.chaos.phase).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from kvstore.errors import DataCorrupt
from kvstore.placement.cluster_map import ClusterMap
from kvstore.placement.map_format import decode_map
from kvstore.placement.ring import partition_of
from kvstore.storage.rows import VALUE, Row, checked
from kvstore.store.opening import store_path

_ROWS = """SELECT kind, key, partition, sequence, version, coalesce(expires_at_ms, 0), body, intent, checksum FROM rows
    WHERE body IS NOT NULL OR intent IS NOT NULL"""
_SUMS = """SELECT count(*), coalesce(sum(length(CAST(key AS BLOB)) + length(body)), 0) FROM rows
    WHERE kind = 'value' AND body IS NOT NULL"""
_POSITION = "SELECT version, attempts_floor, log_number, log_checksum FROM clock"


class DiskAudit(NamedTuple):
    """What was found. `values`: of the keys in the files of their owners. `behind`: sentences on what takes a moment
    (a file that does not have the newest map, or rows that are still to be removed); `wrong`: on what never may be."""

    values: dict[str, tuple[bytes, int]]
    behind: list[str]
    wrong: list[str]

    def differences(self, listed: Mapping[str, tuple[bytes, int]]) -> list[str]:
        """Sentences on keys that are listed otherwise than they lie in the file of their owner."""
        return [
            f"{key}: listed as {listed.get(key)!r}, in its file {self.values.get(key)!r}"[:300]
            for key in sorted(listed.keys() | self.values.keys())
            if listed.get(key) != self.values.get(key)
        ]


def look(data_dir: Path, cluster_map: ClusterMap) -> DiskAudit:
    """The files of all members and their copies, one after the other, where nothing moves and no client writes."""
    found = DiskAudit({}, [], [])
    for index, member in enumerate(cluster_map.shards):
        owned = {partition for partition, owner in enumerate(cluster_map.owners) if owner == index}
        primary, *copies = (store_path(data_dir, member.id, node) for node in member.nodes)
        with _reading(primary) as connection:
            _look_at(connection, member.id, owned, cluster_map, found)
        for copy in copies:
            found.behind.extend(_differences(primary, copy))
    return found


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        yield connection


def _differences(primary: Path, copy: Path) -> Iterator[str]:
    """A sentence, if a copy has not applied the same, or is not there. (Sequences are a file's own.)"""
    try:
        with _reading(primary) as one, _reading(copy) as other:
            ours, theirs = (_content(connection) for connection in (one, other))
    except sqlite3.OperationalError as error:
        yield f"{copy.name} or {primary.name} cannot be read: {error}"
        return
    if unequal := [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]:
        name = min(unequal)
        what = f"{name}: {theirs.get(name)}, {ours.get(name)}"
        yield f"{copy.name} and {primary.name} differ in {len(unequal)} rows; {what}"


def _content(connection: sqlite3.Connection) -> dict[tuple[str, str], Any]:
    """Its rows, each verified, and the record that they are as of."""
    found: dict[tuple[str, str], Any] = {("", "clock"): connection.execute(_POSITION).fetchone()}
    for *columns, checksum in connection.execute(_ROWS):
        row = Row(*columns)
        try:
            checked(row, checksum)
            found[row.kind, row.key] = row._replace(sequence=0)
        except DataCorrupt as error:
            found[row.kind, row.key] = error.detail
    return found


def _look_at(
    connection: sqlite3.Connection, shard_id: str, owned: set[int], cluster_map: ClusterMap, found: DiskAudit
) -> None:
    meta = dict(connection.execute("SELECT name, value FROM meta").fetchall())
    durable = decode_map(meta["cluster_map"].encode()) if "cluster_map" in meta else None
    if durable is None or durable.epoch != cluster_map.epoch:
        has = "no map" if durable is None else f"the map of epoch {durable.epoch}"
        found.behind.append(f"{shard_id} has {has}, the controller that of epoch {cluster_map.epoch}")
        return
    freezes = connection.execute("SELECT count(*) FROM freezes").fetchone()[0]
    if freezes:
        found.wrong.append(f"{shard_id}: {freezes} partitions are frozen, and nothing moves")
    strays = 0
    for *columns, checksum in connection.execute(_ROWS):
        row = Row(*columns)
        if row.partition not in owned:
            strays += 1
            continue
        _take(row, checksum, shard_id, cluster_map.partitions, found)
    if strays:
        found.behind.append(f"{shard_id}: {strays} rows of partitions that it does not own")
    else:
        _compare_counts(connection, shard_id, found)


def _take(row: Row, checksum: Any, shard_id: str, partitions: int, found: DiskAudit) -> None:
    try:
        checked(row, checksum)
    except DataCorrupt as error:
        found.wrong.append(f"{shard_id}: {error.detail}")
    if row.kind != VALUE:
        return
    if partition_of(row.key.encode(), partitions) != row.partition:
        found.wrong.append(f"{shard_id}: {row.key} lies in partition {row.partition}, where it does not belong")
    if row.key in found.values:
        found.wrong.append(f"{shard_id}: {row.key} lies in another file, too")
    if row.body is not None:
        found.values[row.key] = row.body, row.version


def _compare_counts(connection: sqlite3.Connection, shard_id: str, found: DiskAudit) -> None:
    counted = connection.execute("SELECT keys, bytes FROM clock").fetchone()
    held = connection.execute(_SUMS).fetchone()
    if counted != held:
        found.wrong.append(f"{shard_id} counts {counted[0]} keys and {counted[1]} bytes, its file has {held}")
