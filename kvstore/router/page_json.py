"""A page of a listing as JSON, made in pieces.

Owns: its form.
Promises: however many bytes the values have, and however many pages are made at once, a turn of the event loop makes
no more than a piece of one page: `_PIECE_BYTES` or a single item. The pieces are never joined: to copy a page of
several MiB takes longer than to make a piece of it. A value that is still to be asked for is brought when it is due.
Leaves to others: which items are on the page (`listing`), how much memory pages take (`all_shards`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from itertools import groupby
from typing import Any

import msgspec

from kvstore.placement import partition_set
from kvstore.router.decode import encode_cursor
from kvstore.router.json_ops import encode_value
from kvstore.router.listing import Item, Listing
from kvstore.transport.answers import Turns
from kvstore.transport.http.responses import Pieces

_PIECE_BYTES = 65_536
_PIECE_ITEMS = 500


Bring = Callable[[str], Awaitable[tuple[Item | None, int]]]


async def encode_page(
    listing: Listing, values: bool, partial: bool, turns: Turns, bring: Bring | None = None
) -> Pieces:
    """`{"items":[{"key","version"[,"value"|"value_base64"][,"ttl"]}…],"next"[,"missing"]}`.

    The optional members of an item with `values` only, `missing` with `partial` only. `bring`: the item of a key whose
    value was left out, None if it is gone, and the set of partitions that are missing because of it.
    """
    pieces = [b'{"items":[']
    missing = listing.missing
    for is_left_out, run in groupby(listing.items, lambda item: item[2] is None and item[0] in listing.left_out):
        if not is_left_out or bring is None:
            await _encode_run(run, values, turns, pieces)
            continue
        for key, *_ in run:
            brought, gap = await bring(key)
            missing |= gap
            if brought is not None:
                await _encode_run(iter((brought,)), values, turns, pieces)
    if len(pieces) > 1:
        pieces.pop()
    end = _encode({"next": encode_cursor(listing.last), **missing_members(missing, partial)})
    return Pieces([*pieces, b"]," + end.removeprefix(b"{") + b"\n"])


async def _encode_run(items: Iterator[Item], values: bool, turns: Turns, pieces: list[bytes]) -> None:
    while True:
        async with turns:
            piece = _encode_piece(items, values)
        if not piece:
            return
        pieces += (piece, b",")


def missing_members(partitions: int, partial: bool) -> dict[str, list[int]]:
    """What was left out, if that was allowed."""
    return {"missing": partition_set.listed(partitions)} if partial else {}


def _encode_piece(items: Iterator[Item], values: bool) -> bytes:
    """The next few items; empty at the end."""
    parts: list[bytes] = []
    size = 0
    for key, version, value, ttl_left_ms in items:
        item: dict[str, Any] = {"key": key, "version": version}
        if values:
            item |= encode_value(value or b"")
            if ttl_left_ms:
                item["ttl"] = ttl_left_ms / 1000
        parts.append(_encode(item))
        size += len(parts[-1])
        if size >= _PIECE_BYTES or len(parts) >= _PIECE_ITEMS:
            break
    return b",".join(parts)


_encode = msgspec.json.Encoder().encode
