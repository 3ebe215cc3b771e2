"""The engine below the log: what holds the rows once they were applied, and what may be asked of it.

Owns: the interface that the store uses, and the plain values that cross it.
Promises, which every engine keeps and one suite of tests checks for all of them:
  - `apply` is atomic: rows, clock, position, map, freezes and drops change together, or none of them does.
  - What was applied is read by every read that begins afterwards. It survives a crash of the process; it survives a
    loss of power only once a `checkpoint` that began afterwards has told a position at or beyond it.
  - Only what is visible is applied, so everything that an engine returns is visible.
  - A row that a drop covers is never returned, whether or not `clean` has removed it yet.
  - A row that does not match its checksum is DataCorrupt, never another value.
Leaves to others: what the rows mean, ownership, what is not applied yet (`kvstore.store`).

Two engines keep these promises: `sqlite` (files) and `memory` (its naive twin, for tests and simulation).
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path
from typing import NamedTuple, Protocol

from kvstore.errors import DataCorrupt, Unavailable
from kvstore.storage.rows import Clock, Row
from kvstore.storage.segments import BEGINNING, Position
from kvstore.storage.verification import Verified, VerifyQuery

Freezes = dict[str, frozenset[int]]  # the frozen partitions of each move, by its id
RowKey = tuple[str, str]  # kind and key
CopiedRow = tuple[str, str, int, int, int, bytes | None, bytes | None, int]
"""(kind, key, partition, version, expires_at_ms, body, intent, checksum): a row on its way to another store."""


class Identity(NamedTuple):
    """Whose rows these are.

    `cluster_id` is None before the first cluster map; `partitions`: how many there are.
    """

    store_id: str
    cluster_id: str | None
    shard_id: str
    partitions: int


class SnapshotProgress(NamedTuple):
    """How far an engine has come that the rows of another one fill.

    `at`: where the other one stood when it began; `partitions`: so many, the first ones, have all their rows; `seen`:
    where the other one stood at the latest page; `rows` of about `total` have come. `filled_to`: once all have come,
    the number of the record up to which more must be applied before the rows fit together; 0 before.
    """

    at: Position
    seen: Position
    partitions: int = 0
    rows: int = 0
    total: int = 0
    filled_to: int = 0


class Applied(NamedTuple):
    """What an engine stands for, beside its rows. `drops`: rows of these partitions up to that sequence are gone.

    `snapshot`: how it was filled with the rows of another engine, if it was.
    """

    position: Position = BEGINNING
    clock: Clock = Clock()
    cluster_map: bytes | None = None
    freezes: Freezes = {}
    drops: dict[int, int] = {}
    snapshot: SnapshotProgress | None = None


class Application(NamedTuple):
    """What one application changes: `rows` are the newest states of all rows that changed.

    `cluster_map`, `freezes`, `snapshot`: None where they did not change. `drops`: new ones. `kept`: partitions whose
    deletions are kept as tombstones even where the engine has no such row, because a copy of them is under way and has
    to hear of every deletion.
    """

    rows: Sequence[Row]
    position: Position
    clock: Clock
    cluster_map: bytes | None = None
    freezes: Freezes | None = None
    drops: dict[int, int] = {}
    kept: Set[int] = frozenset()
    snapshot: SnapshotProgress | None = None


class ScanQuery(NamedTuple):
    """Rows of `kind` whose key starts with `prefix` and sorts after `after`, not beyond `until` if it is given.

    Of partitions that have an ownership generation above 0 in `generations`; `values`: with their bodies, but of those
    larger than `value_bytes_max`, if it is above 0, only the size.
    """

    kind: str
    prefix: str
    after: str
    limit: int
    values: bool
    now_ms: int
    generations: Sequence[int]
    bytes_max: int
    until: str = ""
    value_bytes_max: int = 0


class ScanPage(NamedTuple):
    """Live rows in key order, (key, version, body or None, milliseconds left or 0), and the partition of each.

    `due`: keys past their deadline; `locked`: keys that carry an intent, so whether and how they exist is undecided.
    `left_out`: the sizes of bodies that were too large, by key. `more`: there may be further rows after `last`.
    """

    rows: list[tuple[str, int, bytes | None, int]]
    partitions: list[int]
    due: list[str]
    locked: list[str]
    left_out: dict[str, int]
    last: str
    more: bool


class FeedQuery(NamedTuple):
    """Rows of some partitions for another store.

    `after_row` -1: those that changed after `sequence`, in that order, with tombstones. Otherwise a copy, without
    tombstones: one partition after the other, of the first one only rows behind `after_row`. `sequence` 0 begins it.
    """

    partitions: Sequence[int]
    sequence: int
    after_row: int
    rows_max: int
    bytes_max: int


class FeedPage(NamedTuple):
    """`sequence`: a copy's beginning, or the last change in the page. `done`: leading partitions that are complete.

    `floor`: tombstones up to that sequence were trimmed. `total`: rows of these partitions, in a copy's first page.
    `position`: what the engine stood for, without its term.
    """

    rows: list[CopiedRow]
    more: bool
    sequence: int
    after_row: int
    done: int
    floor: int
    total: int
    position: Position = BEGINNING


class Digest(NamedTuple):
    """Of some partitions, without tombstones: rows, two sums of halves of their checksums, live keys and their bytes.

    A sum does not depend on the order of the rows, and no half overflows where sums of whole checksums would.
    """

    rows: int = 0
    low: int = 0
    high: int = 0
    keys: int = 0
    bytes: int = 0


class Sizes(NamedTuple):
    """Bytes of the file, of its WAL, and of space inside the file that rows no longer need."""

    file: int
    wal: int
    free: int


class TryLater(Unavailable):
    """Nothing was applied, and a later try may succeed: the disk is full, or another program holds the file."""


class NoRoom(TryLater):
    """The files may not grow: the disk is full, or a quota or limit is reached."""


class Engine(Protocol):
    """What holds the rows: see the module.

    Methods that are not async run in the caller's thread and are quick. Reads may run beside one another and beside
    `apply`; `apply`, `checkpoint` and `clean` run one at a time.
    """

    path: Path

    @property
    def identity(self) -> Identity:
        """Whose rows these are."""
        ...

    @property
    def applied(self) -> Applied:
        """What the engine stands for."""
        ...

    @property
    def sizes(self) -> Sizes:
        """As of now."""
        ...

    async def apply(self, application: Application) -> None:
        """Apply all of it, or nothing. Raises TryLater, OSError."""
        ...

    async def checkpoint(self, *, only_if_due: bool = False) -> int:
        """Make durable what is applied; returns the number up to which it is now, 0 if that cannot be told.

        `only_if_due`: only if about as much was applied since the last one as the WAL should hold.

        Raises TryLater, OSError."""
        ...

    async def clean(self, rows_max: int) -> int:
        """Remove up to `rows_max` rows that drops or the tombstones' floor cover; returns how many.

        0 means that none is left. Raises TryLater, OSError."""
        ...

    async def read(self, keys: list[RowKey]) -> list[Row | DataCorrupt | None]:
        """The row of each key; None where there is none, DataCorrupt in the place of a row that is damaged.

        Raises DataCorrupt where the file cannot be read at all.
        """
        ...

    def read_now(self, key: RowKey) -> Row | None:
        """The row, read in the calling thread. Raises DataCorrupt."""
        ...

    async def scan(self, query: ScanQuery) -> ScanPage:
        """A page of live rows in key order. Raises DataCorrupt."""
        ...

    async def feed(self, query: FeedQuery) -> FeedPage:
        """A page of rows for another store. Raises DataCorrupt."""
        ...

    async def kept_in_memory(self, partitions: Set[int]) -> list[Row]:
        """Leases, decisions and rows with an intent of these partitions. Raises DataCorrupt."""
        ...

    async def due(self, now_ms: int, generations: Sequence[int], count_max: int) -> list[tuple[str, str, int]]:
        """Rows past their deadline without an intent, oldest deadline first: (kind, key, partition). Raises
        DataCorrupt.

        `now_ms` is Unix time. Only partitions with a generation above 0 count; at most `count_max` rows.
        """
        ...

    async def digest(self, partitions: Set[int]) -> tuple[int, Digest]:
        """(number of the last record that is applied, digest of all these partitions together). Raises DataCorrupt."""
        ...

    async def occupied(self) -> set[int]:
        """The partitions of which there are rows, tombstones included. Raises DataCorrupt."""
        ...

    async def old_tombstones(self, sequence: int, count_max: int) -> int:
        """The sequence of the last of the `count_max` oldest tombstones up to `sequence`; 0 if there is none.

        Raises DataCorrupt.
        """
        ...

    async def verify(self, query: VerifyQuery | None) -> Verified:
        """Look whether some rows are what was written and whether they can be found. Damage is a fault, no error.

        None: the file as a whole, for what makes it dangerous to apply anything, because that might damage more.
        """
        ...

    async def close(self) -> None:
        """Close the files; what was applied survives. Nothing may be called afterwards."""
