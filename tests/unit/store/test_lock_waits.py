"""Who waits for a lock is answered once: done, or refused and not done."""

from __future__ import annotations

from kvstore.model import Attempt, TxnOp
from kvstore.protocol import Abort, Answer, Outcome, Prepare, Put, Reply, Transact
from kvstore.store.batch import Batch
from kvstore.store.ops import EndLockWaits, WriteOp
from kvstore.store.write_set import Context
from tests.unit.store.harness import Bench, Sink


def decide(bench: Bench, *work: tuple[WriteOp, Sink]) -> None:
    """One batch, committed and answered."""
    context = Context(bench.now_ms, bench.now_s, bench.arrivals, 1, False, bench.kept_ms, 1 << 24)
    batch = Batch(bench.clock, context, bench.locks, bench.holds, bench.rows)
    for op, sink in work:
        batch.decide(op, sink)
    bench.rows.rows.update(batch.changes.rows)
    bench.clock = batch.changes.clock
    for sink, answer in batch.changes.answers:
        sink.send(answer)


def attempt(start: int) -> Attempt:
    return Attempt(start, start, "router01")


def prepare(start: int, *keys: str) -> Prepare:
    return Prepare(0, "elsewhere", attempt(start), [], [TxnOp("put", key, b"p") for key in keys], [])


def is_done(reply: Reply) -> bool:
    return isinstance(reply, Outcome) or (isinstance(reply, Answer) and reply.status < 300)


def waiting_in_a_row() -> tuple[Bench, list[Sink]]:
    """One holds "b"; an older one holds "a" and waits for "b"; a transaction and a PUT wait for "a"."""
    bench = Bench()
    holder, older, transaction, plain = Sink(), Sink(), Sink(), Sink()
    decide(bench, (prepare(20, "b"), holder))
    decide(bench, (prepare(10, "a", "b"), older))
    decide(bench, (Transact(0, "a", attempt(30), [], [TxnOp("put", "a", b"t")], []), transaction))
    decide(bench, (Put(0, "a", b"plain"), plain))
    assert [len(sink.replies) for sink in (holder, older, transaction, plain)] == [1, 0, 0, 0]
    return bench, [older, transaction, plain]


def test_who_has_the_lock_because_another_was_sent_away_is_not_refused_as_well() -> None:
    bench, sinks = waiting_in_a_row()
    decide(bench, (EndLockWaits(bench.now_s + 1, bench.now_s + 1), Sink()))
    assert [len(sink.replies) for sink in sinks] == [1, 1, 1]
    done = [is_done(sink.replies[0]) for sink in sinks]
    assert done[0] is False
    assert any(done) == (bench.value("a") is not None)
    assert bench.locks.is_free("a")


def test_those_without_an_age_are_given_longer() -> None:
    bench, (older, transaction, plain) = waiting_in_a_row()
    decide(bench, (EndLockWaits(bench.now_s + 1, bench.now_s - 1), Sink()))
    assert [is_done(sink.replies[0]) for sink in (older, transaction, plain)] == [False, True, True]
    assert bench.value("a") == b"plain"


def test_an_abort_lets_those_go_on_who_waited_behind_it() -> None:
    bench, (older, transaction, plain) = waiting_in_a_row()
    decide(bench, (Abort(0, attempt(10), ["a", "b"]), Sink()))
    assert [is_done(sink.replies[0]) for sink in (older, transaction, plain)] == [False, True, True]
    assert bench.value("a") == b"plain"
    assert not bench.locks.is_free("b")


def test_who_is_gone_is_dropped_and_not_done() -> None:
    bench, (older, transaction, plain) = waiting_in_a_row()
    older.closed = transaction.closed = True
    decide(bench, (EndLockWaits(bench.now_s - 1, bench.now_s - 1), Sink()))
    assert [is_done(reply) for reply in plain.replies] == [True]
    assert not any(is_done(reply) for reply in transaction.replies)
    assert bench.value("a") == b"plain"
