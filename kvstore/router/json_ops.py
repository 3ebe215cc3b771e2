"""Operations and values in the JSON of a request: put, get, delete.

Owns: their form, which batches and transactions have in common.
Promises: a value has exactly one of `value` (text) and `value_base64`; bytes that are text leave as text.
Leaves to others: what is done with them (`batch`, `transactions`).
"""

from __future__ import annotations

import base64

from msgspec import UNSET, Struct, UnsetType

from kvstore.config import Limits
from kvstore.errors import BadBody, ValueTooLarge


class PutOp(Struct, tag_field="op", tag="put", forbid_unknown_fields=True):
    key: str
    value: str | UnsetType = UNSET
    value_base64: str | UnsetType = UNSET
    ttl: float | UnsetType = UNSET


class GetOp(Struct, tag_field="op", tag="get", forbid_unknown_fields=True):
    key: str


class DeleteOp(Struct, tag_field="op", tag="delete", forbid_unknown_fields=True):
    key: str


Op = PutOp | GetOp | DeleteOp


def decode_value(text: str | UnsetType, encoded: str | UnsetType, where: str) -> bytes:
    """The bytes of `value` or `value_base64`, exactly one of which is given. Raises BadBody."""
    if (text is UNSET) == (encoded is UNSET):
        raise BadBody(f"{where} needs exactly one of value and value_base64")
    try:
        if encoded is not UNSET:
            return base64.b64decode(encoded, validate=True)
        return str(text).encode()
    except UnicodeEncodeError:
        raise BadBody(f"{where}: value holds a lone surrogate; use value_base64 for bytes") from None
    except ValueError as error:  # binascii.Error, or characters beyond ASCII
        raise BadBody(f"{where}: value_base64 is not base64: {error}") from None


def encode_value(value: bytes) -> dict[str, str]:
    """`{"value": text}` where the bytes are UTF-8, else `{"value_base64": …}`."""
    try:
        return {"value": value.decode()}
    except UnicodeDecodeError:
        return {"value_base64": base64.b64encode(value).decode()}


def check_value_size(size: int, limits: Limits) -> None:
    """Raises ValueTooLarge."""
    if size > limits.value_bytes_max:
        raise ValueTooLarge(
            f"the value has {size} bytes; the limit is {limits.value_bytes_max}", bytes_max=limits.value_bytes_max
        )
