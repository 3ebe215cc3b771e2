"""Header fields and parameters that carry meaning for a write: ttl, conditions, tokens, idempotency keys.

Owns: their syntax, as RFC 9110 (conditions), the Idempotency-Key draft and the API's own rules have it.
Promises: what is malformed is an error that says how to write it, never "no condition".
Leaves to others: whether a condition holds (the shard).
"""

from __future__ import annotations

import base64
import binascii
import re

import xxhash

from kvstore.config import Limits
from kvstore.errors import BadCondition, BadCursor, BadParameter, BadTtl
from kvstore.model import VERSION_MAX, IdempotencyKey, Preconditions
from kvstore.transport.http.requests import Head

_DECIMAL = re.compile(r"([0-9]{1,20}(\.[0-9]{0,20})?|\.[0-9]{1,20})([eE][-+]?[0-9]{1,3})?")
_ELEMENT = re.compile(r'[ \t]*(?:(W/)?"([^"\x00-\x20\x7f]*)")?[ \t]*(?:,|\Z)')  # of a list of tags; may be empty
_VERSION = re.compile(r"0|[1-9][0-9]{0,15}")
_TOKEN = re.compile(r"[0-9]{1,16}")
_CONDITION_FIELDS = ("if-match", "if-none-match", "lock-token")


def seconds_to_ms(value_s: float) -> int:
    """Milliseconds, rounded up so that a time never ends early."""
    return max(1, -int(-value_s * 1000 // 1))


def ttl_to_ms(ttl_s: float, limits: Limits) -> int:
    """The ttl of a value in milliseconds. Raises BadTtl."""
    if not 0 < ttl_s <= limits.ttl_s_max:
        raise BadTtl(f"a ttl of {ttl_s:g} s is not above 0 and at most {limits.ttl_s_max}.", ttl_s_max=limits.ttl_s_max)
    return seconds_to_ms(ttl_s)


def decode_ttl(text: str, limits: Limits) -> int:
    """The parameter `ttl` in milliseconds. Raises BadTtl."""
    if not _DECIMAL.fullmatch(text):
        raise BadTtl(f"ttl={text!a} is not a number of seconds.", ttl_s_max=limits.ttl_s_max)
    return ttl_to_ms(float(text), limits)


def decode_tags(field: str, *, weak: bool) -> list[int] | None:
    """The versions that a condition names, None for `*` (RFC 9110, 13.1); weak tags count only if `weak`.

    A tag that is no version of this store can never match and is left out. Raises BadCondition.
    """
    if field.strip() == "*":
        return None
    versions, tags, position = [], 0, 0
    while position < len(field):
        match = _ELEMENT.match(field, position)
        if match is None:
            item = field[position:].split(",")[0].strip()
            raise BadCondition(f"{item!a} is neither * nor a quoted version.")
        weak_mark, tag = match.groups()
        tags += tag is not None
        if tag is not None and _VERSION.fullmatch(tag) and (weak or not weak_mark):
            versions.append(int(tag))
        position = match.end()
    if not tags:
        raise BadCondition("the condition is empty.")
    return versions


def decode_token(fields: dict[str, str]) -> int | None:
    """`Lock-Token`, None without one. Raises BadParameter."""
    text = fields.get("lock-token")
    if text is None:
        return None
    if not _TOKEN.fullmatch(text) or int(text) > VERSION_MAX:
        raise BadParameter(f"Lock-Token: {text!a} is no token; send the integer that the lock was granted with.")
    return int(text)


def decode_guard(head: Head) -> Preconditions | None:
    """The conditions of a write, None without any. Raises BadCondition, BadParameter."""
    fields = head.fields
    if not any(name in fields for name in _CONDITION_FIELDS):
        return None
    guard = Preconditions(token=decode_token(fields))
    if "if-match" in fields:
        guard.versions = decode_tags(fields["if-match"], weak=False)
        guard.present = guard.versions is None
    if "if-none-match" in fields:
        guard.not_versions = decode_tags(fields["if-none-match"], weak=True)
        guard.absent = guard.not_versions is None
    return guard


def decode_once(head: Head, body: bytes) -> IdempotencyKey | None:
    """The Idempotency-Key and the digest of the request it came with, None without one. Raises BadParameter."""
    key = head.fields.get("idempotency-key")
    if key is None:
        return None
    if len(key) >= 2 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if not 1 <= len(key) <= 255 or not key.isprintable():
        raise BadParameter("the Idempotency-Key has 1 to 255 printable characters; draw a random one, such as a UUID.")
    conditions = "\n".join(head.fields.get(name, "") for name in _CONDITION_FIELDS)
    request = f"{head.method}\n{head.path}\n{head.query}\n{conditions}\n".encode("utf-8", "surrogateescape")
    return IdempotencyKey(key, xxhash.xxh3_128_hexdigest(request + body))


def encode_cursor(last: str | None) -> str | None:
    """Where a listing goes on after the key `last`, as an opaque text."""
    return None if last is None else base64.urlsafe_b64encode(b"k" + last.encode()).decode().rstrip("=")


def decode_cursor(cursor: str | None) -> str:
    """The key after which to go on; empty at the beginning. Raises BadCursor."""
    if cursor is None:
        return ""
    try:
        decoded = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        last = decoded[1:].decode("utf-8", "strict")
    except (binascii.Error, ValueError):
        raise BadCursor(f"after={cursor!a} is no cursor.") from None
    if decoded[:1] != b"k" or not last or encode_cursor(last) != cursor:
        raise BadCursor(f"after={cursor!a} is no cursor.")
    return last
