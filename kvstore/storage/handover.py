"""Partitions come and go: what a store does with a new cluster map, a fence, rows that arrive and rows left behind.

Owns: the view, which is what the store durably knows of the cluster: its partitions, the moves that it takes part in,
what is fenced; the rows of `fences`; the copy of another store's rows; the removal of what belongs elsewhere.
Promises: every step runs alone in the writer's thread, between two batches, as one commit; what it asks is looked at
there, so a message that comes late finds a move that stands no more, and is refused (Conflict), having changed nothing.
Each step is idempotent.
Leaves to others: when which step is due (`shard.receiver`, the controller), waiters and locks (`batch`), the rows that
a destination asks for (`sqlite`).

A partition is answered for here if the durable map says that it is owned and it is not fenced. When it leaves, by a
fence or by a map, all that is in memory of it goes: locks, leases, queues; whoever waits is bounced, unexecuted. When
it arrives, by a map, by the end of a fence or at the opening of the file, that is rebuilt from its rows. So there is
one way out and one way in, and nothing in memory can outlive its partition.

The fence is a row of its own (move, partition), and durable before it is acknowledged. It survives a restart, and ends
only when a map is durable here in which that move stands no more: as long as it might be committed, nobody answers for
the partition. Since the source itself fences, and nobody else can take a partition without that fence, a store that
restarts may start from its durable map, however old: what it does not find fenced is its own.

What is left of a partition that the store neither owns nor is to receive, by its durable map, belongs to nobody: it is
removed, without tombstones. No message asks for that, so none can come late; a partition on its way back stands in the
map before its first row arrives, and what comes begins by removing what lies there.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence, Set
from typing import NamedTuple

import msgspec

from kvstore.errors import Conflict, DataCorrupt
from kvstore.placement.cluster_map import ClusterMap
from kvstore.protocol import Fenced, MovedRow
from kvstore.storage.batch import Batch
from kvstore.storage.rows import COLUMNS, Row, checked, checksum, upsert
from kvstore.storage.tallies import Tallies
from kvstore.transactions.openings import Openings

_OF_PARTITIONS = "json_each(?) AS wanted CROSS JOIN rows INDEXED BY rows_partition ON rows.partition = wanted.value"
_IN_MEMORY = "intent IS NOT NULL OR (body IS NOT NULL AND kind IN ('lease', 'decision'))"
_IN_MEMORY_OF = f"{COLUMNS} FROM {_OF_PARTITIONS} WHERE {_IN_MEMORY}"
_IN_MEMORY_ALL = (
    f"{COLUMNS} FROM rows WHERE kind IN ('lease', 'decision') AND body IS NOT NULL",
    f"{COLUMNS} FROM rows INDEXED BY rows_intents WHERE intent IS NOT NULL",
)
_REMOVE = """DELETE FROM rows WHERE rowid IN
    (SELECT theirs.rowid FROM json_each(?) AS wanted CROSS JOIN rows AS theirs INDEXED BY rows_partition
        ON theirs.partition = wanted.value ORDER BY theirs.rowid LIMIT ?)"""


class View(NamedTuple):
    """The cluster as the file knows it. `leaving`, `receiving`: the partitions of each move from and to this store
    that stands, by the move's id; of those that leave some may be `fenced`."""

    epoch: int = 0
    owned: frozenset[int] = frozenset()
    leaving: dict[str, frozenset[int]] = {}
    receiving: dict[str, frozenset[int]] = {}
    fenced: frozenset[int] = frozenset()

    @property
    def takes_part(self) -> bool:
        """In moves that stand."""
        return bool(self.leaving or self.receiving)

    @property
    def foreign(self) -> frozenset[int]:
        """Partitions that are on their way here."""
        return frozenset().union(*self.receiving.values())


class Handover:
    """Every method but the constructor runs in the writer's thread, in a transaction, with a batch of its own."""

    def __init__(self, shard_id: str, tallies: Tallies) -> None:
        self._shard_id = shard_id
        self._tallies = tallies
        self.view = View()
        self.cluster_map: ClusterMap | None = None
        self.openings = Openings()

    # --- the map ------------------------------------------------------------------------------------------------------

    def restore(self, connection: sqlite3.Connection, batch: Batch) -> None:
        """At the opening of the file: what its map says is owned and not fenced arrives. Raises DataCorrupt."""
        stored = connection.execute("SELECT value FROM meta WHERE name = 'cluster_map'").fetchone()
        if stored is not None:
            self.cluster_map = msgspec.json.decode(stored[0], type=ClusterMap)
            self.view = self._look(connection, self.cluster_map)
            self._answer_for(connection, batch)

    def adopt(self, cluster_map: ClusterMap, connection: sqlite3.Connection, batch: Batch) -> bool:
        """Make the map durable and act by it; False if it is not newer than the one that is there."""
        before = self.view
        if cluster_map.epoch <= before.epoch:
            return False
        batch.steps.append("adopt")
        standing = [move.id for move in cluster_map.moves]
        meta = {"cluster_id": cluster_map.cluster_id, "cluster_map": msgspec.json.encode(cluster_map).decode()}
        connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", meta.items())
        connection.execute("DELETE FROM fences WHERE move NOT IN (SELECT value FROM json_each(?))", _array(standing))
        self.cluster_map = cluster_map
        self.view = view = self._look(connection, cluster_map)
        self._open_empty(before, connection, batch)
        for partitions, sign in ((view.owned - before.owned, 1), (before.owned - view.owned, -1)):
            tally = self._tallies.total(connection, partitions, batch.clock.sequence)
            batch.changes.count(sign * tally.keys, sign * tally.bytes)
        self._answer_for(connection, batch)
        return True

    def _open_empty(self, before: View, connection: sqlite3.Connection, batch: Batch) -> None:
        """What this store is to open anew has no rows, whatever lies here of an earlier time, and the clock is above
        every version that the lost shard gave. What came by a move after that came with a map that knew of it."""
        assert self.cluster_map is not None
        for strike in self.cluster_map.strikes:
            theirs = {p for p in self.view.owned.intersection(strike.partitions) if before.epoch < strike.opened}
            if theirs:
                batch.changes.see(strike.clock)
                self._remove(connection, theirs, -1)

    def _look(self, connection: sqlite3.Connection, cluster_map: ClusterMap) -> View:
        moves = cluster_map.moves
        self.openings = Openings(*cluster_map.openings())
        return View(
            cluster_map.epoch,
            frozenset(cluster_map.owned_by(self._shard_id)),
            {move.id: frozenset(move.partitions) for move in moves if move.source == self._shard_id},
            {move.id: frozenset(move.partitions) for move in moves if move.to == self._shard_id},
            frozenset(partition for (partition,) in connection.execute("SELECT partition FROM fences")),
        )

    def _answer_for(self, connection: sqlite3.Connection, batch: Batch) -> None:
        """From now on for what is owned and not fenced, and for nothing else."""
        view = self.view
        present = {partition for partition, arrival in enumerate(batch.arrivals) if arrival}
        wanted = view.owned - view.fenced
        batch.depart(present - wanted, view.epoch, view.fenced)
        if arriving := wanted - present:
            batch.arrive(arriving, self._in_memory(connection, arriving, len(batch.arrivals)))

    def _in_memory(self, connection: sqlite3.Connection, arriving: frozenset[int], partitions: int) -> list[Row]:
        """Their leases, decisions and intents. Raises DataCorrupt."""
        if len(arriving) * 4 < partitions:
            found = connection.execute(_IN_MEMORY_OF, _array(arriving)).fetchall()
        else:
            found = [row for query in _IN_MEMORY_ALL for row in connection.execute(query)]
        return [checked(Row(*row[:8]), row[8]) for row in found if row[2] in arriving]

    # --- at the source ------------------------------------------------------------------------------------------------

    def fence(self, move: str, connection: sqlite3.Connection, batch: Batch) -> Fenced:
        """Answer for the move's partitions no more. Raises Conflict if it does not stand."""
        partitions = self.view.leaving.get(move)
        if partitions is None:
            raise Conflict(f"the move {move} from shard {self._shard_id} does not stand", retry_after_ms=100)
        batch.steps.append("fence")
        connection.executemany(
            "INSERT OR IGNORE INTO fences VALUES (?, ?)", [(move, partition) for partition in partitions]
        )
        self.view = self.view._replace(fenced=self.view.fenced | partitions)
        self._answer_for(connection, batch)
        clock = batch.clock
        tally = self._tallies.total(connection, partitions, clock.sequence)
        return Fenced(0, clock.version, clock.attempts_floor, tally.rows, (tally.low, tally.high))

    # --- at the destination -------------------------------------------------------------------------------------------

    def _receiving(self, move: str) -> frozenset[int]:
        partitions = self.view.receiving.get(move)
        if partitions is None or partitions & self.view.owned:
            raise Conflict(f"the move {move} to shard {self._shard_id} does not stand", retry_after_ms=100)
        return partitions

    def clear(self, move: str, rows_max: int, connection: sqlite3.Connection, batch: Batch) -> int:
        """Remove what lies here of the move's partitions, at most so many rows; how many. Raises Conflict."""
        partitions = self._receiving(move)
        batch.steps.append("clear")
        return self._remove(connection, partitions, rows_max)

    def take(self, move: str, rows: Sequence[MovedRow], connection: sqlite3.Connection, batch: Batch) -> int:
        """Rows of the source, as they are there; a tombstone removes. Bytes taken. Raises Conflict, DataCorrupt."""
        partitions = self._receiving(move)
        sequence = batch.changes.skip(len(rows))
        changed = self._tallies.changed
        gone: list[tuple[str, str]] = []
        new: list[tuple[object, ...]] = []
        size = 0
        for row in rows:
            kind, key, partition, version, expires_at_ms, body, intent, check = row
            sequence += 1
            if partition not in partitions:
                raise DataCorrupt(f"the {kind} row of key {key!r} came with a move that its partition has no part in")
            if body is None and intent is None:
                gone.append((kind, key))
                changed[partition] = sequence
                continue
            if checksum(kind, key, version, expires_at_ms, body, intent) != check:
                raise DataCorrupt(f"the {kind} row of key {key!r} does not match its checksum")
            new.append((kind, key, partition, sequence, version, expires_at_ms or None, check, body, intent))
            size += len(key) + len(body or b"")
            changed[partition] = sequence
        batch.steps.append("take")
        connection.executemany("DELETE FROM rows WHERE kind = ? AND key = ?", gone)
        upsert(connection, new)
        return size

    def complete(
        self, move: str, fenced: Fenced, rows: Sequence[MovedRow], connection: sqlite3.Connection, batch: Batch
    ) -> None:
        """With these rows all has come: compare, and let the clock and the floor be as high as the source's.

        Raises Conflict, DataCorrupt.
        """
        self.take(move, rows, connection, batch)
        here = self._tallies.total(connection, self._receiving(move), batch.clock.sequence)
        if (here.rows, here.low, here.high) != (fenced.rows, *fenced.digest):
            raise Conflict(f"the copy of move {move} differs from its source: {here.rows} rows, there {fenced.rows}")
        batch.steps.append("complete")
        batch.changes.see(fenced.version)
        batch.changes.raise_floor(fenced.attempts_floor)

    # --- what is left behind ------------------------------------------------------------------------------------------

    def litter(self, connection: sqlite3.Connection, batch: Batch) -> set[int]:
        """The partitions of which rows lie here that belong elsewhere."""
        found = connection.execute("SELECT DISTINCT partition FROM rows")
        return {partition for (partition,) in found} - self.view.owned - self.view.foreign

    def trim(self, partitions: Iterable[int], rows_max: int, connection: sqlite3.Connection, batch: Batch) -> int:
        """Remove rows of those among the partitions that belong elsewhere: at most so many; how many."""
        batch.steps.append("trim")
        return self._remove(connection, set(partitions) - self.view.owned - self.view.foreign, rows_max)

    def _remove(self, connection: sqlite3.Connection, partitions: Set[int], rows_max: int) -> int:
        self._tallies.forget(partitions)
        return connection.execute(_REMOVE, (*_array(partitions), rows_max)).rowcount


def _array(values: Iterable[object]) -> tuple[str]:
    """A parameter for json_each."""
    return (json.dumps(list(values)),)
