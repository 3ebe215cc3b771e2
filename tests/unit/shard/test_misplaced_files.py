"""Files and frames where they do not belong, in a running cluster with copies: old folders, what is no session.

What was acknowledged is there all the same, and what was put there changes nothing of the others.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import aiohttp

from kvstore.replication import messages
from kvstore.replication.session import Session
from kvstore.transport.sessions import PARAMETER
from tests.unit.shard.test_node_failover import Cluster, cluster_in

KEYS = 30


async def put_all(http: aiohttp.ClientSession, cluster: Cluster, value: str) -> None:
    for number in range(KEYS):
        await http.put(f"{cluster.url}/v1/kv/k{number}", data=f"{value}{number}")


async def check_all(http: aiohttp.ClientSession, cluster: Cluster, value: str) -> None:
    for number in range(KEYS):
        async with http.get(f"{cluster.url}/v1/kv/k{number}") as answer:
            assert await answer.text() == f"{value}{number}"


async def backed_up(cluster: Cluster, http: aiohttp.ClientSession, node: str) -> Path:
    """A copy of that node's folder, made while the node was stopped."""
    await put_all(http, cluster, "old")
    await cluster.end(node)
    kept = cluster.folder / f"backup-of-{node}"
    shutil.copytree(cluster.folder / node, kept)
    cluster.start_node(node)
    await cluster.until_replicated()
    await put_all(http, cluster, "new")
    return kept


def put_back(cluster: Cluster, node: str, kept: Path) -> None:
    shutil.rmtree(cluster.folder / node)
    shutil.copytree(kept, cluster.folder / node)


async def test_an_old_folder_of_a_node_that_is_put_back_gets_what_it_lacks_and_loses_nothing(tmp_path: Path) -> None:
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession(raise_for_status=True) as http:
        await cluster.until_replicated()
        kept = await backed_up(cluster, http, "s1")
        await cluster.end("s1")
        put_back(cluster, "s1", kept)
        cluster.start_node("s1")
        await cluster.until_replicated()
        await check_all(http, cluster, "new")
        (copy,) = (await cluster.shard("s1")).replicas
        other = next(node for node in ("s2", "s3") if node != copy.node)
        await cluster.end(other)
        await check_all(http, cluster, "new")


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
