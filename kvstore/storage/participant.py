"""A store's part in transactions: prepare, commit, finish, abort, ask, as changes of rows.

Owns: what each message of two-phase commit does to intents and decisions; transactions that lie in this store alone;
reads under shared locks.
Promises: called with the locks of all its keys held, or free, by the batch. Every message is idempotent per (attempt,
key): keys move, so a store may meet an attempt twice, with other keys.
Leaves to others: the rules themselves (`transactions.intents`, `transactions.decisions`), who waits for which lock
(`batch`), who asks about old intents (`shard.recovery`).

A crash between any two batches leaves rows that say all: an intent without a decision is asked about, a decision
without its finish is applied by whoever asks. A crash within a batch leaves nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from typing import Any

import msgspec

from kvstore.errors import Conflict, Locked, from_problem
from kvstore.placement.ring import partition_of
from kvstore.protocol import (
    STAMP_MAX,
    Abort,
    Answer,
    Ask,
    Attempt,
    Commit,
    Condition,
    Finish,
    Look,
    Once,
    Outcome,
    Prepare,
    Read,
    ReadLock,
    Reads,
    ReadUnlock,
    Step,
    Transact,
    Vote,
)
from kvstore.storage.changes import NUMBER_MAX, Changes, Sink
from kvstore.storage.leases import Leases
from kvstore.storage.replies import Kept, Replies, attempt_row_key, row_key
from kvstore.storage.rows import DECISION, VALUE, Row
from kvstore.transactions.coordination import too_much_read
from kvstore.transactions.decisions import Decision, decode_decision, on_ask, on_commit
from kvstore.transactions.intents import Held, Holds, Intent, ReadHold, State, applies, decode_intent
from kvstore.transactions.locks import Identity, LockTable


class DropDecisions(msgspec.Struct):
    """The owner's own operation: these attempts' decisions may go. All are anchored in `partition`."""

    attempts: list[Attempt]
    partition: int
    id: int = 0


class EndReads(msgspec.Struct):
    """The owner's own operation: these read-only transactions have held their locks for too long, or are gone."""

    numbers: list[int]
    id: int = 0


def keys_of(op: Transact | Prepare | Commit) -> list[str]:
    """All keys that it names, in the order in which they are locked."""
    keys = {condition.key for condition in op.conditions}
    keys.update(step.key for step in op.then)
    keys.update(step.key for step in op.otherwise)
    return sorted(keys)


class Participant:
    """`decided`: attempts that were decided in this batch, each with its anchor's partition, and if it is committed;
    `dropped`: those whose decision went."""

    def __init__(
        self,
        changes: Changes,
        locks: LockTable[Any, Any],
        holds: Holds,
        leases: Leases,
        replies: Replies,
        unlock: Callable[[str, Identity], None],
    ) -> None:
        self.decided: list[tuple[Attempt, int, bool]] = []
        self.dropped: list[Attempt] = []
        self._changes = changes
        self._locks = locks
        self._holds = holds
        self._leases = leases
        self._replies = replies
        self._unlock = unlock
        self._partitions = len(changes.context.arrivals)

    # --- in this store alone ------------------------------------------------------------------------------------------

    def transact(self, op: Transact) -> Outcome:
        """All of it, in this batch. Raises Locked, DiskFull, ReadTooLarge, DataCorrupt, IdempotencyKeyReused."""
        repeated = self._repeated(op.id, op.key, op.once)
        if repeated is not None:
            return repeated
        self._end_what_is_due(keys_of(op))
        succeeded = self._hold_all(op.conditions)
        steps = op.then if succeeded else op.otherwise
        locked = self._locked(steps, op.conditions)
        if locked is not None:
            raise locked
        if any(step.op == "put" for step in steps):
            self._changes.need_room()
        reads = self._read(steps)
        writes = [step for step in steps if step.op != "get"]
        version = self._changes.step() if writes else 0
        for step in writes:
            self._write(step, version, self._changes.context.now_ms)
        if op.once is not None:
            self._keep(op.key, op.once, op.attempt, version, succeeded, reads)
        return Outcome(op.id, "committed", op.attempt.name, version, succeeded, reads=reads)

    # --- prepare ------------------------------------------------------------------------------------------------------

    def prepare(self, op: Prepare, gathered: dict[str, Identity], sink: Sink) -> Vote:
        """The locks in `gathered` are held; those of its other keys are this attempt's already, with their intents.

        They stay. Raises DiskFull, ReadTooLarge, DataCorrupt.
        """
        self._changes.need_room()
        for key in gathered:
            self._changes.state(VALUE, key)  # may raise: before anything is changed
        self._end_what_is_due(gathered)
        holds = self._hold_all(op.conditions)
        reads = self._read((*op.then, *op.otherwise))
        locked_then = self._locked(op.then, op.conditions)
        locked_otherwise = self._locked(op.otherwise, op.conditions)
        return Vote(
            op.id,
            self._leave_intents(op, gathered, sink),
            holds,
            reads,
            locked_then.problem() if locked_then else None,
            locked_otherwise.problem() if locked_otherwise else None,
        )

    def _leave_intents(self, op: Prepare, gathered: dict[str, Identity], sink: Sink) -> int:
        """The highest vote on its keys."""
        context = self._changes.context
        if gathered:
            vote = self._changes.step()
            then = {step.key: step for step in op.then if step.op != "get"}
            otherwise = {step.key: step for step in op.otherwise if step.op != "get"}
            for key, identity in gathered.items():
                intent = Intent(
                    op.attempt, op.anchor, vote, context.now_ms, then.get(key), otherwise.get(key), op.once
                )  # fmt: skip
                state = self._changes.state(VALUE, key)
                self._changes.mark(key, self._partition(key), state, intent.encode())
                self._holds.add(key, Held(identity, intent, state), context.now_s, sink)
            return vote
        hold = self._holds.of(op.attempt)
        return max(hold.vote_on(key) for key in keys_of(op)) if hold else 0

    # --- commit, finish, abort ----------------------------------------------------------------------------------------

    def settled(self, op: Commit) -> Outcome | None:
        """What the commit is answered without doing anything: the attempt is decided already, or gone."""
        decision = self._decision(op.attempt)
        forgotten = self._is_forgotten(op.attempt, op.key)
        what = on_commit(decision, op.attempt.stamp, self._changes.floor, forgotten)
        return None if what == "commit" else self._outcome(op.id, op.attempt, what, decision)

    def commit(self, op: Commit) -> Outcome:
        """At the anchor, with the locks of its keys: do this store's part and decide. The commit point.

        Raises Locked, DiskFull, ReadTooLarge, DataCorrupt, IdempotencyKeyReused: then the caller must `abort_for_good`.
        """
        settled = self.settled(op)
        if settled is not None:
            return settled
        repeated = self._repeated(op.id, op.key, op.once)
        if repeated is not None:
            self.abort_for_good(op.attempt, op.key)
            return repeated
        self._check_strikes(op)
        self._end_what_is_due(keys_of(op))
        succeeded = op.holds and self._hold_all(op.conditions)
        steps = op.then if succeeded else op.otherwise
        self._check_leases(op, succeeded)
        if any(step.op == "put" for step in steps):
            self._changes.need_room()
        reads = self._read(steps)
        self._changes.see(op.vote)
        version = self._changes.step()
        now_ms = self._changes.context.now_ms
        decision = Decision("committed", op.attempt, op.key, op.keys, version, succeeded, now_ms, reads)
        self._write_decision(decision)
        for step in steps:
            if step.op != "get":
                self._write(step, version, now_ms)
        if op.once is not None:
            own = iter(reads)
            places = op.then_reads if succeeded else op.otherwise_reads
            all_reads = [next(own) if read is None else read for read in places]
            self._keep(op.key, op.once, op.attempt, version, succeeded, all_reads)
        return self._outcome(op.id, op.attempt, "committed", decision)

    def _is_forgotten(self, attempt: Attempt, anchor: str) -> bool:
        return self._changes.context.openings.forgets(attempt.epoch, self._partition(anchor))

    def _check_strikes(self, op: Commit) -> None:
        """Raises Conflict if the vote of another store was lost with it."""
        lost = self._changes.context.openings.struck_among(op.attempt.epoch, map(self._partition, op.keys))
        if lost is not None:
            raise Conflict(f"partition {lost} was lost after the transaction began", retry_after_ms=100)

    def _check_leases(self, op: Commit, succeeded: bool) -> None:
        """Raises Locked if the branch writes to what somebody else has leased, in this store or another."""
        elsewhere = op.locked_then if succeeded else op.locked_otherwise
        if elsewhere is not None:
            raise from_problem(elsewhere)
        locked = self._locked(op.then if succeeded else op.otherwise, op.conditions)
        if locked is not None:
            raise locked

    def abort_for_good(self, attempt: Attempt, anchor: str) -> None:
        """A tombstone for the attempt: no commit of it, however late, succeeds."""
        if not self._is_decided(attempt):
            self._write_decision(Decision("aborted", attempt, anchor))

    def finish(self, op: Finish) -> Answer:
        self._apply(op.attempt, op.keys, op.version, op.succeeded, op.decided_ms)
        return Answer(op.id, 200)

    def _apply(self, attempt: Attempt, keys: Iterable[str], version: int, succeeded: bool, decided_ms: int) -> None:
        self._changes.see(version)
        for key in keys:
            held = self._holds.take(attempt, key)
            if held is None:
                continue
            step = held.intent.step(succeeded) if applies(held.intent.vote, version) else None
            if step is None:
                self._changes.mark(key, self._partition(key), held.state, None)
            else:
                self._write(step, version, decided_ms)
            self._unlock(key, held.identity)

    def abort(self, op: Abort) -> Answer:
        self._drop(op.attempt, op.keys)
        return Answer(op.id, 200)

    def _drop(self, attempt: Attempt, keys: Iterable[str]) -> None:
        for key in keys:
            held = self._holds.take(attempt, key)
            if held is not None:
                self._changes.mark(key, self._partition(key), held.state, None)
                self._unlock(key, held.identity)

    # --- recovery -----------------------------------------------------------------------------------------------------

    def ask(self, op: Ask) -> Outcome:
        """At the anchor: what became of it; if nothing has, it is aborted for good, before anybody is told."""
        decision = self._decision(op.attempt)
        forgotten = self._is_forgotten(op.attempt, op.key)
        what = on_ask(decision, op.attempt.stamp, self._changes.floor, forgotten)
        if op.attempt.stamp > STAMP_MAX and decision is None:
            what = "gone"  # no commit with such a stamp is taken; a row that says so could not be dropped by the floor
        if what == "abort":
            self.abort_for_good(op.attempt, op.key)
            what = "aborted"
        return self._outcome(op.id, op.attempt, what, decision)

    def look(self, op: Look) -> Outcome:
        """What is known of it; changes nothing."""
        if op.partition < 0:
            is_held = any(hold.attempt.name == op.name for hold in self._holds.all())
            return Outcome(op.id, "pending" if is_held else "gone", op.name)
        body = self._changes.state(DECISION, op.name).body
        if body is not None:
            decision = decode_decision(body)
            return self._outcome(op.id, decision.attempt, decision.outcome, decision)
        return Outcome(op.id, "committed" if self._replies.committed(op.name) else "gone", op.name)

    def drop_decisions(self, op: DropDecisions) -> Answer:
        for attempt in op.attempts:
            if self._is_decided(attempt):
                self._changes.write(DECISION, attempt.name, op.partition, None)
                if attempt.stamp <= STAMP_MAX:  # what lies beyond is refused at the door: nobody can ask for it later
                    self._changes.raise_floor(attempt.stamp)
            self._forget_decision(attempt)
        return Answer(op.id, 200)

    def _forget_decision(self, attempt: Attempt) -> None:
        undo = self._changes.undo
        undo.note_item(self._holds.decided, attempt)
        self._holds.decided.pop(attempt, None)
        undo.note_length(self.dropped)
        self.dropped.append(attempt)

    # --- partitions come and go ---------------------------------------------------------------------------------------

    def restore(self, row: Row) -> None:
        """A decision, or a key with its intent, which is old: nobody knows whether its router is still there."""
        if row.intent is not None:
            intent = decode_intent(row.intent)
            identity = self._locks.hold(row.key, intent.attempt.age)
            state = State(row.version, row.expires_at_ms, row.body)
            self._holds.add(row.key, Held(identity, intent, state), self._changes.context.now_s, None)
        elif row.body is not None:
            decision = decode_decision(row.body)
            self._holds.decided[decision.attempt] = row.partition
            self.decided.append((decision.attempt, row.partition, decision.outcome == "committed"))

    def forget(self, is_theirs: Callable[[str], bool], partitions: Set[int]) -> None:
        """Of these partitions nothing is held here any more; the rows stay as they are."""
        for hold in self._holds.all():
            for key in list(filter(is_theirs, hold.intents)):
                held = self._holds.take(hold.attempt, key)
                assert held is not None
                self._unlock(key, held.identity)
        for number, reader in list(self._holds.readers.items()):
            if any(map(is_theirs, reader.keys)):
                self._let_go(number, reader)
        for attempt, partition in list(self._holds.decided.items()):
            if partition in partitions:
                self._forget_decision(attempt)

    # --- read-only transactions ---------------------------------------------------------------------------------------

    def read(self, op: ReadLock, gathered: dict[str, Identity], sink: Sink) -> Reads:
        """Under shared locks, which stay until they are let go, or `EndReads`. Raises ReadTooLarge, DataCorrupt."""
        for key, identity in gathered.items():
            if self._locks.is_alone(key, identity):  # what other readers saw must stay: then it expires after them
                self._changes.expire_if_due(VALUE, key, self._partition(key))
        reads = self._read_keys(op.keys)
        first = gathered[op.keys[0]]
        self._changes.undo.note_item(self._holds.readers, first.number)
        self._holds.readers[first.number] = ReadHold(gathered, self._changes.context.now_s, sink)
        return Reads(op.id, reads, (first.opening, first.number))

    def unlock_reads(self, op: ReadUnlock) -> Answer:
        """200 if it still has them all: they go together, with the partition of any."""
        opening, number = op.lock
        hold = self._holds.readers.get(number)
        if hold is None or Identity(opening, number) not in hold.keys.values():
            return Answer(op.id, 409)
        self._let_go(number, hold)
        return Answer(op.id, 200)

    def end_reads(self, op: EndReads) -> Answer:
        for number in op.numbers:
            hold = self._holds.readers.get(number)
            if hold is not None:
                self._let_go(number, hold)
        return Answer(op.id, 200)

    def _let_go(self, number: int, hold: ReadHold) -> None:
        self._changes.undo.note_item(self._holds.readers, number)
        del self._holds.readers[number]
        for key, identity in hold.keys.items():
            self._unlock(key, identity)

    # --- parts --------------------------------------------------------------------------------------------------------

    def _partition(self, key: str) -> int:
        return partition_of(key.encode(), self._partitions)

    def _end_what_is_due(self, keys: Iterable[str]) -> None:
        for key in keys:
            partition = self._partition(key)
            self._leases.on(key, partition)
            self._changes.expire_if_due(VALUE, key, partition)

    def _hold_all(self, conditions: list[Condition]) -> bool:
        return all(self._holds_true(condition) for condition in conditions)

    def _holds_true(self, condition: Condition) -> bool:
        if condition.token is not None:
            lease = self._locks.lease(condition.key)
            return lease is not None and lease.token == condition.token
        before = self._changes.before(VALUE, condition.key)
        if condition.exists is not None:
            return before.live == condition.exists
        return before.live and before.version == condition.version

    def _locked(self, steps: list[Step], conditions: list[Condition]) -> Locked | None:
        """The error if the steps write to what is leased, and no condition names its token."""
        for step in steps:
            lease = self._locks.lease(step.key) if step.op != "get" else None
            if lease is not None and not any(c.token == lease.token and c.key == step.key for c in conditions):
                return self._leases.locked(lease)
        return None

    def _read(self, steps: Iterable[Step]) -> list[Read]:
        return self._read_keys(step.key for step in steps if step.op == "get")

    def _read_keys(self, keys: Iterable[str]) -> list[Read]:
        """Raises ReadTooLarge."""
        reads: list[Read] = []
        left = self._changes.context.read_bytes_max
        for key in keys:
            left -= self._changes.before(VALUE, key).size
            if left < 0:
                raise too_much_read(self._changes.context.read_bytes_max)
            state = self._changes.state(VALUE, key)
            reads.append(Read(state.version if state.body is not None else 0, state.body))
        return reads

    def _write(self, step: Step, version: int, decided_ms: int) -> None:
        body = step.value if step.op == "put" else None
        # An intent may have been stored when other limits were in force; it must be able to be applied all the same.
        expires_at_ms = min(decided_ms + step.ttl_ms, NUMBER_MAX) if step.ttl_ms else 0
        self._changes.write(VALUE, step.key, self._partition(step.key), body, expires_at_ms, version)

    def _is_decided(self, attempt: Attempt) -> bool:
        return attempt in self._holds.decided

    def _decision(self, attempt: Attempt) -> Decision | None:
        if not self._is_decided(attempt):
            return None
        return decode_decision(self._changes.state(DECISION, attempt.name).body or b"")

    def _write_decision(self, decision: Decision) -> None:
        partition = self._partition(decision.anchor)
        self._changes.write_new(DECISION, decision.attempt.name, partition, decision.encode())
        undo = self._changes.undo
        undo.note_item(self._holds.decided, decision.attempt)
        self._holds.decided[decision.attempt] = partition
        undo.note_length(self.decided)
        self.decided.append((decision.attempt, partition, decision.outcome == "committed"))

    def _outcome(self, op_id: int, attempt: Attempt, state: Any, decision: Decision | None) -> Outcome:
        floor = self._changes.floor
        if state != "committed" or decision is None:
            return Outcome(op_id, state, attempt.name, floor=floor)
        version, succeeded, decided_ms = decision.version, decision.succeeded, decision.decided_ms
        return Outcome(op_id, state, attempt.name, version, succeeded, decided_ms, decision.reads, floor)

    def _repeated(self, op_id: int, anchor: str, once: Once | None) -> Outcome | None:
        kept = self._replies.find(row_key("Txn", anchor, once), once) if once is not None else None
        if kept is None:
            return None
        return Outcome(op_id, "repeated", kept.attempt, kept.version, kept.succeeded, reads=kept.reads)

    def _keep(
        self, anchor: str, once: Once, attempt: Attempt, version: int, succeeded: bool, reads: list[Read]
    ) -> None:
        kept = Kept(once.digest, 200, version, attempt=attempt.name, succeeded=succeeded, reads=reads)
        partition = self._partition(anchor)
        self._replies.keep(row_key("Txn", anchor, once), partition, kept)
        self._replies.keep(attempt_row_key(attempt.name), partition, msgspec.structs.replace(kept, reads=[]))
