"""loadtest.chaos.phase: what is left of a phase that does not come to its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from loadtest.chaos.clients import Clients
from loadtest.chaos.cluster import ChaosCluster
from loadtest.chaos.copies import CopyFaults
from loadtest.chaos.doubts import Doubts
from loadtest.chaos.meter import Meter
from loadtest.chaos.nemeses import Nemeses
from loadtest.chaos.phase import Stage
from loadtest.chaos.reshard import NotSettled, Reshard
from loadtest.chaos.summary import Phase
from loadtest.drivers.aio import Wire
from tests.unit.loadtest.small_servers import serving


class NotBack(ChaosCluster):
    """A cluster of which no process is started, so that it never comes back."""

    async def wait_ready(self, timeout_s: float) -> None:
        raise RuntimeError("not ready: shard-s1 does not run")


async def no_answer(request: web.BaseRequest) -> web.Response:
    return web.json_response({"code": "unavailable"}, status=503, headers={"Retry-After": "0"})


class Opened(Clients):
    """Clients who need no accounts to begin with."""

    async def _all(self, name: str, part: Any) -> None:
        return


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    cluster = NotBack(tmp_path, 2, 1, None)
    async with serving(no_answer) as url, aiohttp.ClientSession() as http:
        clients, reshard = Opened(http, [url], [url], 1, Meter()), Reshard(Wire(http, [url], 1), 2)
        nemeses = Nemeses(cluster, None, reshard, CopyFaults(cluster, None, Wire(http, [url], 1)), 0.0)
        working = [asyncio.create_task(client.run()) for client in clients.all]
        yield Stage(cluster, clients, nemeses, reshard, Doubts(http, [url]), lambda doing: None, asyncio.Event())
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)


async def test_what_was_done_in_a_phase_whose_cluster_does_not_come_back_is_judged_and_nothing_is_called_wrong(
    stage: Stage,
) -> None:
    phase = Phase(1, 0.0, 0.3, {}, [], [])
    closing = await stage.play(phase, [])
    assert closing is not None
    assert closing.operations, "what the clients did until then"
    assert phase.complaints == []
    assert len(phase.unfinished) == 1
    assert "shard-s1 does not run" in phase.unfinished[0]
    assert not phase.ok


async def test_changes_that_do_not_end_are_no_fault_of_what_was_seen(stage: Stage) -> None:
    with pytest.raises(NotSettled, match="changes that run"):
        await stage.reshard.settle(0.2)
