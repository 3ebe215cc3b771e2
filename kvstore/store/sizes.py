"""How large the commit record of an operation can become, so that it is known before anything is decided.

Owns: the estimate, which is never too low.
Promises: pure.
Leaves to others: waiting for room in the log, and refusing (`pipeline`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvstore.protocol import Abort, ApplyIntents, DecideCommit, Delete, Prepare, Put, Transact
from kvstore.storage.rows import VALUE
from kvstore.store.ops import DropDecisions, EndLockWaits, keys_of
from kvstore.transactions.intents import PreparedTxn, PreparedTxns, State

_KEY_ROWS = 1100  # of a row whose key is not counted in the message
_MANY_BYTES = 1 << 20  # of decisions that go, or of tombstones of attempts that end, a few thousand at most
BASE_BYTES = 4096  # of two rows in a record: its own, and that of a kept reply


def record_bytes(op: Any, size: int, holds: PreparedTxns, before: Callable[[str, str], State | None]) -> int:
    """An upper bound. `size`: what the operation counts for as a message."""
    kind = type(op)
    if kind is Put or kind is Delete:  # most of what there is
        return BASE_BYTES + len(op.key) * 4 + size
    if kind in _PARTS:
        return size * 3 // 2 + _keys_bytes(op, kind, before) + BASE_BYTES + len(getattr(op, "key", "")) * 4
    if kind is ApplyIntents or kind is Abort:
        hold = holds.of(op.attempt)
        return size + BASE_BYTES + (_held_bytes(hold, op.keys) if hold is not None else 0)
    if kind is DropDecisions or kind is EndLockWaits:
        return _MANY_BYTES
    return size + BASE_BYTES + len(getattr(op, "key", "")) * 4


_PARTS = frozenset({Prepare, Transact, DecideCommit})


def _keys_bytes(op: Any, kind: type, before: Callable[[str, str], State | None]) -> int:
    """An intent holds its writes as base64, and its row the value that stays until it is applied."""
    if kind is not Prepare:
        return (len(op.conditions) + len(op.then) + len(op.otherwise)) * _KEY_ROWS
    size = 0
    for key in keys_of(op):
        found = before(VALUE, key)
        size += _KEY_ROWS if found is None else _KEY_ROWS + found.size
    return size


def _held_bytes(hold: PreparedTxn, keys: list[str]) -> int:
    size = 0
    for key in keys:
        held = hold.intents.get(key)
        if held is not None:
            intent = held.intent
            size += _KEY_ROWS + len(held.state.body or b"")
            size += len(intent.then.value) if intent.then is not None else 0
            size += len(intent.otherwise.value) if intent.otherwise is not None else 0
    return size
