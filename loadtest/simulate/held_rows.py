"""What a copy of a store holds as of a record, and how that differs from what another one does.

Owns: `held`, `differences`.
Promises: rows of the file and of records that are not applied yet count alike; what each copy stamps for itself does
not. Changes nothing, and is done within one event.
Leaves to others: which copies are to be alike, and as of which record (`invariants`, `ending`).
"""

from __future__ import annotations

from contextlib import suppress
from itertools import takewhile

from kvstore.storage.engine import Engine, RowKey
from kvstore.storage.log import Log
from kvstore.storage.replay import replay
from kvstore.storage.rows import Row
from loadtest.simulate.engine import SimulatedEngine

_SHOWN_MAX = 3


def held(engine: Engine, log: Log, number: int) -> dict[RowKey, Row]:
    """The rows as of that record, which is in the log or the last one that the file has."""
    assert isinstance(engine, SimulatedEngine)
    whole = engine.copied()
    entries = list(takewhile(lambda entry: entry.number <= number, log.entries(engine.applied.position.number)))
    work = replay(whole, entries)
    with suppress(StopIteration):
        while True:  # it waits for nothing, since the engine is a plain one, but lets others run between records
            work.send(None)
    return {(row.kind, row.key): row._replace(sequence=0) for row in whole._all() if not row.is_tombstone}


def differences(expected: dict[RowKey, Row], found: dict[RowKey, Row]) -> str:
    """Empty if there are none."""
    wrong = [key for key in sorted(expected.keys() | found.keys()) if expected.get(key) != found.get(key)]
    shown = "; ".join(f"{found.get(key)} instead of {expected.get(key)}" for key in wrong[:_SHOWN_MAX])
    return f"{len(wrong)} rows: {shown}" if wrong else ""
