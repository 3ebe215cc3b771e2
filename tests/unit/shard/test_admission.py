"""What a shard takes in: configured limits hold for what stores something new, and for nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.config import Limits
from kvstore.errors import KvError
from kvstore.model import Attempt, Condition, IdempotencyKey, TxnOp
from kvstore.protocol import (
    Abort,
    Acquire,
    ApplyIntents,
    DecideCommit,
    Delete,
    Get,
    Prepare,
    Put,
    ReadLock,
    Release,
    Renew,
    Transact,
)
from kvstore.shard.admission import Admission

ATTEMPT = Attempt(1, 1, "r")
LONG = "é" * 513
admission = Admission(Limits(), 64)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Put(1, LONG, b""), "key-too-long"),
        (Acquire(1, LONG, 1, 0, ""), "key-too-long"),
        (Acquire(1, "k", 1, 60_001, ""), "bad-request"),
        (Acquire(1, "k", 1, 0, "é" * 129), "bad-request"),
        (Transact(1, "k", ATTEMPT, [Condition(LONG, 1)], [], []), "key-too-long"),
        (Prepare(1, "", ATTEMPT, [Condition("k", 1)], [], []), "key-empty"),
        (Prepare(1, "k", ATTEMPT, [], [TxnOp("put", "k", b"x" * (1 << 20) + b"x")], []), "value-too-large"),
        (DecideCommit(1, "k", ATTEMPT, [], [], [TxnOp("put", "k", b"", -1)], 1, True, None, None, []), "bad-ttl"),
        (ReadLock(1, Attempt(-1, 1, "r"), ["k"]), "bad-request"),
        (ReadLock(1, Attempt(1, 1, "r" * 65), ["k"]), "bad-request"),
        (Delete(1, "k", None, IdempotencyKey("k" * 256, "")), "bad-request"),
        (Renew(1, "k", 1, IdempotencyKey("k" * 256, "")), "bad-request"),
        (Release(1, "k", 1, IdempotencyKey("k" * 256, "")), "bad-request"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_would_be_stored_beyond_a_limit_is_refused(request_: Any, code: str) -> None:
    with pytest.raises(KvError) as caught:
        admission.check(request_)
    assert caught.value.code == code
    assert caught.value.status in (400, 413)


@pytest.mark.parametrize(
    "request_",
    [
        Put(1, "é" * 512, b"x" * (1 << 20), 315_360_000_000, None, IdempotencyKey("k" * 255, "d")),
        Acquire(1, "k", 86_400_000, 60_000, "é" * 128),
        Get(1, LONG),
        Delete(1, LONG),
        ApplyIntents(1, Attempt(1, 2**63, "r" * 65), [LONG], 1, True, 1),
        Abort(1, Attempt(1, 2**63, "r" * 65), [LONG]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_limits_themselves_are_taken_and_what_ends_or_undoes_has_none(request_: Any) -> None:
    admission.check(request_)
