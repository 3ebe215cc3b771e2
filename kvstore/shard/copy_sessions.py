"""The sessions of primaries with the copy on this node.

Owns: the tasks of these sessions, and which of their ends concern more than the connection.
Promises: none is left once `end` has returned. One that comes while the store here is a primary's whose term is about
to end is kept until the files are a copy's, for a moment: the node that takes over asks as soon as it has its map,
which comes here a moment later, and each refusal would cost it another round. A disk that failed ends the process.
Leaves to others: what is said in a session (`replication.serving`), whose the files are (`resident`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kvstore.errors import KvError, is_damage
from kvstore.replication.serving import CopyOf, serve_copy
from kvstore.replication.wire import Wire
from kvstore.shard.hosted import Surroundings
from kvstore.storage.disk import FULL_ERRNOS
from kvstore.storage.engine import TryLater
from kvstore.storage.log import LogFailed

log = logging.getLogger(__name__)

_KEPT_S = 0.5  # below `replica_timeout_s` as shipped, after which a node that opens a term asks again


class CopySessions:
    """`copy_of`: the copy that a session is meant for. `on_harm`: a session has found damage."""

    def __init__(self, shard_id: str, around: Surroundings, copy_of: CopyOf, on_harm: Callable[[], None]) -> None:
        self._shard_id = shard_id
        self._environment = around.environment
        self._is_busy = around.is_busy
        self._on_fatal = around.on_fatal
        self._copy_of = copy_of
        self._on_harm = on_harm
        self._harm: KvError | None = None
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._may_begin = asyncio.Event()
        self._may_begin.set()

    def keep(self) -> None:
        """A store is served here: sessions wait until it is a copy."""
        self._may_begin.clear()

    def begin(self) -> None:
        """What was kept goes on."""
        self._may_begin.set()

    def take_harm(self) -> KvError | None:
        """The damage that a session has found since this was asked last."""
        harm, self._harm = self._harm, None
        return harm

    async def serve(self, wire: Wire) -> None:
        """Serve a primary's session with the copy here, until the connection is lost."""
        task = asyncio.ensure_future(self.serve_here(wire))
        self._tasks[task] = None
        try:
            await task
        except asyncio.CancelledError:
            if not task.cancelled():
                task.cancel()
                raise
        finally:
            self._tasks.pop(task, None)

    async def serve_here(self, wire: Wire) -> None:
        """As `serve`, but `end` does not end it."""
        if not self._may_begin.is_set():
            await self._environment.wait_for(self._may_begin.wait(), _KEPT_S)
        try:
            await serve_copy(wire, self._copy_of, self._environment, self._is_busy)
        except TryLater as error:
            log.warning("a session with the copy of shard %s ends: %s", self._shard_id, error.detail)
        except KvError as error:  # what came cannot be taken: only this connection ends
            log.error("a session with the copy of shard %s ends: %s", self._shard_id, error.detail)
            if is_damage(error):
                self._harm = error
                self._on_harm()
        except (LogFailed, OSError) as error:
            if isinstance(error, OSError) and error.errno in FULL_ERRNOS:  # nothing was changed: it comes again
                log.warning("a session with the copy of shard %s ends: %s", self._shard_id, error)
            else:  # what is on the disk is not known any more
                self._on_fatal(error)

    async def end(self) -> None:
        """End all."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
