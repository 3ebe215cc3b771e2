"""What a message counts for where queues, frames and records are bounded.

Owns: the size of each kind of message, roughly: its values, and so much for each part.
Promises: counting costs no encoding.
Leaves to others: the bounds (`config`), messages (`protocol`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvstore.protocol import (
    Abort,
    Answer,
    ApplyIntents,
    DecideCommit,
    Outcome,
    Page,
    Prepare,
    Put,
    ReadLock,
    Reads,
    Rows,
    Transact,
    Vote,
)

_PART_BYTES = 64


def message_bytes(message: Any) -> int:
    """What a message counts for where queues and frames are bounded, roughly: its values, and so much per part.

    An operation that is no message counts for one part.
    """
    size = _SIZES.get(type(message))
    return _PART_BYTES if size is None else size(message)


def _one_value_bytes(message: Put | Answer) -> int:
    return len(message.value or b"") + _PART_BYTES


def _steps_bytes(message: Prepare | Transact | DecideCommit) -> int:
    then, otherwise = message.then, message.otherwise
    size = _PART_BYTES * (len(then) + len(otherwise) + len(message.conditions) + 1)
    for step in then:
        size += len(step.value)
    for step in otherwise:
        size += len(step.value)
    return size


def _reads_bytes(message: Vote | Outcome | Reads) -> int:
    size = _PART_BYTES
    for read in message.reads:
        size += len(read.value or b"") + _PART_BYTES
    return size


def _page_bytes(message: Page) -> int:
    return sum([len(value or b"") + _PART_BYTES for _, _, value, _ in message.items])


def _rows_bytes(message: Rows) -> int:
    return sum([len(row[5] or b"") + len(row[6] or b"") + _PART_BYTES for row in message.rows])


def _keys_bytes(message: ApplyIntents | Abort | ReadLock) -> int:
    return _PART_BYTES * (len(message.keys) + 1)


_SIZES: dict[type, Callable[[Any], int]] = {
    **dict.fromkeys((Put, Answer), _one_value_bytes),
    **dict.fromkeys((Prepare, Transact, DecideCommit), _steps_bytes),
    **dict.fromkeys((Vote, Outcome, Reads), _reads_bytes),
    **dict.fromkeys((ApplyIntents, Abort, ReadLock), _keys_bytes),
    Page: _page_bytes,
    Rows: _rows_bytes,
}


def row_bytes(row: Sequence[Any]) -> int:
    """What a MovedRow counts for, roughly."""
    return len(row[5] or b"") + len(row[6] or b"") + 64
