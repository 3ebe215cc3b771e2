"""How large the commit record of an operation can become, so that it is known before anything is decided.

Owns: the estimate, which is never too low.
Promises: pure.
Leaves to others: waiting for room in the log, and refusing (`pipeline`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvstore.protocol import Abort, ApplyIntents, DecideCommit, Delete, Message, Prepare, Put, Transact, message_bytes
from kvstore.storage.rows import VALUE
from kvstore.store.ops import DropDecisions, EndLockWaits, keys_of
from kvstore.store.write_set import RowMeta
from kvstore.transactions.intents import PreparedTxns

_KEY_ROWS = 1100  # of a row whose key is not counted in the message
_MANY_BYTES = 1 << 20  # of decisions that go, or of tombstones of attempts that end, a few thousand at most
BASE_BYTES = 4096  # of two rows in a record: its own, and that of a kept reply


def record_bytes(op: Any, holds: PreparedTxns, before: Callable[[str, str], RowMeta | None]) -> int:
    """An upper bound. An intent holds its writes as base64, and its row the value that stays until it is applied."""
    if type(op) is Put or type(op) is Delete:  # most of what there is
        return BASE_BYTES + len(op.key) * 4 + (len(op.value) if type(op) is Put else 0)
    if isinstance(op, DropDecisions | EndLockWaits):
        return _MANY_BYTES
    if not isinstance(op, Message):
        return BASE_BYTES
    size = message_bytes(op)
    if isinstance(op, Prepare | Transact | DecideCommit):
        keys = keys_of(op)
        size = size * 3 // 2 + len(keys) * _KEY_ROWS
        if isinstance(op, Prepare):
            size += sum([found.size for key in keys if (found := before(VALUE, key)) is not None])
    elif isinstance(op, ApplyIntents | Abort):
        hold = holds.of(op.attempt)
        if hold is not None:
            size += sum([_held_bytes(hold.intents[key]) for key in op.keys if key in hold.intents])
    return size + BASE_BYTES + len(getattr(op, "key", "")) * 4


def _held_bytes(held: Any) -> int:
    steps = (held.intent.then, held.intent.otherwise)
    return _KEY_ROWS + len(held.state.body or b"") + sum([len(step.value) for step in steps if step is not None])
