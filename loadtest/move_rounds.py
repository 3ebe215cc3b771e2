"""Shards come and go under load, with faults, then every key is looked at: `python -m loadtest.move_rounds --rounds N`.

Owns: the rounds, asking for the changes, waiting for their end, the judgement.
Promises: after every round every key that was written is read, listed and found in exactly one file, its owner's;
calls that failed while no shard and no router was away are violations. All processes end with this one.
Leaves to others: the clients (move_clients), the faults (move_faults), the files (move_files), the processes
(armed_cluster), transactions (txn_rounds).

One round: processes are armed; clients begin to write, lock, count and list; a change is asked for; processes die or
stand still while it is carried out, and come back; it must come to its end by itself. Then the clients rest, and all is
judged: values byte for byte, versions, deletions, kept replies, leases, counters, counts, what lies in which file.

As in loadtest.crash_rounds, a kill leaves what was written in the page cache: a missing fsync does not show here.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import sys
import tempfile
import time
from collections import Counter as Counts
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import click
import msgspec

from kvstore.placement.map_format import decode_map
from loadtest import changes, move_files
from loadtest.armed_cluster import ArmedCluster
from loadtest.changes import Change, ChangeError
from loadtest.cluster import REPOSITORY
from loadtest.crash_model import KeyHistory
from loadtest.move_clients import (
    PREFIX,
    SHORT,
    Counter,
    Expirer,
    Failure,
    Holder,
    KeyWriter,
    Lister,
    Locker,
    NotingWire,
    StillKeys,
    listed,
)
from loadtest.move_faults import Fault, Outage, Round, all_points, at_random, cast, strike, watch
from loadtest.processes import Pid
from loadtest.txn_clients import Worker
from loadtest.txn_wire import Wire, session

# What is fenced while the controller is away waits for it, on a busy machine, too: that is no reason to fail.
# Tombstones go so soon that some do while their partition is copied.
LIMITS = {
    "move_group_keys_max": 40,
    "txn_timeout_s": 2.0,
    "reroute_timeout_s": 20.0,
    "reconnect_wait_s_max": 0.2,
    "tombstone_kept_s": 0.5,
}
_FILES_TIMEOUT_S = 8.0
_REACH_TIMEOUT_S = 3.0
_SLACK_S = 0.5  # after a process is back, for a call that began before
_POLL_S = 0.05
_REPEATS = 15


class Report(msgspec.Struct, kw_only=True):
    """One round. `excused`: calls that failed while a shard or router was away."""

    number: int
    change: str
    faults: list[str] = []
    unreached: list[str] = []
    seconds: float = 0.0
    write_pause_ms: float = 0.0
    acknowledged: int = 0
    excused: int = 0
    violations: list[str] = []


class Verdict(msgspec.Struct, kw_only=True):
    """All rounds. `violations` are sentences; none means that every promise held."""

    seed: int
    seconds: float = 0.0
    rounds: list[Report] = []
    violations: list[str] = []

    @property
    def ok(self) -> bool:
        return not self.violations and sum(report.acknowledged for report in self.rounds) > 0

    @property
    def unreached(self) -> list[str]:
        """Faults whose process never came to their point."""
        return [fault for report in self.rounds for fault in report.unreached]

    def __str__(self) -> str:
        found = "every promise held" if self.ok else f"{len(self.violations)} VIOLATIONS"
        acknowledged = sum(report.acknowledged for report in self.rounds)
        excused = sum(report.excused for report in self.rounds)
        return (
            f"{found}: {len(self.rounds)} rounds (seed {self.seed}); {acknowledged:,} writes acknowledged,"
            f" {excused:,} calls failed while a process was away; {self.seconds:.0f} s in all"
        )


# --- the clients -----------------------------------------------------------------------------------------------------


class Crew:
    """All clients of one run."""

    def __init__(self, http: aiohttp.ClientSession, urls: Sequence[str], seed: int) -> None:
        self.failures: list[Failure] = []

        def wire(number: int) -> NotingWire:
            return NotingWire(http, urls, seed * 1000 + number, self.failures)

        tokens: dict[str, list[int]] = {}
        locks = [f"{PREFIX}lock/{number}" for number in range(12)]
        self.quiet = Wire(http, urls, seed * 1000 + 999)  # for what is not the load
        self.still = StillKeys(self.quiet, 400)
        self.writers = [
            KeyWriter(f"w{n}", wire(n), [KeyHistory(f"{PREFIX}key/{n}/{k}") for k in range(40)]) for n in range(5)
        ]
        self.counters = [Counter(f"c{n}", wire(100 + n)) for n in range(3)]
        self.holder = Holder("holder", wire(200), 12)
        lockers = [Locker(f"l{n}", wire(300 + n), locks, tokens) for n in range(3)]
        lister = Lister("lister", wire(400), self.still)
        expirer = Expirer("expirer", wire(500))
        self.workers: list[Worker] = [*self.writers, *self.counters, self.holder, *lockers, lister, expirer]

    def open_gates(self) -> None:
        for worker in self.workers:
            worker.idle.clear()
            worker.gate.set()

    async def close_gates(self) -> None:
        """Returns when none has a request under way any more."""
        for worker in self.workers:
            worker.gate.clear()
        for worker in self.workers:
            await worker.idle.wait()

    def take_complaints(self) -> list[str]:
        found = [f"{worker.name}: {sentence}" for worker in self.workers for sentence in worker.wire.complaints]
        for worker in self.workers:
            worker.wire.complaints.clear()
        for writer in self.writers:
            for key in writer.keys:
                found += map(str, key.violations)
                key.violations.clear()
        return found

    def take_counts(self) -> Counts[str]:
        found: Counts[str] = Counts()
        for worker in self.workers:
            found.update(worker.wire.counts)
            worker.wire.counts.clear()
        return found


# --- rounds ----------------------------------------------------------------------------------------------------------


class Rounds:
    """A cluster, its clients, and what was found so far. `members`: ids and weights, as they are to be now."""

    def __init__(self, cluster: ArmedCluster, http: aiohttp.ClientSession, seed: int) -> None:
        self.crew = Crew(http, cluster.urls, seed)
        self.members = {f"s{number}": 1 for number in range(1, cluster.shards + 1)}
        self._cluster = cluster
        self._http = http
        self._rng = random.Random(seed)
        self._number = 0
        self.outages: list[Outage] = []
        self._armed: dict[str, Pid | None] = {}

    async def load(self) -> None:
        """Before the first round."""
        await asyncio.gather(self.crew.still.load(), self.crew.holder.open())

    async def one(self, the_round: Round) -> Report:
        """One round. Raises ChangeError if its change does not end, RuntimeError if the cluster does not come back."""
        self._number += 1
        asked = ", ".join(map(str, [the_round.change, *the_round.more]))
        report = Report(number=self._number, change=asked, faults=[str(fault) for fault in the_round.faults])
        parts = cast(the_round, self.members, self._cluster, self._rng)
        self._arm(parts)
        self.outages.clear()
        self.crew.failures.clear()
        self.crew.open_gates()
        await asyncio.sleep(self._rng.uniform(0.1, 0.3))
        began_s = time.monotonic()
        met = {name: asyncio.Event() for name in parts}
        watchers = {name: asyncio.create_task(self._watch(name, parts[name], met[name])) for name in parts}
        try:
            await self.ask(the_round.change)
            for change in the_round.more:
                await asyncio.sleep(self._rng.uniform(0.0, 0.4))
                await self.ask(change)
            await self.until_settled()
            report.seconds = time.monotonic() - began_s
            report.unreached = await self._until_struck(parts, watchers, met)
            await self.until_settled()
        finally:
            for watcher in watchers.values():
                watcher.cancel()
            await asyncio.gather(*watchers.values(), return_exceptions=True)
        await asyncio.sleep(self._rng.uniform(0.1, 0.3))
        await self.crew.close_gates()
        await self.judge(report)
        return report

    def _arm(self, parts: dict[str, Fault]) -> None:
        """Those that have not met their fault in an earlier round are armed no more."""
        for name in self._armed.keys() - parts.keys():
            self._cluster.arm(name, "")
        self._armed = {
            name: self._cluster.arm(name, f"{fault.point}={fault.action}@{fault.turn}")
            for name, fault in parts.items()
            if fault.point
        }

    async def _watch(self, name: str, fault: Fault, is_met: asyncio.Event) -> None:
        if fault.point:
            outage = await watch(self._cluster, name, fault, self._armed.get(name), is_met)
        else:
            is_met.set()
            outage = await strike(self._cluster, name, fault, self._rng.uniform(0.0, 0.8))
        self.outages.append(outage)

    async def _until_struck(
        self, parts: dict[str, Fault], watchers: dict[str, asyncio.Task[None]], met: dict[str, asyncio.Event]
    ) -> list[str]:
        """Until all have met their faults and got over them; those that did not come to theirs. Raises RuntimeError."""
        unreached = []
        deadline_s = time.monotonic() + _REACH_TIMEOUT_S
        for name, watcher in watchers.items():
            try:
                async with asyncio.timeout(max(0.0, deadline_s - time.monotonic())):
                    await met[name].wait()
            except TimeoutError:
                unreached.append(f"{name}: {parts[name]}")
            else:
                await watcher
        return unreached

    async def ask(self, change: Change) -> None:
        """Until it is known to be taken down; then the members are to be those after it. Raises ChangeError."""
        await changes.ask(self.crew.quiet, change)
        self.members = change.after(self.members)

    async def until_settled(self) -> dict[str, Any]:
        """The members are those that were asked for, and nothing moves: /v1/cluster then. Raises ChangeError."""
        return await changes.until_settled(self.crew.quiet, self.members)

    # --- judging -----------------------------------------------------------------------------------------------------

    async def judge(self, report: Report) -> None:
        """Of a cluster in which nothing moves and nobody writes."""
        crew, found = self.crew, report.violations
        counts = crew.take_counts()
        report.acknowledged = counts["done"]
        report.write_pause_ms = ((await self.until_settled())["last_change"] or {}).get("write_pause_ms_max", 0.0)
        felt = [outage for outage in self.outages if outage.is_felt]
        for failure in crew.failures:
            if any(o.begin_s <= failure.end_s and failure.begin_s <= o.end_s + _SLACK_S for o in felt):
                report.excused += 1
            else:
                found.append(f"failed while no shard and no router was away: {failure.what}")
        await asyncio.gather(*(self._read_all(writer, found) for writer in crew.writers))
        found += [sentence for counter in crew.counters if (sentence := await counter.look())]
        found += await crew.holder.look()
        found += await self._compare_listing_and_files()
        found += crew.take_complaints()
        report.violations = found[:30]

    async def _read_all(self, writer: KeyWriter, found: list[str]) -> None:
        for key in writer.keys:
            if not await writer.read(key):
                found.append(f"{key.key} cannot be read, although nothing is away")
        repeated = set()
        for kept in self._rng.sample(writer.kept, k=min(_REPEATS, len(writer.kept))):
            if sentence := await writer.repeat(kept):
                found.append(sentence)
            repeated.add(kept.key)
        for key in writer.keys:
            if key.key in repeated:  # which changed nothing
                await writer.read(key)

    async def _compare_listing_and_files(self) -> list[str]:
        pages = await listed(self.crew.quiet, PREFIX)
        if pages is None:
            return ["the keys cannot be listed, although nothing is away"]
        files = await self._look_at_files()
        for key in [key for key in files.values if key.startswith(SHORT)]:
            del files.values[key]  # they go while we look
        shown = {key: (value, version) for key, value, version in pages}
        wrong = [*files.behind, *files.wrong]
        if len(shown) != len(pages):
            wrong.append(f"{len(pages) - len(shown)} keys are listed twice")
        for key in shown.keys() | files.values.keys():
            if shown.get(key) != files.values.get(key):
                wrong.append(f"{key}: listed as {shown.get(key)!r}, in its file {files.values.get(key)!r}"[:300])
        wrong += self.crew.still.compare([page for page in pages if page[0].startswith(f"{PREFIX}still/")])
        for key in self.crew.still.deleted:
            if (status := (await self.crew.quiet.ask("GET", f"/v1/kv/{key}")).status) != 404:
                wrong.append(f"{key} was deleted and is answered {status}")
        if counted := await self._counted_too_many(len(shown)):
            wrong.append(f"/v1/cluster counts {counted} keys, {len(shown)} are listed")
        return wrong

    async def _counted_too_many(self, listed_keys: int) -> int:
        """What /v1/cluster counts, if that is not what is listed, when all that expires has; else 0."""
        deadline_s = time.monotonic() + _FILES_TIMEOUT_S
        while True:
            document = await changes.cluster(self.crew.quiet)
            counted: int = sum(shard["keys"] for shard in document.get("shards", []))
            if counted == listed_keys:
                return 0
            if time.monotonic() > deadline_s:
                return counted
            await asyncio.sleep(_POLL_S)

    async def _look_at_files(self) -> move_files.Lying:
        """When all are up to date and trimmed, or it has taken too long."""
        deadline_s = time.monotonic() + _FILES_TIMEOUT_S
        while True:
            async with self._http.get(f"{self._cluster.controller_url}/v1/map?after=0") as response:
                cluster_map = decode_map(await response.read())
            found = await asyncio.to_thread(move_files.look, self._cluster.data_dir, cluster_map)
            if not found.behind or time.monotonic() > deadline_s:
                return found
            await asyncio.sleep(_POLL_S)


async def run_rounds(
    rounds: Sequence[Round],
    seed: int,
    folder: Path,
    *,
    shards: int = 3,
    routers: int = 1,
    tell: Callable[[str], None] = lambda line: None,
) -> Verdict:
    """On a new cluster below `folder` (it must be empty); it is stopped at the end.

    Stops at the first round with a violation, or when the cluster does not come back (that is one, too). Raises
    RuntimeError when the cluster does not start at all.
    """
    began_s = time.monotonic()
    verdict = Verdict(seed=seed)
    cluster = ArmedCluster(folder, shards, LIMITS, routers, partitions=64)
    try:
        async with session() as http, cluster, asyncio.TaskGroup() as group:
            run = Rounds(cluster, http, seed)
            await run.load()
            tasks = [group.create_task(worker.run()) for worker in run.crew.workers]
            for the_round in rounds:
                report = await run.one(the_round)
                verdict.rounds.append(report)
                verdict.violations += [f"round {report.number}: {sentence}" for sentence in report.violations]
                tell(_line_of(report, len(rounds)))
                if verdict.violations:
                    break
            for task in tasks:
                task.cancel()
    except* ChangeError as errors:
        verdict.violations += [str(error) for error in errors.exceptions]
    verdict.seconds = time.monotonic() - began_s
    return verdict


def _line_of(report: Report, rounds: int) -> str:
    faults = "; ".join(report.faults) or "no fault"
    unreached = f"; NOT REACHED: {', '.join(report.unreached)}" if report.unreached else ""
    return (
        f"[{report.number}/{rounds}] {report.change} ({faults}): {report.seconds:.1f} s,"
        f" pause {report.write_pause_ms:.0f} ms; {report.acknowledged:,} acknowledged, {report.excused} failed"
        f" meanwhile{unreached}"
    )


@click.command(
    help="Shards come and go under load, with faults; then every key. Exit code 0: every promise held; 1: not."
)
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True, help="Of random faults.")
@click.option("--points", is_flag=True, help="Every named point once, instead of random faults.")
@click.option("--seed", type=int, default=None, help="Of all random choices.  [default: from the clock]")
@click.option("--routers", type=click.IntRange(1, 8), default=1, show_default=True)
@click.option("--shards", type=click.IntRange(2, 16), default=3, show_default=True)
@click.option(
    "--tmp",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=REPOSITORY / "loadtest" / "out",
    help="The data go into a folder below this one; it is kept if something was wrong.  [default: loadtest/out]",
)
def main(rounds: int, points: bool, seed: int | None, routers: int, shards: int, folder: Path) -> None:
    seed = int(time.time()) if seed is None else seed
    chosen = all_points(shards, seed) if points else at_random(rounds, shards, seed)
    folder.mkdir(parents=True, exist_ok=True)
    data_dir = Path(tempfile.mkdtemp(prefix=f"moves-{seed}-", dir=folder))
    run = run_rounds(
        chosen, seed, data_dir, shards=shards, routers=routers, tell=lambda line: click.echo(line, err=True)
    )
    try:
        verdict = asyncio.run(run)
    except* RuntimeError as errors:
        raise click.ClickException(str(errors.exceptions[0])) from errors
    for violation in verdict.violations[:50]:
        click.echo(violation)
    click.echo(str(verdict))
    if verdict.ok:
        shutil.rmtree(data_dir)
    else:
        click.echo(f"the data and logs are kept in {data_dir}", err=True)
    sys.exit(0 if verdict.ok else 1)


if __name__ == "__main__":
    main()
