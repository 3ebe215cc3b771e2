"""A channel whose connection is lost, refused or cannot be opened: what is unavailable, and what unknown."""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from kvstore.config import Limits
from kvstore.errors import OutcomeUnknown, Unavailable
from kvstore.protocol import Answer, Delete, Get, Put, Scan, Stats
from kvstore.transport.channel import Channel
from kvstore.transport.sessions import ADOPT, IS_STRANGER, ClusterSession
from tests.unit.transport.far_end import MIB, outcome
from tests.unit.waiting import WAIT_S, until

# --- lost connections -------------------------------------------------------------------------------------------------


async def test_before_it_is_connected_it_refuses_as_unavailable(connect: Any, far: Any) -> None:
    channel = await connect(wait=False)
    with pytest.raises(Unavailable) as refused:
        channel.request(Get(0, "a"))
    assert refused.value.members["shard"] == "s1"
    assert refused.value.members["retry_after_ms"] > 0


async def test_when_the_connection_is_lost_reads_are_unavailable_and_writes_that_left_have_an_unknown_outcome(
    far: Any, channel: Channel
) -> None:
    requests = [Get(0, "a"), Put(0, "b", b""), Delete(0, "c"), Scan(0, "", "", 1), Stats(0)]
    futures = [channel.request(request) for request in requests]
    await until(lambda: len(far.requests) == 5)
    far.hang_up()
    kinds = [type(await outcome(future)) for future in futures]
    assert kinds == [Unavailable, OutcomeUnknown, OutcomeUnknown, Unavailable, Unavailable]
    assert (channel.ops_under_way, channel.bytes_under_way) == (0, 0)


async def test_writes_that_never_left_are_unavailable_and_do_not_leave_later(far: Any, connect: Any) -> None:
    far.reads = False
    channel = await connect(frame_bytes_max=MIB)
    futures = [channel.request(Put(0, f"key-{number:02}", b"v" * MIB)) for number in range(40)]
    await until(lambda: channel._link.under_way.sent_up_to > 1)
    await asyncio.sleep(0.05)
    far.reads = True
    far.hang_up()
    kinds = [type(await outcome(future)) for future in futures]
    left = kinds.count(OutcomeUnknown)
    assert 0 < left < 40
    assert kinds == [OutcomeUnknown] * left + [Unavailable] * (40 - left)
    await until(lambda: channel.connected)
    channel.request(Get(0, "after"))
    await until(lambda: far.requests)
    assert [request.key for request in far.requests] == ["after"]


async def test_it_connects_again_and_nothing_is_sent_twice(far: Any, channel: Channel) -> None:
    lost = channel.request(Put(0, "lost", b""))
    await until(lambda: far.requests)
    far.hang_up()
    await outcome(lost)
    await until(lambda: channel.connected and len(far.sockets) == 2)
    future = channel.request(Put(0, "again", b""))
    await until(lambda: len(far.requests) == 2)
    assert [request.key for request in far.requests] == ["lost", "again"]
    await far.send(Answer(far.requests[1].id, 201))
    assert (await future).status == 201


async def test_it_goes_on_trying_until_the_shard_is_there(far: Any) -> None:
    async with aiohttp.ClientSession() as session:
        port = int(far.url.rsplit(":", 1)[1])
        late = Channel("s1", "http://127.0.0.1:9", Limits(reconnect_wait_s_max=0.02), session)
        await asyncio.sleep(0.05)
        assert not late.connected
        late._link._dialer._url = f"http://127.0.0.1:{port}"
        await until(lambda: late.connected)
        await late.close()


async def test_it_says_which_shard_it_wants(far: Any, channel: Channel) -> None:
    assert far.queries[0].startswith("/channel?shard=s1")


async def test_each_hello_names_the_session_that_the_process_is_in_by_then(far: Any) -> None:
    cluster = ClusterSession("first")
    async with aiohttp.ClientSession() as session:
        channel = Channel("s1", far.url, Limits(reconnect_wait_s_max=0.02), session, "x", cluster)
        await until(lambda: channel.connected)
        cluster.enter("second")
        far.hang_up()
        await until(lambda: len(far.queries) > 1 and channel.connected)
        await channel.close()
    assert [query.rpartition("session=")[2] for query in far.queries] == ["first", "second"]


async def test_a_shard_of_another_cluster_is_left_alone_and_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[str] = []

    async def refuse(request: web.Request) -> web.Response:
        asked.append(request.path_qs)
        return web.Response(status=IS_STRANGER)

    app = web.Application()
    app.router.add_get("/channel", refuse)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        channel = Channel("s1", str(server.make_url("")).rstrip("/"), Limits(reconnect_wait_s_max=0.02), session)
        await until(lambda: len(asked) > 3)
        with pytest.raises(Unavailable):
            channel.request(Put(0, "a", b""))
        await channel.close()
    (record,) = caplog.records
    assert ADOPT in record.getMessage()


async def test_closing_it_ends_what_waits_and_closes_the_connection(far: Any, channel: Channel) -> None:
    read, write = channel.request(Get(0, "a")), channel.request(Put(0, "b", b""))
    await until(lambda: len(far.requests) == 2)
    await channel.close()
    assert isinstance(await outcome(read), Unavailable)
    assert isinstance(await outcome(write), OutcomeUnknown)
    await asyncio.wait_for(far.gone.wait(), WAIT_S)
    with pytest.raises(Unavailable):
        channel.request(Get(0, "a"))


async def test_a_frame_that_is_none_costs_the_connection_and_not_the_channel(far: Any, channel: Channel) -> None:
    future = channel.request(Put(0, "a", b""))
    await until(lambda: far.requests)
    await far.sockets[-1].send_bytes(b"\xc1 this is not msgpack")
    assert isinstance(await outcome(future), OutcomeUnknown)
    await until(lambda: channel.connected and len(far.sockets) == 2)
    channel.request(Get(0, "b"))
    await until(lambda: len(far.requests) == 2)


async def test_operations_that_fail_while_they_are_not_awaited_are_no_cause_for_complaint(
    far: Any, channel: Channel
) -> None:
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    for _ in range(3):
        channel.request(Put(0, "a", b""))
    await until(lambda: len(far.requests) == 3)
    far.hang_up()
    await until(lambda: not channel.ops_under_way)
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []


async def test_a_caller_that_stops_waiting_disturbs_no_other(far: Any, channel: Channel) -> None:
    gone, kept = channel.request(Get(0, "gone")), channel.request(Get(0, "kept"))
    await until(lambda: len(far.requests) == 2)
    gone.cancel()
    await far.send(*(Answer(request.id, 404) for request in far.requests))
    assert (await kept).status == 404
    assert channel.ops_under_way == 0


# --- what the log says ------------------------------------------------------------------------------------------------


@contextmanager
def no_file_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_process_that_may_open_no_more_files_says_so_once_and_when_it_is_over(
    far: Any, connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvstore.transport.dialing")
    with no_file_left():
        channel = await connect(wait=False)
        await until(lambda: caplog.text)
        await asyncio.sleep(0.1)  # several tries more
        assert not channel.connected
    await until(lambda: channel.connected)
    lost, found = caplog.messages
    assert "Too many open files" in lost
    assert "raise the limit of open files" in lost
    assert found == f"shard s1 at {far.url} is reached again"
