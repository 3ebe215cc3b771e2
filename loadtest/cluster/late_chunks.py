"""Pieces of a stream that are on their way to the other end.

Owns: their order and their bytes. Pure.
Promises: a piece is never due before one that was sent earlier.
Leaves to others: when they are looked at, what delivering one means (`proxied`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator


class LateChunks:
    """`bytes`: of all of them. None stands for a reset."""

    def __init__(self) -> None:
        self.bytes = 0
        self._queue: deque[tuple[float, bytes | None]] = deque()

    def __bool__(self) -> bool:
        return bool(self._queue)

    @property
    def due_s(self) -> float | None:
        """When the first one is due; None without any."""
        return self._queue[0][0] if self._queue else None

    def put(self, due_s: float, chunk: bytes | None) -> None:
        """Behind all others."""
        self._queue.append((max(due_s, self._queue[-1][0]) if self._queue else due_s, chunk))
        self.bytes += len(chunk or b"")

    def take_due(self, now_s: float) -> Iterator[bytes | None]:
        """Those that are due, one by one: each is gone when it is handed out."""
        while self._queue and self._queue[0][0] <= now_s:
            _, chunk = self._queue.popleft()
            self.bytes -= len(chunk or b"")
            yield chunk

    def clear(self) -> None:
        self._queue.clear()
        self.bytes = 0
