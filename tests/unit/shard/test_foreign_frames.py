"""Frames where they do not belong, in a cluster with copies: what is no session of a primary changes nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp

from kvstore.replication import messages
from kvstore.replication.session import Session
from kvstore.transport.sessions import PARAMETER
from tests.unit.shard.test_node_failover import cluster_in
from tests.unit.shard.test_old_copies import check_all, put_all

GARBAGE = [
    b"", b"\x00" * 100, b"\xff" * 1000, b"{}", b"\x92\x01\xc0",
    messages.encode(messages.Records([], 1 << 40)), messages.encode(messages.Beacon(1, 1 << 62)),
    messages.encode(messages.Hello(Session("of no store", 1 << 40, "start", "no copy", 1))),
]  # fmt: skip


async def test_what_is_no_session_of_a_primary_changes_no_copy_and_ends_no_process(tmp_path: Path) -> None:
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession() as http:
        await cluster.until_replicated()
        await put_all(http, cluster, "v")
        shard = await cluster.shard("s1")
        (copy,) = shard.replicas
        node = next(each.listen for each in cluster.config.shards if each.id == copy.node)
        session = (cluster.folder / copy.node / f"shard-{copy.node}.session").read_text().strip()
        url = f"http://{node}/copies?store={shard.store_id}&{PARAMETER}={session}"
        old = messages.encode(messages.Hello(Session(shard.store_id, 0, "start", copy.copy_id, copy.joined)))
        for frame in (*GARBAGE, old, b"\x00" * (65 << 20)):
            async with asyncio.timeout(60), http.ws_connect(url, max_msg_size=0) as socket:
                try:
                    await socket.send_bytes(frame)
                    answers = [answer.data async for answer in socket if answer.type is aiohttp.WSMsgType.BINARY]
                except (aiohttp.ClientError, ConnectionError):
                    answers = []
                told = [messages.decode_from_copy(answer) for answer in answers]
                assert all(isinstance(each, messages.Foreign | messages.Deposed) for each in told)
        await put_all(http, cluster, "w")
        after = await cluster.shard("s1")
        assert (after.term, after.replicas) == (shard.term, shard.replicas)
        await cluster.end("s1")
        await check_all(http, cluster, "w")
