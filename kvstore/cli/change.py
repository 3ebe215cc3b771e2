"""Following a change of the cluster to its end, by GET /v1/changes/{id}.

Owns: asking again and again; what is said about what it waits for.
Promises: a router or controller that is away for a moment is waited for; nothing is asked of the cluster here that
changes it.
Leaves to others: asking for the change and telling its end (`shards`), drawing (`move_progress`), how far it is and
what it waits for (the controller).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from kvstore.cli.frame import printable
from kvstore.cli.move_progress import MoveProgress
from kvstore.client import Client
from kvstore.errors import KvError, NotFound, Unavailable

_POLL_S = 0.25
_AWAY_S_MAX = 60.0
_WAITING_PATIENCE_S = 2.0  # what it waits for no longer is not worth a line

Document = Mapping[str, Any]


async def follow(kv: Client, change_id: str, progress: MoveProgress) -> Document:
    """The document of the change, once it has ended.

    Raises Unavailable when none was to be had for a minute, NotFound if the controller does not know the change.
    """
    watch = _Watch(kv, change_id, progress)
    while True:
        document = await watch.document()
        if document is not None and document["state"] != "running":
            return document
        await asyncio.sleep(_POLL_S)


class _Watch:
    """Asks the router, and says what is waited for, each thing once."""

    def __init__(self, kv: Client, change_id: str, progress: MoveProgress) -> None:
        self._kv = kv
        self._change_id = change_id
        self._progress = progress
        self._clock = asyncio.get_running_loop().time
        self._heard_s = self._clock()
        self._waiting = ""
        self._waiting_since_s = 0.0
        self._is_told = False
        self._away = ""

    async def document(self) -> Document | None:
        """The change as it is now; None while that cannot be told. Raises what was answered last after a minute."""
        try:
            document = await self._kv.change(self._change_id)
        except NotFound:
            raise
        except KvError as error:
            if self._clock() - self._heard_s > _AWAY_S_MAX:
                next_step = "The change goes on by itself; `kvstore status` shows how far it is, once it answers."
                raise Unavailable(error.detail, next_step=next_step) from None
            self._note_away(f"no news of the change: {error.detail}")
            return None
        self._heard_s = self._clock()
        self._note_away("")
        self._progress.show(document)
        self._note_waiting(document["waiting_for"] or "")
        return document

    def _note_waiting(self, waiting: str) -> None:
        if waiting != self._waiting:
            if self._is_told and not waiting:
                self._progress.say("going on")
            self._waiting, self._waiting_since_s, self._is_told = waiting, self._clock(), False
        if waiting and not self._is_told and self._clock() >= self._waiting_since_s + _WAITING_PATIENCE_S:
            self._is_told = True
            self._progress.say(f"waiting: {printable(waiting)}")

    def _note_away(self, reason: str) -> None:
        if reason and not self._away:
            self._progress.say(f"waiting: {printable(reason)}")
        if self._away and not reason:
            self._progress.say("it answers again")
        self._away = reason
