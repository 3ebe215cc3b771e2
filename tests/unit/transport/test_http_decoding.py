"""Keys and parameters as they come in a target: decoded strictly, refused readably."""

from __future__ import annotations

from urllib.parse import quote, quote_from_bytes

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvstore.errors import BadParameter, KeyEmpty, KeyNotUtf8, KeyTooLong
from kvstore.transport.http.requests import check_key, decode_key, decode_query

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


# --- keys -------------------------------------------------------------------------------------------------------------


@given(texts, st.sampled_from(["", "/", "!$&'()*+,;=:@-._~"]))
@example("..", "")
@example("a/../b", "/")
@example("nul\0inside", "")
@example("100% of 50%25", "")
def test_any_key_survives_its_percent_encoding(key: str, unescaped: str) -> None:
    assert decode_key(quote(key, safe=unescaped), 1024) == key


@given(texts)
def test_every_byte_may_be_encoded_and_case_does_not_matter(key: str) -> None:
    encoded = "".join(f"%{byte:02x}" for byte in key.encode())
    assert decode_key(encoded, 1024) == decode_key(encoded.upper(), 1024) == key


@given(texts)
def test_raw_bytes_that_are_utf8_are_the_key(key: str) -> None:
    raw = key.replace("%", "%25").encode().decode("utf-8", "surrogateescape")
    assert decode_key(raw, 1024) == key


@given(st.binary(min_size=1, max_size=8))
def test_bytes_are_a_key_exactly_if_they_are_utf8(raw: bytes) -> None:
    try:
        expected = raw.decode("utf-8")
    except UnicodeDecodeError:
        for encoded in (quote_from_bytes(raw, safe=""), raw.replace(b"%", b"%25").decode("utf-8", "surrogateescape")):
            with pytest.raises(KeyNotUtf8):
                decode_key(encoded, 1024)
    else:
        assert decode_key(quote_from_bytes(raw, safe=""), 1024) == expected


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        ("a/b", "a/b"),
        ("a%2Fb", "a/b"),
        ("a%2fb", "a/b"),
        ("//", "//"),
        ("..", ".."),
        ("a/../b", "a/../b"),
        ("%2E%2e", ".."),
        ("a+b", "a+b"),
        ("a%20b", "a b"),
        ("%00", "\0"),
        ("%3F", "?"),
        ("%25zz", "%zz"),
        ("%F0%9F%94%91", "🔑"),
    ],
)
def test_each_way_to_write_a_key_means_one_key(raw: str, key: str) -> None:
    assert decode_key(raw, 1024) == key


@pytest.mark.parametrize("raw", ["%", "a%", "%z", "%zz", "%1", "%1g", "%%31", "%2", "a%2/b", "%\uff11\uff11"])
def test_a_broken_escape_is_refused(raw: str) -> None:
    with pytest.raises(KeyNotUtf8):
        decode_key(raw, 1024)


@pytest.mark.parametrize(
    "raw",
    ["%FF", "%C3", "%C0%80", "%ED%A0%80", "%F8%88%80%80%80", "%F4%90%80%80", "a%80b", "\udcff", "%C3("],
)
def test_bytes_that_are_not_utf8_are_refused_overlong_and_surrogate_forms_included(raw: str) -> None:
    with pytest.raises(KeyNotUtf8):
        decode_key(raw, 1024)


def test_an_empty_key_is_refused() -> None:
    with pytest.raises(KeyEmpty):
        decode_key("", 1024)


@pytest.mark.parametrize("letter", ["a", "%61", "ü", "%C3%BC", "🔑"])
def test_a_key_is_measured_in_bytes_after_decoding(letter: str) -> None:
    size = {"a": 1, "%61": 1, "ü": 2, "%C3%BC": 2, "🔑": 4}[letter]
    assert len(decode_key(letter * (1024 // size), 1024).encode()) == 1024
    with pytest.raises(KeyTooLong) as refused:
        decode_key(letter * (1024 // size) + "b", 1024)
    assert refused.value.members["key_bytes_max"] == 1024
    assert "1025" in refused.value.detail


def test_a_key_that_came_as_text_obeys_the_same_rules() -> None:
    assert check_key("a/ü%zz", 1024) == "a/ü%zz"
    for key, error in (("", KeyEmpty), ("ü" * 513, KeyTooLong), ("a\ud800", KeyNotUtf8)):
        with pytest.raises(error):
            check_key(key, 1024)


# --- queries ----------------------------------------------------------------------------------------------------------

KNOWN = frozenset({"prefix", "limit", "after"})


@given(st.dictionaries(st.sampled_from(sorted(KNOWN)), texts))
def test_any_parameters_survive_their_encoding(parameters: dict[str, str]) -> None:
    query = "&".join(f"{name}={quote(value, safe='')}" for name, value in parameters.items())
    assert decode_query(query, KNOWN) == parameters


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", {}),
        ("&&", {}),
        ("prefix=", {"prefix": ""}),
        ("prefix", {"prefix": ""}),
        ("prefix=a+b", {"prefix": "a b"}),
        ("prefix=a%2Bb", {"prefix": "a+b"}),
        ("prefix=a=b", {"prefix": "a=b"}),
        ("prefix=a%26limit%3D5", {"prefix": "a&limit=5"}),
        ("%70refix=a", {"prefix": "a"}),
        ("prefix=\udcc3\udcbc", {"prefix": "ü"}),
    ],
)
def test_a_query_is_decoded_as_forms_are(query: str, expected: dict[str, str]) -> None:
    assert decode_query(query, KNOWN) == expected


@pytest.mark.parametrize(
    "query",
    [
        "tll=5",
        "Prefix=a",
        "prefix=a&prefix=a",
        "prefix=a&%70refix=b",
        "=a",
        "prefix=%zz",
        "prefix=%",
        "prefix=%FF",
        "prefix=\udcff",
        "pre%FFfix=a",
        "prefix=a;limit=5&",
        "a;limit=5",
    ],
)
def test_unknown_repeated_and_broken_parameters_are_refused(query: str) -> None:
    if query == "prefix=a;limit=5&":
        assert decode_query(query, KNOWN) == {"prefix": "a;limit=5"}, "a semicolon separates nothing"
        return
    with pytest.raises(BadParameter):
        decode_query(query, KNOWN)


def test_a_refused_parameter_is_named_with_what_is_known() -> None:
    with pytest.raises(BadParameter) as refused:
        decode_query("tll=5", KNOWN)
    assert "'tll'" in refused.value.detail
    assert "after, limit, prefix" in refused.value.detail
