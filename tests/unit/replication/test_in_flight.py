"""What was sent to a copy and is not answered: frames, beacons, and for how long something is owed."""

from __future__ import annotations

from kvstore.replication.in_flight import InFlight
from kvstore.replication.patience import Patience


def begun(sent: int = 10) -> InFlight:
    flight = InFlight()
    flight.begin(sent)
    return flight


def test_bytes_are_under_way_until_the_frame_that_they_are_in_is_acknowledged() -> None:
    flight = begun()
    flight.records(12, 100, now=1.0)
    flight.records(15, 50, now=2.0)
    assert (flight.sent, flight.bytes) == (15, 150)
    assert not flight.acked(14, now=3.0)
    assert flight.bytes == 50
    assert flight.acked(15, now=4.0)
    assert flight.bytes == 0


def test_only_the_last_frame_that_is_acknowledged_is_said_to_be_the_last() -> None:
    flight = begun()
    assert not flight.acked(10, now=1.0), "nothing was owed"
    flight.records(11, 1, now=1.0)
    assert flight.acked(11, now=2.0)
    assert not flight.acked(11, now=3.0)


def test_a_copy_that_repeats_an_acknowledgement_owes_the_other_records_all_the_same() -> None:
    flight = begun()
    flight.records(12, 1, now=1.0)
    flight.acked(10, now=5.0)
    assert flight.patience == Patience(1.0)
    flight.records(14, 1, now=5.0)
    flight.acked(12, now=6.0)
    assert flight.patience == Patience(6.0), "it has come further, and owes one frame still"


def test_a_granted_lease_does_not_excuse_a_record_that_is_owed() -> None:
    flight = begun()
    beacon = flight.beacon(now=1.0)
    flight.records(11, 1, now=2.0)
    assert flight.granted(beacon, now=3.0) == 1.0
    assert flight.patience == Patience(1.0)
    flight.acked(11, now=4.0)
    assert flight.patience == Patience()


def test_the_answer_to_a_beacon_answers_those_before_it_too() -> None:
    flight = begun()
    first, second, third = (flight.beacon(now) for now in (1.0, 2.0, 3.0))
    assert flight.granted(second, now=4.0) == 2.0
    assert flight.patience == Patience(4.0), "the third is under way"
    assert flight.granted(first, now=5.0) is None
    assert flight.granted(third, now=5.0) == 3.0
    assert flight.patience == Patience()


def test_a_new_session_forgets_what_was_under_way_but_not_how_long_the_copy_has_owed_an_answer() -> None:
    flight = begun()
    flight.records(11, 1, now=1.0)
    beacon = flight.beacon(now=1.0)
    flight.begin(10)
    assert (flight.sent, flight.bytes) == (10, 0)
    assert flight.granted(beacon, now=2.0) is None
    assert flight.patience == Patience(1.0)
