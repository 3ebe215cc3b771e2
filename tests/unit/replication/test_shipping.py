"""What a primary waits for, counts as durable, and asks the controller."""

from __future__ import annotations

from kvstore.replication import shipping
from kvstore.replication.configuration import Configuration, Primary, Replica, Request
from kvstore.replication.shipping import Link, Shipping

IN_SYNC, JOINING = Replica("n2", "c2", "in-sync", 3), Replica("n3", "c3", "joining", 4)
CONFIG = Configuration("s1", "store", 5, 5, Primary("n1", "c1"), (IN_SYNC, JOINING))


def _link(now: Shipping, copy: Replica) -> Link:
    link = now.link(copy.copy_id, copy.joined)
    assert link is not None
    return link


def _begun(now: Shipping, copy: Replica) -> Shipping:
    return _acked(shipping.greet(now, _link(now, copy)), copy, 0)


def _acked(now: Shipping, copy: Replica, number: int) -> Shipping:
    return shipping.acked(now, _link(now, copy).session, number)


def _opened() -> Shipping:
    """Record 10 has opened term 5; every copy in sync has it, and the joining one is compared."""
    now = shipping.opened(CONFIG, "n1", "start", 10, 9)
    now = _begun(_begun(now, IN_SYNC), JOINING)
    return _acked(shipping.synced(now, 10), IN_SYNC, 10)


def test_a_term_is_served_once_every_copy_in_sync_has_the_record_that_opened_it() -> None:
    now = _begun(shipping.synced(shipping.opened(CONFIG, "n1", "start", 10, 9), 10), IN_SYNC)
    assert not _acked(now, IN_SYNC, 9).serves
    assert _acked(now, IN_SYNC, 10).serves


def test_a_record_is_durable_once_the_own_disk_and_every_awaited_copys_have_it() -> None:
    now = shipping.appended(_opened(), 12)
    assert _acked(now, IN_SYNC, 12).committed == 10
    assert shipping.synced(now, 12).committed == 10
    assert shipping.synced(_acked(now, IN_SYNC, 11), 12).committed == 11


def test_an_acknowledgement_of_what_was_never_sent_counts_for_nothing() -> None:
    now = shipping.synced(shipping.appended(_opened(), 11), 11)
    assert _acked(now, IN_SYNC, 99).committed == 11


def test_acknowledgements_before_the_greeting_and_of_other_sessions_are_thrown_away() -> None:
    now = shipping.synced(shipping.opened(CONFIG, "n1", "start", 10, 9), 10)
    assert _acked(now, IN_SYNC, 10) == now
    now = shipping.greet(now, _link(now, IN_SYNC))
    session = _link(now, IN_SYNC).session
    for other in ({"term": 4}, {"start": "x"}, {"copy_id": "x"}, {"joined": 2}, {"round": 0}, {"round": 2}):
        assert shipping.acked(now, session._replace(**other), 10) == now  # type: ignore[arg-type]


def test_a_session_begins_with_the_copys_first_acknowledgement() -> None:
    now = shipping.synced(shipping.opened(CONFIG, "n1", "start", 10, 9), 10)
    now = shipping.greet(now, _link(now, IN_SYNC))
    assert not shipping.may_send(now, _link(now, IN_SYNC))
    assert shipping.may_send(now, _link(_acked(now, IN_SYNC, 0), IN_SYNC))


def test_what_a_copy_that_is_not_waited_for_acknowledged_before_it_is_greeted_again_counts_no_more() -> None:
    now = _acked(_opened(), JOINING, 10)
    assert _link(shipping.greet(now, _link(now, JOINING)), JOINING).acked == 0
    now = shipping.wait_from(now, _link(now, JOINING).session)
    assert _link(shipping.greet(now, _link(now, JOINING)), JOINING).acked == 10


def test_every_batch_from_w_on_waits_for_a_copy_that_is_nearly_there() -> None:
    now = _acked(shipping.appended(_opened(), 12), JOINING, 11)
    assert shipping.is_nearly_there(now, _link(now, JOINING), 1)
    now = shipping.wait_from(now, _link(now, JOINING).session)
    now = shipping.synced(_acked(shipping.appended(now, 14), IN_SYNC, 14), 14)
    assert now.committed == 12
    assert _acked(now, JOINING, 13).committed == 13


def test_a_copy_that_lags_is_not_waited_for_yet() -> None:
    now = shipping.appended(_opened(), 30)
    assert not shipping.is_nearly_there(now, _link(now, JOINING), 1)


def test_from_w_on_the_lease_of_a_joining_copy_is_needed() -> None:
    now = _opened()
    assert [link.node for link in shipping.awaited(now)] == ["n2"]
    now = shipping.wait_from(now, _link(now, JOINING).session)
    assert [link.node for link in shipping.awaited(now)] == ["n2", "n3"]


def test_in_sync_is_asked_for_once_everything_below_w_is_on_the_copys_disk() -> None:
    now = _opened()
    assert shipping.request_in_sync(now, _link(now, JOINING)) is None
    now = shipping.wait_from(_acked(now, JOINING, 9), _link(now, JOINING).session)
    assert shipping.request_in_sync(now, _link(now, JOINING)) is None
    now = _acked(now, JOINING, 10)
    assert shipping.request_in_sync(now, _link(now, JOINING)) == Request("in-sync", "s1", 5, "c1", "c3", 4)


def test_the_committed_number_does_not_fall_when_the_set_grows() -> None:
    now = _opened()
    grown = CONFIG._replace(epoch=6, replicas=(IN_SYNC, JOINING._replace(state="in-sync")))
    assert shipping.follow(now, grown, 11).committed == 10


def test_what_an_awaited_copy_lacks_stays_back_until_a_map_in_which_it_is_out_is_followed() -> None:
    now = shipping.synced(shipping.appended(_opened(), 12), 12)
    assert shipping.request_out(now, _link(now, IN_SYNC)) == Request("out", "s1", 5, "c1", "c2", 3)
    assert now.committed == 10
    same = CONFIG._replace(epoch=6)
    assert shipping.follow(now, same, 12).committed == 10
    gone = CONFIG._replace(epoch=7, replicas=(JOINING,))
    assert shipping.follow(now, gone, 12).committed == 12
    again = CONFIG._replace(epoch=7, replicas=(Replica("n2", "c2", "joining", 7), JOINING))
    assert shipping.follow(now, again, 12).committed == 12
    assert _link(shipping.follow(now, again, 12), again.replicas[0]).waited == 0


def test_a_joining_copy_is_not_asked_to_be_taken_out_before_it_is_waited_for() -> None:
    now = _opened()
    assert shipping.request_out(now, _link(now, JOINING)) is None


def test_a_copy_is_sent_nothing_before_the_map_that_names_it_is_durable_in_the_own_log() -> None:
    late = Replica("n4", "c4", "joining", 6)
    now = shipping.follow(
        shipping.appended(_opened(), 11), CONFIG._replace(epoch=6, replicas=(*CONFIG.replicas, late)), 11
    )
    assert not shipping.may_greet(now, _link(now, late))
    now = _begun(shipping.synced(now, 11), late)
    assert shipping.may_greet(now, _link(now, late))
    assert shipping.may_send(now, _link(now, late))
    assert not shipping.may_send(now, _link(shipping.greet(now, _link(now, late)), late))


def test_a_map_with_another_term_ends_the_primarys() -> None:
    now = shipping.follow(_opened(), CONFIG._replace(epoch=6, term=6), 11)
    assert now.deposed
    assert not now.serves
    assert shipping.request_out(now, now.links[0]) is None
    assert shipping.follow(now, CONFIG._replace(epoch=7), 11) == now


def test_a_promise_of_a_higher_term_ends_the_primarys() -> None:
    assert shipping.depose(_opened(), 6).deposed
    assert not shipping.depose(_opened(), 5).deposed


def test_an_older_map_changes_nothing() -> None:
    now = _opened()
    assert shipping.follow(now, CONFIG._replace(epoch=4, replicas=()), 11) == now


def test_without_copies_the_own_sync_is_enough() -> None:
    now = shipping.opened(CONFIG._replace(replicas=()), "n1", "start", 10, 9)
    assert not now.serves
    assert shipping.synced(now, 10).serves
    assert shipping.awaited(now) == ()
