"""The chain of a log, as two copies compare it, and reading records back in pieces.

Owns: nothing; functions on an open log.
Promises: a number that is asked for and not kept is left out, never guessed.
Leaves to others: the comparison (`session`), the log (`storage.log`).
"""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.storage.log import Log, Released
from kvstore.storage.segments import Entry


def known(log: Log) -> tuple[int, int]:
    """The first and the last number whose checksum the log can tell: that before its first record is one."""
    return log.first - 1, log.last.number


def checksums(log: Log, numbers: Iterable[int]) -> dict[int, int]:
    """The checksums of these records, by number, as far as the log can tell them. Raises LogDamaged, OSError."""
    first, last = known(log)
    found = {}
    for number in numbers:
        if first <= number <= last:
            try:
                found[number] = _checksum(log, number)
            except Released:
                continue
    return found


def _checksum(log: Log, number: int) -> int:
    last = log.last
    return last.checksum if number == last.number else next(log.entries(number)).previous


def some_entries(log: Log, after: int, bytes_max: int, each_bytes: int = 0) -> list[Entry]:
    """The records behind that number, about so many bytes, one at least.
    Each counts `each_bytes` more than it has. Raises Released, LogDamaged, OSError."""
    entries: list[Entry] = []
    size = 0
    for entry in log.entries(after):
        entries.append(entry)
        size += len(entry.payload) + each_bytes
        if size >= bytes_max:
            break
    return entries
