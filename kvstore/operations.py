"""Operations on keys and their values, as the client names them and as JSON has them.

Owns: the operations of batches and transactions, and the JSON forms of values.
Promises: any bytes survive their way through JSON; what JSON could not carry is an error, never another operation.
Leaves to others: sending them (`client`), conditions (`txn`).
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvstore.errors import BadTtl, KeyNotUtf8


@dataclass(frozen=True, slots=True)
class Put:
    """An operation of a batch or transaction: `ttl` in seconds, None for a value that does not expire."""

    key: str
    value: bytes
    ttl: float | None = None


@dataclass(frozen=True, slots=True)
class Get:
    """An operation of a batch or transaction."""

    key: str


@dataclass(frozen=True, slots=True)
class Delete:
    """An operation of a batch or transaction."""

    key: str


Operation = Put | Get | Delete


def operation_members(operation: Operation) -> dict[str, Any]:
    """An operation in JSON. Raises KeyNotUtf8, BadTtl, and TypeError for a value that is not bytes."""
    key = checked_key(operation.key)
    if isinstance(operation, Put):
        ttl = {} if operation.ttl is None else {"ttl": finite(operation.ttl)}
        return {"op": "put", "key": key, **value_members(checked_value(operation.value)), **ttl}
    return {"op": "get" if isinstance(operation, Get) else "delete", "key": key}


def value_members(value: bytes) -> dict[str, str]:
    """A value in JSON: `{"value": text}` where it is UTF-8, else `{"value_base64": …}`."""
    try:
        return {"value": value.decode()}
    except UnicodeDecodeError:
        return {"value_base64": base64.b64encode(value).decode()}


def value_of(document: Mapping[str, Any]) -> bytes | None:
    """The inverse of `value_members`; None if there is no value. Raises ValueError for broken base64."""
    if "value" in document:
        return str(document["value"]).encode()
    if "value_base64" in document:
        try:
            return base64.b64decode(document["value_base64"], validate=True)
        except binascii.Error as error:
            raise ValueError(f"value_base64 is not base64: {error}") from None
    return None


def checked_key(key: str) -> str:
    """The key. Raises KeyNotUtf8."""
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise KeyNotUtf8(f"the key {key!r} is not UTF-8 at character {error.start}.") from None
    return key


def checked_value(value: bytes) -> bytes:
    """The value. Raises TypeError if it is not bytes."""
    if not isinstance(value, bytes):
        raise TypeError(f"a value is bytes, not {type(value).__name__}: encode text first")
    return value


def finite(ttl: float) -> float:
    """The number, unless it is infinite or none. Raises BadTtl.

    JSON has no NaN: sent as null, it would be a ttl lost silently.
    """
    if not math.isfinite(ttl):
        raise BadTtl(f"ttl is {ttl}, which is no time.")
    return ttl
