"""The feed of events: snapshot, changes, pace, and where a listener goes on."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvstore.router.feed import Feed


def told(feed: Feed, number: int) -> dict[str, Any]:
    return {event.kind: json.loads(event.data) for event in feed.since(number)}


def test_a_snapshot_has_everything_as_of_now() -> None:
    feed = Feed("a1", {"router": "0"})
    feed.offer("locks", {"count": 1})
    feed.keep("history", [1, 2])
    snapshot = feed.snapshot()
    assert snapshot.kind == "snapshot"
    assert json.loads(snapshot.data) == {"router": "0", "locks": {"count": 1}, "history": [1, 2]}


def test_a_change_is_told_once_and_what_is_the_same_is_not_told() -> None:
    feed = Feed("a1", {})
    feed.offer("locks", {"count": 1})
    feed.release(0.0)
    assert told(feed, 0) == {"locks": {"count": 1}}
    feed.offer("locks", {"count": 1})
    assert feed.release(10.0) is None
    assert feed.number == 1
    feed.offer("locks", {"count": 2})
    feed.release(20.0)
    assert told(feed, 1) == {"locks": {"count": 2}}
    assert told(feed, 2) == {}


def test_a_kind_is_told_at_most_four_times_a_second_and_the_last_change_of_a_burst_is_told() -> None:
    feed = Feed("a1", {})
    numbers = []
    for tick in range(101):  # a change every 10 ms, for a second
        now_s = tick / 100
        feed.offer("map", {"epoch": tick})
        feed.release(now_s)
        numbers.append(feed.number)
    assert numbers[-1] <= 5
    wait_s = feed.release(1.0)
    feed.release(1.0 + (wait_s or 0.0))
    assert told(feed, numbers[-1] - 1)["map"] == {"epoch": 100}


def test_kinds_do_not_wait_for_one_another() -> None:
    feed = Feed("a1", {})
    feed.offer("map", 1)
    feed.release(0.0)
    feed.offer("map", 2)
    feed.offer("locks", 1)
    wait_s = feed.release(0.1)
    assert told(feed, 1) == {"locks": 1}
    assert wait_s is not None
    assert 0.1 < wait_s < 0.2
    feed.release(0.1 + wait_s)
    assert told(feed, 2) == {"map": 2}


def test_what_merely_goes_on_is_no_change_but_a_snapshot_shows_it() -> None:
    feed = Feed("a1", {})
    feed.offer("locks", {"ttl_left": 9.0}, identity="the same lock")
    feed.release(0.0)
    feed.offer("locks", {"ttl_left": 8.0}, identity="the same lock")
    feed.release(1.0)
    assert feed.number == 1
    assert json.loads(feed.snapshot().data)["locks"] == {"ttl_left": 8.0}


def test_a_change_within_the_same_identity_is_told_with_the_next_one() -> None:
    feed = Feed("a1", {})
    feed.offer("cluster", {"keys": 1}, identity=1)
    feed.release(0.0)
    feed.offer("cluster", {"keys": 2}, identity=1)
    feed.release(0.5)
    assert feed.number == 1
    feed.offer("cluster", {"keys": 2}, identity=2)
    feed.release(1.0)
    assert told(feed, 1) == {"cluster": {"keys": 2}}


def test_a_listener_that_comes_back_goes_on_where_it_was() -> None:
    feed = Feed("a1", {})
    feed.offer("map", 1)
    feed.offer("locks", 1)
    feed.release(0.0)
    assert feed.number_of("a1-2") == 2
    feed.offer("map", 2)
    feed.release(1.0)
    assert told(feed, 2) == {"map": 2}


def test_an_id_of_another_start_or_none_or_one_from_the_future_gets_a_snapshot() -> None:
    feed = Feed("a1", {})
    feed.offer("map", 1)
    feed.release(0.0)
    for unknown in (None, "", "a2-1", "a1-7", "a1", "a1--1", "a1-x", "<script>"):
        assert feed.number_of(unknown) is None


def test_an_event_travels_as_one_block_whatever_its_data_hold() -> None:
    feed = Feed("a1", {})
    feed.offer("locks", {"name": "a\n\ndata: x\r\u2028"})
    feed.release(0.0)
    (event,) = feed.since(0)
    lines = event.encode().split(b"\n")
    assert [line.partition(b":")[0] for line in lines] == [b"id", b"event", b"data", b"", b""]
    assert json.loads(lines[2][6:]) == {"name": "a\n\ndata: x\r\u2028"}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.floats(0, 0.4)), max_size=60))
def test_a_listener_that_follows_every_release_ends_with_the_newest_documents(
    steps: list[tuple[str, int, float]],
) -> None:
    feed = Feed("a1", {})
    now_s, seen, known, times = 0.0, 0, {}, dict[str, list[float]]()
    for kind, document, pause_s in steps:
        now_s += pause_s
        feed.offer(kind, document)
        feed.release(now_s)
        for event in feed.since(seen):
            known[event.kind] = json.loads(event.data)
            times.setdefault(event.kind, []).append(now_s)
        seen = feed.number
    while (wait_s := feed.release(now_s)) is not None:
        now_s += wait_s + 1e-9
    known |= told(feed, seen)
    assert known == {kind: document for kind, document, _ in steps}
    for told_at in times.values():
        assert all(later - earlier >= 0.249 for earlier, later in pairwise(told_at))
