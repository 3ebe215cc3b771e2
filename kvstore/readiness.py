"""The word that a cluster is ready, and the few lines of HTTP by which a launcher asks for it.

Owns: when `ready:` is said, and what is said until then.
Promises: at the first start of a cluster with copies it is said once all of them are in sync, so that any disk may be
lost from then on; but no later than `COPIES_WAIT_S` after the first router is ready.
Leaves to others: whether a router can serve (`GET /readyz`), what copies there are (`GET /v1/cluster`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress

from kvstore.addresses import on_this_host

COPIES_WAIT_S = 20.0
_POLL_S = 0.05
_ANSWER_S = 2.0
_REPORT_S = 10.0
_PROGRESS_S = 1.0
_ANSWER_BYTES_MAX = 1024 * 1024

Say = Callable[[str], None]


async def until_ready(listen: str, say: Say) -> None:
    """Poll /readyz of that router until it answers 200; say now and then why it does not."""
    host, port = on_this_host(listen)
    clock = asyncio.get_running_loop()
    report_s = clock.time() + _REPORT_S
    while True:
        status, reason = await http_get(host, port, "/readyz")
        if status == 200:
            return
        if clock.time() >= report_s:
            report_s += _REPORT_S
            say(f"not ready yet: {reason}")
        await asyncio.sleep(_POLL_S)


async def until_copied(listen: str, say: Say, wait_s: float = COPIES_WAIT_S) -> None:
    """Wait until every shard has as many copies in sync as it can have, for `wait_s` seconds at most.

    Says how far they are.
    """
    host, port = on_this_host(listen)
    clock = asyncio.get_running_loop()
    end_s = clock.time() + wait_s
    report_s = clock.time() + _PROGRESS_S
    while True:
        status, body, _ = await http_ask(host, port, "/v1/cluster", _ANSWER_S)
        in_sync, wanted = copies_in(body) if status == 200 else (0, 1)
        if in_sync >= wanted:
            return
        if clock.time() >= end_s:
            say(f"not all copies are in sync yet ({in_sync} of {wanted}): `kvstore status` shows what they wait for")
            return
        if clock.time() >= report_s:
            report_s += _PROGRESS_S
            say(f"copies in sync: {in_sync} of {wanted}")
        await asyncio.sleep(_POLL_S)


def copies_in(body: bytes) -> tuple[int, int]:
    """(in sync, possible) copies beside the primaries, of a GET /v1/cluster."""
    document = json.loads(body)
    shards = document["shards"]
    in_sync = sum(copy["state"] == "in-sync" for shard in shards for copy in shard["copies"])
    return in_sync, (min(document["replicas"], len(document["nodes"])) - 1) * len(shards)


async def http_get(host: str, port: int, path: str) -> tuple[int, str]:
    """Status and reason (the `detail` of a problem document, or the error); status 0 if there is no answer."""
    status, _, reason = await http_ask(host, port, path, _ANSWER_S)
    return status, reason


async def http_ask(host: str, port: int, path: str, timeout_s: float) -> tuple[int, bytes, str]:
    """Status, body and reason, as `http_get`.

    The few lines of HTTP that this needs: an HTTP library would be most of the launcher's memory and start.
    """
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port, limit=_ANSWER_BYTES_MAX)
            try:
                # 1.0: the answer ends with the connection.
                writer.write(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
                answer = bytearray()
                while (chunk := await reader.read(_ANSWER_BYTES_MAX)) and len(answer) <= _ANSWER_BYTES_MAX:
                    answer += chunk
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        return 0, b"", str(error) or type(error).__name__
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    status = int(head[9:12]) if head[9:12].isdigit() else 0
    with suppress(ValueError, AttributeError):
        return status, body, str(json.loads(body).get("detail", "")) if body else ""
    return status, body, head.split(b"\r\n")[0].decode(errors="replace")
