"""A bare aiohttp `web.Server` handler that stores nothing: what HTTP alone costs in the same language and library.

It answers every GET with the same 100 bytes under the headers that a value of kvstore carries, and reads the body of
every PUT before it answers 204. `python -m loadtest.bench.bare PORT` prints `ready: URL`.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

import uvloop
from aiohttp import web

_VALUE = b"x" * 100
_BACKLOG = 1024
_HEADERS = {
    "Content-Type": "application/octet-stream",
    "ETag": '"1234567"',
    "Kv-Shard": "s1",
    "Kv-Partition": "1234",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


async def _handle(request: web.BaseRequest) -> web.StreamResponse:
    if request.method == "GET":
        return web.Response(body=_VALUE, headers=_HEADERS)
    await request.read()
    return web.Response(status=204, headers={"ETag": '"1234567"'})


async def _serve(port: int) -> None:
    server = web.Server(_handle, access_log=None)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", port, backlog=_BACKLOG)
    async with listener:
        print(f"ready: http://127.0.0.1:{port}", flush=True)
        await listener.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(int(sys.argv[1])))
