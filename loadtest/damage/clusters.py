"""Whole clusters: one that is killed as it works, and damaged copies of it that are started again.

Owns: filling and killing a cluster of real processes; damaging the files of one of a shard's copies, and with three
or more of all but one of them; asking for every key by HTTP.
Promises: what was acknowledged is kept outside. A cluster that does not become ready is asked all the same: the keys of
the other shards must be there, and where a copy is whole those of this one. All copies are in sync when it is killed.
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

from kvstore.controller.document import ClusterDocument
from kvstore.controller.map_store.sqlite import open_sqlite
from kvstore.placement.cluster_map import ClusterMap
from loadtest.cluster import processes
from loadtest.cluster.local import LocalCluster
from loadtest.damage.inject import Damage, damage
from loadtest.damage.verdicts import DOWN, REFUSED, SICK, Acknowledged, Finding, Tally

_SHARDS = 3
_KEYS = 400
_WRITES = 2500
_CLIENTS = 16
_SETTLE_S = 8.0
_MEND_S = 60.0  # until all is answered, and then until all copies are in sync again: with copies only
_POLL_S = 0.2
_KILLS_MAX = 5
_LIMITS = {
    "log_segment_bytes": 1_097_728, "batch_bytes_max": 32_768, "wal_bytes_max": 524_288, "value_bytes_max": 16_384,
    "body_bytes_max": 32_768, "txn_read_bytes_max": 32_768,
}  # fmt: skip


class Bench:
    """A killed cluster's folder, and what it had acknowledged."""

    def __init__(self, folder: Path, acknowledged: Acknowledged, replicas: int) -> None:
        self._folder = folder
        self._acknowledged = acknowledged
        self._replicas = replicas
        self._shards = max(_SHARDS, replicas)

    @classmethod
    async def killed(cls, folder: Path, seed: int, replicas: int = 1) -> Bench:
        """Fill a cluster, and kill all of its processes at once while it works and all copies are in sync."""
        for _ in range(_KILLS_MAX):
            shutil.rmtree(folder, ignore_errors=True)
            bench = cls(folder, await _filled_and_killed(folder, seed, max(_SHARDS, replicas), replicas), replicas)
            if not await _copies_that_lack(folder, replicas):
                return bench
        raise RuntimeError("copies were out of sync each time the cluster was killed: the machine is too busy")

    async def damaged(self, rng: random.Random, folder: Path) -> Finding | None:
        """Damage one shard of a copy, start it, and judge all that it answers; None if nothing could be damaged."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._folder, folder, ignore=shutil.ignore_patterns("*.lock", "*-shm", "*.pid"))
        shard = f"s{rng.randint(1, self._shards)}"
        found = damages(folder / "data", shard, self._replicas, rng)
        if not found:
            return None
        where = (found[0].place, found[0].shape, ", ".join(each.file for each in found), found[0].offset)
        cluster = LocalCluster(folder, shards=self._shards, replicas=self._replicas)
        tally = Tally()
        try:
            await cluster.start()
        except RuntimeError as error:
            return Finding(*where, REFUSED, _last_line(str(error)))
        finally:
            if cluster.url:
                await self._ask(cluster.url, tally)
            await cluster.stop()
        verdict, detail = tally.worst
        return Finding(*where, verdict, f"shard {shard}: {detail}")

    async def _ask(self, url: str, tally: Tally) -> None:
        has_copies = self._replicas > 1
        async with aiohttp.ClientSession() as session:
            until_s = time.monotonic() + (_MEND_S if has_copies else _SETTLE_S)
            for key, values in self._acknowledged.items():
                while True:
                    status, value, code = await _get(session, url, key)
                    may_change = status not in (200, 404) if has_copies else status == 503
                    if not may_change or time.monotonic() > until_s:
                        break
                    await asyncio.sleep(_POLL_S)
                tally.judge(key, values, status, value, code)
            if has_copies and (missing := await _until_in_sync(session, url, self._replicas)):
                tally.add(SICK, missing)


async def _filled_and_killed(folder: Path, seed: int, shards: int, replicas: int) -> Acknowledged:
    """What a cluster had acknowledged when all of its processes were killed."""
    cluster = LocalCluster(folder, shards=shards, limits=_LIMITS, partitions=64, replicas=replicas)
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
    return {key: frozenset({certain.get(key), *([begun[key]] if key in begun else [])}) for key in keys}


async def _map_of(folder: Path) -> ClusterMap:
    store = await open_sqlite(folder / "data" / "controller-0.db")
    try:
        found = (await ClusterDocument(store, 1).read()).map
    finally:
        await store.close()
    assert found is not None
    return found


async def _copies_that_lack(folder: Path, replicas: int) -> list[str]:
    """Shards that were short of a copy in sync as the last map was written."""
    return [
        shard.id
        for shard in (await _map_of(folder)).shards
        if sum(replica.state == "in-sync" for replica in shard.replicas) < replicas - 1
    ]


def damages(data_dir: Path, shard: str, replicas: int, rng: random.Random) -> list[Damage]:
    """Damage one copy of that shard, or more, but never all where there are others; none if nothing could be."""
    paths = [data_dir / f"shard-{shard}.db", *sorted(data_dir.glob(f"shard-{shard}.copy-*.db"))]
    chosen = rng.sample(paths, rng.randint(1, max(1, replicas - 1)))
    return [found for path in chosen if (found := damage(path, rng)) is not None]


async def _until_in_sync(session: aiohttp.ClientSession, url: str, replicas: int) -> str:
    """Wait until each shard is served with all of its copies in sync; what is not so in the end."""
    until_s = time.monotonic() + _MEND_S
    while True:
        async with session.get(f"{url}/v1/cluster") as response:
            document = await response.json()
        lacking = [
            f"shard {shard['id']} is {shard['state']}, its copies: {[copy['state'] for copy in shard['copies']]}"
            for shard in document.get("shards", [])
            if (shard["state"], [copy["state"] for copy in shard["copies"]]) != ("up", ["in-sync"] * (replicas - 1))
        ]
        if not lacking and document.get("shards"):
            return ""
        if time.monotonic() > until_s:
            return "; ".join(lacking) or f"/v1/cluster: {document}"
        await asyncio.sleep(_POLL_S)


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
