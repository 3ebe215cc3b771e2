"""Whole clusters: one that is killed as it works, and damaged copies of it that are started again.

Owns: filling and killing a cluster of real processes; damaging one shard's files; asking for every key by HTTP.
Promises: what was acknowledged is kept outside. A cluster that does not become ready is asked all the same: the keys of
the other shards must be there.
Leaves to others: the damage (`inject`), the verdict (`verdicts`), the processes (`loadtest.cluster`).
"""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import time
from pathlib import Path

import aiohttp
import yaml

from loadtest.cluster import processes
from loadtest.cluster.local import LocalCluster
from loadtest.damage.inject import damage
from loadtest.damage.verdicts import DOWN, REFUSED, Acknowledged, Finding, Tally

_SHARDS = 3
_KEYS = 400
_WRITES = 2500
_CLIENTS = 16
_SETTLE_S = 8.0
_LIMITS = {
    "log_segment_bytes": 1_097_728, "batch_bytes_max": 32_768, "wal_bytes_max": 524_288, "value_bytes_max": 16_384,
    "body_bytes_max": 32_768, "txn_read_bytes_max": 32_768,
}  # fmt: skip


class Bench:
    """A killed cluster's folder, and what it had acknowledged."""

    def __init__(self, folder: Path, acknowledged: Acknowledged) -> None:
        self._folder = folder
        self._acknowledged = acknowledged

    @classmethod
    async def killed(cls, folder: Path, seed: int) -> Bench:
        """Fill a cluster, and kill all of its processes at once while it works."""
        cluster = LocalCluster(folder, shards=_SHARDS, limits=_LIMITS, partitions=64)
        certain: dict[str, bytes | None] = {}
        begun: dict[str, bytes | None] = {}
        async with cluster, aiohttp.ClientSession() as session:
            work = [_write_on(session, cluster.url, random.Random(f"{seed}/{name}"), name, certain, begun)
                    for name in range(_CLIENTS)]  # fmt: skip
            tasks = [asyncio.create_task(each) for each in work]
            while len(certain) < _KEYS or sum(task.done() for task in tasks):
                await asyncio.sleep(0.05)
                if all(task.done() for task in tasks):
                    break
            for process in cluster.family():
                processes.send_signal(process, signal.SIGKILL)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        keys = certain.keys() | begun.keys()
        allowed = {key: frozenset({certain.get(key), *([begun[key]] if key in begun else [])}) for key in keys}
        return cls(folder, allowed)

    async def damaged(self, rng: random.Random, folder: Path) -> Finding | None:
        """Damage one shard of a copy, start it, and judge all that it answers; None if nothing could be damaged."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._folder, folder, ignore=shutil.ignore_patterns("*.lock", "*-shm", "*.pid"))
        shard = f"s{rng.randint(1, _SHARDS)}"
        found = damage(folder / "data" / f"shard-{shard}.db", rng)
        if found is None:
            return None
        cluster = LocalCluster(folder, shards=_SHARDS)
        tally = Tally()
        try:
            await cluster.start()
        except RuntimeError as error:
            return Finding(*found, REFUSED, _last_line(str(error)))
        finally:
            if cluster.url:
                await self._ask(cluster.url, tally)
            await cluster.stop()
        verdict, detail = tally.worst
        return Finding(*found, verdict, f"shard {shard}: {detail}")

    async def _ask(self, url: str, tally: Tally) -> None:
        async with aiohttp.ClientSession() as session:
            until_s = time.monotonic() + _SETTLE_S
            for key, values in self._acknowledged.items():
                while True:
                    status, value, code = await _get(session, url, key)
                    if status != 503 or time.monotonic() > until_s:
                        break
                    await asyncio.sleep(0.2)
                tally.judge(key, values, status, value, code)


async def _write_on(
    session: aiohttp.ClientSession,
    url: str,
    rng: random.Random,
    name: int,
    certain: dict[str, bytes | None],
    begun: dict[str, bytes | None],
) -> None:
    """Put and delete keys of its own, one after the other."""
    for count in range(_WRITES // _CLIENTS):
        key = f"{name}/key-{rng.randrange(_KEYS // _CLIENTS):03d}"
        value = (
            None
            if rng.random() < 0.1
            else b"%s#%d#" % (key.encode(), count) + rng.randbytes(rng.choice((8, 200, 3000)))
        )
        begun[key] = value
        method = "DELETE" if value is None else "PUT"
        async with session.request(method, f"{url}/v1/kv/{key}", data=value) as response:
            await response.read()
            if response.status in (201, 204, 404):
                certain[key] = begun.pop(key)


async def _get(session: aiohttp.ClientSession, url: str, key: str) -> tuple[int, bytes | None, str]:
    async with session.get(f"{url}/v1/kv/{key}") as response:
        body = await response.read()
        if response.status in (200, 404):
            return response.status, body if response.status == 200 else None, ""
        return response.status, None, str(yaml.safe_load(body).get("code", ""))


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), DOWN)
