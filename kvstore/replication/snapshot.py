"""A snapshot of the primary's file for a copy that cannot get what it lacks as records.

Owns: the order in which rows are read and sent.
Promises: rows of all partitions, in pages, each as it is when it is read or newer; with the records behind the
beginning of the snapshot they give the file as of its end. One page is under way at a time, and after each of them the
primary has time for its clients. One that broke off goes on with the first partition that the copy has not whole: the
rows of a part of one come again, because where they lie differs from file to file.
Leaves to others: how fast (`snapshot_pace`), what the copy does with it (`copy`), the records (`sender`), keeping them
(`storage.log`).

SQLite's own backup begins again with each write of another connection, and `VACUUM INTO` holds one read view for all
that time, in which no checkpoint can come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvstore.environment import Environment
from kvstore.replication import messages
from kvstore.replication.places import Times
from kvstore.replication.session import FellBehind
from kvstore.replication.snapshot_pace import SnapshotPace
from kvstore.replication.wire import Wire, WireLost, expect
from kvstore.storage.engine import Applied, CopiedRow, Engine, FeedPage, FeedQuery, SnapshotProgress
from kvstore.storage.log import Log
from kvstore.storage.rows import Row, checked


class Source(NamedTuple):
    """What a snapshot is read from, and beside what. `is_kept`: whether the records behind a number are kept still.
    `is_busy`: whether clients are at work on this node."""

    log: Log
    engine: Engine
    environment: Environment
    times: Times
    is_kept: Callable[[int], bool]
    is_busy: Callable[[], bool]


class Snapshot:
    """A snapshot on its way to a copy. `since_s`: when the copy's first one began, on the monotonic clock; `resumes`:
    one that broke off, which goes on."""

    def __init__(self, wire: Wire, source: Source, since_s: float, resumes: SnapshotProgress | None = None) -> None:
        self.since_s = since_s
        self._wire = wire
        self._source = source
        self._engine = source.engine
        self._pace = SnapshotPace(source.times)
        self._copy_is_busy = False
        self._begun = source.engine.applied
        self._resumes = resumes is not None
        self._under_way: Sequence[CopiedRow] = ()
        self.is_sent = False
        self.progress = resumes or SnapshotProgress(self._begun.position, self._begun.position)

    async def send(self) -> None:
        """Send all rows that the copy lacks. Raises WireLost, Refused, FellBehind."""
        environment, at = self._source.environment, self.progress.at
        if not self._resumes:
            await self._take(_beginning(self._begun))
        first = self.progress.partitions
        query = FeedQuery(range(first, self._engine.identity.partitions), 0, 0, 0, 0)
        more = True
        while more:
            started_s = environment.monotonic_s()
            self._look()
            page = await self._engine.feed(query._replace(rows_max=self._pace.rows_max, bytes_max=self._pace.bytes_max))
            if not self._source.is_kept(at.number):
                raise FellBehind(f"too many records came during a snapshot that began behind record {at.number}")
            left = query.partitions[page.done :]
            self._note(page, len(left))
            if page.rows:
                self._under_way = page.rows
                await self._take(messages.SnapshotPage(at, page.rows, self.progress))
                self._under_way = ()
            query = query._replace(partitions=left, sequence=page.sequence, after_row=page.after_row)
            if more := page.more:
                worked_s = environment.monotonic_s() - started_s
                self._look()
                await environment.sleep(self._pace.pause_s(worked_s))
        self.is_sent = True
        await self._take(messages.SnapshotEnds(at, self.progress.seen.number))

    def check_rows(self) -> None:
        """Look at the rows that the copy has not taken. Raises DataCorrupt if one is damaged here."""
        for copied in self._under_way:
            row_of(copied)

    def _look(self) -> None:
        is_busy = self._source.is_busy() or self._copy_is_busy
        filling_s = self._source.environment.monotonic_s() - self.since_s
        self._pace.look(is_busy=is_busy, kept_bytes=self._source.log.bytes, filling_s=filling_s)

    async def _take(self, part: messages.SnapshotBegins | messages.SnapshotPage | messages.SnapshotEnds) -> None:
        await self._wire.send(part)
        taken = await expect(self._wire, messages.Taken)
        if not taken.is_taken:
            raise WireLost("the copy does not take the snapshot")
        self._copy_is_busy = taken.is_busy

    def _note(self, page: FeedPage, left: int) -> None:
        before, rows = self.progress, self.progress.rows + len(page.rows)
        self.progress = before._replace(
            seen=page.position,
            partitions=self._engine.identity.partitions - left,
            rows=rows,
            total=max(before.total, before.rows + page.total, rows),
        )


def row_of(copied: CopiedRow) -> Row:
    """The row of a page. Raises DataCorrupt if it is not what was once written."""
    kind, key, partition, version, expires_at_ms, body, intent, checksum = copied
    return checked(Row(kind, key, partition, 0, version, expires_at_ms, body, intent), checksum)


def _beginning(of: Applied) -> messages.SnapshotBegins:
    clock = of.clock._replace(tombstones_floor=of.clock.sequence)  # a snapshot has no tombstones
    return messages.SnapshotBegins(of.position, clock, of.cluster_map, dict(of.freezes), dict(of.drops))
