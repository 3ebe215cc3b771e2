"""Writes under load, kill -9, restart, compare, many rounds: `python -m loadtest.crash_rounds --rounds N --seed S`.

Owns: the load, which processes are killed when, waiting until the cluster is back, reading everything back.
Promises: every acknowledged write is looked for after every round, under the rule of loadtest/crash_model.py; a write
is never sent twice (aiohttp's silent repeat is switched off); only processes started here are killed, by pid.
Leaves to others: the rule itself (crash_model), the processes (cluster).

One round: writers put, delete and read their own keys, one request at a time each; at a random moment some processes
get SIGKILL; the writers go on into the outage; when the cluster is back they stop, and every key is read and listed.
The choices come from the seed; what the kernel's scheduling makes of them differs between runs.

What it cannot show: a killed process leaves what it has written in the kernel's page cache, so a missing fsync would
pass here. Only a power cut, or a file system that forgets what was not synced, tells those apart.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import aiohttp
import click
import msgspec

from loadtest import processes
from loadtest.cluster import REPOSITORY, LocalCluster
from loadtest.crash_model import KeyHistory
from loadtest.processes import Pid

BACK_TIMEOUT_S = 30.0
_REQUEST_TIMEOUT_S = 20.0
_POLL_S = 0.05
_REFUSALS = frozenset({409, 423, 429, 503, 507})  # the contract: nothing was done by this try
_PADDING = b"." * 80
_PREFIX = "crash/"


class CrashError(Exception):
    """The cluster does not come back, or answers what no cluster should; the message says what and when."""


class Verdict(msgspec.Struct, kw_only=True):
    """What was done and what was found. `violations` are sentences; none means that every promise held."""

    seed: int
    rounds: int = 0
    seconds: float = 0.0
    longest_outage_s: float = 0.0
    kills: dict[str, int] = {}
    acknowledged: int = 0
    refused: int = 0
    unknown: int = 0
    reads: int = 0
    violations: list[str] = []

    @property
    def ok(self) -> bool:
        return not self.violations and self.acknowledged > 0

    def __str__(self) -> str:
        kills = ", ".join(f"{name} {number}" for name, number in sorted(self.kills.items()))
        found = "every acknowledged write was there" if self.ok else f"{len(self.violations)} VIOLATIONS"
        return (
            f"{found}: {self.rounds} rounds (seed {self.seed}), killed: {kills}; writes: {self.acknowledged:,}"
            f" acknowledged, {self.refused:,} refused, {self.unknown:,} unknown; {self.reads:,} reads compared;"
            f" longest outage {self.longest_outage_s:.1f} s; {self.seconds:.0f} s in all"
        )


class Victims(NamedTuple):
    """`names` as in LocalCluster.pids; with `up`, the supervisor dies first, so that nothing is restarted."""

    label: str
    names: Sequence[str]
    up: bool = False


def choose(rng: random.Random, members: Sequence[str]) -> Victims:
    """Who is killed in the next round: one process, several, all, `up` alone, or all with `up`."""
    shards = [name for name in members if name.startswith("shard-")]
    kind = rng.choices(("router", "shard", "controller", "several", "all", "up", "all+up"), (3, 4, 1, 3, 2, 1, 3))[0]
    names = {
        "router": [name for name in members if name.startswith("router-")],
        "shard": [rng.choice(shards)],
        "controller": [name for name in members if name.startswith("controller-")],
        "several": rng.sample(list(members), k=rng.randint(2, len(members) - 1)),
        "all": list(members),
        "up": [],
        "all+up": list(members),
    }[kind]
    return Victims(kind, names, up=kind in ("up", "all+up"))


# --- the load ----------------------------------------------------------------------------------------------------


class Writer:
    """The only one that writes its keys. `run` goes on until it is cancelled; `open_gate` lets it pass or holds it."""

    def __init__(self, name: str, keys: Sequence[KeyHistory], http: aiohttp.ClientSession, seed: int) -> None:
        self.keys = keys
        self.idle = asyncio.Event()
        self.open_gate = asyncio.Event()
        self.counts: Counter[str] = Counter()
        self.url = ""
        self._name = name
        self._http = http
        self._rng = random.Random(seed)
        self._number = 0

    async def run(self) -> None:
        while True:
            if not self.open_gate.is_set():
                self.idle.set()
                await self.open_gate.wait()
                self.idle.clear()
            await self.step()

    async def step(self) -> None:
        """One request for one of its keys, and what its answer means."""
        key = self._rng.choice(self.keys)
        choice = self._rng.random()
        if choice < 0.65:
            self._number += 1
            await self._write(key, b"%s-%d%s" % (self._name.encode(), self._number, _PADDING))
        elif choice < 0.8:
            await self._write(key, None)
        elif await self.read(key) is None:
            await asyncio.sleep(_POLL_S)

    async def _write(self, key: KeyHistory, value: bytes | None) -> None:
        """One put, or one delete for None; what came of it goes into the key's history."""
        try:
            async with self._http.request(
                "DELETE" if value is None else "PUT", f"{self.url}/v1/kv/{key.key}", data=value
            ) as response:
                body = await response.read()
        except aiohttp.ClientConnectorError:  # never sent
            self.counts["refused"] += 1
            key.refused(value)
            await asyncio.sleep(_POLL_S)
        except (aiohttp.ClientError, TimeoutError, OSError):
            self.counts["unknown"] += 1
            key.outcome_unknown(value)
        else:
            self._answered(key, value, response, body)

    def _answered(self, key: KeyHistory, value: bytes | None, response: aiohttp.ClientResponse, body: bytes) -> None:
        status = response.status
        if value is not None and status in (201, 204):
            self.counts["acknowledged"] += 1
            key.put_acknowledged(value, _version(response), created=status == 201)
        elif value is None and status in (204, 404):
            self.counts["acknowledged"] += 1
            key.delete_acknowledged(existed=status == 204)
        elif status in _REFUSALS:
            self.counts["refused"] += 1
            key.refused(value)
        elif status == 504:
            self.counts["unknown"] += 1
            key.outcome_unknown(value)
        else:
            raise CrashError(f"a write of {key.key} was answered {status}: {body[:500]!r}")

    async def read(self, key: KeyHistory) -> int | None:
        """Read the key and compare; the status, None when no answer came (or one that says so: 503, 504)."""
        try:
            async with self._http.get(f"{self.url}/v1/kv/{key.key}") as response:
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None
        if response.status == 200:
            key.observed(body, _version(response))
        elif response.status == 404:
            key.observed(None, None)
        elif response.status in (429, 503, 504):
            return None
        else:
            raise CrashError(f"a read of {key.key} was answered {response.status}: {body[:500]!r}")
        self.counts["reads"] += 1
        return response.status


def _version(response: aiohttp.ClientResponse) -> int:
    tag = response.headers.get("ETag", "")
    try:
        return int(tag.strip('"'))
    except ValueError:
        raise CrashError(f"{response.method} {response.url} was answered without a version: ETag {tag!r}") from None


# --- rounds --------------------------------------------------------------------------------------------------------


class Rounds:
    """A cluster, its writers, and what was found so far."""

    def __init__(
        self, cluster: LocalCluster, writers: Sequence[Writer], http: aiohttp.ClientSession, verdict: Verdict
    ) -> None:
        self.verdict = verdict
        self._cluster = cluster
        self._writers = writers
        self._http = http
        self._rng = random.Random(verdict.seed)
        self._killed: set[Pid] = set()
        self._kills: Counter[str] = Counter()

    async def one(self) -> str:
        """One round; a line that says what happened. Raises CrashError when the cluster does not come back."""
        self._open_gates()
        await asyncio.sleep(self._rng.uniform(0.05, 1.0))  # the random moment
        victims = choose(self._rng, sorted(self._cluster.members()))
        began = time.monotonic()
        await self._kill(victims)
        await self._wait_until_back(victims)
        outage_s = time.monotonic() - began
        await asyncio.sleep(self._rng.uniform(0.0, 0.2))
        await self._close_gates()
        await self._compare()
        self._count(victims, outage_s)
        return f"killed {victims.label} ({', '.join(victims.names) or 'up'}), back after {outage_s:.2f} s"

    async def _kill(self, victims: Victims) -> None:
        pids = self._cluster.pids()
        family = self._cluster.family()
        if victims.up:
            processes.send_signal(family[0], signal.SIGKILL)
        targets = [pids[name] for name in victims.names if name in pids]
        self._killed = set(targets)
        for target in targets:
            processes.send_signal(target, signal.SIGKILL)
        await processes.wait_gone(targets, _REQUEST_TIMEOUT_S)
        if victims.up:
            # without their supervisor the rest ends by itself: it must not outlive it
            if left := await processes.wait_gone(family[1:], BACK_TIMEOUT_S):
                raise CrashError(f"{len(left)} processes outlived a killed `up` by {BACK_TIMEOUT_S:g} s")
            await self._cluster.stop()
            await self._cluster.start()
            self._open_gates()

    async def _wait_until_back(self, victims: Victims) -> None:
        """Until every process runs (a new one in each victim's place) and the router and every shard answer."""
        deadline = time.monotonic() + BACK_TIMEOUT_S
        while time.monotonic() < deadline:
            pids = self._cluster.pids()
            if (
                pids.keys() >= self._cluster.members()
                and not self._killed & set(pids.values())
                and await self._answers()
            ):
                return
            await asyncio.sleep(_POLL_S)
        missing = sorted(self._cluster.members() - self._cluster.pids().keys())
        log = processes.tail(self._cluster.log, 30)
        raise CrashError(f"not back {BACK_TIMEOUT_S:g} s after killing {victims}; not running: {missing}\n{log}")

    async def _answers(self) -> bool:
        """Whether the router is ready and a listing over all shards succeeds."""
        for path in ("/readyz", f"/v1/kv?prefix={_PREFIX}&count=true"):
            try:
                async with self._http.get(self._cluster.url + path) as response:
                    if response.status != 200:
                        return False
            except (aiohttp.ClientError, TimeoutError, OSError):
                return False
        return True

    async def _compare(self) -> None:
        """Read every key, then list them all: both must show the same."""
        for writer in self._writers:
            for key in writer.keys:
                for _ in range(20):
                    if await writer.read(key) is not None:
                        break
                    await asyncio.sleep(_POLL_S)
                else:
                    raise CrashError(f"{key.key} cannot be read in a cluster that says it is ready")
        await self._compare_listing()

    async def _compare_listing(self) -> None:
        async with self._http.get(f"{self._cluster.url}/v1/kv?prefix={_PREFIX}&limit=10000") as response:
            page = await response.json(content_type=None)
            if response.status != 200:
                raise CrashError(f"the listing was answered {response.status}: {page}")
        listed: dict[str, int | None] = {item["key"]: item["version"] for item in page["items"]}
        for key in (key for writer in self._writers for key in writer.keys):
            if listed.pop(key.key, None) != key.version:
                self.verdict.violations.append(f"{key.key}: the listing shows another version than the read before")
        self.verdict.violations += [f"{name}: is listed, and nobody wrote it" for name in listed]

    def _open_gates(self) -> None:
        for writer in self._writers:
            writer.url = self._cluster.url
            writer.open_gate.set()

    async def _close_gates(self) -> None:
        for writer in self._writers:
            writer.open_gate.clear()
        for writer in self._writers:
            await writer.idle.wait()

    def _count(self, victims: Victims, outage_s: float) -> None:
        verdict = self.verdict
        self._kills.update([victims.label])
        totals = sum((writer.counts for writer in self._writers), Counter[str]())
        verdict.rounds += 1
        verdict.kills = dict(self._kills)
        verdict.longest_outage_s = max(verdict.longest_outage_s, outage_s)
        verdict.acknowledged, verdict.refused = totals["acknowledged"], totals["refused"]
        verdict.unknown, verdict.reads = totals["unknown"], totals["reads"]
        for key in (key for writer in self._writers for key in writer.keys):
            verdict.violations += [str(violation) for violation in key.violations]
            key.violations.clear()


async def run_rounds(
    rounds: int,
    seed: int,
    data_dir: Path,
    *,
    shards: int = 4,
    writers: int = 8,
    keys: int = 160,
    tell: Callable[[str], None] = lambda line: None,
) -> Verdict:
    """Run that many rounds on a new cluster below `data_dir` (it must be empty); it is stopped at the end.

    Stops early at the first round with a violation, or when the cluster does not come back (that is one, too).
    Raises RuntimeError when the cluster does not start at all.
    """
    began = time.monotonic()
    verdict = Verdict(seed=seed)
    timeout = aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http,
            LocalCluster(data_dir, shards=shards) as cluster,
            asyncio.TaskGroup() as group,
        ):
            http._retry_connection = False  # else aiohttp sends a PUT or DELETE again on a broken connection
            crew = _crew(http, writers, keys, seed)
            state = Rounds(cluster, crew, http, verdict)
            tasks = [group.create_task(writer.run()) for writer in crew]
            while verdict.rounds < rounds and not verdict.violations:
                line = await state.one()
                left_s = (time.monotonic() - began) / verdict.rounds * (rounds - verdict.rounds)
                tell(
                    f"[{verdict.rounds}/{rounds}] {line}; {verdict.acknowledged:,} acknowledged,"
                    f" {verdict.unknown:,} unknown ({left_s:.0f} s left)"
                )
            for task in tasks:
                task.cancel()
    except* CrashError as errors:
        verdict.violations += [str(error) for error in errors.exceptions]
    verdict.seconds = time.monotonic() - began
    return verdict


def _crew(http: aiohttp.ClientSession, writers: int, keys: int, seed: int) -> list[Writer]:
    """The writers, each with every `writers`-th key."""
    return [
        Writer(
            f"w{number}",
            [KeyHistory(f"{_PREFIX}{place:04d}") for place in range(number, keys, writers)],
            http,
            seed * 1000 + number,
        )
        for number in range(writers)
    ]


@click.command(help="Write under load, kill -9, restart, compare. Exit code 0: nothing was lost; 1: something was.")
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True)
@click.option("--seed", type=int, default=None, help="Of all random choices.  [default: from the clock]")
@click.option("--shards", type=click.IntRange(1, 64), default=4, show_default=True)
@click.option("--writers", type=click.IntRange(1), default=8, show_default=True)
@click.option("--keys", type=click.IntRange(1, 10_000), default=160, show_default=True)
@click.option(
    "--tmp",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=REPOSITORY / "loadtest" / "out",
    help="The data go into a folder below this one; it is kept if something was lost.  [default: loadtest/out]",
)
def main(rounds: int, seed: int | None, shards: int, writers: int, keys: int, folder: Path) -> None:
    seed = int(time.time()) if seed is None else seed
    folder.mkdir(parents=True, exist_ok=True)
    data_dir = Path(tempfile.mkdtemp(prefix=f"crash-{seed}-", dir=folder))
    try:
        verdict = asyncio.run(
            run_rounds(
                rounds,
                seed,
                data_dir,
                shards=shards,
                writers=min(writers, keys),
                keys=keys,
                tell=lambda line: click.echo(line, err=True),
            )
        )
    except* RuntimeError as errors:
        raise click.ClickException(str(errors.exceptions[0])) from errors
    for violation in verdict.violations[:50]:
        click.echo(violation)
    click.echo(str(verdict))
    if verdict.ok:
        shutil.rmtree(data_dir)
    else:
        click.echo(f"the data and logs are kept in {data_dir}")
    sys.exit(0 if verdict.ok else 1)


if __name__ == "__main__":
    main()
