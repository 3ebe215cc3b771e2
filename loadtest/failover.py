"""`python -m loadtest.failover`: how long clients wait when a shard gets another primary.

Owns: a cluster of its own, the ways in which a primary goes, and the figures.
Promises: counts from the moment at which the primary's process is killed, or its planned change is asked for, to the
answer of the next acknowledged write of a key of that shard. Before each, all copies are in sync.
Leaves to others: whether what clients see is allowed (`loadtest.chaos`).
"""

from __future__ import annotations

import asyncio
import signal
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import aiohttp
import click

from loadtest.cluster import processes
from loadtest.cluster.local import LocalCluster

Way = Literal["dead", "restarted", "planned"]

QUICK = {"failover_after_s": 1.0, "lease_s": 0.75, "replica_timeout_s": 0.4}
_SETTLE_S = 0.5  # of writes that go well, before each
_WATCH_S = 2.0  # how long a planned change is looked at
_PATIENCE_S = 120.0


class Failovers:
    """One running cluster. `keys`: one of each shard."""

    def __init__(self, cluster: LocalCluster, http: aiohttp.ClientSession) -> None:
        self._cluster = cluster
        self._http = http
        self.keys: dict[str, str] = {}

    async def find_keys(self) -> None:
        """Write until each shard has a key."""
        number = 0
        while len(self.keys) < self._cluster.shards:
            key, number = f"failover/{number}", number + 1
            async with self._http.put(f"{self._cluster.url}/v1/kv/{key}", data=b"x") as answer:
                self.keys.setdefault(answer.headers["Kv-Shard"], key)

    async def until_settled(self) -> dict[str, Any]:
        """Wait until all copies are in sync and every process runs; the cluster's facts."""
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                with suppress(aiohttp.ClientError, KeyError):
                    async with self._http.get(f"{self._cluster.url}/v1/cluster") as answer:
                        facts: dict[str, Any] = await answer.json()
                    shards = facts["shards"]
                    whole = all([copy["state"] for copy in shard["copies"]] == ["in-sync"] for shard in shards)
                    if whole and self._cluster.pids().keys() >= self._cluster.members():
                        return {shard["id"]: shard for shard in shards}
                await asyncio.sleep(0.1)

    async def one(self, way: Way, shard_id: str) -> float:
        """The time in seconds."""
        shard = (await self.until_settled())[shard_id]
        answered: list[tuple[float, float]] = []  # of each acknowledged write: when it began and ended
        writing = asyncio.create_task(self._write(self.keys[shard_id], answered))
        try:
            await asyncio.sleep(_SETTLE_S)
            if way == "planned":
                return await self._planned(shard, answered)
            return await self._killed(way, shard, answered)
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    async def _write(self, key: str, answered: list[tuple[float, float]]) -> None:
        while True:
            began = time.monotonic()
            with suppress(aiohttp.ClientError):
                async with self._http.put(f"{self._cluster.url}/v1/kv/{key}", data=b"x") as answer:
                    await answer.read()
                    if answer.status < 300:
                        answered.append((began, time.monotonic()))
                        continue
            await asyncio.sleep(0.005)

    async def _killed(self, way: Way, shard: dict[str, Any], answered: list[tuple[float, float]]) -> float:
        """`dead`: `kvstore up` stands still meanwhile, so that it starts nothing."""
        up, node = self._cluster.up, self._cluster.pids()[f"shard-{shard['primary']}"]
        assert up is not None
        if way == "dead":
            up.send_signal(signal.SIGSTOP)
        try:
            killed = time.monotonic()
            processes.send_signal(node, signal.SIGKILL)
            async with asyncio.timeout(_PATIENCE_S):
                while not (after := [ended for began, ended in answered if began > killed]):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            return after[0] - killed
        finally:
            if way == "dead":
                up.send_signal(signal.SIGCONT)

    async def _planned(self, shard: dict[str, Any], answered: list[tuple[float, float]]) -> float:
        """The longest wait of a write around it."""
        to = shard["copies"][0]["node"]
        asked = time.monotonic()
        async with self._http.post(f"{self._cluster.url}/v1/shards/{shard['id']}/promote", json={"to": to}) as answer:
            if answer.status != 202:
                raise click.ClickException(await answer.text())
        async with asyncio.timeout(_PATIENCE_S):
            while (await self.until_settled())[shard["id"]]["primary"] != to:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        await asyncio.sleep(_WATCH_S)
        return max(ended - began for began, ended in answered if ended >= asked)


async def measure(way: Way, count: int, shards: int, limits: dict[str, float], folder: Path) -> list[float]:
    """So many times, of each shard in turn."""
    times = []
    cluster = LocalCluster(folder, shards=shards, limits=limits, replicas=2)
    async with aiohttp.ClientSession() as http, cluster:
        failovers = Failovers(cluster, http)
        await failovers.find_keys()
        for number in range(count):
            shard_id = f"s{number % shards + 1}"
            times.append(await failovers.one(way, shard_id))
            click.echo(f"{number + 1}/{count} {shard_id}: {times[-1]:.3f} s", err=True)
    return times


def summary(way: Way, times: list[float]) -> str:
    """One line."""
    unit, factor = ("ms", 1000) if way == "planned" else ("s", 1)
    low, middle, high = (value * factor for value in (min(times), statistics.median(times), max(times)))
    digits = 0 if way == "planned" else 2
    return f"{way}, {len(times)} times: median {middle:.{digits}f} {unit} ({low:.{digits}f} to {high:.{digits}f})"


@click.command()
@click.option("--count", default=10, show_default=True, type=click.IntRange(1), help="How often, for each way.")
@click.option(
    "--way",
    "ways",
    multiple=True,
    type=click.Choice(["dead", "restarted", "planned"]),
    help="dead: kill -9, and nothing starts it again; restarted: `kvstore up` does; planned: `kvstore shard promote`. "
    "All three, if none is named.",
)
@click.option("--quick", is_flag=True, help="With the quick settings of cluster.yaml.")
@click.option("--shards", default=4, show_default=True, type=click.IntRange(2), help="Shards, two copies each.")
def main(count: int, ways: tuple[Way, ...], quick: bool, shards: int) -> None:
    """Measure how long clients wait when a shard gets another primary, on a cluster of its own.

    From the kill of the primary's process to the next acknowledged write of a key of its shard; of a planned change,
    the longest wait of a write.
    """
    limits = QUICK if quick else {}
    every: tuple[Way, ...] = ("dead", "restarted", "planned")
    for way in ways or every:
        with tempfile.TemporaryDirectory() as folder:
            times = asyncio.run(measure(way, count, shards, limits, Path(folder)))
        click.echo(summary(way, times) + (", quick settings" if quick else ""))


if __name__ == "__main__":
    main()
