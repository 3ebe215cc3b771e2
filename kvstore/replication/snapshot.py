"""A snapshot of the primary's file for a copy that cannot get what it lacks as records.

Owns: the order in which rows are read and sent, and how fast.
Promises: rows of all partitions, in pages, each as it is when it is read or newer; with the records behind the
beginning of the snapshot they give the file as of its end. One page is under way at a time, and after each of them the
primary has time for its clients. One that broke off goes on with the first partition that the copy has not whole: the
rows of a part of one come again, because where they lie differs from file to file.
Leaves to others: what the copy does with it (`copy`), the records (`sender`), keeping them (`storage.log`).

SQLite's own backup begins again with each write of another connection, and `VACUUM INTO` holds one read view for all
that time, in which no checkpoint can come.
"""

from __future__ import annotations

from collections.abc import Callable

from kvstore.environment import Environment
from kvstore.replication import messages
from kvstore.replication.places import Times
from kvstore.replication.session import FellBehind
from kvstore.replication.wire import Wire, WireLost, expect
from kvstore.storage.engine import Applied, Engine, FeedPage, FeedQuery, SnapshotProgress

_PAGE_BYTES = 1 << 20


class Snapshot:
    """A snapshot on its way to a copy. `resumes`: one that broke off, which goes on. `is_kept`: whether the records
    behind a number are kept still."""

    def __init__(
        self,
        wire: Wire,
        engine: Engine,
        environment: Environment,
        is_kept: Callable[[int], bool],
        times: Times,
        resumes: SnapshotProgress | None = None,
    ) -> None:
        self._wire = wire
        self._engine = engine
        self._environment = environment
        self._is_kept = is_kept
        self._times = times
        self._begun = engine.applied
        self._resumes = resumes is not None
        self.progress = resumes or SnapshotProgress(self._begun.position, self._begun.position)

    async def send(self) -> None:
        """Send all rows that the copy lacks. Raises WireLost, Refused, FellBehind."""
        at = self.progress.at
        if not self._resumes:
            await _take(self._wire, _beginning(self._begun))
        first = self.progress.partitions
        rows_max = self._times.snapshot_page_rows_max
        query = FeedQuery(range(first, self._engine.identity.partitions), 0, 0, rows_max, _PAGE_BYTES)
        more = True
        while more:
            started_s = self._environment.monotonic_s()
            page = await self._engine.feed(query)
            if not self._is_kept(at.number):
                raise FellBehind(f"too many records came during a snapshot that began behind record {at.number}")
            left = query.partitions[page.done :]
            self._note(page, len(left))
            if page.rows:
                await _take(self._wire, messages.SnapshotPage(at, page.rows, self.progress))
            query = query._replace(partitions=left, sequence=page.sequence, after_row=page.after_row)
            if more := page.more:
                took_s = self._environment.monotonic_s() - started_s
                await self._environment.sleep(took_s * max(0.0, 1 / self._times.snapshot_share - 1))
        await _take(self._wire, messages.SnapshotEnds(at, self.progress.seen.number))

    def _note(self, page: FeedPage, left: int) -> None:
        before, rows = self.progress, self.progress.rows + len(page.rows)
        self.progress = before._replace(
            seen=page.position,
            partitions=self._engine.identity.partitions - left,
            rows=rows,
            total=max(before.total, before.rows + page.total, rows),
        )


def _beginning(of: Applied) -> messages.SnapshotBegins:
    clock = of.clock._replace(tombstones_floor=of.clock.sequence)  # a snapshot has no tombstones
    return messages.SnapshotBegins(of.position, clock, of.cluster_map, dict(of.freezes), dict(of.drops))


async def _take(wire: Wire, part: messages.SnapshotBegins | messages.SnapshotPage | messages.SnapshotEnds) -> None:
    await wire.send(part)
    if not (await expect(wire, messages.Taken)).is_taken:
        raise WireLost("the copy does not take the snapshot")
