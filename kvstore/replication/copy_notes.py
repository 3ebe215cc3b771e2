"""What a copy has noted: who it is, what it has promised, whether it is filling, which session it follows.

Owns: the identity, which is on the disk, and the copy's side of the session, which is in memory.
Promises: a note is durable before it is true here, whatever becomes of the caller. Of two notes that are written at the
same moment neither is written over by the other: each begins from all that was noted before it.
Leaves to others: what is promised, and when (`copy_greeting`, `own_opening`), when the file is whole (`copy_filling`),
the rules (`session`), the form of the file (`promise`).
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from kvstore import failpoints
from kvstore.environment import Environment, to_its_end
from kvstore.replication import session
from kvstore.replication.places import Place
from kvstore.replication.promise import Identity, room_may_come, write_identity
from kvstore.replication.session import Following, Session


class CopyNotes:
    """`identity`: which copy this is, and what it has promised. `following`: its side of its session."""

    def __init__(self, place: Place, identity: Identity, environment: Environment) -> None:
        self.identity = identity
        self.following = Following(identity.store_id, identity.copy_id, identity.promised)
        self._place = place
        self._environment = environment
        self._writing = asyncio.Lock()  # held by what changes the identity; innermost

    @property
    def is_filling(self) -> bool:
        """Whether a snapshot is on its way, so that the file is nothing yet."""
        return self.identity.filling

    def is_current(self, named: Session) -> bool:
        """Whether what names this session concerns the copy."""
        return session.is_current(self.following, named)

    def begin(self, named: Session) -> None:
        """That session has begun."""
        self.following = session.begun(self.following, named)

    def learn_committed(self, named: Session, number: int, last: int) -> None:
        """In that session, records up to `number` are committed; the log ends with `last`."""
        self.following = session.learn_committed(self.following, named, number, last)

    async def promise(self, term: int) -> None:
        """Promise that term. Raises TryLater, OSError."""
        await self._write(promised=term)

    async def note_filling(self, filling: bool) -> None:
        """Note whether a snapshot is on its way. Raises TryLater, OSError."""
        await self._write(filling=filling)

    async def _write(self, **changes: Any) -> None:
        """Make them durable, and the promise that is among them true, whatever becomes of the caller."""
        await to_its_end(self._environment, self._write_now(changes))

    async def _write_now(self, changes: dict[str, Any]) -> None:
        async with self._writing:
            place, identity = self._place, self.identity._replace(**changes)
            write = partial(write_identity, place.disk, place.folder, place.store, identity)
            with room_may_come():
                if "filling" in changes or not failpoints.planted("promise-not-durable"):
                    await self._environment.in_thread(write)
            self.identity, self.following = identity, session.promise(self.following, identity.promised)
