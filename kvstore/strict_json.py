"""JSON that programs and people send, decoded so that nothing in it is passed over.

Owns: what `msgspec` lets through: an object that names a member twice, at any depth.
Promises: a document that is decoded says each thing once; a whole number is an integer however it is written.
Leaves to others: what a document's members are (its type), how a refusal is told.

RFC 8259 leaves open what a doubled member means, and parsers differ: the last counts, or the first, or both. A proxy
that checked the first of two values would let pass what is then done with the last.
"""

from __future__ import annotations

import math
from collections import Counter
from json.decoder import JSONDecoder
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

_NAME_LENGTH_MAX = 100  # of a name in an error
_EXACT_MAX = 2**53  # up to here a float is the number that was written


def decode_strictly(decoder: msgspec.json.Decoder[T], raw: bytes) -> T:
    """The document that `raw` is. Raises msgspec.DecodeError, UnicodeError, RecursionError.

    A number such as 3.0 is an integer, as JSON Schema, and so the OpenAPI document, has it.
    """
    try:
        document = decoder.decode(raw)
    except msgspec.ValidationError as error:
        document = decoder.decode(_with_integers(raw, error))
    _members.decode(raw.decode())
    return document


def _refuse_doubled(members: list[tuple[str, Any]]) -> None:
    if len(dict(members)) == len(members):
        return
    name, times = Counter(name for name, _ in members).most_common(1)[0]
    raise msgspec.DecodeError(f"an object has the member {name[:_NAME_LENGTH_MAX]!a} {times} times; send it once")


def _with_integers(raw: bytes, error: msgspec.ValidationError) -> bytes:
    """The same document with whole numbers written as integers. Raises `error` where that cannot be done."""
    try:
        return msgspec.json.encode(_whole.decode(raw))
    except (msgspec.MsgspecError, OverflowError, ValueError, RecursionError):
        raise error from None


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("out of range")  # it would be written as null
    return int(number) if number.is_integer() and abs(number) <= _EXACT_MAX else number


_whole = msgspec.json.Decoder(float_hook=_number)
_members = JSONDecoder(object_pairs_hook=_refuse_doubled, parse_int=float)  # int() refuses numbers of many digits
