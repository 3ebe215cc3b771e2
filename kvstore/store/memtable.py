"""Rows that the file does not have yet, and rows that were fetched from it for operations that wait.

Owns: four layers of rows, looked through from the newest to the oldest:
  executed   decided in a batch that is not durable yet; only later batches see them
  unapplied  visible, to be applied
  applying   visible, being applied now
  fetched    read from the file for operations that are about to be decided
Promises: what a look-up finds is the newest state of the row in its sight, and a fetch that set out before a change
became visible never hides that change.
Leaves to others: the cache of values (`cache`), the file (`storage.engine`), when to apply (`applier`).

A fetched row is pinned while an operation waits for it, because the file may be changed and the cache may forget in the
meantime: a change that becomes visible replaces what was fetched, and also what is still being fetched.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from kvstore.errors import DataCorrupt
from kvstore.storage.engine import RowKey
from kvstore.storage.rows import Row

ROW_BYTES = 300  # of the objects of a row, beside its body


class _Fetched:
    __slots__ = ("is_known", "pins", "row")

    def __init__(self) -> None:
        self.pins = 0
        self.is_known = False
        self.row: Row | DataCorrupt | None = None


class Memtable:
    """`bytes` counts visible rows that are not in the file, those being applied included."""

    def __init__(self) -> None:
        self.bytes = 0
        self.undurable: dict[RowKey, Row] = {}  # executed
        self._unapplied: dict[RowKey, Row] = {}
        self._applying: dict[RowKey, Row] = {}
        self._applying_bytes = 0
        self._fetched: dict[RowKey, _Fetched] = {}

    def __len__(self) -> int:
        """How many visible rows are not in the file."""
        return len(self._unapplied) + len(self._applying)

    @property
    def unapplied_count(self) -> int:
        """How many of them wait for an application to begin."""
        return len(self._unapplied)

    # --- looking ------------------------------------------------------------------------------------------------------

    def visible(self, key: RowKey) -> Row | None:
        """The row as readers see it, if it is not applied yet."""
        return self._unapplied.get(key) or self._applying.get(key)

    def executed(self, key: RowKey) -> Row | None:
        """The row as the next batch sees it, if it is not applied yet."""
        return self.undurable.get(key) or self._unapplied.get(key) or self._applying.get(key)

    # --- changing -----------------------------------------------------------------------------------------------------

    def execute(self, rows: Mapping[RowKey, Row]) -> None:
        """A batch has decided these; they are not durable yet."""
        self.undurable.update(rows)

    def publish(self, rows: Mapping[RowKey, Row], size: int) -> None:
        """These become visible. `size`: the sum of their `row_bytes`."""
        unapplied, executed, fetched = self._unapplied, self.undurable, self._fetched
        size -= sum(map(row_bytes, filter(None, map(unapplied.get, rows))))
        unapplied.update(rows)
        self.bytes += size
        if executed:
            for key, row in rows.items():
                if executed.get(key) is row:
                    del executed[key]
        if fetched:
            for key, row in rows.items():
                if (pinned := fetched.get(key)) is not None:
                    pinned.is_known, pinned.row = True, row

    def drop(self, partitions: Set[int], sequence: int) -> None:
        """The rows of these partitions up to that sequence are gone. Those being applied go with the drop itself."""
        gone = [key for key, row in self._unapplied.items() if row.partition in partitions and row.sequence <= sequence]
        for key in gone:
            self.bytes -= row_bytes(self._unapplied.pop(key))
        self._applying = {
            key: row
            for key, row in self._applying.items()
            if row.partition not in partitions or row.sequence > sequence
        }

    # --- applying -----------------------------------------------------------------------------------------------------

    def begin_application(self) -> list[Row]:
        """The rows to apply, with those that a failed application left; they stay visible until `end_application`."""
        self._applying |= self._unapplied
        self._unapplied = {}
        self._applying_bytes = self.bytes
        return list(self._applying.values())

    def end_application(self) -> None:
        """The file has them."""
        self._applying = {}
        self.bytes -= self._applying_bytes
        self._applying_bytes = 0

    # --- fetching -----------------------------------------------------------------------------------------------------

    def pin(self, key: RowKey) -> bool:
        """An operation needs that row; True if it has to be fetched: the file may lack what is visible here."""
        pinned = self._fetched.get(key)
        if pinned is None:
            pinned = self._fetched[key] = _Fetched()
            pinned.row = self.visible(key)
            pinned.is_known = pinned.row is not None
        pinned.pins += 1
        return pinned.pins == 1 and not pinned.is_known

    def fetched(self, key: RowKey) -> tuple[bool, Row | DataCorrupt | None]:
        """Whether the row is known, and the row; None if there is none, DataCorrupt if it is damaged."""
        pinned = self._fetched.get(key)
        return (pinned.is_known, pinned.row) if pinned is not None else (False, None)

    def arrived(self, key: RowKey, row: Row | DataCorrupt | None) -> None:
        """The file had that row when it was asked; a change that became visible since stays."""
        pinned = self._fetched.get(key)
        if pinned is not None and not pinned.is_known:
            pinned.is_known, pinned.row = True, row

    def unpin(self, key: RowKey) -> None:
        """The operation is decided."""
        pinned = self._fetched[key]
        pinned.pins -= 1
        if not pinned.pins:
            del self._fetched[key]


def row_bytes(row: Row) -> int:
    """What a row that is not in the file counts for: more than it takes in the log."""
    _, key, _, _, _, _, body, intent = row
    return len(key) + len(body or b"") + len(intent or b"") + ROW_BYTES
