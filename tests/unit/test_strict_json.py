"""A document says each thing once: doubled members are refused wherever they stand, and nothing else is."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.strict_json import decode_strictly

ANY: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Any)
DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
)  # fmt: skip


@pytest.mark.parametrize(
    ("document", "name"),
    [
        (b'{"ttl":1,"ttl":2}', "'ttl'"),
        (b'{"ttl":1,"ttl":1}', "'ttl'"),
        (b'{"a":1,"ttl":1,"b":2,"t\\u0074l":2}', "'ttl'"),
        (b'[{"a":1},{"b":{"a":1,"c":[{"x":1,"y":{},"x":2}]}}]', "'x'"),
        ('{"\u00fc":1, "\\u00fc" :2}'.encode(), r"'\xfc'"),
        (b'{"":1,"":2}', "''"),
    ],
)
def test_a_member_that_is_named_twice_is_refused_by_its_name(document: bytes, name: str) -> None:
    with pytest.raises(msgspec.DecodeError) as refused:
        decode_strictly(ANY, document)
    assert f"member {name} 2 times" in str(refused.value)


def test_what_a_type_passes_over_is_looked_at_too() -> None:
    class Line(msgspec.Struct):
        key: str
        version: msgspec.Raw = msgspec.Raw()

    lines = msgspec.json.Decoder(Line)
    assert decode_strictly(lines, b'{"key":"k","version":' + b"9" * 5000 + b"}").key == "k"
    for again in (b'"version":{"a":1,"a":2}', b'"more":1,"more":2', b'"key":"k"'):
        with pytest.raises(msgspec.DecodeError):
            decode_strictly(lines, b'{"key":"k",' + again + b"}")


@given(DOCUMENTS)
def test_a_document_without_doubled_members_is_taken_as_it_is(document: Any) -> None:
    encoded = msgspec.json.encode(document)
    assert decode_strictly(ANY, encoded) == ANY.decode(encoded)


class Counted(msgspec.Struct):
    number: int
    other: int | None = None


@pytest.mark.parametrize("written", ["3", "3.0", "3e0", "30e-1", "0.3E+1"])
def test_a_whole_number_is_an_integer_however_it_is_written(written: str) -> None:
    raw = f'{{"number":{written}}}'.encode()
    assert decode_strictly(msgspec.json.Decoder(Counted), raw) == Counted(3)


@pytest.mark.parametrize(
    "document",
    [
        '{"number":3.5}',
        '{"number":1e300}',
        '{"number":"3.0"}',
        '{"number":3.0,"other":1e400}',
        '{"number":3.0,"number":3}',
        '{"number":3.0,"other":' + "9" * 5000 + "}",
    ],
)
def test_what_is_no_integer_stays_none(document: str) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_strictly(msgspec.json.Decoder(Counted), document.encode())
