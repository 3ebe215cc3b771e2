"""Copies in sync that take records, and do not say what rows they have when they are asked for them.

Owns: in how many rounds in a row that was so of each copy; which one is to be rebuilt for it.
Promises: pure. A copy is rebuilt for that only while another one in sync has told all its rows, and they are the
primary's: else it stays, since it may be the last one beside the primary's, and a person is told.
Leaves to others: asking, and telling the copy (`comparison`).

So it is with a file that is not read or written any more: its disk hangs or is full, or another program holds it. A
copy that is only beyond the record that it is asked for does both, and is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

ROUNDS_MAX = 3


class Unproved:
    """By copy id; `rounds` counts those in a row in which the copy did not say what it has."""

    def __init__(self) -> None:
        self._rounds: dict[str, int] = {}

    def round_is_over(self, untold: Set[str]) -> None:
        """These copies did not say, of some partition at least, what they have."""
        self._rounds = {copy_id: self._rounds.get(copy_id, 0) + 1 for copy_id in sorted(untold)}

    def nodes(self, in_sync: Mapping[str, str]) -> list[str]:
        """Where those lie that did not for too long. `in_sync`: node by copy id."""
        return sorted(
            in_sync[copy_id] for copy_id, rounds in self._rounds.items() if _is_long(rounds, copy_id, in_sync)
        )

    def to_rebuild(self, in_sync: Mapping[str, str], proved: Set[str]) -> str | None:
        """The copy to be rebuilt, one at a time. `proved`: nodes whose copy has in all partitions what is here."""
        if not proved:
            return None
        long = (copy_id for copy_id, rounds in self._rounds.items() if _is_long(rounds, copy_id, in_sync))
        return min(long, default=None)


def _is_long(rounds: int, copy_id: str, in_sync: Mapping[str, str]) -> bool:
    return rounds >= ROUNDS_MAX and copy_id in in_sync
