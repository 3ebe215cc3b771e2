"""Partitions move while processes die, stand still or stay away: nothing is lost, and what was asked for gets done.

`python -m loadtest.chaos --nemesis sweep` lets a process die at every step of a move, under load.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
import pytest
import pytest_asyncio
from psutil import Process

from kvstore.placement.cluster_map import ClusterMap
from kvstore.placement.ring import partition_of
from kvstore.process import EXIT_NEEDS_A_PERSON
from kvstore.storage import schema
from loadtest.chaos.clients import Clients, Failure
from loadtest.chaos.meter import Meter
from loadtest.chaos.phase import audited
from loadtest.cluster import changes
from loadtest.cluster.armed import ArmedCluster
from loadtest.cluster.changes import Change
from loadtest.cluster.local import REPOSITORY
from loadtest.cluster.processes import free_ports, wait_gone
from loadtest.drivers.aio import session
from loadtest.histories.verdict import judge
from tests.cluster import actions
from tests.cluster.clusters import Cluster, running, write_config

pytestmark = [pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]

SLACK_S = 0.5  # after a process is back, for a call that began before
LIMITS = {
    "move_group_keys_max": 40,
    "txn_timeout_s": 2.0,
    "reroute_timeout_s": 20.0,  # what is frozen while the controller is away waits for it: that is no reason to fail
    "reconnect_wait_s_max": 0.2,
    "tombstone_kept_s": 0.5,  # so soon that some go while their partition is copied
    "move_freeze_timeout_s": 10.0,  # so that a freeze stands while a process comes back
}


# --- one cluster, one thing at a time --------------------------------------------------------------------------------


class Outage(NamedTuple):
    """From when to when (monotonic) a shard was not there, or stood still."""

    begin_s: float
    end_s: float


class Scene:
    """Three shards under load, no faults but what the test does. `members`: ids and weights, as they are to be."""

    def __init__(self, cluster: ArmedCluster, clients: Clients) -> None:
        self.cluster = cluster
        self.clients = clients
        self.wire = clients.quiet
        self.members = {f"s{number}": 1 for number in range(1, cluster.shards + 1)}
        self.loads = 0

    async def change(self, *wanted: Change) -> None:
        """Ask for all of them, the first one first, without waiting for anything."""
        for change in wanted:
            await self._ask(change)
            self.members = change.after(self.members)

    async def _ask(self, change: Change) -> None:
        """Until it is known to be taken down: a call that was perhaps heard is refused when it is repeated."""
        deadline_s, was_sent = time.monotonic() + 30.0, False
        while (reply := await self.wire.ask(*change.request)).status != 202:
            if was_sent and reply.status == {"add": 409, "remove": 404}.get(change.verb):
                return
            assert reply.status != 404, reply.words
            assert time.monotonic() < deadline_s, f"{change} was answered {reply.words}"
            was_sent = was_sent or reply.outcome == "unknown"
            await asyncio.sleep(0.05)

    async def until_settled(self) -> dict[str, Any]:
        """The members are those that were asked for, and nothing moves: /v1/cluster then."""
        document: dict[str, Any] = {}

        async def is_settled() -> bool:
            nonlocal document
            document = await changes.cluster(self.wire)
            shards = {each["id"]: each["weight"] for each in document.get("shards", []) if each["state"] == "up"}
            return document.get("moves") == document.get("ending") == [] and shards == self.members

        await self.until(is_settled, "all changes end", timeout_s=40.0)
        return document

    async def moves(self) -> list[dict[str, Any]]:
        """`moves` of GET /v1/cluster."""
        return (await changes.cluster(self.wire)).get("moves") or []

    async def until(self, condition: Callable[[], Awaitable[Any]], what: str, timeout_s: float = 20.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not await condition():
            assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}; moves: {await self.moves()}"
            await asyncio.sleep(0.02)

    async def map(self) -> ClusterMap:
        """The controller's, now."""
        return await self.cluster.cluster_map()

    async def restore(self) -> None:
        """All processes run, unarmed, and the members are s1, s2, s3 again, with equal weights."""
        for shard in ("s1", "s2", "s3", "s4", "s5", "s7"):
            self.cluster.arm(f"shard-{shard}", "")
            self.cluster.let_come_back(f"shard-{shard}")
            self.cluster.wake(f"shard-{shard}")
        members = self.members
        extra = [Change("remove", shard) for shard in members if shard not in ("s1", "s2", "s3")]
        equal = [Change("weigh", shard, 1) for shard, weight in members.items() if weight != 1]
        await self.change(*(Change("add", shard) for shard in ("s1", "s2", "s3") if shard not in members))
        await self.change(*extra, *equal)
        await self.until_settled()
        await self.cluster.wait_ready(30.0)

    def rows(self, shard: str, query: str, *parameters: object) -> list[Any]:
        """Of its file, as it is now."""
        path = self.cluster.data_dir / f"shard-{shard}.db"
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            return connection.execute(query, parameters).fetchall()

    async def strays(self, shard: str) -> int:
        """How many rows lie in its file of partitions that it does not own."""
        owned = msgspec.json.encode((await self.map()).owned_by(shard)).decode()
        query = "SELECT count(*) FROM rows WHERE partition NOT IN (SELECT value FROM json_each(?))"
        return int(self.rows(shard, query, owned)[0][0])

    def fences(self) -> list[tuple[str, str, int]]:
        """Which shards have fenced which partitions, for which moves: some, at least."""
        found = [
            (shard, *row) for shard in self.members for row in self.rows(shard, "SELECT move, partition FROM freezes")
        ]
        assert found
        return found

    async def until_still(self, process: Process) -> None:
        async def is_still() -> bool:
            return self.cluster.stands_still(process)

        await self.until(is_still, f"{process} stands still")

    async def kill_and_wait(self, shard: str) -> None:
        """Until it serves what it owns, and does not move, to the router."""
        cluster_map = await self.map()
        moving = {partition for move in cluster_map.moves for partition in move.partitions}
        key = key_in(next(iter(set(cluster_map.owned_by(shard)) - moving)))
        killed = self.cluster.kill(f"shard-{shard}")
        assert killed is not None
        await wait_gone([killed], 10.0)

        async def answers() -> bool:
            return (await self.wire.ask("GET", f"/v1/kv/{key}")).status == 404

        await self.until(answers, f"{shard} is back")

    async def batch(self, ops: list[dict[str, str]]) -> None:
        """All of them are done."""
        reply = await self.wire.ask("POST", "/v1/batch", msgspec.json.encode({"ops": ops}))
        assert all(result["status"] < 300 for result in msgspec.json.decode(reply.body)["results"]), reply

    async def fails(self, method: str, path: str, body: Any = None) -> tuple[int, str, str]:
        """Status, code and detail of a refusal, whose next step is told, too."""
        reply = await self.wire.ask(method, path, None if body is None else msgspec.json.encode(body))
        problem = msgspec.json.decode(reply.body)
        assert problem["next_step"]
        return reply.status, problem["code"], problem["detail"]


def key_in(partition: int) -> str:
    """A key of that partition."""
    return next(key for n in itertools.count() if partition_of((key := f"in/{n}").encode(), 64) == partition)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_trio(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    async with session() as http, ArmedCluster(tmp_path_factory.mktemp("trio"), 3, LIMITS, partitions=64) as cluster:
        clients = Clients(http, cluster.urls, cluster.urls, 2, Meter())
        tasks = [asyncio.create_task(client.run()) for client in clients.all]
        yield Scene(cluster, clients)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest_asyncio.fixture(loop_scope="module")
async def trio(shared_trio: Scene) -> AsyncIterator[Scene]:
    """Three equal shards, as they are before every test and after it, whatever became of it."""
    yield shared_trio
    await shared_trio.restore()


@asynccontextmanager
async def under_load(scene: Scene) -> AsyncIterator[list[Outage]]:
    """Clients are at work until the block ends; then all is judged. Yields a list for outages that excuse failures."""
    clients, outages = scene.clients, list[Outage]()
    scene.loads += 1
    await clients.turn_to(f"load/{scene.loads}/")
    clients.failures.clear()
    clients.open_gates()
    try:
        yield outages
        await asyncio.sleep(0.1)
    finally:
        clients.close_gates()
        await clients.idle()
    await scene.until_settled()
    failed = [failure for failure in clients.failures if not any(is_excused(failure, each) for each in outages)]
    assert failed == []
    closing = await clients.close()
    assert closing.wrong == []
    assert [check for check in judge(closing.operations).checks if not check.ok] == []
    assert clients.take_complaints() == []
    assert await audited(scene.cluster, clients) == []
    assert len(closing.operations) > 100


def is_excused(failure: Failure, outage: Outage) -> bool:
    """The call was under way, or waited for what it had met, while the shard was away."""
    return outage.begin_s <= failure.end_s and failure.begin_s <= outage.end_s + SLACK_S


async def test_changes_asked_for_at_the_same_time_all_come_true_and_no_call_fails(trio: Scene) -> None:
    async with under_load(trio):
        await trio.change(Change("add", "s4"), Change("add", "s5"), Change("remove", "s3"), Change("weigh", "s1", 3))
        settled = await trio.until_settled()
        owned = {shard["id"]: shard["partitions"] for shard in settled["shards"]}
        assert owned.keys() == {"s1", "s2", "s4", "s5"}
        assert owned.pop("s1") == pytest.approx(32, abs=1)
        assert max(owned.values()) - min(owned.values()) <= 1
        await trio.change(Change("remove", "s5"), Change("remove", "s4"), Change("weigh", "s1", 1))
        await trio.until_settled()
        await trio.change(Change("add", "s3"))  # again, with a new file
        await trio.until_settled()
    assert (trio.cluster.data_dir / "shard-s3.db.removed").exists()


async def test_a_shard_that_is_away_is_waited_for_and_others_go_on(trio: Scene) -> None:
    async with under_load(trio) as outages:
        began_s = time.monotonic()
        assert trio.cluster.hold("shard-s2") is not None
        for change, waiting in (
            (Change("weigh", "s1", 4), {("s2", "s1")}),
            (Change("weigh", "s2", 4), {("s1", "s2"), ("s3", "s2")}),
        ):
            await trio.change(change)

            async def only_those_wait(waiting: set[tuple[str, str]] = waiting) -> bool:
                moves = await trio.moves()
                pairs = {(move["from"], move["to"]) for move in moves if move["step"] == "waiting"}
                return pairs == waiting == {(move["from"], move["to"]) for move in moves}

            await trio.until(only_those_wait, "all others are done")
            for move in await trio.moves():
                assert move["step"] == "queued" or "shard s2" in move["detail"], move
        assert {each["id"]: each["state"] for each in (await changes.cluster(trio.wire))["shards"]}["s2"] == "down"
        trio.cluster.let_come_back("shard-s2")
        await trio.until_settled()
        await trio.cluster.wait_ready(30.0)
        outages.append(Outage(began_s, time.monotonic()))


async def test_a_cancelled_change_leaves_no_trace(trio: Scene) -> None:
    async with under_load(trio):
        trio.cluster.arm("shard-s4", "take-before-commit=pause:400")
        await trio.change(Change("add", "s4"))

        async def copies() -> bool:
            return any(move["step"] == "copy" and move["keys_total"] for move in await trio.moves())

        await trio.until(copies, "rows are on their way")
        assert (await trio.wire.ask("DELETE", "/v1/moves")).status == 202
        del trio.members["s4"]
        settled = await trio.until_settled()
        assert [shard["partitions"] for shard in settled["shards"]] == [pytest.approx(21, abs=1)] * 3
        owners = (await trio.map()).owners

        # of a shard that stays a member nothing is left in its file, either
        trio.cluster.arm("shard-s1", "complete-before-commit=pause:400")
        await trio.change(Change("weigh", "s1", 4))
        assert (await trio.map()).moves

        async def has_taken() -> bool:
            return await trio.strays("s1") > 0

        await trio.until(has_taken, "rows have come")
        assert (await trio.wire.ask("DELETE", "/v1/moves")).status == 202
        await trio.until_settled()
        assert (await trio.map()).owners == owners


async def test_what_has_moved_stays_when_the_rest_is_cancelled_and_planned_again(trio: Scene) -> None:
    async with under_load(trio):
        trio.cluster.arm("shard-s4", "complete-before-commit=pause:250")
        await trio.change(Change("add", "s4"))

        async def some_are_there() -> bool:
            return any(
                shard["id"] == "s4" and shard["partitions"] for shard in (await changes.cluster(trio.wire))["shards"]
            )

        await trio.until(some_are_there, "the first ones have moved")
        assert (await trio.wire.ask("DELETE", "/v1/moves")).status == 202
        settled = await trio.until_settled()  # s4 is up: it owns something
        assert 0 < settled["shards"][-1]["partitions"] < 16
        assert (await trio.wire.ask("POST", "/v1/moves")).status == 202
        settled = await trio.until_settled()
        assert settled["shards"][-1]["partitions"] == 16


async def test_there_and_back_again_before_the_trim(trio: Scene) -> None:
    keys = every_key = [f"there/{number}" for number in range(200)]  # several in each partition
    await trio.change(Change("weigh", "s1", 4))
    await trio.until_settled()
    await trio.batch([{"op": "put", "key": key, "value": "before"} for key in keys])
    before = await trio.map()
    async with under_load(trio) as outages:
        began_s = time.monotonic()
        trio.cluster.hold("shard-s2")  # while a move of s1 waits for it, s1 trims nothing
        await trio.change(Change("weigh", "s1", 1))

        async def only_s2_is_waited_for() -> bool:
            return {(move["from"], move["to"]) for move in await trio.moves()} == {("s1", "s2")}

        await trio.until(only_s2_is_waited_for, "the rest is done")
        gone = set(before.owned_by("s1")) & set((await trio.map()).owned_by("s3"))
        keys = [key for key in keys if partition_of(key.encode(), 64) in gone]
        assert len(keys) > 5
        deletes = [{"op": "delete", "key": key} for key in keys[::2]]
        await trio.batch([*deletes, *({"op": "put", "key": key, "value": "there"} for key in keys[1::2])])
        assert await trio.strays("s1")
        await trio.change(Change("weigh", "s1", 4))
        trio.cluster.let_come_back("shard-s2")
        await trio.until_settled()
        assert gone & set((await trio.map()).owned_by("s1"))
        for key in keys[::2]:
            assert (await trio.wire.ask("GET", f"/v1/kv/{key}")).status == 404
        for key in keys[1::2]:
            assert (await trio.wire.ask("GET", f"/v1/kv/{key}")).body == b"there"
        await trio.cluster.wait_ready(30.0)
        await trio.batch([{"op": "delete", "key": key} for key in every_key if key not in keys[::2]])
        outages.append(Outage(began_s, time.monotonic()))


async def test_a_new_controller_gives_new_ids_and_old_fences_end_while_the_destination_sleeps(trio: Scene) -> None:
    async with under_load(trio) as outages:
        destination = trio.cluster.arm("shard-s1", "move-after-last-pull=stop")
        assert destination is not None
        began_s = time.monotonic()
        await trio.change(Change("weigh", "s1", 4))
        await trio.until_still(destination)
        before = {move.id: move for move in (await trio.map()).moves}
        fences = trio.fences()
        assert {move for _, move, _ in fences} <= before.keys()
        trio.cluster.kill("controller-0")
        for _, _, partition in fences:
            key = key_in(partition)
            reply = await trio.wire.ask("PUT", f"/v1/kv/{key}", b"as soon as the fence has ended")
            assert reply.status == 201, reply
            assert (await trio.wire.ask("DELETE", f"/v1/kv/{key}")).status == 204
        assert trio.cluster.stands_still(destination)
        after = (await trio.map()).moves
        assert not before.keys() & {move.id for move in after}
        assert [move.partitions for move in after] == [move.partitions for move in before.values()]
        trio.cluster.wake("shard-s1")
        await trio.until_settled()
        await trio.cluster.wait_ready(30.0)
        outages.append(Outage(began_s, time.monotonic()))


async def test_a_fenced_source_that_dies_and_comes_back_stays_fenced_until_the_commit(trio: Scene) -> None:
    async with under_load(trio) as outages:
        destination = trio.cluster.arm("shard-s1", "move-after-last-pull=stop")
        assert destination is not None
        began_s = time.monotonic()
        await trio.change(Change("weigh", "s1", 4))
        await trio.until_still(destination)
        source, _, partition = trio.fences()[0]
        before = {move.id for move in (await trio.map()).moves}
        await trio.kill_and_wait(source)
        key = key_in(partition)
        written = asyncio.create_task(trio.wire.ask("PUT", f"/v1/kv/{key}", b"not before the commit"))
        await asyncio.sleep(0.3)
        assert not written.done()
        assert before == {move.id for move in (await trio.map()).moves}  # nothing was voided
        trio.cluster.wake("shard-s1")
        assert (await written).status == 201
        assert not before <= {move.id for move in (await trio.map()).moves}
        await trio.until_settled()
        outages.append(Outage(began_s, time.monotonic()))
        assert (await trio.wire.ask("GET", f"/v1/kv/{key}")).body == b"not before the commit"
        assert (await trio.wire.ask("DELETE", f"/v1/kv/{key}")).status == 204


# --- refusals --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def serving(
    shard: str, folder: Path, join: str, *options: str
) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """`kvstore shard serve` of a shard whose file lies there: its url and its process, until the block ends."""
    (port,) = free_ports(1)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvstore", "shard", "serve", shard, "--join", join),
        *("--listen", f"127.0.0.1:{port}", "--data-dir", str(folder), *options),
        cwd=REPOSITORY,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def until_it_answers(url: str) -> None:
    async with session() as http:
        while True:
            try:
                async with http.get(f"{url}/healthz") as reply:
                    assert reply.status == 200
                    return
            except aiohttp.ClientError:
                await asyncio.sleep(0.05)


async def test_what_cannot_be_is_refused_with_the_reason(trio: Scene, tmp_path: Path) -> None:
    before = await trio.map()
    urls = {node.id: node.url for node in before.nodes}
    assert await trio.fails("DELETE", "/v1/shards/s9") == (
        404, "not-found", f"there is no shard 's9': the members are {', '.join(urls)}.",
    )  # fmt: skip
    assert (await trio.fails("PATCH", "/v1/shards/s9", {"weight": 2}))[:2] == (404, "not-found")
    status, code, detail = await trio.fails("POST", "/v1/shards", {"id": "s1"})
    assert (status, code, "exists already" in detail) == (409, "change-refused", True)
    (port,) = free_ports(1)
    status, code, detail = await trio.fails("POST", "/v1/shards", {"id": "s9", "url": f"http://127.0.0.1:{port}"})
    assert (status, code, "no shard answers" in detail) == (409, "change-refused", True)
    status, code, detail = await trio.fails("POST", "/v1/shards", {"id": "s9", "url": urls["s1"]})
    assert (status, code, "is s1, not s9" in detail) == (409, "change-refused", True)
    status, code, detail = await trio.fails("POST", "/v1/shards", {"id": "s9", "url": trio.cluster.url})
    assert (status, code) == (409, "change-refused")
    for body in ({"id": "S 9"}, {"id": "s9", "weight": 0}, {"id": "s9", "url": "127.0.0.1:1"}):
        assert (await trio.fails("POST", "/v1/shards", body))[:2] == (400, "bad-body")
    assert await trio.map() == before


async def test_the_last_shard_stays(trio: Scene) -> None:
    await trio.change(Change("weigh", "s1", 2))
    for shard in ("s1", "s2"):
        assert (await trio.wire.ask("DELETE", f"/v1/shards/{shard}")).status == 202
    status, code, detail = await trio.fails("DELETE", "/v1/shards/s3")
    assert (status, code, "the last one" in detail) == (409, "change-refused", True)
    assert (await trio.wire.ask("DELETE", "/v1/moves")).status == 202
    await trio.change(Change("weigh", "s1", 1))
    await trio.wire.ask("POST", "/v1/moves")
    settled = await trio.until_settled()
    assert [shard["partitions"] for shard in settled["shards"]] == [pytest.approx(21, abs=1)] * 3


async def test_a_file_of_another_cluster_or_of_a_removed_shard_is_refused(trio: Scene, tmp_path: Path) -> None:
    await trio.change(Change("add", "s7"))
    await trio.until_settled()
    await trio.change(Change("remove", "s7"))
    await trio.until_settled()
    removed = trio.cluster.data_dir / "shard-s7.db.removed"
    config = ("--config", str(trio.cluster.config))
    for name in ("same", "other"):
        (tmp_path / name).mkdir()
        shutil.copy(removed, tmp_path / name / "shard-s7.db")
        for path in removed.parent.glob(f"{removed.name}.log.*"):
            shutil.copy(path, tmp_path / name / f"shard-s7{path.name.removeprefix(removed.name)}")
    with closing(sqlite3.connect(tmp_path / "other" / "shard-s7.db")) as connection, connection:
        schema.set_meta(connection, {"cluster_id": "another"})
    before = await trio.map()
    (nowhere,) = free_ports(1)
    for name, why in (("same", "was removed from this cluster"), ("other", "belongs to cluster another")):
        async with serving("s7", tmp_path / name, trio.cluster.controller_url, *config) as (_, process):
            _, said = await asyncio.wait_for(process.communicate(), 30.0)
            assert process.returncode == EXIT_NEEDS_A_PERSON, said
            assert why in said.decode()
        async with serving("s7", tmp_path / name, f"http://127.0.0.1:{nowhere}", *config) as (url, _):
            await asyncio.wait_for(until_it_answers(url), 30.0)
            status, code, detail = await trio.fails("POST", "/v1/shards", {"id": "s7", "url": url})
            assert (status, code, why in detail) == (409, "foreign-data", True)
    assert await trio.map() == before


# --- all of it, with `kvstore up` ------------------------------------------------------------------------------------


async def test_killed_with_its_supervisor_in_the_middle_of_a_change_a_cluster_goes_on_with_it(tmp_path: Path) -> None:
    await asyncio.to_thread(kill_up_twice, tmp_path)


def kill_up_twice(folder: Path) -> None:
    config = write_config(folder, shards=2, partitions=64, limits={"move_group_keys_max": 20})
    slowly = {**os.environ, "KVSTORE_FAILPOINTS": "take-before-commit=pause:60"}
    keys = {f"key {number}": f"{number}" * 9 for number in range(400)}
    with running(config, slowly) as cluster:
        ops = [{"op": "put", "key": key, "value": value} for key, value in keys.items()]
        assert actions.ask(cluster.url, "POST", "/v1/batch", msgspec.json.encode({"ops": ops})).status == 200
        assert actions.ask(cluster.url, "POST", "/v1/shards", b'{"id": "s3"}').status == 202
        wait_until_some_have_moved(cluster, "s3", 0)
        actions.kill_everything(cluster)
    with running(config, slowly) as cluster:
        wait_until_members_hold(cluster, keys, "s1", "s2", "s3")
        assert actions.ask(cluster.url, "DELETE", "/v1/shards/s1").status == 202
        wait_until_some_have_moved(cluster, "s1", 22)
        actions.kill_everything(cluster)
    with running(config) as cluster:
        wait_until_members_hold(cluster, keys, "s2", "s3")
        actions.wait_until(lambda: (folder / "data" / "shard-s1.db.removed").exists(), "its file is set aside")
        assert "shard-s1" not in actions.pids(cluster)


def wait_until_some_have_moved(cluster: Cluster, shard_id: str, before: int) -> None:
    """The shard has more or fewer partitions than before, and more moves stand."""

    def are_under_way() -> bool:
        facts = actions.facts(cluster)
        partitions = {shard["id"]: shard["partitions"] for shard in facts["shards"]}.get(shard_id, before)
        return partitions not in (before, before - 1) and bool(facts["moves"])

    actions.wait_until(are_under_way, "some partitions have moved")


def wait_until_members_hold(cluster: Cluster, keys: dict[str, str], *members: str) -> None:
    def is_settled() -> bool:
        facts = actions.facts(cluster)
        states = {shard["id"]: shard["state"] for shard in facts["shards"]}
        return not facts["moves"] and facts["ending"] == [] and states == dict.fromkeys(members, "up")

    actions.wait_until(is_settled, f"{members} are the members, and nothing moves")
    page = actions.ask(cluster.url, "GET", "/v1/kv?values=true&limit=10000").json
    assert {item["key"]: item["value"] for item in page["items"]} == keys
    assert sum(shard["keys"] for shard in actions.facts(cluster)["shards"]) == len(keys)
