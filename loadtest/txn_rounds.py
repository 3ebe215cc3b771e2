"""Transactions under load, one fault a round, then the books: `python -m loadtest.txn_rounds --rounds N --seconds S`.

Owns: the rounds, watching what is in doubt, reading everything at the end of a round, the table.
Promises: after every round the whole bank and all lists are judged (loadtest.histories), and nothing is left in doubt
2 x txn_timeout_s after the fault; all processes end with this one. The history of a round that was wrong is kept.
Leaves to others: the clients (txn_clients), the faults (txn_faults), the processes (armed_cluster).

One round: a process is armed, if the fault is a point in the code; clients transfer, append and read; the fault
happens; when all processes are back the load goes on for a while and ends; when nothing is in doubt any more,
everything is read and judged. Accounts live through all rounds; lists and markers are new in each, and are looked at
once more when all rounds are over: what was settled must have stayed as it was.

As in loadtest.crash_rounds, a kill leaves what was written in the page cache: a missing fsync does not show here.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import click
import msgspec

from loadtest.armed_cluster import ArmedCluster
from loadtest.changes import ChangeError
from loadtest.cluster import REPOSITORY
from loadtest.histories import append, bank
from loadtest.histories.bank import Bank
from loadtest.histories.history import AnyOperation, Balances, Lists, Transfer, write
from loadtest.processes import Pid, wait_gone
from loadtest.txn_clients import Appender, Auditor, Held, Places, Teller, Told, Worker, opening_transaction
from loadtest.txn_doubts import Doubts
from loadtest.txn_faults import Fault, Struck, arm, plan, strike
from loadtest.txn_report import Report, Verdict, line_of, table_of
from loadtest.txn_wire import Wire, session

LIMITS = {"move_group_keys_max": 200}
ACCOUNTS = 1000
ACCOUNTS_PLACED = 400  # of which the clients know the shard
BALANCE = 100
_BACK_TIMEOUT_S = 30.0
_READ_TIMEOUT_S = 20.0
_POLL_S = 0.05
_LOOK_SLACK_S = 0.5  # between two looks at what is in doubt, on a busy machine
_LISTS = 6
_PAGE = 10_000


class RoundsError(Exception):
    """The cluster does not come back, or cannot be read when it is; the message says what and when."""


# --- rounds ----------------------------------------------------------------------------------------------------------


class Crew:
    """All clients of one run."""

    def __init__(self, http: aiohttp.ClientSession, urls: Sequence[str], seed: int, patience_s: float) -> None:
        def wire(number: int) -> Wire:
            return Wire(http, urls, seed * 1000 + number)

        numbers: Counter[str] = Counter()
        self.places = Places()
        self.tellers = [Teller(f"teller-{n}", wire(n), ACCOUNTS, patience_s, self.places) for n in range(16)]
        self.auditors = [Auditor(f"auditor-{n}", wire(100 + n), ACCOUNTS) for n in range(2)]
        self.appenders = [Appender(f"appender-{n}", wire(200 + n), numbers) for n in range(5)]
        # these read when all others rest, so what they read is of no round
        self.last_auditor = Auditor("the last auditor", wire(300), ACCOUNTS)
        self.last_reader = Appender("the last reader", wire(301), numbers)

    @property
    def workers(self) -> list[Worker]:
        return [*self.tellers, *self.auditors, *self.appenders]

    def open_gates(self) -> None:
        for worker in self.workers:
            worker.gate.set()

    async def close_gates(self) -> None:
        for worker in self.workers:
            worker.gate.clear()
        for worker in self.workers:
            await worker.idle.wait()

    def take_history(self) -> list[AnyOperation]:
        """All operations since the last time, in the order in which they began."""
        found = [operation for worker in self.workers for operation in worker.history.operations]
        for worker in self.workers:
            worker.history.operations.clear()
        return sorted(found, key=lambda operation: operation.begin_s)

    def take_counts(self) -> Counter[str]:
        found = sum((worker.wire.counts for worker in self.workers), Counter[str]())
        for worker in self.workers:
            worker.wire.counts.clear()
        return found

    def take_complaints(self) -> list[str]:
        everyone = [*self.workers, self.last_auditor, self.last_reader]
        found = [f"{worker.name}: {sentence}" for worker in everyone for sentence in worker.wire.complaints]
        for worker in everyone:
            worker.wire.complaints.clear()
        return found


class Rounds:
    """A cluster, its clients, and what is known of the data after the last round."""

    def __init__(self, cluster: ArmedCluster, http: aiohttp.ClientSession, verdict: Verdict, seconds: float) -> None:
        self.crew = Crew(http, cluster.urls, verdict.seed, patience_s=4 * verdict.txn_timeout_s)
        self.doubts = Doubts(http, cluster.urls)
        self._cluster = cluster
        self._verdict = verdict
        self._seconds = seconds
        self._rng = random.Random(verdict.seed)
        self._books = Bank({})
        self._settled_lists: dict[str, Held] = {}
        self._settled_markers: dict[str, str] = {}

    async def open_bank(self) -> None:
        wire = self.crew.last_auditor.wire
        reply, answered = await wire.transact(opening_transaction(ACCOUNTS, BALANCE))
        if answered is None or not answered.succeeded:
            raise RoundsError(f"the bank could not be opened: {reply.status} {reply.body[:500]!r}")
        self._books = await self._audit()
        await self.crew.places.learn(wire, ACCOUNTS_PLACED)

    async def one(self, fault: Fault) -> Report:
        """One round. Raises RoundsError when the cluster does not come back, or cannot be read when it is."""
        report = Report(number=len(self._verdict.rounds) + 1, fault=fault.name)
        armed = arm(fault, self._cluster, self._rng, self._verdict.txn_timeout_s)
        self._new_keys(report.number)
        self.doubts.count_max = 0
        began = time.monotonic()
        self.crew.open_gates()
        patience_s = self._seconds + 4 * self._verdict.txn_timeout_s
        struck = await strike(fault, self._cluster, armed, self._rng, self._verdict.txn_timeout_s, patience_s)
        await self._wait_until_back(struck.killed)
        back_s = time.monotonic()
        report.what, report.reached, report.outage_s = struck.what, struck.reached, back_s - struck.over_s
        await self._watch_doubts(report, struck, back_s)
        await asyncio.sleep(max(self._seconds - (time.monotonic() - began), self._rng.uniform(0.1, 0.5)))
        await self.crew.close_gates()
        limit_s = 2 * self._verdict.txn_timeout_s + _LOOK_SLACK_S
        if not await self.doubts.none_left(limit_s):
            report.violations.append(f"{self.doubts.count} are in doubt {limit_s:g} s after the last transaction")
        await self._judge(report)
        return report

    def _new_keys(self, number: int) -> None:
        for teller in self.crew.tellers:
            teller.markers = f"bank/marker/{number:05d}/"
        for appender in [*self.crew.appenders, self.crew.last_reader]:
            appender.keys = [f"lists/{number:05d}/{place}" for place in range(_LISTS)]

    async def _wait_until_back(self, killed: Sequence[Pid]) -> None:
        """Until a new process runs in the place of each that was killed, and every router reaches all shards."""
        if left := await wait_gone(killed, _BACK_TIMEOUT_S):
            raise RoundsError(f"{left} did not end after kill -9")
        try:
            await self._cluster.wait_ready(_BACK_TIMEOUT_S)
        except RuntimeError as error:
            raise RoundsError(str(error)) from None

    async def _watch_doubts(self, report: Report, struck: Struck, back_s: float) -> None:
        limit_s = 2 * self._verdict.txn_timeout_s + _LOOK_SLACK_S
        took_s = await self.doubts.resolved(max(back_s, struck.over_s), limit_s)
        report.in_doubt_max = self.doubts.count_max
        report.in_doubt_s = limit_s if took_s is None else took_s
        if took_s is None:
            count, oldest_s = self.doubts.count, self.doubts.oldest_s
            report.violations.append(f"{count} are in doubt {limit_s:g} s after the fault, the oldest for {oldest_s} s")

    # --- judging ---------------------------------------------------------------------------------------------------

    async def _judge(self, report: Report) -> None:
        history = self.crew.take_history()
        closing = await self._audit()
        markers = await self._list(f"bank/marker/{report.number:05d}/")
        lists = await self._read_lists(self.crew.last_reader.keys)
        last_reads = [op for op in self.crew.last_reader.history.operations if isinstance(op, Lists)]
        self.crew.last_reader.history.operations.clear()
        transactions = [operation for operation in history if isinstance(operation, Transfer | Balances)]
        appends = [operation for operation in history if isinstance(operation, Lists)] + last_reads
        report.violations += map(str, bank.check(self._books, transactions, closing, markers))
        report.violations += map(str, append.check(appends))
        report.violations += await self._compare_accounts(closing)
        report.violations += await self._look_up(markers)
        report.violations += self.crew.take_complaints()
        self._count(report)
        self._books = closing
        self._settled_lists |= lists
        self._settled_markers |= markers
        if report.violations:
            write(self._cluster.folder / f"round-{report.number}.ndjson", [*history, *last_reads])

    async def _audit(self) -> Bank:
        auditor = self.crew.last_auditor
        auditor.history.operations.clear()
        await _until(lambda: self._was_answered(auditor), "all accounts cannot be read in one transaction")
        return auditor.last

    async def _was_answered(self, auditor: Auditor) -> bool:
        return (await auditor.audit()).status == 200

    async def _read_lists(self, keys: Sequence[str]) -> dict[str, Held]:
        found: dict[str, Held] = {}

        async def read() -> bool:
            _, now = await self.crew.last_reader.look(keys)
            found.update(now)
            return bool(now)

        await _until(read, f"{keys} cannot be read in one transaction")
        return found

    async def _list(self, prefix: str) -> dict[str, str]:
        """All keys with that prefix and their values."""
        found: dict[str, str] = {}
        after: str | None = ""
        while after is not None:
            page = await self._page(f"/v1/kv?prefix={prefix}&values=true&limit={_PAGE}{after}")
            found |= {item["key"]: item["value"] for item in page["items"]}
            after = None if page["next"] is None else f"&after={page['next']}"
        return found

    async def _page(self, path: str) -> dict[str, Any]:
        pages: list[dict[str, Any]] = []

        async def read() -> bool:
            reply = await self.crew.last_auditor.wire.ask("GET", path)
            if reply.status == 200:
                pages.append(msgspec.json.decode(reply.body))
            return reply.status == 200

        await _until(read, f"{path} cannot be listed")
        return pages[0]

    async def _compare_accounts(self, closing: Bank) -> list[str]:
        """A listing of a cluster at rest shows what a transaction shows."""
        listed = await self._list("bank/account/")
        read = {f"bank/account/{number:04d}": str(account.balance) for number, account in closing.accounts.items()}
        wrong = [key for key in listed.keys() | read.keys() if listed.get(key) != read.get(key)]
        return [f"{key}: listed as {listed.get(key)}, read as {read.get(key)}" for key in sorted(wrong)[:3]]

    async def _look_up(self, markers: Mapping[str, str]) -> list[str]:
        """What GET /v1/txn/{id} says of a cluster at rest agrees with what clients were told, and with the markers."""
        told = [told for teller in self.crew.tellers for told in teller.told]
        for teller in self.crew.tellers:
            teller.told.clear()
        return [sentence for one in told if (sentence := await self._look_up_one(one, one.marker in markers))]

    async def _look_up_one(self, told: Told, is_there: bool) -> str:
        reply = await self.crew.last_auditor.wire.ask("GET", f"/v1/txn/{told.id}")
        if reply.status not in (200, 404):
            return f"/v1/txn/{told.id} was answered {reply.status}: {reply.body[:300]!r}"
        status = msgspec.json.decode(reply.body)["status"] if reply.status == 200 else "not known"
        if told.outcome == "done" and told.keyed and status != "committed":
            return f"{told.marker} was acknowledged, and carried an Idempotency-Key; /v1/txn/{told.id} says: {status}"
        if told.outcome == "unknown" and not told.keyed and status == "aborted" and is_there:
            return f"{told.marker} is there, and /v1/txn/{told.id} says: aborted"
        if status == "pending":
            return f"{told.marker}: nothing is in doubt, and /v1/txn/{told.id} says: pending"
        return ""

    async def look_again(self) -> list[str]:
        """After the last round: what was settled in any of them has stayed as it was."""
        wrong = []
        markers = await self._list("bank/marker/")
        for key in sorted(markers.keys() ^ self._settled_markers.keys()):
            what = "has come" if key in markers else "has gone"
            wrong.append(f"the marker {key} {what} after its round was over")
        for keys in _parts(sorted(self._settled_lists), 300):
            for key, now in (await self._read_lists(keys)).items():
                if now != self._settled_lists[key]:
                    wrong.append(f"{key} has changed after its round was over: {self._settled_lists[key]}, now {now}")
        return wrong[:20]

    def _count(self, report: Report) -> None:
        counts = self.crew.take_counts()
        report.acknowledged, report.unknown, report.unmet = counts["done"], counts["unknown"], counts["unmet"]
        report.refused = counts["refused"] + counts["reads refused"]
        report.repeats = counts["repeats"]
        report.failed = {name: number for name, number in counts.items() if name.isdecimal()}
        report.audits = counts["audits"]
        report.reads = counts["reads"] + counts["audits"]


async def _until(condition: Callable[[], Any], otherwise: str) -> None:
    """Until the awaited condition is true. Raises RoundsError."""
    deadline = time.monotonic() + _READ_TIMEOUT_S
    while not await condition():
        if time.monotonic() > deadline:
            raise RoundsError(f"{otherwise}, although the cluster says that it is ready")
        await asyncio.sleep(_POLL_S)


def _parts(keys: Sequence[str], size: int) -> list[Sequence[str]]:
    return [keys[place : place + size] for place in range(0, len(keys), size)]


async def run_rounds(
    faults: Sequence[Fault],
    seconds: float,
    seed: int,
    folder: Path,
    *,
    routers: int = 1,
    shards: int = 4,
    txn_timeout_s: float = 2.0,
    tell: Callable[[str], None] = lambda line: None,
) -> Verdict:
    """One round for each fault, on a new cluster below `folder` (it must be empty); it is stopped at the end.

    Stops at the first round with a violation, or when the cluster does not come back (that is one, too). Raises
    RuntimeError when the cluster does not start at all.
    """
    began = time.monotonic()
    verdict = Verdict(seed=seed, routers=routers, txn_timeout_s=txn_timeout_s)
    cluster = ArmedCluster(folder, shards, {**LIMITS, "txn_timeout_s": txn_timeout_s}, routers)
    try:
        async with session() as http, cluster, asyncio.TaskGroup() as group:
            rounds = Rounds(cluster, http, verdict, seconds)
            await rounds.open_bank()
            tasks = [group.create_task(worker.run()) for worker in rounds.crew.workers]
            tasks.append(group.create_task(rounds.doubts.run()))
            for fault in faults:
                report = await rounds.one(fault)
                verdict.rounds.append(report)
                verdict.violations += [f"round {report.number}: {sentence}" for sentence in report.violations]
                tell(line_of(report, len(faults), time.monotonic() - began))
                if verdict.violations:
                    break
            for task in tasks:
                task.cancel()
            verdict.violations += await rounds.look_again()
    except* (RoundsError, ChangeError) as errors:
        verdict.violations += [str(error) for error in errors.exceptions]
    verdict.seconds = time.monotonic() - began
    return verdict


@click.command(help="Transactions under load, faults, then the books. Exit code 0: every promise held; 1: not.")
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.5), default=4.0, show_default=True, help="Of load in a round.")
@click.option("--seed", type=int, default=None, help="Of all random choices.  [default: from the clock]")
@click.option("--routers", type=click.IntRange(1, 8), default=1, show_default=True)
@click.option("--shards", type=click.IntRange(1, 64), default=4, show_default=True)
@click.option("--txn-timeout", "txn_timeout_s", type=click.FloatRange(0.5), default=2.0, show_default=True)
@click.option(
    "--faults",
    "which",
    type=click.Choice(["failpoints", "slow", "random", "reshard", "all"]),
    default="all",
    show_default=True,
)
@click.option("--fault", "names", multiple=True, metavar="NAME", help="Only this one; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole verdict as JSON instead of the table.")
@click.option(
    "--tmp",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=REPOSITORY / "loadtest" / "out",
    help="The data go into a folder below this one; it is kept if something was wrong.  [default: loadtest/out]",
)
def main(
    rounds: int,
    seconds: float,
    seed: int | None,
    routers: int,
    shards: int,
    txn_timeout_s: float,
    which: str,
    names: Sequence[str],
    as_json: bool,
    folder: Path,
) -> None:
    seed = int(time.time()) if seed is None else seed
    chosen = [Fault(names[number % len(names)]) for number in range(rounds)] if names else plan(which, rounds, seed)
    if unknown := {fault.name for fault in chosen if not fault.exists}:
        raise click.UsageError(f"there is no fault {', '.join(sorted(unknown))}; see loadtest/txn_faults.py")
    folder.mkdir(parents=True, exist_ok=True)
    data_dir = Path(tempfile.mkdtemp(prefix=f"txn-{seed}-", dir=folder))
    run = run_rounds(
        chosen,
        seconds,
        seed,
        data_dir,
        routers=routers,
        shards=shards,
        txn_timeout_s=txn_timeout_s,
        tell=lambda line: click.echo(line, err=True),
    )
    try:
        verdict = asyncio.run(run)
    except* RuntimeError as errors:
        raise click.ClickException(str(errors.exceptions[0])) from errors
    if as_json:
        click.echo(msgspec.json.encode({"ok": verdict.ok, **msgspec.to_builtins(verdict)}))
    else:
        _print(verdict)
    if verdict.ok:
        shutil.rmtree(data_dir)
    else:
        click.echo(f"the data, logs and histories are kept in {data_dir}", err=True)
    sys.exit(0 if verdict.ok else 1)


def _print(verdict: Verdict) -> None:
    for violation in verdict.violations[:50]:
        click.echo(violation)
    click.echo(table_of(verdict))
    missed = sorted({r.fault for r in verdict.rounds if not r.reached} - {r.fault for r in verdict.rounds if r.reached})
    if missed:
        click.echo(f"never reached: {', '.join(missed)}")
    click.echo(str(verdict))


if __name__ == "__main__":
    main()
