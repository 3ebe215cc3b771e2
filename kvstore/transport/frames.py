"""Frames with a fault: of many messages, one may be none.

Owns: taking a frame apart message by message when it cannot be decoded as a whole.
Promises: a message that is none fails alone, if only it has an id to be answered under; the others are done.
Leaves to others: frames without a fault (`protocol`), which are decoded in one go.
"""

from __future__ import annotations

import msgspec

from kvstore.errors import BadRequest
from kvstore.protocol import Answer, Request

_apart = msgspec.msgpack.Decoder(list[msgspec.Raw])
_tag = msgspec.msgpack.Decoder(int)
_NAMES_WHAT_FOLLOWS = frozenset({28, 29})  # Names and ForStore
_id = msgspec.msgpack.Decoder(int)
_request = msgspec.msgpack.Decoder(Request)


def decode_apart(frame: bytes) -> tuple[list[Request], list[Answer]]:
    """The requests of a frame, and refusals of those that are none. Raises msgspec.DecodeError."""
    requests: list[Request] = []
    refusals: list[Answer] = []
    for raw in _apart.decode(frame):
        try:
            requests.append(_request.decode(raw))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            refusals.append(_refusal(raw, error))
    return requests, refusals


def _refusal(raw: msgspec.Raw, error: Exception) -> Answer:
    parts = _apart.decode(raw)
    if parts and _tag.decode(parts[0]) in _NAMES_WHAT_FOLLOWS:
        raise msgspec.DecodeError(f"what comes behind this message cannot be told: {error}")
    if len(parts) < 2:
        raise msgspec.DecodeError(f"a message without an id: {error}")
    refused = BadRequest(f"a message of the channel is out of its bounds or not known here: {error}.")
    return Answer(_id.decode(parts[1]), refused.status, problem=refused.problem())
