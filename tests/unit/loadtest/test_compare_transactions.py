"""loadtest.compare: which keys transactions write, how they are asked for, and how their answers are counted."""

from __future__ import annotations

import base64
import json
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from aiohttp import web

from kvstore.config import default_config
from kvstore.placement.cluster_map import at_home, first_map
from loadtest.bench import dialects, drive, transactions
from loadtest.bench.data import Data, make_data
from loadtest.bench.drive import Step, run_wrk
from loadtest.bench.http1 import Answer, write_replay
from loadtest.bench.systems import EtcdSystem
from loadtest.bench.transactions import PUTS, SCRIPT, Draw, Transactions
from loadtest.bench.workloads import WORKLOADS
from loadtest.cluster import processes
from tests.unit.loadtest.small_servers import serving

DRAWS = (transactions.over_all_stores, transactions.in_one_store, transactions.zipf)
DATA = make_data(400, seed=1)


def drawn(draw: Draw, owners: Sequence[str] = DATA.owners, seed: int = 1) -> list[list[int]]:
    return draw(owners, random.Random(seed))


# --- which keys ------------------------------------------------------------------------------------------------------


def test_the_owners_are_those_of_a_new_cluster() -> None:
    members = [at_home(f"s{number}", f"http://h:{number}", str(number)) for number in range(1, 4)]
    cluster_map = first_map("c", 4096, members)
    data = make_data(200, seed=1, shards=3)
    assert list(data.owners) == [cluster_map.owner_of(key.encode()).id for key in data.keys]


@pytest.mark.parametrize("draw", DRAWS)
def test_there_are_as_many_transactions_as_keys_each_of_4_distinct_keys(draw: Draw) -> None:
    groups = drawn(draw)
    assert len(groups) == len(DATA.keys)
    assert {len(set(numbers)) for numbers in groups} == {PUTS}
    assert {number for numbers in groups for number in numbers} <= set(range(len(DATA.keys)))


def test_random_keys_lie_in_several_stores() -> None:
    stores = [len({DATA.owners[number] for number in numbers}) for numbers in drawn(transactions.over_all_stores)]
    assert 2.5 < sum(stores) / len(stores) < 3  # 4 × (1 - (3/4)⁴) = 2.73


def test_keys_of_one_store_never_lie_in_two_and_every_store_has_its_share() -> None:
    groups = drawn(transactions.in_one_store)
    stores = [{DATA.owners[number] for number in numbers} for numbers in groups]
    assert {len(store) for store in stores} == {1}
    assert Counter(store for each in stores for store in each) == Counter(DATA.owners)


def test_zipf_draws_a_key_in_inverse_proportion_to_about_its_rank() -> None:
    owners = ["s1"] * 20_000
    first = Counter(numbers[0] for numbers in drawn(transactions.zipf, owners))  # before anything is drawn again
    share = 1 / sum(rank**-0.99 for rank in range(1, len(owners) + 1))
    for rank in (1, 2, 10):
        expected = len(owners) * share * rank**-0.99
        assert abs(first[rank - 1] - expected) < 5 * expected**0.5


@pytest.mark.parametrize("draw", DRAWS)
def test_too_few_keys_for_a_transaction_are_an_error_and_no_endless_loop(draw: Draw) -> None:
    data = make_data(3, seed=1, shards=1)
    with pytest.raises(RuntimeError, match="4 keys, and there are 3"):
        Transactions(draw).requests(dialects.Kvstore(), data)


def test_too_few_keys_in_a_store_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="fewer than the 4 keys"):
        drawn(transactions.in_one_store, ["s1", "s1", "s1", "s1", "s2"])


# --- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("work", ["txn4", "txn1", "txn-zipf"])
def test_all_systems_are_asked_for_the_same_transactions(work: str) -> None:
    make = WORKLOADS[work].requests
    assert make is not None
    kvstore, bare, etcd, redis = (
        make(dialect, DATA) for dialect in (dialects.Kvstore(), dialects.Bare(), dialects.Etcd(), dialects.Webdis())
    )
    assert kvstore == bare
    for ours, theirs, third in zip(kvstore, etcd, redis, strict=True):
        assert (ours.method, ours.target) == ("POST", "/v1/txn")
        assert (theirs.method, theirs.target) == ("POST", "/v3/kv/txn")
        steps = json.loads(ours.body)["then"]
        assert json.loads(ours.body) == {"then": steps}
        assert [step["op"] for step in steps] == ["put"] * PUTS
        puts = [(step["key"], step["value"]) for step in steps]
        success = [step["request_put"] for step in json.loads(theirs.body)["success"]]
        assert [(unpack(step["key"]), unpack(step["value"])) for step in success] == puts
        assert third.body.decode().split("/") == ["MSET", *(word for put in puts for word in put)]
        assert {len(value) for _, value in puts} == {100}


def unpack(text: str) -> str:
    return base64.b64decode(text).decode()


def test_only_the_store_itself_tells_who_keeps_a_key() -> None:
    answer = Answer(200, b"", {"kv-shard": "s3"})
    assert dialects.Kvstore().owner(answer) == "s3"
    assert dialects.Bare().owner(answer) is None
    assert dialects.Etcd().owner(answer) is None


def test_conflicts_have_time_to_be_answered_and_are_no_time_outs() -> None:
    zipf = WORKLOADS["txn-zipf"]
    gives_up_s = default_config().limits.txn_timeout_s
    assert zipf.timeout_s > gives_up_s
    step = Step(1, zipf, 32, EtcdSystem())
    assert step.seconds(asked=1) > gives_up_s
    assert step.seconds(asked=60) == 60
    assert step._replace(workload=WORKLOADS["txn4"]).seconds(asked=1) == 1


async def test_a_run_ends_when_the_system_has_come_to_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_s = [0.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0]  # before and after each look: busy, busy, at rest, …
    monkeypatch.setattr(drive, "SETTLE_S", 0.01)
    monkeypatch.setattr(processes, "cpu_by_name", lambda _: {"shard": cpu_s.pop(0)})
    await drive._settle(EtcdSystem())
    assert cpu_s == [2.0, 2.0]


# --- against a store in this process ---------------------------------------------------------------------------------


class SmallStore:
    """Transactions of puts as kvstore answers them; every `conflict_every`-th is a conflict, `forgets` writes half."""

    def __init__(self, data: Data, forgets: bool = False, conflict_every: int = 0) -> None:
        self.owners = dict(zip(data.keys, data.owners, strict=True))
        self.values = dict(zip(data.keys, data.stored, strict=True))
        self.forgets = forgets
        self.conflict_every = conflict_every
        self.answers: Counter[int] = Counter()

    async def answer(self, request: web.BaseRequest) -> web.Response:
        body = await request.read()
        if request.method == "GET":
            key = request.path.rpartition("/")[2]
            return web.Response(body=self.values[key], headers={"Kv-Shard": self.owners[key]})
        status = 200
        if self.conflict_every and self.answers.total() % self.conflict_every == 0:
            status = 409
        self.answers[status] += 1
        if status == 200:
            steps = json.loads(body)["then"]
            for step in steps[: 2 if self.forgets else None]:
                self.values[step["key"]] = step["value"].encode()
        return web.json_response({"succeeded": True}, status=status)


@pytest.mark.parametrize("draw", DRAWS)
async def test_a_store_that_writes_all_of_a_transaction_is_measured(draw: Draw) -> None:
    async with serving(SmallStore(DATA).answer) as url:
        await Transactions(draw).check(url, dialects.Kvstore(), DATA)


async def test_a_store_that_writes_half_of_a_transaction_is_not_measured() -> None:
    async with serving(SmallStore(DATA, forgets=True).answer) as url:
        with pytest.raises(RuntimeError, match="does not show what a transaction wrote"):
            await Transactions(transactions.over_all_stores).check(url, dialects.Kvstore(), DATA)


async def test_a_store_that_refuses_transactions_is_not_measured() -> None:
    async with serving(SmallStore(DATA, conflict_every=1).answer) as url:
        with pytest.raises(RuntimeError, match="/v1/txn: 409"):
            await Transactions(transactions.over_all_stores).check(url, dialects.Kvstore(), DATA)


async def test_keys_that_lie_elsewhere_than_reckoned_are_an_error() -> None:
    elsewhere = DATA._replace(owners=["s9"] * len(DATA.keys))
    async with serving(SmallStore(elsewhere).answer) as url:
        with pytest.raises(RuntimeError, match="in s9, and not in s"):
            await Transactions(transactions.in_one_store).check(url, dialects.Kvstore(), DATA)


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed: apt-get install wrk")
async def test_the_script_counts_answers_by_status_and_only_what_was_done_as_operations(tmp_path: Path) -> None:
    store, file = SmallStore(DATA, conflict_every=10), tmp_path / "file"
    requests = Transactions(transactions.over_all_stores).requests(dialects.Kvstore(), DATA)
    async with serving(store.answer) as url:
        file.write_bytes(write_replay(requests, url))
        result = await run_wrk(url, SCRIPT, 3, 1, [str(file), "1"])
    # What was answered but not yet read when wrk stopped: one for each connection at the most.
    assert 0 < result["operations"] <= store.answers[200] <= result["operations"] + 3
    assert 0 < result["409"] <= store.answers[409] <= result["409"] + 3
    assert result["attempts"] == result["operations"] + result["409"]
    assert result["status"] == result["timeout"] == 0
