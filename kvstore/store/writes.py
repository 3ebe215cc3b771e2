"""Put, delete and expiry of single keys, as changes of rows.

Owns: what a plain write must pass, in this order: the fence (is the key's name leased, and does the write show the
holder's token), the key's deadline, the conditions, room on the disk.
Promises: called with the key's lock free or held by the operation. One that is refused has changed nothing but what
was due anyway. A row that is damaged, and nothing but that row, is replaced by a write without a condition.
Leaves to others: ownership and locks (`batch`), kept replies (`idempotency`).
"""

from __future__ import annotations

from kvstore.errors import DataCorrupt, PreconditionFailed
from kvstore.model import Preconditions
from kvstore.protocol import Answer, Delete, Put
from kvstore.storage.rows import REPLY, VALUE
from kvstore.store.idempotency import Idempotency
from kvstore.store.leases import Leases
from kvstore.store.ops import Expire
from kvstore.store.write_set import Sink, WriteSet
from kvstore.transactions.intents import State

_DAMAGED = State(0, 0, b"")  # of a row that is to be replaced: there is, or was, something


class Writes:
    """The plain writes, as one batch does them."""

    def __init__(self, changes: WriteSet, leases: Leases, idempotency: Idempotency) -> None:
        self._changes = changes
        self._leases = leases
        self._idempotency = idempotency

    def put(self, op: Put, partition: int, sink: Sink) -> Answer:
        """Write the value: 204 if the key was there, else 201, with the new version.

        Raises Locked, LockLost, PreconditionFailed, DiskFull, DataCorrupt.
        """
        before = self._admit(op.key, op.guard, partition)
        self._changes.need_room()
        expires_at_ms = self._changes.context.now_ms + op.ttl_ms if op.ttl_ms else 0
        version = self._changes.write(VALUE, op.key, partition, op.value, expires_at_ms)
        return Answer(op.id, 204 if before.live else 201, version)

    def delete(self, op: Delete, partition: int, sink: Sink) -> Answer:
        """Delete the key: 204 with the version of the deletion, 404 if it was not there.

        Raises Locked, LockLost, PreconditionFailed, DataCorrupt.
        """
        before = self._admit(op.key, op.guard, partition)
        if not before.live:
            return Answer(op.id, 404)
        return Answer(op.id, 204, self._changes.write(VALUE, op.key, partition, None))

    def _admit(self, key: str, guard: Preconditions | None, partition: int) -> State:
        """The state of the key as the write finds it. Raises Locked, LockLost, PreconditionFailed, DataCorrupt."""
        self._leases.fence(key, guard.token if guard is not None else None, partition)
        try:
            self._changes.expire_if_due(VALUE, key, partition)
        except DataCorrupt as error:
            if error.damaged_row is None or (guard is not None and _has_condition(guard)):
                raise
            return _DAMAGED
        before = self._changes.before(VALUE, key)
        if guard is not None and not _condition_holds(guard, before):
            state = f"has version {before.version}" if before.live else "does not exist"
            members = {"version": before.version} if before.live else {}
            raise PreconditionFailed(f"key {key!r} {state}.", **members)
        return before

    def expire(self, op: Expire, partition: int, sink: Sink) -> Answer:
        """Make the row's expiry a fact if it is due: 410, else 200."""
        if op.kind == REPLY:
            gone = self._idempotency.expire_if_due(op.key, partition)
        else:
            gone = self._changes.expire_if_due(op.kind, op.key, partition)
        return Answer(op.id, 410 if gone else 200)


def _has_condition(guard: Preconditions) -> bool:
    """It asks for more than a lease's token."""
    return guard.present or guard.absent or guard.versions is not None or guard.not_versions is not None


def _condition_holds(guard: Preconditions, before: State) -> bool:
    """RFC 9110, 13.2.2: If-Match first, then If-None-Match; both must hold."""
    version = before.version if before.live else None
    return (
        not (guard.present and not before.live)
        and not (guard.absent and before.live)
        and (guard.versions is None or version in guard.versions)
        and (guard.not_versions is None or version not in guard.not_versions)
    )
