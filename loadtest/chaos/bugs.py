"""Deliberate bugs, to see that the checkers find them: each breaks one promise of the store.

Owns: what is changed in kvstore's code for each.
Promises: a bug is planted only in the process that calls `plant`, and only as named. What it changes must still be
there under its name: a change of the store that moves it makes `plant` raise, never plant nothing.
Leaves to others: who may ask for one (`child`), finding them (`loadtest.histories`).

early-answer: a write is answered, and seen by reads, before its batch is committed; whoever kills the process then
loses what was acknowledged. ignore-token: writes need no token, or any, for a name that somebody else has leased.
ignore-intent: reads do not look whether a transaction is at work on a key: they see half of it.
"""

from __future__ import annotations

import asyncio
import inspect
import sqlite3
import time
from collections.abc import Callable
from typing import Any

import msgspec

from kvstore.protocol import ReadLock, Transact
from kvstore.storage import sqlite, store
from kvstore.store.batch import Batch
from kvstore.store.leases import Leases
from kvstore.store.participant import Participant
from kvstore.transactions.locks import LockTable

EARLY_S = 0.1


def plant(name: str) -> None:
    """Make this process wrong in that way. Raises KeyError; LookupError if the store's code is not as it was."""
    BUGS[name]()


def _replace(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    original = getattr(owner, name, None)
    ours = list(inspect.signature(replacement).parameters)
    if original is None or list(inspect.signature(original).parameters) != ours:
        raise LookupError(f"{owner.__name__}.{name}({', '.join(ours)}) is not there: adapt loadtest.chaos.bugs to it")
    setattr(owner, name, replacement)


def _need(owner: Any, *names: str) -> None:
    for name in names:
        if not hasattr(owner, name):
            raise LookupError(f"{owner.__name__}.{name} is not there: adapt loadtest.chaos.bugs to it")


def _early_answer() -> None:
    """The writer's thread lets the answers go, dawdles, and only then commits."""
    _need(sqlite, "_in_thread", "_begin")
    _need(sqlite.Database, "_batch", "_write")

    async def commit(self: sqlite.Database, work: sqlite.Work) -> Batch:
        loop = asyncio.get_running_loop()
        decided: asyncio.Future[Batch] = loop.create_future()

        def commit_late(connection: sqlite3.Connection) -> None:
            batch = self._batch(connection, work)
            sqlite._begin(connection)
            for op, sink in work.waiters:
                batch.decide(op, sink)
            loop.call_soon_threadsafe(decided.set_result, batch)
            time.sleep(EARLY_S)
            self._write(connection, batch, "batch", *batch.steps)

        late = loop.create_task(sqlite._in_thread(self._writer, commit_late))
        await asyncio.wait((late, decided), return_when=asyncio.FIRST_COMPLETED)
        if not decided.done():
            late.result()
        return await decided

    _replace(sqlite.Database, "commit", commit)


def _ignore_token() -> None:
    """A lease keeps nobody from writing, and no token is compared with it."""

    def fence(self: Leases, name: str, token: int | None, partition: int) -> None:
        self.on(name, partition)  # one that is due still ends

    def locked(self: Participant, steps: Any, conditions: Any) -> None:
        return None

    holds_true = Participant._holds_true

    def holds(self: Participant, condition: Any) -> bool:
        return condition.token is not None or holds_true(self, condition)

    _replace(Leases, "fence", fence)
    _replace(Participant, "_locked", locked)
    _replace(Participant, "_holds_true", holds)


def _ignore_intent() -> None:
    """Reads wait for nobody: not one of a key, not a list, not a read-only transaction, in one store or many."""
    _need(LockTable, "_identity")
    entry, gather, try_transact = store._entry, Batch._gather, Batch._try_transact

    def entry_without_intent(row: Any) -> Any:
        return msgspec.structs.replace(entry(row), has_intent=False)

    def gather_nothing(self: Batch, queued: Any) -> None:
        if isinstance(queued.op, ReadLock):  # it gets locks that bar nobody
            for key in queued.keys:
                queued.gathered[key] = self._locks._identity()
            self._changes.answer(queued.sink, self._with_locks(queued))
        else:
            gather(self, queued)

    def transact_at_once(self: Batch, queued: Any, held: str | None = None) -> None:
        op = queued.op
        steps = (*op.then, *op.otherwise) if isinstance(op, Transact) else ()
        if steps and all(step.op == "get" for step in steps):
            self._changes.answer(queued.sink, self._part.transact(op))
        else:
            try_transact(self, queued, held)

    _replace(store, "_entry", entry_without_intent)
    _replace(Batch, "_gather", gather_nothing)
    _replace(Batch, "_try_transact", transact_at_once)


BUGS: dict[str, Callable[[], None]] = {
    "early-answer": _early_answer,
    "ignore-token": _ignore_token,
    "ignore-intent": _ignore_intent,
}
