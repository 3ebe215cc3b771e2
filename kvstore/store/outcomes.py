"""Decisions of transactions anchored in this store, as rows, and what is answered about them.

Owns: the decision's row; what a commit that was decided before, an ask and a look are answered; kept replies of
transactions.
Promises: a decision is written once, and looked for in the very batch that would write it. When one goes, the low-water
mark of stamps rises with it.
Leaves to others: the rules (`transactions.decisions`), what a commit does (`participant`), when a decision may go
(`decision_table`, `shard.recovery`).
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import msgspec

from kvstore.model import STAMP_MAX, Attempt, IdempotencyKey, Read
from kvstore.protocol import Answer, DecideCommit, GetTxn, Outcome, ResolveTxn
from kvstore.storage.rows import DECISION, Row
from kvstore.store.idempotency import Idempotency, IdempotencyRecord, attempt_row_key, row_key
from kvstore.store.ops import DropDecisions
from kvstore.store.txn_steps import TxnSteps
from kvstore.store.write_set import WriteSet
from kvstore.transactions.decisions import Decision, decode_decision, on_ask, on_commit
from kvstore.transactions.intents import PreparedTxns


class Outcomes:
    """The decisions, as one batch sees and changes them.

    `decided`: attempts that were decided in this batch, each with its anchor's partition, and if it is committed;
    `dropped`: those whose decision went.
    """

    def __init__(self, changes: WriteSet, holds: PreparedTxns, steps: TxnSteps, idempotency: Idempotency) -> None:
        self.decided: list[tuple[Attempt, int, bool]] = []
        self.dropped: list[Attempt] = []
        self._changes = changes
        self._holds = holds
        self._steps = steps
        self._idempotency = idempotency

    def is_decided(self, attempt: Attempt) -> bool:
        """Whether its decision is kept here."""
        return attempt.name in self._holds.decided

    def decision(self, attempt: Attempt) -> Decision | None:
        """Its decision, while it is kept here. Raises DataCorrupt."""
        if not self.is_decided(attempt):
            return None
        return decode_decision(self._changes.state(DECISION, attempt.name).body or b"")

    def write(self, decision: Decision) -> None:
        """The commit point, or a tombstone for the attempt."""
        partition = self._steps.partition_of(decision.anchor)
        self._changes.write_new(DECISION, decision.attempt.name, partition, decision.encode())
        undo = self._changes.undo
        undo.note_item(self._holds.decided, decision.attempt.name)
        self._holds.decided[decision.attempt.name] = decision.attempt, partition
        undo.note_length(self.decided)
        self.decided.append((decision.attempt, partition, decision.outcome == "committed"))

    def outcome(self, op_id: int, attempt: Attempt, state: Any, decision: Decision | None) -> Outcome:
        """The answer `state` about the attempt, with what was decided if that is "committed"."""
        floor = self._changes.floor
        if state != "committed" or decision is None:
            return Outcome(op_id, state, attempt.name, floor=floor)
        version, succeeded, decided_ms = decision.version, decision.succeeded, decision.decided_ms
        return Outcome(op_id, state, attempt.name, version, succeeded, decided_ms, decision.reads, floor)

    def repeated(self, op_id: int, anchor: str, once: IdempotencyKey | None) -> Outcome | None:
        """The kept reply to the same request, None if it is new. Raises IdempotencyKeyReused, DataCorrupt."""
        kept = self._idempotency.find(row_key("Txn", anchor, once), once) if once is not None else None
        if kept is None:
            return None
        return Outcome(op_id, "repeated", kept.attempt, kept.version, kept.succeeded, reads=kept.reads)

    def keep(
        self, anchor: str, once: IdempotencyKey, attempt: Attempt, version: int, succeeded: bool, reads: list[Read]
    ) -> None:
        """Keep the reply under its Idempotency-Key, and under the attempt's name."""
        kept = IdempotencyRecord(once.digest, 200, version, attempt=attempt.name, succeeded=succeeded, reads=reads)
        partition = self._steps.partition_of(anchor)
        self._idempotency.keep(row_key("Txn", anchor, once), partition, kept)
        self._idempotency.keep(attempt_row_key(attempt.name), partition, msgspec.structs.replace(kept, reads=[]))

    # --- what is answered -------------------------------------------------------------------------------------------

    def settled(self, op: DecideCommit) -> Outcome | None:
        """What the commit is answered without doing anything: the attempt is decided already, or gone."""
        decision = self.decision(op.attempt)
        forgotten = self._is_forgotten(op.attempt, op.key)
        what = on_commit(decision, op.attempt.stamp, self._changes.floor, forgotten)
        return None if what == "commit" else self.outcome(op.id, op.attempt, what, decision)

    def _is_forgotten(self, attempt: Attempt, anchor: str) -> bool:
        return self._changes.context.openings.forgets(attempt.epoch, self._steps.partition_of(anchor))

    def abort_for_good(self, attempt: Attempt, anchor: str) -> None:
        """A tombstone for the attempt: no commit of it, however late, succeeds."""
        if not self.is_decided(attempt):
            self.write(Decision("aborted", attempt, anchor))

    def ask(self, op: ResolveTxn) -> Outcome:
        """At the anchor: what became of it; if nothing has, it is aborted for good, before any process is told."""
        decision = self.decision(op.attempt)
        forgotten = self._is_forgotten(op.attempt, op.key)
        what = on_ask(decision, op.attempt.stamp, self._changes.floor, forgotten)
        if op.attempt.stamp > STAMP_MAX and decision is None:
            what = "gone"  # no commit with such a stamp is taken; a row that says so could not be dropped by the floor
        if what == "abort":
            self.abort_for_good(op.attempt, op.key)
            what = "aborted"
        return self.outcome(op.id, op.attempt, what, decision)

    def look(self, op: GetTxn) -> Outcome:
        """What is known of it; changes nothing."""
        if op.partition < 0:
            is_held = any(hold.attempt.name == op.name for hold in self._holds.all())
            return Outcome(op.id, "pending" if is_held else "gone", op.name)
        body = self._changes.state(DECISION, op.name).body
        if body is not None:
            decision = decode_decision(body)
            return self.outcome(op.id, decision.attempt, decision.outcome, decision)
        if (kept := self._idempotency.of_attempt(op.name)) is not None:
            return Outcome(op.id, "committed", op.name, kept.version, kept.succeeded)
        return Outcome(op.id, "gone", op.name)

    def drop(self, op: DropDecisions) -> Answer:
        """These decisions go, and the low-water mark of stamps rises."""
        for attempt in op.attempts:
            kept = self._holds.decided.get(attempt.name)
            if kept is not None:
                self._changes.write(DECISION, attempt.name, kept[1], None)
                if attempt.stamp <= STAMP_MAX:  # what lies beyond is refused at the door: it cannot be asked for later
                    self._changes.raise_floor(attempt.stamp)
            self._forget(attempt)
        return Answer(op.id, 200)

    def _forget(self, attempt: Attempt) -> None:
        undo = self._changes.undo
        undo.note_item(self._holds.decided, attempt.name)
        self._holds.decided.pop(attempt.name, None)
        undo.note_length(self.dropped)
        self.dropped.append(attempt)

    # --- partitions come and go ---------------------------------------------------------------------------------------

    def restore(self, row: Row) -> None:
        """A decision of a partition that arrives."""
        if row.body is not None:
            decision = decode_decision(row.body)
            self._holds.decided[decision.attempt.name] = decision.attempt, row.partition
            self.decided.append((decision.attempt, row.partition, decision.outcome == "committed"))

    def forget(self, partitions: Set[int]) -> None:
        """Nothing of these partitions is decided here any more; the rows stay as they are."""
        for attempt, partition in list(self._holds.decided.values()):
            if partition in partitions:
                self._forget(attempt)
