"""Operations and values in the JSON of a request: put, get, delete.

Owns: their form, which batches and transactions have in common.
Promises: a value has exactly one of `value` (text) and `value_base64`; bytes that are text leave as text.
Leaves to others: what is done with them (`batch`, `routes.txn`).
"""

from __future__ import annotations

import base64
from typing import Annotated

from msgspec import UNSET, Struct, UnsetType

from kvstore.config import Limits
from kvstore.errors import BadBody, ValueTooLarge
from kvstore.router.routes.words import Key, ValueBase64, ValueText
from kvstore.transport.http.schema import about, having, refined


@refined(oneOf=[having("value"), having("value_base64")])
class PutOp(Struct, tag_field="op", tag="put", forbid_unknown_fields=True):
    """Sets the value, of at most {value_bytes_max:,} bytes: exactly one of value and value_base64."""

    key: Key
    value: ValueText | UnsetType = UNSET
    value_base64: ValueBase64 | UnsetType = UNSET
    ttl: (
        Annotated[
            float,
            about("Seconds until the key expires: above 0, at most {ttl_s_max:,}. Without it the key never expires."),
        ]
        | UnsetType
    ) = UNSET


class GetOp(Struct, tag_field="op", tag="get", forbid_unknown_fields=True):
    """Reads the value."""

    key: Key


class DeleteOp(Struct, tag_field="op", tag="delete", forbid_unknown_fields=True):
    """Removes the key."""

    key: Key


Op = PutOp | GetOp | DeleteOp


def decode_value(text: str | UnsetType, encoded: str | UnsetType, where: str) -> bytes:
    """The bytes of `value` or `value_base64`, exactly one of which is given. Raises BadBody."""
    if (text is UNSET) == (encoded is UNSET):
        raise BadBody(f"{where} needs exactly one of value and value_base64.")
    try:
        if encoded is not UNSET:
            return base64.b64decode(encoded, validate=True)
        return str(text).encode()
    except UnicodeEncodeError:
        raise BadBody(f"{where}: value holds a lone surrogate; use value_base64 for bytes.") from None
    except ValueError as error:  # binascii.Error, or characters beyond ASCII
        raise BadBody(f"{where}: value_base64 is not base64: {error}.") from None


def encode_value(value: bytes) -> dict[str, str | bytes]:
    """`{"value": text}` where the bytes are UTF-8, else `{"value_base64": bytes}`, which msgspec writes as base64."""
    try:
        return {"value": value.decode()}
    except UnicodeDecodeError:
        return {"value_base64": value}


def check_value_size(size: int, limits: Limits) -> None:
    """Refuse a value of that many bytes. Raises ValueTooLarge."""
    if size > limits.value_bytes_max:
        raise ValueTooLarge(
            f"the value has {size} bytes; the limit is {limits.value_bytes_max}.", bytes_max=limits.value_bytes_max
        )
