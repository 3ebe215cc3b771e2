"""A store's part in transactions: prepare, commit, finish and abort, as changes of rows.

Owns: what these messages of two-phase commit do to intents; transactions that lie in this store alone.
Promises: called with the locks of all its keys held, or free, by the batch. Every message is idempotent per (attempt,
key): keys move, so a store may meet an attempt twice, with other keys.
Leaves to others: the rules themselves (`transactions.intents`), decisions (`outcomes`), what a step means
(`txn_steps`), reads under locks (`read_locks`), which operation waits for which lock (`batch`), asking about old
intents (`shard.recovery`).

A crash between any two batches leaves rows that say all: an intent without a decision is asked about, a decision
without its finish is applied by the store that asks. A crash within a batch leaves nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvstore import failpoints
from kvstore.errors import Conflict, from_problem
from kvstore.model import Attempt
from kvstore.protocol import Abort, Answer, ApplyIntents, DecideCommit, Outcome, Prepare, Transact, Vote
from kvstore.storage.rows import VALUE, Row
from kvstore.store.ops import keys_of
from kvstore.store.outcomes import Outcomes
from kvstore.store.ready import Ready
from kvstore.store.txn_steps import TxnSteps
from kvstore.store.write_set import Sink, WriteSet
from kvstore.transactions.decisions import Decision
from kvstore.transactions.intents import Intent, PreparedKey, PreparedTxns, State, applies, decode_intent
from kvstore.transactions.locks import Identity


class Participant:
    """The intents of a store, as one batch changes them."""

    def __init__(
        self, changes: WriteSet, holds: PreparedTxns, steps: TxnSteps, outcomes: Outcomes, ready: Ready
    ) -> None:
        self._changes = changes
        self._holds = holds
        self._steps = steps
        self._outcomes = outcomes
        self._unlock = ready.unlock

    # --- in this store alone ------------------------------------------------------------------------------------------

    def transact(self, op: Transact) -> Outcome:
        """Do all of a transaction that lies in this store, in this batch.

        Raises Locked (`locked`), DiskFull, ReadTooLarge, DataCorrupt, IdempotencyKeyReused.
        """
        repeated = self._outcomes.repeated(op.id, op.key, op.once)
        if repeated is not None:
            return repeated
        self._steps.end_what_is_due(keys_of(op))
        succeeded = self._steps.hold_all(op.conditions)
        steps = op.then if succeeded else op.otherwise
        locked = self._steps.locked(steps, op.conditions)
        if locked is not None:
            raise locked
        if any(step.op == "put" for step in steps):
            self._changes.need_room()
        reads = self._steps.read(steps)
        writes = [step for step in steps if step.op != "get"]
        version = self._changes.step() if writes else 0
        for step in writes:
            self._steps.write(step, version, self._changes.context.now_ms)
        if op.once is not None:
            self._outcomes.keep(op.key, op.once, op.attempt, version, succeeded, reads)
        return Outcome(op.id, "committed", op.attempt.name, version, succeeded, reads=reads)

    # --- prepare ------------------------------------------------------------------------------------------------------

    def prepare(self, op: Prepare, gathered: dict[str, Identity], sink: Sink) -> Vote:
        """Vote, and leave an intent on each key. Raises DiskFull, ReadTooLarge, DataCorrupt.

        The locks in `gathered` are held, and stay; those of its other keys are this attempt's already, with their
        intents.
        """
        self._changes.need_room()
        for key in gathered:
            self._changes.state(VALUE, key)  # may raise: before anything is changed
        self._steps.end_what_is_due(gathered)
        holds = self._steps.hold_all(op.conditions)
        reads = self._steps.read((*op.then, *op.otherwise))
        locked_then = self._steps.locked(op.then, op.conditions)
        locked_otherwise = self._steps.locked(op.otherwise, op.conditions)
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
            changes, attempt, anchor, once = self._changes, op.attempt, op.anchor, op.once
            vote = changes.step()
            then = {step.key: step for step in op.then if step.op != "get"}
            otherwise = {step.key: step for step in op.otherwise if step.op != "get"}
            for key, identity in gathered.items():
                intent = Intent(attempt, anchor, vote, context.now_ms, then.get(key), otherwise.get(key), once)
                state = changes.state(VALUE, key)
                changes.mark(key, self._steps.partition_of(key), state, intent.encode())
                self._holds.add(key, PreparedKey(identity, intent, state), context.now_s, sink)
            return vote
        hold = self._holds.of(op.attempt)
        return max(hold.vote_on(key) for key in keys_of(op)) if hold else 0

    # --- commit, finish, abort ----------------------------------------------------------------------------------------

    def commit(self, op: DecideCommit) -> Outcome:
        """Do this store's part and decide, at the anchor, with the locks of its keys: the commit point.

        Raises Locked, DiskFull, ReadTooLarge, DataCorrupt, IdempotencyKeyReused, Conflict (a vote was lost with its
        shard): then the caller must `abort_for_good`.
        """
        settled = self._outcomes.settled(op)
        if settled is not None:
            return settled
        repeated = self._outcomes.repeated(op.id, op.key, op.once)
        if repeated is not None:
            self._outcomes.abort_for_good(op.attempt, op.key)
            return repeated
        self._check_strikes(op)
        self._steps.end_what_is_due(keys_of(op))
        succeeded = op.holds and self._steps.hold_all(op.conditions)
        steps = op.then if succeeded else op.otherwise
        self._check_leases(op, succeeded)
        if any(step.op == "put" for step in steps):
            self._changes.need_room()
        reads = self._steps.read(steps)
        self._changes.see(op.vote)
        version = self._changes.step()
        now_ms = self._changes.context.now_ms
        decision = Decision("committed", op.attempt, op.key, op.keys, version, succeeded, now_ms, reads)
        self._outcomes.write(decision)
        for step in steps:
            if step.op != "get":
                self._steps.write(step, version, now_ms)
        if op.once is not None:
            own = iter(reads)
            places = op.then_reads if succeeded else op.otherwise_reads
            all_reads = [next(own) if read is None else read for read in places]
            self._outcomes.keep(op.key, op.once, op.attempt, version, succeeded, all_reads)
        return self._outcomes.outcome(op.id, op.attempt, "committed", decision)

    def _check_strikes(self, op: DecideCommit) -> None:
        """Raises Conflict if the vote of another store was lost with it."""
        partitions = map(self._steps.partition_of, op.keys)
        openings = self._changes.context.openings
        lost = openings.struck_among(op.attempt.epoch, partitions) if openings.struck else None
        if lost is not None:
            raise Conflict(f"Partition {lost} was lost after the transaction began.", retry_after_ms=100)

    def _check_leases(self, op: DecideCommit, succeeded: bool) -> None:
        """Raises Locked if the branch writes to what another client has leased, in this store or another."""
        elsewhere = op.locked_then if succeeded else op.locked_otherwise
        if elsewhere is not None:
            raise from_problem(elsewhere)
        locked = self._steps.locked(op.then if succeeded else op.otherwise, op.conditions)
        if locked is not None:
            raise locked

    def finish(self, op: ApplyIntents) -> Answer:
        """Apply the attempt's intents on these keys, as it was decided; no-op for keys without one."""
        self._apply(op.attempt, op.keys, op.version, op.succeeded, op.decided_ms)
        return Answer(op.id, 200)

    def _apply(self, attempt: Attempt, keys: Iterable[str], version: int, succeeded: bool, decided_ms: int) -> None:
        self._changes.see(version)
        for key in keys:
            held = self._holds.take(attempt, key)
            if held is None:
                continue
            counts = applies(held.intent.vote, version) or failpoints.planted("late-prepare-applied")
            step = held.intent.step(succeeded) if counts else None
            if step is None:
                self._changes.mark(key, self._steps.partition_of(key), held.state, None)
            else:
                self._steps.write(step, version, decided_ms)
            self._unlock(key, held.identity)

    def abort(self, op: Abort) -> Answer:
        """Drop the attempt's intents on these keys; no-op for keys without one."""
        self._drop(op.attempt, op.keys)
        return Answer(op.id, 200)

    def _drop(self, attempt: Attempt, keys: Iterable[str]) -> None:
        for key in keys:
            held = self._holds.take(attempt, key)
            if held is not None:
                self._changes.mark(key, self._steps.partition_of(key), held.state, None)
                self._unlock(key, held.identity)

    # --- partitions come and go ---------------------------------------------------------------------------------------

    def restore(self, row: Row, hold: Callable[[str, tuple[int, str]], Identity]) -> None:
        """A key that arrives with its intent, which is old.
        No router is known to be there that may decide it."""
        assert row.intent is not None
        intent = decode_intent(row.intent)
        state = State(row.version, row.expires_at_ms, row.body)
        self._holds.add(
            row.key, PreparedKey(hold(row.key, intent.attempt.age), intent, state), self._changes.context.now_s, None
        )

    def forget(self, is_theirs: Callable[[str], bool]) -> None:
        """Of these keys nothing is held here any more; the rows stay as they are."""
        for hold in self._holds.all():
            for key in list(filter(is_theirs, hold.intents)):
                held = self._holds.take(hold.attempt, key)
                assert held is not None
                self._unlock(key, held.identity)
