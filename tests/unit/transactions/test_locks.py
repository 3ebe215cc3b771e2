"""The lock table against models that are too simple to be wrong."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.transactions.locks import Identity, LockTable

WAITERS_MAX = 4
NAMES = st.sampled_from(["a", "b"])


class Waiter:
    """An owner; equal to no other."""


class Entry:
    """Who asked for a lock, in which mode, and the identity it was granted, if it was."""

    def __init__(self, waiter: Waiter, mode: str) -> None:
        self.waiter = waiter
        self.mode = mode
        self.identity: Identity | None = None


class LocksAgainstOneLine(RuleBasedStateMachine):
    """The model of a name is one line of all who asked, in order of arrival.

    An attempt holds the lock if none before it is in its way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table: LockTable[Waiter, Waiter] = LockTable("opening", WAITERS_MAX)
        self.lines: dict[str, list[Entry]] = {"a": [], "b": []}
        self.identities: set[Identity] = set()
        self.past: list[tuple[str, Identity]] = []

    def holders(self, name: str) -> list[Entry]:
        line = self.lines[name]
        admitted = []
        for place, entry in enumerate(line):
            before = line[:place]
            if not before or (entry.mode == "shared" and all(other.mode == "shared" for other in before)):
                admitted.append(entry)
        return admitted

    def note(self, entry: Entry, identity: Identity) -> None:
        assert identity not in self.identities
        self.identities.add(identity)
        entry.identity = identity

    def expect_promotions(self, name: str, granted: list) -> None:
        promoted = [entry for entry in self.holders(name) if entry.identity is None]
        assert [waiter for _, waiter in granted] == [entry.waiter for entry in promoted]
        for entry, (identity, _) in zip(promoted, granted, strict=True):
            self.note(entry, identity)

    @rule(name=NAMES, mode=st.sampled_from(["shared", "exclusive"]))
    def lock(self, name: str, mode: str) -> None:
        entry = Entry(Waiter(), mode)
        line = self.lines[name]
        queued = sum(other.identity is None for other in line)
        line.append(entry)
        holds = entry in self.holders(name)
        if not holds and queued >= WAITERS_MAX:
            with pytest.raises(OverflowError):
                self.table.lock(name, mode, entry.waiter)
            line.remove(entry)
            return
        identity = self.table.lock(name, mode, entry.waiter)
        assert (identity is not None) == holds
        if identity is not None:
            self.note(entry, identity)

    @rule(name=NAMES, which=st.integers(0, 9))
    def unlock(self, name: str, which: int) -> None:
        held = self.holders(name)
        if held:
            entry = held[which % len(held)]
            assert entry.identity is not None
            self.lines[name].remove(entry)
            self.past.append((name, entry.identity))
            self.expect_promotions(name, self.table.unlock(name, entry.identity))

    @precondition(lambda self: self.past)
    @rule(which=st.integers(0, 99))
    def unlock_what_is_over(self, which: int) -> None:
        name, identity = self.past[which % len(self.past)]
        assert not self.table.holds(name, identity)
        assert self.table.unlock(name, identity) == []

    @rule(name=NAMES, which=st.integers(0, 9))
    def leave(self, name: str, which: int) -> None:
        waiting = [entry for entry in self.lines[name] if entry.identity is None]
        if waiting:
            entry = waiting[which % len(waiting)]
            self.lines[name].remove(entry)
            self.expect_promotions(name, self.table.leave(name, entry.waiter))
        else:
            assert self.table.leave(name, Waiter()) == []

    @invariant()
    def only_holders_hold(self) -> None:
        for name, line in self.lines.items():
            assert self.table.is_free(name) == (not line)
            for entry in line:
                assert (entry.identity is not None) == (entry in self.holders(name))
                assert entry.identity is None or self.table.holds(name, entry.identity)


class LeasesAgainstAList(RuleBasedStateMachine):
    """The queue for a lease is a list; a lease is an entry of a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.table: LockTable[Waiter, Waiter] = LockTable("opening", WAITERS_MAX)
        self.leased: dict[str, int] = {}
        self.queues: dict[str, list[Waiter]] = {"a": [], "b": []}
        self.identities: set[Identity] = set()
        self.token = 0

    @rule(name=NAMES)
    def grant(self, name: str) -> None:
        self.token += 1
        if name in self.leased:
            with pytest.raises(ValueError, match="is leased"):
                self.table.grant(name, "", self.token, 1.0)
            return
        lease = self.table.grant(name, "", self.token, 1.0)
        assert lease.identity not in self.identities
        assert lease.deadline_s == math.inf
        self.identities.add(lease.identity)
        self.leased[name] = self.token

    @rule(name=NAMES)
    def end(self, name: str) -> None:
        if name in self.leased:
            del self.leased[name]
            self.table.end(name)
        else:
            with pytest.raises(KeyError):
                self.table.end(name)

    @rule(name=NAMES)
    def queue(self, name: str) -> None:
        waiter = Waiter()
        if len(self.queues[name]) == WAITERS_MAX:
            with pytest.raises(OverflowError):
                self.table.queue_for_lease(name, waiter)
        else:
            self.table.queue_for_lease(name, waiter)
            self.queues[name].append(waiter)

    @rule(name=NAMES)
    def serve(self, name: str) -> None:
        queue = self.queues[name]
        assert self.table.next_for_lease(name) is (queue.pop(0) if queue else None)

    @rule(name=NAMES, which=st.integers(0, 9))
    def leave(self, name: str, which: int) -> None:
        queue = self.queues[name]
        if queue:
            waiter = queue.pop(which % len(queue))
            assert self.table.leave_lease_queue(name, waiter)
            assert not self.table.leave_lease_queue(name, waiter)
        assert not self.table.leave_lease_queue(name, Waiter())

    @invariant()
    def agree(self) -> None:
        assert {lease.name: lease.token for lease in self.table.leases()} == self.leased
        for name, queue in self.queues.items():
            lease = self.table.lease(name)
            assert (lease.token if lease else None) == self.leased.get(name)
            assert self.table.waiting_for_lease(name) == tuple(queue)
            assert self.table.is_free(name)  # a queue of its own: it is in no other's way


TestLocksAgainstOneLine = LocksAgainstOneLine.TestCase
TestLocksAgainstOneLine.settings = settings(max_examples=60, stateful_step_count=40)
TestLeasesAgainstAList = LeasesAgainstAList.TestCase
TestLeasesAgainstAList.settings = settings(max_examples=40, stateful_step_count=40)


def test_a_shared_lock_waits_behind_an_exclusive_one_that_came_first():
    table: LockTable[str, str] = LockTable("opening", 10)
    reader = table.lock("k", "shared", "r1")
    assert reader is not None
    assert table.lock("k", "exclusive", "w") is None
    assert table.lock("k", "shared", "r2") is None
    ((writer, who),) = table.unlock("k", reader)
    assert who == "w"
    assert [who for _, who in table.unlock("k", writer)] == ["r2"]


def test_an_identity_of_an_earlier_opening_is_nobodys():
    before: LockTable[str, str] = LockTable("first opening", 10)
    after: LockTable[str, str] = LockTable("second opening", 10)
    old, new = before.lock("k", "exclusive", "w"), after.lock("k", "exclusive", "w")
    assert old is not None
    assert new is not None
    assert old != new
    assert not after.holds("k", old)
    assert after.unlock("k", old) == []
    assert after.holds("k", new)


def test_a_leases_time_runs_from_when_it_became_visible_and_stands_still_while_it_is_renewed():
    table: LockTable[str, str] = LockTable("opening", 10)
    lease = table.grant("k", "me", 1, 10.0)
    assert lease.left_s(1e9) == 10.0
    table.start(lease, 100.0)
    assert lease.left_s(104.0) == 6.0
    assert lease.left_s(200.0) == 0.0
    table.suspend(lease)
    assert lease.left_s(200.0) == 10.0
    table.start(lease, 108.0)
    assert lease.deadline_s == 118.0


def test_no_reader_sees_a_lease_end_by_looking_at_it():
    table: LockTable[str, str] = LockTable("opening", 10)
    table.start(table.grant("k", "me", 1, 10.0), 0.0)
    lease = table.lease("k")
    assert lease is not None
    assert lease.left_s(1e9) == 0.0
    assert table.lease("k") is lease
