"""Who may open a channel to this shard: processes of its own cluster's session.

Owns: the judgement of a hello, the file that remembers the last session, what is said of a stranger.
Promises: a process of another cluster is refused before it can ask anything, also when that cluster runs on a copy of
this data directory and has all its ids; both ends say so. One of the own cluster is let in while the controller is
away, also after a restart of this shard.
Leaves to others: sessions (`transport.sessions`), asking the controller (`transport.map_follower`), HTTP (`app`).

A hello that names an unknown session may be early: the controller has started again, and the other end heard of it
first. Or this shard was away for as long as that session lasted. So the controller, which tells its earlier sessions,
too, is asked before a node is called a stranger.

The last session is kept in `shard-<id>.session` beside the store. A copy of that file does no harm: it lets in who
names that session, and the processes of the copy name one of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from kvstore.transport.sessions import ADOPT, IS_STRANGER, IS_UNSURE, ClusterSession

log = logging.getLogger(__name__)

_TOLD_MAX = 64
_ID_CHARS_MAX = 64


class Memory(Protocol):
    """Where the last session is kept."""

    def read(self) -> str:
        """Empty if none is."""

    def keep(self, session_id: str) -> None: ...


class SessionFile:
    """`shard-<id>.session`."""

    def __init__(self, folder: Path, shard_id: str) -> None:
        self._path = folder / f"shard-{shard_id}.session"

    def read(self) -> str:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return self._path.read_text(encoding="ascii").strip()[:_ID_CHARS_MAX]
        return ""

    def keep(self, session_id: str) -> None:
        """A full disk, for example, is no reason to end: then a restart waits for the controller."""
        temporary = self._path.with_name(f".{self._path.name}")
        try:
            temporary.write_text(f"{session_id}\n", encoding="ascii")
            temporary.replace(self._path)
        except OSError as error:
            log.warning("the session cannot be kept in %s: %s", self._path, error)


class Hellos:
    """`ask`: has the session enter what the controller is in now, and know its earlier ones; returns whether it
    answered."""

    def __init__(
        self, shard_id: str, session: ClusterSession, ask: Callable[[], Awaitable[bool]], memory: Memory
    ) -> None:
        self._shard_id = shard_id
        self._session = session
        self._ask = ask
        self._asking = asyncio.Lock()
        self._told: set[str] = set()
        self.last = memory.read()
        if self.last:
            session.recall(self.last)
        session.on_enter = memory.keep

    async def refusal(self, named: str, peer: str | None) -> int | None:
        """The status that refuses a hello which names that session; None: it is let in."""
        session = self._session
        if session.knows(named):
            return None
        if not named:
            return IS_UNSURE  # a process that has not heard from its controller yet
        async with self._asking:
            is_answered = session.knows(named) or await self._ask()
        if session.knows(named):
            return None
        if not is_answered:
            return IS_UNSURE
        self._tell(named, peer)
        return IS_STRANGER

    def _tell(self, named: str, peer: str | None) -> None:
        if named not in self._told and len(self._told) < _TOLD_MAX:
            self._told.add(named)
            log.error(
                "a cluster with the same ids runs on a copy of this data directory: its process at %s asked for shard "
                "%s and was refused, and nothing was changed. Both go on apart; %s",
                peer,
                self._shard_id,
                ADOPT,
            )
