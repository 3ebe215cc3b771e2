"""A watch over the disk of a node.
A process whose disk neither fails nor answers ends, instead of holding its shards.

Owns: one thread, which looks whether a sync of a log is still the one that was under way when it looked last.
Promises: only time counts in which the thread itself had its turns, so a process that was stopped, or a machine that
slept, is not taken for a hung disk. What is said before the end cannot keep the process from ending.
Leaves to others: which logs are watched (`node_stores`): those of stores that lie on other nodes, too. A store without
copies waits for its disk, as it always did: no other node could serve it.

No promise of replication rests on this: a node whose loop hangs answers no beacon, and one whose own sync hangs commits
nothing. But its lease would be renewed by its living loop for ever, and no other node could take over. All stores of
the process end with it, also those on a disk that is well.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from threading import Event, Thread
from typing import NoReturn, Protocol

log = logging.getLogger(__name__)

_LOOKS = 16  # at a sync, in the time that it may take
_LAST_WORDS_S = 1.0
_EXIT_DISK_FAILED = 74  # EX_IOERR of sysexits.h


class Watched(Protocol):
    """A log: `sync_under_way` is another object for each sync, and None between two of them."""

    @property
    def sync_under_way(self) -> object | None:
        """Another object for each sync, None between two of them."""


class DiskWatch:
    """`stall_s`: how long a sync may take.
    `watched` says what is looked at; it is asked, and `on_hung` is called once, in the watch's own thread."""

    def __init__(
        self, stall_s: float, watched: Callable[[], Iterable[Watched]], on_hung: Callable[[float], None]
    ) -> None:
        self._watched = watched
        self._stall_s = stall_s
        self._on_hung = on_hung
        self._is_over = Event()
        self._seen: dict[object, int] = {}  # how often each sync that is under way was seen
        self._thread = Thread(target=self._run, name="disk-watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def close(self) -> None:
        """Watch no more; returns when the thread has ended."""
        self._is_over.set()
        self._thread.join()

    def look(self) -> bool:
        """Look once; returns whether a sync has hung for too long."""
        under_way = [sync for each in self._watched() if (sync := each.sync_under_way) is not None]
        self._seen = {sync: self._seen.get(sync, 0) + 1 for sync in under_way}
        return any(looks > _LOOKS for looks in self._seen.values())

    def _run(self) -> None:
        while not self._is_over.wait(self._stall_s / _LOOKS):
            if self.look():
                self._on_hung(self._stall_s)
                return


def end_process(stall_s: float) -> NoReturn:
    """End at once, even if what is said last cannot be written, because it goes to the disk that hangs."""
    last_words = Thread(target=_say, args=(stall_s,), daemon=True)
    last_words.start()
    last_words.join(_LAST_WORDS_S)
    os._exit(_EXIT_DISK_FAILED)


def _say(stall_s: float) -> None:
    log.critical(
        "the disk has not answered a sync for %g s (disk_stall_s): the process ends with all its stores, so that other "
        "nodes can take over",
        stall_s,
    )
    logging.shutdown()
