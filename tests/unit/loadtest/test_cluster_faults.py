"""What is wrong with which link, and the order of what comes late."""

from __future__ import annotations

from loadtest.cluster.faults import Faults, Route
from loadtest.cluster.late_chunks import LateChunks

TO_B = Route("a", "127.0.0.1:1", is_back=False)
FROM_B = TO_B._replace(is_back=True)


def test_a_fault_is_of_one_direction_whichever_side_opened_the_connection() -> None:
    faults = Faults()
    faults.names["127.0.0.1:1"] = "b"
    faults.names["127.0.0.1:2"] = "a"
    fault = faults.at("b", "a")
    assert faults.of(FROM_B) is fault
    assert faults.of(Route("b", "127.0.0.1:2", is_back=False)) is fault
    assert faults.of(TO_B) is None


def test_no_connection_can_be_made_while_either_direction_is_closed() -> None:
    for source, destination in (("a", "b"), ("b", "a")):
        faults = Faults()
        faults.names["127.0.0.1:1"] = "b"
        assert not faults.is_closed(TO_B)
        faults.at(source, destination).delay_s = 1.0
        assert not faults.is_closed(TO_B), "late is not closed"
        faults.at(source, destination).is_stalled = True
        assert faults.is_closed(TO_B)


def test_an_address_that_no_process_has_is_a_name_of_its_own() -> None:
    assert Faults().way(TO_B) == ("a", "127.0.0.1:1")


def test_a_piece_is_never_due_before_one_that_was_sent_earlier() -> None:
    late = LateChunks()
    late.put(5.0, b"one")
    late.put(3.0, b"two")
    assert (late.due_s, late.bytes) == (5.0, 6)
    assert list(late.take_due(4.9)) == []
    assert list(late.take_due(5.0)) == [b"one", b"two"]
    assert (late.due_s, late.bytes, bool(late)) == (None, 0, False)


def test_what_is_cleared_while_it_is_delivered_does_not_come() -> None:
    late = LateChunks()
    late.put(1.0, b"one")
    late.put(1.0, b"two")
    for chunk in late.take_due(2.0):
        assert chunk == b"one"
        late.clear()
    assert late.bytes == 0
