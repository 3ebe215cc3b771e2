"""Kept replies: what an Idempotency-Key was answered with, as rows.

Owns: the form of kept replies and of the keys of their rows; when one is still valid.
Promises: a reply is kept in the batch that has its effect, and looked for again in that very batch, so a request and
its duplicate cannot both have an effect. A transaction's reply outlives its time until its decision is gone: a
duplicate must not begin again while a part of the first is still on its way.
Leaves to others: which operations may be repeated (`batch`), what a transaction's reply holds (`outcomes`).

The header and its meaning are those of the IETF draft "The Idempotency-Key HTTP Header Field": the answer to a repeat
is the first one's, and a key that comes with another request is refused (422).

How long a reply is kept is a time since, not a time of day: a wall clock that is set 11 minutes ahead must not make all
keys be forgotten at once. So the row says when it was written by the monotonic clock, too, which runs from the boot of
the machine on through all of its processes, and counts while the machine is the same and has not been booted again.
Else (after a boot, or on the shard of another host) the row's deadline by the wall clock counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from kvstore.errors import IdempotencyKeyReused, KvError
from kvstore.model import IdempotencyKey, Read
from kvstore.protocol import Answer
from kvstore.storage.rows import DECISION, REPLY
from kvstore.store.refusals import refusal
from kvstore.store.write_set import WriteSet


class IdempotencyRecord(msgspec.Struct, omit_defaults=True):
    """The body of a reply's row: the answer that was given, and to which request (`digest` empty: to any).

    `owner` and `ttl_ms`: a renewal's. `attempt` and what follows: a transaction's, see `protocol.Outcome`.
    `written_s` and `boot`: when it was written, by the monotonic clock of which machine.
    """

    digest: str
    status: int
    version: int
    problem: dict[str, Any] | None = None
    owner: str = ""
    ttl_ms: int = 0
    attempt: str = ""
    succeeded: bool = False
    reads: list[Read] = []
    written_s: float = 0.0
    boot: str = ""


_EXTENSION_MS = 60_000
_DECIDED = frozenset({200, 201, 204, 404, 412})


class Idempotency:
    """The kept replies, as one batch sees and changes them."""

    def __init__(self, changes: WriteSet) -> None:
        self._changes = changes

    def run(
        self,
        op: Any,
        partition: int,
        execute: Callable[[], Answer | None],
        repeated: Callable[[Any, IdempotencyRecord, int], Answer],
    ) -> Answer | None:
        """Execute a plain operation, unless its Idempotency-Key was answered before; None if it waits.

        A KvError of `execute` or `repeated` becomes the answer.
        """
        once: IdempotencyKey | None = getattr(op, "once", None)
        if once is None:
            try:
                return execute()
            except KvError as error:
                return refusal(op.id, error)
        name = row_key(type(op).__name__, op.key, once)
        try:
            kept = self.find(name, once)
            if kept is not None:
                return repeated(op, kept, partition)
        except KvError as error:
            return refusal(op.id, error)
        try:
            reply = execute()
        except KvError as error:
            reply = refusal(op.id, error)
        if reply is not None and reply.status in _DECIDED:
            owner = (reply.value or b"").decode()
            problem, ttl_ms = reply.problem, reply.ttl_left_ms
            self.keep(
                name, partition, IdempotencyRecord(once.digest, reply.status, reply.version, problem, owner, ttl_ms)
            )
        return reply

    def find(self, row_key: str, once: IdempotencyKey) -> IdempotencyRecord | None:
        """The reply to the first request with this Idempotency-Key, if there was one and its time is not over.

        Raises IdempotencyKeyReused if that request was another one, DataCorrupt.
        """
        before = self._changes.before(REPLY, row_key)
        if not before.live:
            return None
        kept = self._decode(row_key)
        if not self._left_ms(kept, before.expires_at_ms) and not self._must_stay(kept):
            return None
        if kept.digest not in (once.digest, ""):
            raise IdempotencyKeyReused(f"the Idempotency-Key {once.key!r} came with another request before.")
        return kept

    def keep(self, row_key: str, partition: int, kept: IdempotencyRecord) -> None:
        """Write the reply's row, to be kept for `idempotency_kept_s` from now."""
        context = self._changes.context
        expires_at_ms = context.now_ms + context.reply_kept_ms
        kept = msgspec.structs.replace(kept, written_s=round(context.now_s, 3), boot=context.boot)
        self._changes.write(REPLY, row_key, partition, msgspec.json.encode(kept), expires_at_ms)

    def granted(self, row_key: str) -> int:
        """The token that an Acquire was answered with, 0 if it was not."""
        kept = self._kept(row_key)
        return kept.version if kept is not None and kept.status == 201 else 0

    def forget(self, row_key: str, partition: int) -> None:
        """As if there had been no such request."""
        if self._changes.before(REPLY, row_key).live:
            self._changes.write(REPLY, row_key, partition, None)

    def of_attempt(self, attempt: str) -> IdempotencyRecord | None:
        """The kept reply of that attempt, without its reads. Raises DataCorrupt."""
        return self._kept(attempt_row_key(attempt))

    def expire_if_due(self, row_key: str, partition: int) -> bool:
        """As `WriteSet.expire_if_due`; a reply that must stay, or whose time is not over, gets a new deadline."""
        changes = self._changes
        before = changes.before(REPLY, row_key)
        if before.live and 0 < before.expires_at_ms <= changes.context.now_ms:
            kept = self._decode(row_key)
            left_ms = _EXTENSION_MS if self._must_stay(kept) else self._left_ms(kept, before.expires_at_ms)
            if left_ms:
                deadline_ms = changes.context.now_ms + left_ms
                changes.write(REPLY, row_key, partition, msgspec.json.encode(kept), deadline_ms)
                return False
        return changes.expire_if_due(REPLY, row_key, partition)

    def _left_ms(self, kept: IdempotencyRecord, expires_at_ms: int) -> int:
        """For how long it is still to be kept; 0 if its time is over."""
        context = self._changes.context
        if kept.boot == context.boot != "":
            return max(0, context.reply_kept_ms - round((context.now_s - kept.written_s) * 1000))
        return max(0, expires_at_ms - context.now_ms)

    def _kept(self, row_key: str) -> IdempotencyRecord | None:
        return self._decode(row_key) if self._changes.before(REPLY, row_key).live else None

    def _decode(self, row_key: str) -> IdempotencyRecord:
        return msgspec.json.decode(self._changes.state(REPLY, row_key).body or b"", type=IdempotencyRecord)

    def _must_stay(self, kept: IdempotencyRecord) -> bool:
        return bool(kept.attempt) and self._changes.before(DECISION, kept.attempt).live


def row_key(request: str, key: str, once: IdempotencyKey) -> str:
    """An Idempotency-Key belongs to its target: kind of request and key.
    It holds no line feed: no two share a row."""
    return f"{once.key}\n{request}\n{key}"


def attempt_row_key(attempt: str) -> str:
    """Of the row by which a transaction that carried an Idempotency-Key can be looked up: the same reply again."""
    return f"{attempt}\nTxn"
