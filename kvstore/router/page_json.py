"""A page of a listing as JSON, made in pieces.

Owns: its form.
Promises: however many bytes the values have, the event loop has its turn after each `_PIECE_BYTES` of them.
Leaves to others: which items are on the page (`listing`), how much memory pages take (`app`).
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from kvstore.router.decode import encode_cursor
from kvstore.router.json_ops import encode_value
from kvstore.router.listing import Listing

_PIECE_BYTES = 65_536
_PIECE_ITEMS = 500


async def encode_page(listing: Listing, values: bool) -> bytes:
    """`{"items":[{"key","version"[,"value"|"value_base64"][,"ttl"]}…],"next"}`; the last two with `values` only."""
    encode = msgspec.json.Encoder().encode
    parts: list[bytes] = [b'{"items":[']
    size = items = 0
    for key, version, value, ttl_left_ms in listing.items:
        item: dict[str, Any] = {"key": key, "version": version}
        if values:
            item |= encode_value(value or b"")
            if ttl_left_ms:
                item["ttl"] = ttl_left_ms / 1000
        encoded = encode(item)
        parts += (b"," if len(parts) > 1 else b"", encoded)
        size, items = size + len(encoded), items + 1
        if size >= _PIECE_BYTES or items >= _PIECE_ITEMS:
            size = items = 0
            await asyncio.sleep(0)
    parts += (b'],"next":', encode(encode_cursor(listing.last)), b"}\n")
    return b"".join(parts)
