"""Each rule of transactions, taken out: then the explorer finds a story that ends badly.

A rule that no test misses is either not tested or not needed. Below, each rule of kvstore/DESIGN.md (sections 4, 5,
6) is taken out alone, by replacing one function, and one scenario of `scenarios` has to show it.

What is not here, and why:
- "Decide names the anchor's vote", "a tombstone drops the anchor's intent", "tombstones are looked for in the batch
  that writes an anchor's intent": the anchor's store is asked last, does its part and decides in one batch, and has no
  intent of its own. What took their place is here: a commit looks for a tombstone and for the floor in its own batch,
  also after it has waited for a lock.
- "Prepare is idempotent per (attempt, key), never per store": the coordinator sends an attempt's prepare once to each
  store, and begins another attempt when a key has moved. A store keeps the rule all the same; the test is
  `test_a_key_that_moved_to_a_store_that_already_takes_part_is_prepared_there_too`.
- "An abort cancels a prepare that still waits": without that it leaves an intent later, which is asked about and
  dropped. Nothing wrong comes of it, only a delay; `test_an_abort_cancels_a_prepare_that_still_waits`.
- A finish moves the version clock up to the transaction's version: what it writes does that anyway, and where it writes
  nothing a late duplicate has nothing to write either.
- A retry takes the lock that was in its way first, by itself: the store looks whether the attempt holds nothing else;
  the coordinator sees to it, too, so either alone will do. Here it is the store that no longer looks, for all prepares.
- The retry keeps its start, stamps follow the floors heard of: without that transactions starve, but are right
  (`test_transaction_rules`).
- A GET between executed and visible, a reader that fills the cache late: these rules lie in `storage.store`, and so do
  their tests. That a read waits for an intent does, too; here the explorer's own read stands in for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from kvstore.errors import KvError, OutcomeUnknown, Unavailable
from kvstore.model import Attempt
from kvstore.protocol import (
    Acquire,
    Answer,
    ApplyIntents,
    DecideCommit,
    Outcome,
    Prepare,
    ReadUnlock,
    Release,
    ResolveTxn,
)
from kvstore.router.coordinator import Coordinator
from kvstore.router.intent_resolver import IntentResolver
from kvstore.store import batch as batch_module
from kvstore.store import ops, outcomes, participant
from kvstore.store.batch import Batch
from kvstore.store.idempotency import Idempotency
from kvstore.store.lock_waits import LockWaits
from kvstore.store.ops import ExpireLease
from kvstore.store.outcomes import Outcomes
from kvstore.store.ownership import Ownership
from kvstore.store.participant import Participant
from kvstore.store.read_locks import ReadLocks
from kvstore.store.refusals import refusal
from kvstore.store.txn_steps import TxnSteps
from kvstore.store.write_set import WriteSet
from kvstore.transactions import locks
from kvstore.transactions.attempts import Stamps
from kvstore.transactions.locks import LockTable
from tests.unit.transactions import cluster, explorer, world
from tests.unit.transactions.explorer import explore
from tests.unit.transactions.scenarios import SCENARIOS
from tests.unit.transactions.world import Violation

Change = Callable[[pytest.MonkeyPatch], None]


class Mutation(NamedTuple):
    change: Change
    shown_by: str


MUTATIONS: list[Mutation] = []


def shown_by(scenario: str) -> Callable[[Change], Change]:
    def note(change: Change) -> Change:
        MUTATIONS.append(Mutation(change, scenario))
        return change

    return note


def _patched(patch: pytest.MonkeyPatch, where: Any, name: str, change: Callable[[Any], Any]) -> None:
    """Replace a function by what `change` makes of it."""
    patch.setattr(where, name, change(getattr(where, name)))


# --- "Prepare: lock the keys of if, then and else, one intent row per key (reads too)" --------------------------------


def _keys_are(patch: pytest.MonkeyPatch, keys_of: Callable[[Any], set[str]]) -> None:
    for module in (participant, ops):
        patch.setattr(module, "keys_of", lambda op: sorted(keys_of(op)))


@shown_by("the else branch runs")
def keys_of_else_are_not_locked(patch: pytest.MonkeyPatch) -> None:
    _keys_are(patch, lambda op: {each.key for each in (*op.conditions, *op.then)})


@shown_by("each deletes what the other one needs")
def keys_that_are_only_read_are_not_locked(patch: pytest.MonkeyPatch) -> None:
    _keys_are(patch, lambda op: {step.key for step in (*op.then, *op.otherwise) if step.op != "get"})


@shown_by("two transactions over two keys in opposite order")
def a_commit_does_not_wait_for_locks(patch: pytest.MonkeyPatch) -> None:
    def change(gather: Any) -> Any:
        def changed(self: Any, queued: Any) -> None:
            if not isinstance(queued.op, DecideCommit):
                return gather(self, queued)
            try:
                return self.changes.answer(queued.sink, self.part.commit(queued.op))
            except KvError as error:
                return self.waits.give_up(queued, error)

        return changed

    _patched(patch, Batch, "_gather", change)


# --- "A lock named in a condition is a key named: release, expiry and grant of that lock wait for its intent" ---------


@shown_by("a guard's lock is released and granted")
def a_guards_lock_is_not_a_key(patch: pytest.MonkeyPatch) -> None:
    def keys_of(op: Any) -> set[str]:
        guards = {condition.key for condition in op.conditions if condition.token is not None}
        return {each.key for each in (*op.conditions, *op.then, *op.otherwise)} - guards

    _keys_are(patch, keys_of)


@shown_by("a guard's lock is released and granted")
def release_and_grant_do_not_wait_for_an_intent(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(batch_module, "_PASSES_LOCKS", batch_module._PASSES_LOCKS | {Release, Acquire})


@shown_by("a guard's lock is due")
def expiry_does_not_wait_for_an_intent(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(batch_module, "_PASSES_LOCKS", batch_module._PASSES_LOCKS | {ExpireLease, Acquire})


@shown_by("a leased key is written by a transaction without the token")
def a_transaction_does_not_look_for_leases(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TxnSteps, "locked", lambda *_: None)


# --- "Version = 1 + the highest vote"; "an intent is applied only if its own vote is below" ---------------------------


@shown_by("two transactions over two keys in opposite order")
def the_version_is_not_above_all_votes(patch: pytest.MonkeyPatch) -> None:
    _patched(patch, WriteSet, "see", lambda see: lambda self, version: see(self, version - 1))


@shown_by("a doubled prepare after finish and a later put")
def an_intent_is_applied_whatever_its_vote(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(participant, "applies", lambda vote, version: True)


@shown_by("a key moves to a clock that is behind")
def the_clock_does_not_move_with_a_key(patch: pytest.MonkeyPatch) -> None:
    def change(later_clock: Any) -> Any:
        return lambda own, source: later_clock(own, source._replace(version=0))

    _patched(patch, world, "later_clock", change)


# --- "It is refused where a tombstone stands" -------------------------------------------------------------------------


def _on_commit_sees(patch: pytest.MonkeyPatch, sees: Callable[[Any, int], tuple[Any, int]]) -> None:
    def change(on_commit: Any) -> Any:
        def changed(decision: Any, stamp: int, floor: int, *more: Any) -> Any:
            decision, floor = sees(decision, floor)
            return on_commit(decision, stamp, floor, *more)

        return changed

    _patched(patch, outcomes, "on_commit", change)


@shown_by("another one asks before the commit has arrived")
def a_commit_ignores_a_tombstone(patch: pytest.MonkeyPatch) -> None:
    _on_commit_sees(patch, lambda decision, floor: (_unless(decision, "aborted"), floor))


@shown_by("a commit repeated after its decision was dropped")
def a_commit_is_done_again(patch: pytest.MonkeyPatch) -> None:
    _on_commit_sees(patch, lambda decision, floor: (_unless(decision, "committed"), floor))


def _unless(decision: Any, outcome: str) -> Any:
    return None if decision is not None and decision.outcome == outcome else decision


@shown_by("a commit waits for a lock and another one asks")
def a_commit_that_waited_does_not_look_for_a_tombstone_again(patch: pytest.MonkeyPatch) -> None:
    def change(commit: Any) -> Any:
        def changed(self: Any, op: DecideCommit) -> Any:
            self._outcomes.settled = lambda _: None
            try:
                return commit(self, op)
            finally:
                del self._outcomes.settled

        return changed

    _patched(patch, Participant, "commit", change)


@shown_by("two transactions over two keys in opposite order")
def a_refused_commit_leaves_no_tombstone(patch: pytest.MonkeyPatch) -> None:
    def give_up(self: Any, queued: Any, error: KvError) -> None:
        self.release(queued)
        self._changes.answer(queued.sink, refusal(queued.op.id, error))

    patch.setattr(LockWaits, "give_up", give_up)


@shown_by("the same request again, very late")
def a_commit_that_is_answered_with_a_kept_reply_leaves_no_tombstone(patch: pytest.MonkeyPatch) -> None:
    def change(commit: Any) -> Any:
        def changed(self: Any, op: DecideCommit) -> Any:
            outcomes = self._outcomes
            repeated = outcomes.repeated(op.id, op.key, op.once) if outcomes.settled(op) is None else None
            return repeated or commit(self, op)

        return changed

    _patched(patch, Participant, "commit", change)


# --- "Once it may have been sent, the router passes on only what the anchor answers" ----------------------------------


@shown_by("another one asks before the commit has arrived")
def a_commit_that_may_be_lost_is_given_up(patch: pytest.MonkeyPatch) -> None:
    async def commit(self: Any, op: DecideCommit, transaction: Any, deadline_s: float) -> Any:
        try:
            return await self._service.owner_of(op.key).request(op)
        except KvError as error:
            self._after.abort(op.attempt, op.keys)
            raise Unavailable(error.detail) from None

    patch.setattr(Coordinator, "_commit", commit)


@shown_by("a key of the anchor's store moves")
def a_commit_that_has_met_no_owner_is_tried_again(patch: pytest.MonkeyPatch) -> None:
    async def commit(self: Any, op: DecideCommit, transaction: Any, deadline_s: float) -> Any:
        while True:
            try:
                reply = await self._service.owner_of(op.key).request(op)
            except OutcomeUnknown:
                continue
            if isinstance(reply, Outcome) and reply.state == "gone":
                raise self._unknown("gone", transaction, op.attempt)
            return reply

    patch.setattr(Coordinator, "_commit", commit)


# --- "The decision may go only when the present owner of every key has acknowledged that no intent is left there" -----


@shown_by("the decision of three stores is dropped")
def a_decision_goes_without_acknowledgement(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(explorer, "may_drop", lambda noted: True)


@shown_by("the decision of three stores is dropped")
def a_router_says_forget_before_all_have_finished(patch: pytest.MonkeyPatch) -> None:
    def change(finish: Any) -> Any:
        def changed(self: Any, others: Any, anchor: str, attempt: Attempt, outcome: Outcome) -> None:
            self._forget_later(attempt, anchor)
            finish(self, others, anchor, attempt, outcome)

        return changed

    _patched(patch, IntentResolver, "finish", change)


def _is_done_by_any_attempt(patch: pytest.MonkeyPatch, kind: type) -> None:
    def change(foreign: Any) -> Any:
        return lambda self, op, keys: None if isinstance(op, kind) else foreign(self, op, keys)

    _patched(patch, Ownership, "foreign", change)


@shown_by("a key of the anchor's store moves")
def a_store_acknowledges_what_it_does_not_own(patch: pytest.MonkeyPatch) -> None:
    _is_done_by_any_attempt(patch, ApplyIntents)


# --- Recovery: "writes a tombstone, also when it has never heard of the attempt"; "only the present owner may answer" -


@shown_by("another one asks before the commit has arrived")
def who_asks_is_told_aborted_without_a_tombstone(patch: pytest.MonkeyPatch) -> None:
    def change(on_ask: Any) -> Any:
        return lambda *known: "aborted" if on_ask(*known) == "abort" else on_ask(*known)

    _patched(patch, outcomes, "on_ask", change)


@shown_by("a key moves while its transaction runs")
def who_asks_is_answered_by_any_attempt(patch: pytest.MonkeyPatch) -> None:
    _is_done_by_any_attempt(patch, ResolveTxn)


@shown_by("a key moves while its transaction runs")
def a_key_is_prepared_by_any_attempt(patch: pytest.MonkeyPatch) -> None:
    _is_done_by_any_attempt(patch, Prepare)


@shown_by("a key moves while its transaction runs")
def a_commit_is_done_by_any_attempt(patch: pytest.MonkeyPatch) -> None:
    _is_done_by_any_attempt(patch, DecideCommit)


# --- "The floor" ------------------------------------------------------------------------------------------------------


@shown_by("a commit after its tombstone was dropped")
def dropping_does_not_raise_the_floor(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WriteSet, "raise_floor", lambda self, stamp: None)


@shown_by("a commit after its tombstone was dropped")
def a_commit_ignores_the_floor(patch: pytest.MonkeyPatch) -> None:
    _on_commit_sees(patch, lambda decision, floor: (decision, 0))


@shown_by("a commit repeated after its decision was dropped")
def a_commit_at_the_floor_is_answered_aborted(patch: pytest.MonkeyPatch) -> None:
    def change(on_commit: Any) -> Any:
        return lambda *known: "aborted" if on_commit(*known) == "gone" else on_commit(*known)

    _patched(patch, outcomes, "on_commit", change)


@shown_by("a commit repeated after its decision was dropped")
def a_router_tries_again_when_its_commit_is_gone(patch: pytest.MonkeyPatch) -> None:
    def change(commit: Any) -> Any:
        async def changed(self: Any, op: DecideCommit, transaction: Any, deadline_s: float) -> Any:
            try:
                return await commit(self, op, transaction, deadline_s)
            except OutcomeUnknown:
                return Outcome(0, "aborted", op.attempt.name)

        return changed

    _patched(patch, Coordinator, "_commit", change)


@shown_by("a commit repeated after its decision was dropped, and a late duplicate asked about")
def an_ask_at_the_floor_writes_a_tombstone(patch: pytest.MonkeyPatch) -> None:
    _patched(
        patch, outcomes, "on_ask", lambda on_ask: lambda decision, stamp, _, *more: on_ask(decision, stamp, 0, *more)
    )


@shown_by("a key moves and decisions are dropped")
def the_floor_does_not_move_with_a_key(patch: pytest.MonkeyPatch) -> None:
    def change(later_clock: Any) -> Any:
        return lambda own, source: later_clock(own, source._replace(attempts_floor=0))

    _patched(patch, world, "later_clock", change)


# --- "Every try has its own id" ---------------------------------------------------------------------------------------


@shown_by("a router that tries again over three stores")
def a_retry_has_the_id_of_the_first_try(patch: pytest.MonkeyPatch) -> None:
    def draw(self: Any, now_us: int, start: int = 0, epoch: int = 0) -> Attempt:
        self._last = start or max(self._last + 1, now_us)
        return Attempt(self._last, self._last, self._router)

    patch.setattr(Stamps, "draw", draw)


# --- "Wait-die, against every holder and waiter ahead that has a start, conflicting or not" ---------------------------


@shown_by("two transactions over three keys of three stores in opposite order")
def every_attempt_waits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(locks, "may_wait", lambda age, ahead: True)


@shown_by("a transaction waits behind an older one")
def who_waits_ahead_does_not_count(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(locks._Lock, "ages", lambda self: (age for _, age in self.holders.values()))


@shown_by("two transactions over three keys of three stores in opposite order")
def who_holds_does_not_count(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(locks._Lock, "ages", lambda self: (age for _, age, _ in self.queue))


@shown_by("readers behind plain writes that wait for readers")
def only_those_in_conflict_count(patch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def change(lock: Any) -> Any:
        def changed(self: Any, name: str, mode: str, *rest: Any, **more: Any) -> Any:
            asked[:] = [mode]
            return lock(self, name, mode, *rest, **more)

        return changed

    def ages(self: Any) -> Iterator[Any]:
        ahead = [*self.holders.values(), *((mode, age) for mode, age, _ in self.queue)]
        yield from (age for mode, age in ahead if "exclusive" in (mode, *asked))

    _patched(patch, LockTable, "lock", change)
    patch.setattr(locks._Lock, "ages", ages)


@shown_by("two transactions over three keys of three stores in opposite order")
def also_a_holder_may_wait_behind_any_other(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        LockWaits, "is_first", lambda self, queued, key: isinstance(queued.op, Prepare) and not queued.gathered
    )


# --- "The release confirms that every lock was still the same one, ownership included" --------------------------------


@shown_by("a reading transaction whose time is over")
def the_release_of_read_locks_is_always_confirmed(patch: pytest.MonkeyPatch) -> None:
    def change(unlock_reads: Any) -> Any:
        def changed(self: Any, op: ReadUnlock) -> Answer:
            unlock_reads(self, op)
            return Answer(op.id, 200)

        return changed

    _patched(patch, ReadLocks, "unlock", change)


@shown_by("a reading transaction while a key moves")
def the_release_of_read_locks_is_confirmed_by_any_attempt(patch: pytest.MonkeyPatch) -> None:
    def change(enter: Any) -> Any:
        def changed(self: Any, op: Any, sink: Any) -> None:
            if isinstance(op, ReadUnlock) and self.ownership.foreign(op, op.keys) is not None:
                self.changes.answer(sink, Answer(op.id, 200))
            else:
                enter(self, op, sink)

        return changed

    _patched(patch, Batch, "_enter_transaction", change)


@shown_by("a reading transaction while a key moves there and back again")
def read_locks_outlive_the_partition_that_they_are_in(patch: pytest.MonkeyPatch) -> None:
    def forget(forget: Any) -> Any:
        def without_readers(self: ReadLocks, *args: Any) -> None:
            for reader in self._holds.readers.values():
                for key, identity in reader.keys.items():
                    self._unlock(key, identity)

        return without_readers

    _patched(patch, ReadLocks, "forget", forget)


@shown_by("two reading transactions and a restart")
def a_locks_identity_does_not_name_the_opening(patch: pytest.MonkeyPatch) -> None:
    _patched(patch, LockTable, "__init__", lambda init: lambda self, opening, waiters: init(self, "", waiters))


# --- "A reader that meets an undecided intent waits" ------------------------------------------------------------------


@shown_by("reads in both orders beside a transaction")
def a_read_does_not_wait_for_an_intent(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cluster, "may_read", lambda key, with_intent: True)


# --- "The reply row is looked for in the batch that has the effect", "it outlives its time until the decision goes" ---


@shown_by("the same request twice")
def a_kept_reply_is_not_looked_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Outcomes, "repeated", lambda *_: None)


@shown_by("a reply outlives a participant that is dead")
def a_reply_goes_before_its_decision(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Idempotency, "_must_stay", lambda self, kept: False)


# --- who gives up -----------------------------------------------------------------------------------------------------


@shown_by("several wait for a lock when their time is over")
def who_is_refused_may_be_granted_the_lock_all_the_same(patch: pytest.MonkeyPatch) -> None:
    def leave_queue(self: Any, key: str, queued: Any, error: KvError) -> None:
        self._ready.leave(key, queued)
        self.give_up(queued, error)

    patch.setattr(LockWaits, "leave_queue", leave_queue)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.change.__name__)
def test_without_the_rule_some_story_ends_badly(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation.change(monkeypatch)
    with pytest.raises(Violation):
        explore(SCENARIOS[mutation.shown_by])
