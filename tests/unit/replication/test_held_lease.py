"""A primary's lease: until when it lasts follows what its copies grant, and which of them are waited for."""

from __future__ import annotations

from kvstore.replication import shipping
from kvstore.replication.configuration import Configuration, Primary, Replica
from kvstore.replication.held_lease import HeldLease
from kvstore.replication.places import Times
from kvstore.replication.shipping import Shipping

TIMES = Times(lease_s=1.5, disk_stall_s=2.0, failover_after_s=2.0)
NEVER, EVER = float("-inf"), float("inf")


def opened(*copies: str) -> Shipping:
    """A primary whose term is open, with these copies in sync."""
    replicas = tuple(Replica(f"n-{copy}", copy, "in-sync", 1) for copy in copies)
    config = Configuration("s1", "store", 3, 3, Primary("n1", "home"), replicas)
    state = shipping.opened(config, "n1", "start", opening=1, synced=1)
    for link in state.links:
        state = shipping.greet(state, link)
    for link in state.links:
        state = shipping.acked(state, link.session, 1)
    assert state.serves
    return state


def test_the_lease_lasts_as_long_as_the_grant_that_ends_first() -> None:
    held, state = HeldLease(TIMES), opened("a", "b")
    first, second = (link.session for link in state.links)
    held.take(first, 10.0, 10.0)
    assert held.until(state) == NEVER
    held.take(second, 11.0, 11.0)
    assert held.until(state) == 11.5


def test_a_grant_that_comes_in_the_last_quarter_of_the_one_before_is_counted() -> None:
    held, state = HeldLease(TIMES), opened("a")
    named = state.links[0].session
    for asked_s, came_s, close in ((10.0, 10.0, 0), (10.5, 11.0, 0), (11.5, 11.7, 1), (13.5, 13.6, 2)):
        held.take(named, asked_s, came_s)
        assert held.close == close


def test_without_copies_no_lease_is_needed() -> None:
    assert HeldLease(TIMES).until(opened()) == EVER


def test_how_long_it_lasts_is_computed_again_once_the_copies_have_changed() -> None:
    held, state = HeldLease(TIMES), opened("a")
    held.take(state.links[0].session, 10.0, 10.0)
    assert held.until(state) == 11.5
    greeted = shipping.greet(state, state.links[0])
    held.note_change()
    assert held.until(greeted) == NEVER, "the grant was of the session before"


def test_a_primary_whose_term_is_over_answers_nothing() -> None:
    held, state = HeldLease(TIMES), opened("a")
    held.take(state.links[0].session, 10.0, 10.0)
    assert held.until(shipping.depose(state, 99)) == NEVER


def test_a_lease_that_was_given_back_is_neither_held_nor_asked_for() -> None:
    held, state = HeldLease(TIMES), opened("a")
    held.take(state.links[0].session, 10.0, 10.0)
    assert held.may_ask(10.0)
    held.give_back()
    assert held.until(state) == NEVER
    assert not held.may_ask(10.0)


def test_no_beacon_is_sent_once_the_controller_was_needed_in_vain_for_as_long_as_a_failover_takes() -> None:
    held = HeldLease(TIMES)
    held.needed_s = 10.0
    assert held.may_ask(11.9)
    assert not held.may_ask(12.0)
    held.needed_s = None
    assert held.may_ask(12.0)
