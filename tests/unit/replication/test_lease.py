"""The lease that copies grant."""

from __future__ import annotations

from kvstore.replication import lease
from kvstore.replication.configuration import Configuration, Primary
from kvstore.replication.lease import CLOCK_MARGIN, Granted, Grants
from kvstore.replication.session import Following, Session

ONE, OTHER = Session("store", 5, "start", "c2", 3), Session("store", 5, "start", "c3", 3)
FOLLOWING = Following("store", "c2", 5, ONE)


def test_a_grant_lasts_from_the_asking_on() -> None:
    grants = lease.held(Grants(), ONE, 10.0, 1.5)
    assert lease.may_answer(grants, [ONE], 11.4)
    assert not lease.may_answer(grants, [ONE], 11.5)


def test_a_late_answer_to_an_earlier_beacon_shortens_nothing() -> None:
    grants = lease.held(lease.held(Grants(), ONE, 10.0, 1.5), ONE, 9.0, 1.5)
    assert grants.of(ONE) == 11.5


def test_the_grant_of_every_copy_that_is_waited_for_is_needed() -> None:
    grants = lease.held(Grants(), ONE, 10.0, 1.5)
    assert not lease.may_answer(grants, [ONE, OTHER], 10.5)
    assert lease.may_answer(lease.held(grants, OTHER, 10.0, 1.5), [ONE, OTHER], 10.5)


def test_a_grant_of_another_session_counts_for_nothing() -> None:
    grants = lease.held(Grants(), ONE, 10.0, 1.5)
    assert not lease.may_answer(grants, [ONE._replace(joined=4)], 10.5)


def test_of_each_copy_one_grant_is_kept_however_often_it_connects_and_joins_again() -> None:
    grants = lease.held(Grants(), OTHER, 9.0, 1.5)
    for joined in (3, 4):
        for number in range(100):
            grants = lease.held(grants, ONE._replace(joined=joined, round=number), 10.0 + number, 1.5)
    assert [each for each, _ in grants.until] == [OTHER, ONE._replace(joined=4, round=99)]


def test_without_copies_no_lease_is_needed_unless_it_was_given_back() -> None:
    assert lease.may_answer(Grants(), [], 0.0)
    assert not lease.may_answer(lease.give_back(Grants()), [], 0.0)


def test_a_primary_that_gave_its_lease_back_answers_nothing_more_whatever_is_granted_later() -> None:
    grants = lease.held(lease.give_back(lease.held(Grants(), ONE, 10.0, 1.5)), ONE, 10.1, 1.5)
    assert not lease.may_answer(grants, [ONE], 10.2)


def test_a_beacon_goes_every_eighth_of_the_lease() -> None:
    assert lease.beacon_every_s(8.0) == 1.0


def test_a_primary_that_has_needed_the_controller_in_vain_lets_its_beacons_end() -> None:
    assert lease.may_ask(None, 100.0, 2.0)
    assert lease.may_ask(10.0, 11.9, 2.0)
    assert not lease.may_ask(10.0, 12.0, 2.0)


def test_a_copy_takes_no_promotion_before_its_own_grant_has_run_out_with_the_margin() -> None:
    given = lease.granted(Granted(0.0), 10.0, 1.0)
    assert not lease.may_be_promoted(given, 11.0)
    assert not lease.may_be_promoted(given, 10.0 + CLOCK_MARGIN - 0.001)
    assert lease.may_be_promoted(given, 10.0 + CLOCK_MARGIN)


def test_the_margin_covers_two_clocks_of_one_percent_each() -> None:
    assert CLOCK_MARGIN > 1.01 / 0.99


LOGGED = Configuration("s1", "store", 5, 5, Primary("n2", "c2"))


def test_a_copy_that_starts_counts_as_having_granted_at_its_start() -> None:
    other = LOGGED._replace(primary=Primary("n1", "c1"))
    for logged, promised in ((other, 5), (None, 5), (LOGGED, 6)):
        assert not lease.may_be_promoted(lease.granted_at_start(logged, "c2", promised, 10.0, 1.0), 11.0)
        assert lease.may_be_promoted(lease.granted_at_start(logged, "c2", promised, 10.0, 1.0), 11.1)


def test_a_primary_that_starts_again_has_granted_nothing_since_it_opened_its_term() -> None:
    assert lease.may_be_promoted(lease.granted_at_start(LOGGED, "c2", 5, 10.0, 1.0), 10.0)


def test_a_copy_that_has_promised_nothing_has_granted_nothing() -> None:
    assert lease.may_be_promoted(lease.granted_at_start(None, "c2", 0, 10.0, 1.0), 10.0)


def test_a_copy_grants_only_in_a_session_that_has_begun_in_the_term_that_it_has_promised() -> None:
    assert lease.grants(FOLLOWING, ONE, None, 10.0, 2.0)
    assert not lease.grants(FOLLOWING, OTHER, None, 10.0, 2.0)
    assert not lease.grants(FOLLOWING._replace(session=None), ONE, None, 10.0, 2.0)
    assert not lease.grants(FOLLOWING._replace(promised=6), ONE, None, 10.0, 2.0)


def test_a_copy_whose_sync_has_been_under_way_for_too_long_answers_no_beacon() -> None:
    assert lease.grants(FOLLOWING, ONE, 8.0, 10.0, 2.0)
    assert not lease.grants(FOLLOWING, ONE, 7.9, 10.0, 2.0)


def test_a_lease_that_was_given_back_lets_the_copy_be_promoted_at_once() -> None:
    given = lease.granted(Granted(0.0), 10.0, 1.0)
    assert lease.may_be_promoted(lease.returned(given, FOLLOWING, ONE, 10.1), 10.1)
    assert not lease.may_be_promoted(lease.returned(given, FOLLOWING, ONE._replace(term=4), 10.1), 10.1)
