"""An operation that fails at any of its steps has changed nothing, and fails alone."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from kvstore.errors import DataCorrupt
from kvstore.model import Attempt, IdempotencyKey, TxnOp
from kvstore.protocol import (
    Abort,
    Acquire,
    Answer,
    ApplyIntents,
    CancelWait,
    DecideCommit,
    Delete,
    Outcome,
    Prepare,
    Put,
    ReadLock,
    Release,
    Renew,
    Reply,
    ResolveTxn,
    Transact,
)
from kvstore.store import refusals
from kvstore.store.batch import Batch
from kvstore.store.leases import Leases
from kvstore.store.ops import DropDecisions, EndLockWaits, ExpireLease, WriteOp
from kvstore.store.write_set import Context, WriteSet
from kvstore.transactions.undo import Undo
from tests.unit.store.harness import Bench, Sink, acquire, token
from tests.unit.transactions.world import _form

OLD, YOUNG, OTHER = Attempt(1, 1, "r"), Attempt(9, 9, "r"), Attempt(4, 4, "r")


class Broken(Exception):
    """A fault of the program."""


class Faulty:
    """Raises at the step with that number of the operation with that id."""

    def __init__(self, patch: pytest.MonkeyPatch, op_id: int, step: int) -> None:
        self.reached = False
        self._step = step
        decide = Batch.decide

        def decide_one(batch: Batch, op: Any, sink: Any) -> None:
            self._left = step if op.id == op_id else -1
            decide(batch, op, sink)
            self._left = -1

        self._left = -1
        patch.setattr(Batch, "decide", decide_one)
        init = Undo.__init__

        def begin(undo: Undo) -> None:
            init(undo)
            undo.note = self._counting(undo.note)

        patch.setattr(Undo, "__init__", begin)

    def _counting(self, note: Any) -> Any:
        def counted(step: Any) -> None:
            note(step)
            if self._left == 0:
                self._left, self.reached = -1, True
                raise Broken(f"at step {self._step}")
            self._left -= self._left > 0

        return counted


def put(key: str) -> TxnOp:
    return TxnOp("put", key, b"new")


FIRST: list[WriteOp] = [
    Put(1, "a", b"old"),
    Acquire(2, "held", 10_000, 0, "o", IdempotencyKey("K", "d")),
    Acquire(3, "held", 10_000, 5000, "w"),
    Acquire(4, "held", 10_000, 5000, "x"),
    Prepare(5, "z", OLD, [], [put("p"), put("q")], []),
    Prepare(6, "z", YOUNG, [], [put("r")], []),
    ReadLock(7, OTHER, ["s", "t"]),
    Put(8, "p", b"waits"),
    Put(9, "q", b"waits"),
    Transact(10, "p", OTHER, [], [put("p"), put("b")], []),
    DecideCommit(11, "u", Attempt(2, 2, "r"), [], [put("u")], [], 1, True, None, None, []),
    Prepare(12, "z", Attempt(0, 3, "r"), [], [put("c"), put("s")], []),
    Put(13, "t", b"waits"),
]
FAILING: list[WriteOp] = [
    Put(50, "a", b"new", 5, None, IdempotencyKey("k", "d")),
    Delete(50, "a"),
    Renew(50, "held", 2),
    Release(50, "held", 2),
    Release(50, "held", 2, None, 2),
    Release(50, "held", 0, withdraw="K"),
    ExpireLease("other", 50),
    Acquire(50, "free", 10_000, 0, "", IdempotencyKey("k", "d")),
    Acquire(50, "held", 10_000, 9, ""),
    CancelWait(50, "held", 3),
    Transact(50, "a", OTHER, [], [put("a"), put("d")], [], IdempotencyKey("k", "d")),
    Prepare(50, "z", OTHER, [], [put("a"), put("d")], []),
    Prepare(50, "z", Attempt(0, 5, "r"), [], [put("a"), put("p")], []),
    ReadLock(50, OTHER, ["a", "d"]),
    ApplyIntents(50, OLD, ["p", "q"], 90, True, 5),
    Abort(50, OLD, ["p", "q"]),
    ResolveTxn(50, "v", OTHER),
    DropDecisions([Attempt(2, 2, "r")], 50),
    EndLockWaits(5000.0, 5000.0, 50),
]


def state(bench: Bench) -> Any:
    rows = {name: tuple(row) for name, row in bench.rows.rows.items()}
    holds = bench.holds
    names: dict[Any, int] = {}  # numbers of identities may be skipped
    return _form(bench.locks, names), _form(holds, names), rows, bench.clock, dict(holds.decided)


def run(*ops: WriteOp) -> tuple[Any, dict[int, Reply]]:
    """Each batch in turn, the last op alone; the state, and who was answered what."""
    bench = Bench()
    replies: dict[int, Reply] = {}
    sink = Sink()
    for op in ops:
        context = Context(bench.now_ms, bench.now_s, bench.arrivals, 1, False, bench.kept_ms, 1 << 24)
        bench.batch = batch = Batch(bench.clock, context, bench.locks, bench.holds, bench.rows)
        batch.decide(op, sink)
        assert not batch._ready
        bench.rows.rows.update(batch.changes.rows)
        bench.clock = batch.changes.clock
        for lease in batch.leases.started:
            bench.locks.start(lease, bench.now_s)
        replies.update({reply.id: reply for _, reply in batch.changes.answers})
    return state(bench), replies


@pytest.mark.parametrize("failing", FAILING, ids=lambda op: f"{type(op).__name__}-{FAILING.index(op)}")
def test_whichever_step_fails_nothing_of_the_operation_is_left(failing: WriteOp) -> None:
    undisturbed, _ = run(*FIRST)
    _, without_fault = run(*FIRST, failing)
    step, reached = 0, True
    while reached:
        with pytest.MonkeyPatch.context() as patch:
            faulty = Faulty(patch, failing.id, step)
            after, replies = run(*FIRST, failing)
        reached = faulty.reached
        reply = replies.get(failing.id)
        if isinstance(reply, Answer) and reply.status == 500:
            assert after == undisturbed, step
        else:  # it was another operation that failed: one that went on because of this one
            assert reply == without_fault.get(failing.id), step
            others = [other for other in replies.values() if isinstance(other, Answer) and other.status == 500]
            assert len(others) == reached, step
        step += 1
    assert step > 1 or not isinstance(failing, Put)


def test_one_that_fails_does_not_disturb_the_others_of_its_batch_and_is_told_once_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(refusals, "_faults_told", set())
    bench = Bench()
    write = WriteSet.write

    def broken(changes: WriteSet, kind: str, key: str, *args: Any) -> Any:
        if key == "bad":
            write(changes, kind, key, *args)
            raise Broken("a fault")
        return write(changes, kind, key, *args)

    monkeypatch.setattr(WriteSet, "write", broken)
    with caplog.at_level(logging.ERROR):
        answers = bench.run(Put(1, "a", b"1"), Put(2, "bad", b"1"), Put(3, "bad", b"2"), Put(4, "b", b"1"))
    assert [(answer.id, answer.status) for answer in answers] == [(1, 201), (2, 500), (3, 500), (4, 201)]
    assert [answer.version for answer in answers] == [1, 0, 0, 2]
    assert [row.key for row in bench.rows.rows.values()] == ["a", "b"]
    assert (bench.clock.keys, bench.clock.sequence) == (2, 2)
    assert [record.exc_info is not None for record in caplog.records] == [True, False]


def test_a_waiter_that_fails_when_its_turn_comes_does_not_fail_the_release(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    held = bench.acquire("k")
    bench.run(acquire("k", wait_s=5, owner="bad", op_id=2), acquire("k", wait_s=5, owner="good", op_id=3))
    started = Leases._start

    def broken(leases: Any, lease: Any) -> None:
        started(leases, lease)
        if lease.owner == "bad":
            raise Broken("a fault")

    monkeypatch.setattr(Leases, "_start", broken)
    answers = bench.run(Release(1, "k", held))
    assert [(answer.id, answer.status) for answer in answers] == [(2, 500), (3, 201), (1, 204)]
    assert bench.lease("k").owner == "good"
    assert bench.one(Put(4, "k", b"v", 0, token(bench.lease("k").token))).status == 201


def test_a_commit_that_fails_is_aborted_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    commit = DecideCommit(1, "a", OLD, [], [put("a")], [], 1, True, None, None, [])
    with monkeypatch.context() as patch:
        patch.setattr(WriteSet, "see", lambda *_: 1 / 0)
        assert bench.one(commit).status == 500
    bench.run_any(ResolveTxn(2, "a", OLD))
    assert [type(reply) for _, reply in bench.batch.changes.answers] == [Outcome]
    assert [reply.state for _, reply in bench.batch.changes.answers] == ["aborted"]  # type: ignore[union-attr]
    bench.run_any(commit)
    assert [reply.state for _, reply in bench.batch.changes.answers] == ["aborted"]  # type: ignore[union-attr]
    assert bench.value("a") is None


def test_a_commit_whose_decision_cannot_be_read_is_not_said_to_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    commit = DecideCommit(1, "a", OLD, [], [put("a")], [], 1, True, None, None, ["b"])
    bench.run_any(commit)

    def damaged(*_: Any) -> Any:
        raise DataCorrupt("damaged")

    monkeypatch.setattr(bench.rows, "state", damaged)
    bench.run_any(commit)
    ((_, reply),) = bench.batch.changes.answers
    assert isinstance(reply, Outcome)
    assert reply.state == "gone"


def test_an_error_of_the_file_is_not_the_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    monkeypatch.setattr(bench.rows, "state", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        bench.one(Put(1, "a", b"1"))
