"""Replay: the records of a log, applied to an engine that lacks them.

Owns: bringing an engine up to a record.
Promises: afterwards the engine is as if each record had been applied when it was made. A crash in between leaves it at
some record before the last one, from which it goes on.
Leaves to others: which records those are (`log`), and whether they are visible (`kvstore.store`,
`kvstore.replication`).
"""

from __future__ import annotations

import asyncio

from kvstore.storage.engine import Application, Engine, Freezes
from kvstore.storage.record import decode_record
from kvstore.storage.rows import Row
from kvstore.storage.segments import Entry, Position

_REPLAYED_ROWS_MAX = 5000
_DECODED_BYTES_MAX = 1 << 15  # before the event loop has its turn


async def replay(engine: Engine, entries: list[Entry]) -> None:
    """Apply the records, in order.

    Raises DataCorrupt for one that cannot be decoded, and what `Engine.apply` raises.
    """
    rows: dict[tuple[str, str], Row] = {}
    cluster_map: bytes | None = None
    freezes: Freezes | None = None
    drops: dict[int, int] = {}
    decoded = 0
    for at, entry in enumerate(entries):
        record = decode_record(entry.payload)
        if (decoded := decoded + len(entry.payload)) >= _DECODED_BYTES_MAX:
            decoded = 0
            await asyncio.sleep(0)
        if record.dropped:
            gone = frozenset(record.dropped)
            rows = {key: row for key, row in rows.items() if row.partition not in gone}
            drops |= dict.fromkeys(record.dropped, record.clock.sequence)
        cluster_map = record.cluster_map if record.cluster_map is not None else cluster_map
        freezes = record.freezes if record.freezes is not None else freezes
        rows |= {(row.kind, row.key): row for row in record.rows}
        if len(rows) >= _REPLAYED_ROWS_MAX or at == len(entries) - 1:
            position = Position(entry.number, entry.checksum, entry.term)
            every = frozenset(row.partition for row in rows.values())  # whether a move reads them is not known yet
            await engine.apply(
                Application(list(rows.values()), position, record.clock, cluster_map, freezes, drops, every)
            )
            rows, cluster_map, freezes, drops = {}, None, None, {}
