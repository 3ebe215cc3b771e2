"""How fast a copy applies the records that it has.

Owns: for one copy, how much waits to be applied; how much is applied at once, and the pause behind it.
Promises: pure: sizes and durations are arguments. A little is applied at a time, and for the rest of the time nothing
is, as long as no more waits than a copy that takes over applies in a moment. Where more comes than is applied, pieces
grow and pauses end: what waits is bounded. What a copy that joins gets in one go may wait longer, since its primary's
clients, who are at work beside it, need no part of that.
Leaves to others: applying (`copy_applier`), how fast records come (`catching_up`), where they lie (`copy_log`).

A piece keeps a core busy, and the log's syncs of the node's other stores end the later. The processor gives each
thread its turn of about three milliseconds, so a piece that takes less holds up nobody for long.
"""

from __future__ import annotations

PIECE_BYTES_MIN, PIECE_BYTES_MAX = 1 << 15, 1 << 20
WAITING_BYTES_MIN = 4 << 20
WAITING_BYTES_MAX = 64 << 20
HURRY_BYTES = 8 << 20  # so much beyond what may wait ends all pauses
PAUSE_S_MAX = 1.0  # a disk or a process that has stood still is not waited for many times as long


class ApplyPace:
    """`share`: of the time, for applying, as long as no more waits than may. `waiting_bytes`: that came and wait."""

    def __init__(self, share: float) -> None:
        self.waiting_bytes = 0
        self._share = share
        self._may_wait_bytes = WAITING_BYTES_MIN

    @property
    def hurry(self) -> float:
        """From 0 to 1: how far what waits is beyond what may."""
        return min(1.0, max(0.0, (self.waiting_bytes - self._may_wait_bytes) / HURRY_BYTES))

    @property
    def piece_bytes(self) -> int:
        """About how many bytes are applied at once."""
        return PIECE_BYTES_MIN + int(self.hurry * (PIECE_BYTES_MAX - PIECE_BYTES_MIN))

    def come(self, size: int) -> None:
        """A record of that size waits, too."""
        self.waiting_bytes += size

    def heard(self, *, lacks: bool) -> None:
        """The primary has told what is committed. `lacks`: that is more than the copy's log has, so it catches up."""
        if lacks:
            self._may_wait_bytes = min(max(self._may_wait_bytes, self.waiting_bytes), WAITING_BYTES_MAX)

    def applied(self, size: int) -> None:
        """So many bytes wait no more."""
        self.waiting_bytes = max(0, self.waiting_bytes - size)
        self._may_wait_bytes = max(WAITING_BYTES_MIN, min(self._may_wait_bytes, self.waiting_bytes))

    def forget(self) -> None:
        """The log was cut or replaced: what waited is gone."""
        self.applied(self.waiting_bytes)

    def pause_s(self, took_s: float) -> float:
        """How long to pause behind a piece that took so long."""
        share = self._share + self.hurry * (1 - self._share)
        return min(took_s * (1 / share - 1), PAUSE_S_MAX)
