"""Conditions, tokens and idempotency keys as header fields: RFC 9110, the draft, and our own rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.config import Limits
from kvstore.errors import BadCondition, BadParameter, BadTtl
from kvstore.model import VERSION_MAX, Preconditions
from kvstore.router.decode import (
    decode_guard,
    decode_once,
    decode_tags,
    decode_token,
    decode_ttl,
    seconds_to_ms,
)
from kvstore.transport.http.requests import Head


def head(method: str = "PUT", path: str = "/v1/kv/k", query: str = "", **fields: str) -> Head:
    return Head(method, path, query, {name.replace("_", "-"): value for name, value in fields.items()})


# --- tags -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "strong", "weak"),
    [
        ("*", None, None),
        (" * ", None, None),
        ('"7"', [7], [7]),
        ('W/"7"', [], [7]),
        ('"7", "8"', [7, 8], [7, 8]),
        ('"7","8"', [7, 8], [7, 8]),
        (' "7" ,\t"8" ', [7, 8], [7, 8]),
        ('"7", W/"8", "9"', [7, 9], [7, 8, 9]),
        (',"7",,"8",', [7, 8], [7, 8]),  # RFC 9110, 5.6.1.2: empty elements of a list are ignored
        ('""', [], []),
        ('"abc"', [], []),
        ('"abc", "7"', [7], [7]),
        ('"7x"', [], []),
        ('"-7"', [], []),
        ('"7.0"', [], []),
        ('"a,b"', [], []),  # a comma inside the quotes is one of the characters of a tag
        ('"a,b", "7"', [7], [7]),
        ('"1,2"', [], []),
        ('"007"', [], []),  # tags are compared character by character: this is no version of ours
        ('"0"', [0], [0]),
        ('"\xe4"', [], []),
        ('"٧"', [], []),
        ('"\'"', [], []),
    ],
)
def test_tags(field: str, strong: list[int] | None, weak: list[int] | None):
    assert decode_tags(field, weak=False) == strong
    assert decode_tags(field, weak=True) == weak


def test_a_tag_beyond_all_versions_matches_none_of_them():
    for text in ("9" * 30, str(2**53), "1" + "0" * 400):
        (tag,) = decode_tags(f'"{text}"', weak=False) or [VERSION_MAX + 1]
        assert tag > VERSION_MAX


@pytest.mark.parametrize(
    "field",
    [
        "",
        " ",
        ",",
        "7",
        "abc",
        '"7',
        '7"',
        '"7" "8"',
        '"7"; "8"',
        '*, "7"',
        '"7", *',
        "*, *",
        "**",
        'w/"7"',
        'W/ "7"',
        "W/7",
        "'7'",
        '"a b"',
        '"7"x',
        '""7""',
        "“7”",
    ],
)
def test_a_malformed_condition_is_refused_with_the_mend(field: str):
    for name in ("if_match", "if_none_match"):
        with pytest.raises(BadCondition) as caught:
            decode_guard(head(**{name: field}))
        assert caught.value.status == 400
        assert 'If-Match: "42"' in caught.value.next_step


@given(st.lists(st.tuples(st.booleans(), st.integers(0, VERSION_MAX)), min_size=1))
def test_every_list_of_versions_is_read_as_it_was_written(tags: list[tuple[bool, int]]):
    field = ", ".join(("W/" if weak else "") + f'"{version}"' for weak, version in tags)
    assert decode_tags(field, weak=True) == [version for _, version in tags]
    assert decode_tags(field, weak=False) == [version for weak, version in tags if not weak]


@given(st.text("\"W/*, 7a\t'", max_size=12))
def test_what_is_no_condition_never_passes_for_one(field: str):
    """Read the other way round: what is accepted, written out again, is what was given."""
    try:
        versions = decode_tags(field, weak=True)
    except BadCondition:
        return
    assert field.strip() == "*" if versions is None else '"' in field


# --- guards -----------------------------------------------------------------------------------------------------------


def test_no_header_is_no_condition():
    assert decode_guard(head(content_type="text/plain")) is None


@pytest.mark.parametrize(
    ("fields", "guard"),
    [
        ({"if_match": "*"}, Preconditions(present=True)),
        ({"if_match": '"7"'}, Preconditions(versions=[7])),
        ({"if_match": 'W/"7"'}, Preconditions(versions=[])),
        ({"if_none_match": "*"}, Preconditions(absent=True)),
        ({"if_none_match": 'W/"7", "8"'}, Preconditions(not_versions=[7, 8])),
        ({"if_match": '"7"', "if_none_match": "*"}, Preconditions(versions=[7], absent=True)),
        ({"lock_token": "12"}, Preconditions(token=12)),
        ({"lock_token": "0", "if_match": "*"}, Preconditions(token=0, present=True)),
    ],
)
def test_guards(fields: dict[str, str], guard: Preconditions):
    assert decode_guard(head(**fields)) == guard


@pytest.mark.parametrize(
    "text",
    [
        *("", "abc", "-1", "+1", "1.0", "1e3", "0x1", "1_000", "1 2", "1, 2", '"12"', "٧", "²", "NaN"),
        *(str(2**53), "9" * 16, "9" * 400, "\udcff"),
    ],
)
def test_what_is_no_token_is_refused_and_never_no_token(text: str):
    with pytest.raises(BadParameter, match="Lock-Token"):
        decode_guard(head(lock_token=text))


def test_every_token_below_the_limit_is_taken():
    assert decode_token({"lock-token": str(VERSION_MAX)}) == VERSION_MAX
    assert decode_token({"lock-token": "0"}) == 0
    assert decode_token({}) is None


# --- idempotency keys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "key"),
    [
        ("a", "a"),
        ('"a"', "a"),
        ('"', '"'),
        ('"a', '"a'),
        ('""a""', '"a"'),
        ("x" * 255, "x" * 255),
        ('"' + "x" * 255 + '"', "x" * 255),
        ("5f1ab5b8-0000-4000-8000-000000000000", "5f1ab5b8-0000-4000-8000-000000000000"),
        ("schlüssel", "schlüssel"),
        ("a b", "a b"),
    ],
)
def test_quotes_around_an_idempotency_key_are_taken_off(field: str, key: str):
    once = decode_once(head(idempotency_key=field), b"")
    assert once is not None
    assert once.key == key


@pytest.mark.parametrize("field", ["", '""', "x" * 256, '"' + "x" * 256 + '"', "a\x01b", "a\nb", "a\udcffb", "a\x7f"])
def test_what_is_no_idempotency_key_is_refused(field: str):
    with pytest.raises(BadParameter, match="1 to 255"):
        decode_once(head(idempotency_key=field), b"")


def test_without_the_header_nothing_is_digested():
    assert decode_once(head(), b"") is None


REQUESTS = [
    (head(idempotency_key="k"), b""),
    (head(idempotency_key="k"), b"v"),
    (head("DELETE", idempotency_key="k"), b""),
    (head(path="/v1/kv/other", idempotency_key="k"), b""),
    (head(query="ttl=1", idempotency_key="k"), b""),
    (head(idempotency_key="k", if_match="*"), b""),
    (head(idempotency_key="k", if_none_match="*"), b""),
    (head(idempotency_key="k", lock_token="1"), b""),
    (head(idempotency_key="k", if_match='"1"'), b""),
]


def test_requests_that_mean_something_else_have_another_digest():
    digests = [once.digest for request, body in REQUESTS if (once := decode_once(request, body)) is not None]
    assert len(set(digests)) == len(REQUESTS)


def test_the_same_request_has_the_same_digest_whatever_else_comes_with_it():
    plain = decode_once(head(idempotency_key="k", if_match='"1"'), b"v")
    other = decode_once(head(idempotency_key='"k"', if_match='"1"', user_agent="curl", host="x"), b"v")
    assert plain == other


def test_a_byte_moved_from_one_part_of_the_request_to_the_next_is_another_request():
    one = decode_once(head(idempotency_key="k", query="a", if_match="b"), b"")
    other = decode_once(head(idempotency_key="k", query="a\nb"), b"")
    assert one is not None
    assert other is not None
    assert one.digest != other.digest


# --- times ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 86_400_000))
def test_milliseconds_written_as_seconds_come_back_as_they_were(ms: int):
    assert seconds_to_ms(float(f"{ms / 1000:.3f}")) in (ms, ms + 1)  # never earlier


@pytest.mark.parametrize(
    "text", ["0", "0.0", "-1", "", "abc", "NaN", "inf", "1e", "e3", "1e9", "0e3", "1e-999", "315360001", "1,5", "+1"]
)
def test_what_is_no_ttl_is_refused(text: str):
    with pytest.raises(BadTtl):
        decode_ttl(text, Limits())


@pytest.mark.parametrize(("text", "ms"), [("1", 1000), (".5", 500), ("1.", 1000), ("1e3", 1_000_000), ("5e-324", 1)])
def test_a_ttl_is_a_number_as_json_writes_it_or_shorter(text: str, ms: int):
    assert decode_ttl(text, Limits()) == ms
