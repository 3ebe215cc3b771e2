"""How fast records are sent to a copy that is not waited for yet.

Owns: for one session, how much may be under way, and the pause behind what was acknowledged.
Promises: clients come first as long as the copy comes nearer: a little is under way at a time, and for the rest of the
time nothing is. Where as many records come as are sent, more and more is under way, without pauses: a copy that joins
arrives some time.
Leaves to others: sending (`copy_link`), when the primary begins to wait for the copy (`shipping`).
"""

from __future__ import annotations

ROOM_BYTES_MIN = 1 << 17
ROOM_BYTES_MAX = 8 << 20
_FRAME_BYTES_MAX = 1 << 20
_APPLIED_BYTES_PER_S = 16 << 20  # about so fast a copy applies what it has acknowledged
PAUSE_S_MAX = 1.0  # a disk or a process that has stood still is not waited for many times as long


class CatchingUp:
    """`share`: of the time in which records are under way, for them and for applying them. `room_bytes`: that may be
    under way at once."""

    def __init__(self, share: float) -> None:
        self.room_bytes = ROOM_BYTES_MIN
        self._rest = max(0.0, 1 / share - 1)
        self._full_since: float | None = None  # when a full frame was sent that is not acknowledged yet
        self._pause_s = 0.0
        self._before: tuple[int, int] | None = None  # of the last full frame: its bytes, all that had come by then

    @property
    def frame_bytes(self) -> int:
        """About how many bytes are sent at once."""
        return min(self.room_bytes, _FRAME_BYTES_MAX)

    def sent(self, size: int, come_bytes: int, now: float) -> None:
        """A frame is sent. `come_bytes`: of all records that have come in this term."""
        if size < self.frame_bytes:
            return  # the copy is there
        if self._before is not None and 2 * (come_bytes - self._before[1]) > self._before[0]:
            self.room_bytes = min(2 * self.room_bytes, ROOM_BYTES_MAX)
        self._before = size, come_bytes
        self._full_since = now

    def acknowledged(self, now: float) -> None:
        """The copy has some of what was sent on its disk."""
        if self._full_since is not None and self.room_bytes == ROOM_BYTES_MIN:
            size = self._before[0] if self._before is not None else 0
            busy_s = now - self._full_since + size / _APPLIED_BYTES_PER_S
            self._pause_s = min(busy_s * self._rest, PAUSE_S_MAX)
        self._full_since = None

    def take_pause(self) -> float:
        """For how many seconds nothing is to be sent now; the next time it is none."""
        pause_s, self._pause_s = self._pause_s, 0.0
        return pause_s
