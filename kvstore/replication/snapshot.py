"""A snapshot of the primary's file for a copy that cannot get what it lacks as records.

Owns: the order in which rows are read and sent, and how fast.
Promises: rows of all partitions, in pages, each as it is when it is read or newer; with the records behind the
beginning of the snapshot they give the file as of its end. One page is under way at a time, and after each of them the
primary has time for its clients.
Leaves to others: what the copy does with it (`copy`), the records (`sender`), keeping them (`storage.log`).

SQLite's own backup begins again with each write of another connection, and `VACUUM INTO` holds one read view for all
that time, in which no checkpoint can come.
"""

from __future__ import annotations

from collections.abc import Callable

from kvstore.environment import Environment
from kvstore.replication import messages
from kvstore.replication.wire import Wire, WireLost, expect
from kvstore.storage.engine import Engine, FeedQuery

_PAGE_BYTES = 1 << 20
_PAUSE_SHARE = 0.5  # of the time that a page takes, for others

Progress = Callable[[int, int], None]
"""Rows that were sent, and how many there are."""


async def send_snapshot(
    wire: Wire, engine: Engine, environment: Environment, progress: Progress, page_rows: int
) -> int:
    """Send all rows; the number of the record that the snapshot began with. Raises WireLost, Refused."""
    begun = engine.applied
    clock = begun.clock._replace(tombstones_floor=begun.clock.sequence)  # a snapshot has no tombstones
    at, sent = begun.position, 0
    await _take(wire, messages.SnapshotBegins(at, clock, begun.cluster_map, dict(begun.freezes), dict(begun.drops)))
    left = list(range(engine.identity.partitions))
    query = FeedQuery(left, 0, 0, page_rows, _PAGE_BYTES)
    total = 0
    while True:
        started_s = environment.monotonic_s()
        page = await engine.feed(query)
        total = total or page.total
        sent += len(page.rows)
        if page.rows:
            await _take(wire, messages.SnapshotPage(at, page.rows))
        progress(sent, max(sent, total))
        if not page.more:
            break
        left = left[page.done :]
        query = query._replace(partitions=left, sequence=page.sequence, after_row=page.after_row)
        await environment.sleep(_PAUSE_SHARE * (environment.monotonic_s() - started_s))
    await _take(wire, messages.SnapshotEnds(at, engine.applied.position.number))
    return at.number


async def _take(wire: Wire, part: messages.SnapshotBegins | messages.SnapshotPage | messages.SnapshotEnds) -> None:
    await wire.send(part)
    if not (await expect(wire, messages.Taken)).is_taken:
        raise WireLost("the copy does not take the snapshot")
