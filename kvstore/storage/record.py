"""The commit record.
All that one batch changes, as one value and as the bytes of one record of the log.

Owns: what a commit consists of, and its encoding.
Promises: a record says everything that changes what the store holds: rows, the clock, a cluster map, freezes, dropped
partitions. Replaying records in order on an engine that lacks them gives the same state as applying them when they were
made. Bytes that do not decode are DataCorrupt, never another record.
Leaves to others: numbers, checksums and durability (`log`), applying (`engine`).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvstore.errors import DataCorrupt
from kvstore.storage.engine import Freezes
from kvstore.storage.rows import Clock, Row
from kvstore.storage.segments import Entry


class CommitRecord(msgspec.Struct, array_like=True, gc=False):
    """The changes of one batch.

    `clock`: as it is after the batch. `rows`: the new state of each changed row. `cluster_map`: a map that was adopted,
    as JSON. `freezes`: all that stand after it, where that changed. `dropped`: every row of these partitions up to the
    clock's sequence is gone; rows of theirs that come in later records stay.
    """

    clock: Clock
    rows: list[Row] = []
    cluster_map: bytes | None = None
    freezes: Freezes | None = None
    dropped: list[int] = []

    def encode(self) -> bytes:
        """The payload of the log's record."""
        return _encoder.encode(self)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(CommitRecord)


def decode_record(payload: bytes) -> CommitRecord:
    """The record of these bytes. Raises DataCorrupt."""
    try:
        return _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataCorrupt(f"a record of the log verifies but cannot be decoded: {error}.") from error


def newest_map(entries: Sequence[Entry]) -> bytes | None:
    """The last cluster map that these records carry; None if none does. Raises DataCorrupt."""
    maps = (decode_record(entry.payload).cluster_map for entry in reversed(entries))
    return next((each for each in maps if each is not None), None)
