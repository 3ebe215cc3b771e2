"""The messages of the channel: every value arrives as it was sent, and no frame of another shape is taken for one."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.model import IdempotencyKey, Preconditions
from kvstore.protocol import (
    WRITES,
    Acquire,
    Answer,
    CancelWait,
    Count,
    Delete,
    Explain,
    Get,
    GetLock,
    Info,
    Page,
    Put,
    Release,
    Renew,
    Scan,
    ScanLeases,
    Stats,
    decode_replies,
    decode_requests,
    encode_frame,
)

ids = st.integers(0, 2**53)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values = st.binary(max_size=50)
versions = st.integers(0, 2**53 - 1)

version_lists = st.none() | st.lists(versions, max_size=3)
guards = st.none() | st.builds(
    Preconditions, st.none() | versions, st.booleans(), st.booleans(), version_lists, version_lists
)
onces = st.none() | st.builds(IdempotencyKey, texts, texts)

requests = st.one_of(
    st.builds(Get, ids, texts),
    st.builds(Put, ids, texts, values, st.integers(0, 315_360_000_000), guards, onces),
    st.builds(Delete, ids, texts, guards, onces),
    st.builds(Acquire, ids, texts, st.integers(1, 10**9), st.integers(0, 10**9), texts, onces),
    st.builds(Renew, ids, texts, versions, onces),
    st.builds(Release, ids, texts, versions, onces),
    st.builds(CancelWait, ids, texts, ids),
    st.builds(GetLock, ids, texts),
    st.builds(ScanLeases, ids, texts, texts, st.integers(1, 10_000), values, texts),
    st.builds(Scan, ids, texts, texts, st.integers(1, 10_000), st.booleans(), values, texts),
    st.builds(Count, ids, texts, values),
    st.builds(Explain, ids, texts),
    st.builds(Stats, ids),
)
problems = st.none() | st.dictionaries(texts, texts | st.integers(-100, 100) | st.none() | st.booleans(), max_size=4)
items = st.tuples(texts, versions, st.none() | values, st.integers(0, 10**12))
replies = st.one_of(
    st.builds(Answer, ids, st.integers(100, 599), versions, st.none() | values, st.integers(0, 10**12), problems),
    st.builds(Page, ids, values, st.booleans(), texts, st.lists(items, max_size=4), st.integers(0, 10**12)),
    st.builds(Info, ids, st.integers(1, 10**6), st.dictionaries(texts, st.integers() | st.lists(texts), max_size=3)),
).filter(lambda reply: not isinstance(reply, Info) or _fits_msgpack(reply.facts))


def _fits_msgpack(facts: dict[str, Any]) -> bool:
    return all(not isinstance(value, int) or -(2**63) <= value < 2**64 for value in facts.values())


@given(st.lists(requests, max_size=5))
def test_requests_arrive_as_they_were_sent(messages: list[Any]) -> None:
    assert decode_requests(encode_frame(messages)) == messages


@given(st.lists(replies, max_size=5))
def test_replies_arrive_as_they_were_sent(messages: list[Any]) -> None:
    assert decode_replies(encode_frame(messages)) == messages


@given(st.binary(max_size=40))
def test_arbitrary_bytes_are_refused_or_are_a_frame_but_never_anything_else(frame: bytes) -> None:
    for decode in (decode_requests, decode_replies):
        try:
            assert isinstance(decode(frame), list)
        except msgspec.DecodeError:
            pass


@pytest.mark.parametrize(
    "message",
    [
        [99, 1, "key"],
        [1, "id", "key"],
        [1, 1],
        [1, 1, b"key"],
        [2, 1, "key", "text"],
        [2, 1, "key", b"", 0, [1, 2]],
        [8, 1, "name", 1],
        [2, 1, "key"],
        [4, 1, "", ""],
        [],
        {"id": 1},
        1,
    ],
)
def test_a_message_of_another_shape_is_refused(message: Any) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_requests(msgspec.msgpack.encode([message]))


def test_a_key_that_is_not_utf8_is_refused() -> None:
    frame = encode_frame([Get(1, "AAAA")])
    with pytest.raises(msgspec.DecodeError):
        decode_requests(frame.replace(b"AAAA", b"\xff\xfe\xfd\xfc"))


def test_requests_are_no_replies_and_replies_no_requests() -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_replies(encode_frame([Get(1, "a")]))
    with pytest.raises(msgspec.DecodeError):
        decode_requests(encode_frame([Answer(1, 200)]))


def test_a_later_version_may_add_fields_at_the_end() -> None:
    assert decode_requests(msgspec.msgpack.encode([[1, 5, "key", 0, "something new"]])) == [Get(5, "key")]
    assert decode_replies(msgspec.msgpack.encode([[101, 5, 204]])) == [Answer(5, 204)]


def test_what_writes_is_known_as_such() -> None:
    write = (Put(1, "a", b""), Delete(1, "a"), Acquire(1, "a", 1, 0, ""), Renew(1, "a", 1), Release(1, "a", 1))
    read = (Get(1, "a"), Scan(1, "", "", 1), ScanLeases(1, "", "", 1), Count(1, ""), Stats(1), GetLock(1, "a"))
    assert all(type(message) in WRITES for message in write)
    assert not any(type(message) in WRITES for message in read)


def test_the_tags_are_frozen_since_processes_of_two_versions_talk_during_an_upgrade() -> None:
    kinds = (Get, Put, Delete, Scan, Count, Explain, Stats, Acquire, Renew, Release, CancelWait, GetLock, ScanLeases)
    assert [kind.__struct_config__.tag for kind in kinds] == list(range(1, 14))
    assert {kind.__name__: kind.__struct_config__.tag for kind in (Answer, Page, Info)} == {
        "Answer": 101,
        "Page": 102,
        "Info": 103,
    }
