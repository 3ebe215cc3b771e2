"""loadtest.compare: several shapes of this cluster in one run, and a load that goes to all routers of each."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import click
import pytest
from aiohttp import web
from click.testing import CliRunner

from loadtest import compare
from loadtest.bench import command
from loadtest.bench.data import make_data, placed
from loadtest.bench.dialects import Kvstore
from loadtest.bench.drive import Plan, Step, run_wrk
from loadtest.bench.http1 import Request, write_replay
from loadtest.bench.stateful import Cas, LockCycles, Template, write_sections
from loadtest.bench.systems import EtcdSystem, KvstoreSystem, Shape, System, etcd_command, is_leader
from loadtest.bench.transactions import SCRIPT as TRANSACTIONS
from loadtest.bench.workloads import WORKLOADS
from tests.unit.loadtest.small_servers import serving

# --- names and data --------------------------------------------------------------------------------------------------


def test_a_cluster_that_is_alone_has_the_plain_name() -> None:
    assert [system.name for system in compare._clusters([Shape(2, 2)])] == ["kvstore"]


def test_several_are_called_by_their_shapes() -> None:
    systems = compare._clusters([Shape(1, 1), Shape(4, 2)])
    assert [(system.name, system.shape) for system in systems] == [
        ("kvstore-1s-1r", (1, 1)),
        ("kvstore-4s-2r", (4, 2)),
    ]


@pytest.mark.parametrize(("text", "numbers"), [("4", [4]), ("1,2, 4,2", [1, 2, 4])])
def test_lists_of_numbers_are_read_without_what_is_said_twice(text: str, numbers: list[int]) -> None:
    assert command.Several(click.IntRange(1, 64)).convert(text, None, None) == numbers


@pytest.mark.parametrize("arguments", [["--shards", "0"], ["--shards", "1,65"], ["--routers", "two"], ["--shards", ""]])
def test_other_numbers_are_refused_before_anything_is_started(arguments: list[str]) -> None:
    result = CliRunner().invoke(compare.main, arguments)
    assert result.exit_code == 2
    assert f"Invalid value for '{arguments[0]}'" in result.output


def test_every_combination_is_a_system_of_its_own() -> None:
    options = compare.Options(
        rounds=1, seconds=1, connections=[1], systems=["kvstore"], works=["get"], shards=[1, 4], routers=[1, 2],
        replicas=1, keys=1, json_file=None, folder=Path(),
    )  # fmt: skip
    assert options.shapes == [(1, 1), (1, 2), (4, 1), (4, 2)]
    assert [system.name for system in compare._installed(options)] == [shape.name for shape in options.shapes]


def test_a_cluster_with_copies_is_compared_with_as_many_nodes_of_etcd_as_bear_the_same_losses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(System, "missing", lambda self: None)
    options = compare.Options(
        rounds=1, seconds=1, connections=[1], systems=["kvstore", "etcd"], works=["get"], shards=[4], routers=[1],
        replicas=2, keys=1, json_file=None, folder=Path(),
    )  # fmt: skip
    ours, etcd = compare._installed(options)
    assert isinstance(ours, KvstoreSystem)
    assert isinstance(etcd, EtcdSystem)
    assert (ours._replicas, etcd._nodes) == (2, 3)


def test_each_node_of_etcd_knows_the_addresses_of_all() -> None:
    command = etcd_command(Path("/x"), 1, "http://c", ["http://p0", "http://p1", "http://p2"])
    settings = dict(zip(command[1::2], command[2::2], strict=True))
    assert settings["--name"] == "node-1"
    assert settings["--listen-peer-urls"] == "http://p1"
    assert settings["--initial-cluster"] == "node-0=http://p0,node-1=http://p1,node-2=http://p2"


def test_the_leader_of_etcd_is_found_by_what_its_nodes_say() -> None:
    assert is_leader(b'{"header":{"member_id":"7"},"leader":"7"}')
    assert not is_leader(b'{"header":{"member_id":"7"},"leader":"8"}')
    assert not is_leader(b'{"header":{"member_id":"7"}}'), "there is none yet"


def test_only_the_places_of_keys_depend_on_the_number_of_shards() -> None:
    assert placed(make_data(300, seed=1, shards=2), 3) == make_data(300, seed=1, shards=3)


# --- the load goes to all routers ------------------------------------------------------------------------------------


def step(system: KvstoreSystem | EtcdSystem, work: str, connections: int) -> Step:
    return Step(1, WORKLOADS[work], connections, system)


def test_wrk_has_a_thread_for_each_router_and_never_more_threads_than_connections() -> None:
    system = KvstoreSystem(Shape(1, 2))
    system.urls = ["http://127.0.0.1:1", "http://127.0.0.1:2"]
    assert [step(system, "get", connections).threads for connections in (1, 2, 32)] == [1, 2, 2]
    assert step(system, "lock", 32).threads == 32
    etcd = EtcdSystem()
    etcd.urls = ["http://127.0.0.1:3"]
    assert step(etcd, "get", 32).threads == 1


def test_the_scripts_are_told_of_routers_only_if_there_are_several() -> None:
    plan = Plan([], [], make_data(1, seed=1), Path("/x"))
    system = KvstoreSystem(Shape(1, 2), "kvstore-1s-2r")
    system.urls = ["http://127.0.0.1:1"]
    assert plan._script_arguments(step(system, "get", 32)) == ["/x/kvstore-1s-2r-get.requests", "1041", "kvstore"]
    system.urls.append("http://127.0.0.1:2")
    assert plan._script_arguments(step(system, "get", 32))[3:] == ["127.0.0.1:1", "127.0.0.1:2"]


class Router:
    """Answers as kvstore does where scripts look, and counts who asks for what."""

    def __init__(self) -> None:
        self.addresses: set[tuple[str, int]] = set()
        self.paths: Counter[str] = Counter()

    async def answer(self, request: web.BaseRequest) -> web.Response:
        await request.read()
        assert request.transport is not None
        self.addresses.add(request.transport.get_extra_info("peername"))
        self.paths[request.path] += 1
        if request.method == "POST":
            return web.Response(status=201, headers={"Lock-Token": "1"})
        return web.Response(status=204, headers={"ETag": '"1"'})


@pytest.fixture
async def routers() -> AsyncIterator[tuple[list[Router], list[str]]]:
    if shutil.which("wrk") is None:
        pytest.skip("wrk is not installed")
    found = [Router(), Router()]
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(serving(router.answer)) for router in found]
        yield found, [url.removeprefix("http://") for url in urls]


@pytest.mark.parametrize("script", [WORKLOADS["get"].script, WORKLOADS["batch100"].script, TRANSACTIONS])
async def test_each_thread_replays_to_a_router_of_its_own(
    script: Path, routers: tuple[list[Router], list[str]], tmp_path: Path
) -> None:
    (first, second), addresses = routers
    file = tmp_path / "file"
    requests = [Request("PUT", f"/v1/kv/key-{number}", b"x") for number in range(50)]
    file.write_bytes(write_replay(requests, f"http://{addresses[0]}"))
    result = await run_wrk(f"http://{addresses[0]}", script, 6, 1, [str(file), "1", "kvstore", *addresses], threads=2)
    assert (len(first.addresses), len(second.addresses)) == (3, 3)
    asked = first.paths.total() + second.paths.total()
    assert result.get("operations", result["requests"]) <= asked <= result["requests"] + 6
    assert min(first.paths.total(), second.paths.total()) > 0.1 * asked
    assert result["connect"] == result["read"] == result["status"] == 0


async def test_threads_replay_in_orders_of_their_own(routers: tuple[list[Router], list[str]], tmp_path: Path) -> None:
    """Two that ask for the same key at the same time all along would be a workload of its own."""
    (first, second), addresses = routers
    file = tmp_path / "file"
    requests = [Request("GET", f"/v1/kv/key-{number}") for number in range(10_000)]
    file.write_bytes(write_replay(requests, f"http://{addresses[0]}"))
    script = WORKLOADS["get"].script
    await run_wrk(f"http://{addresses[0]}", script, 2, 1, [str(file), "1", "kvstore", *addresses], threads=2)
    firsts = [list(router.paths)[:5] for router in (first, second)]
    assert firsts[0] != firsts[1]


@pytest.mark.parametrize("workload", [Cas(), LockCycles()], ids=lambda workload: workload.script.stem)
async def test_connections_with_a_thread_each_ask_the_routers_in_turn(
    workload: Cas | LockCycles, routers: tuple[list[Router], list[str]], tmp_path: Path
) -> None:
    (first, second), addresses = routers
    file, dialect = tmp_path / "file", Kvstore()
    lock = Request("POST", "/v1/locks/a", b"{}"), Request("DELETE", "/v1/locks/a")
    templates = [Template(dialect.put("a", b"x"))] if isinstance(workload, Cas) else [Template(each) for each in lock]
    file.write_bytes(write_sections([templates] * 5, addresses[0]))
    result = await run_wrk(
        f"http://{addresses[0]}", workload.script, 5, 1, [str(file), "1", "kvstore", *addresses], threads=5
    )
    assert (len(first.addresses), len(second.addresses)) == (3, 2)
    assert result["operations"] > 0
    assert result["connect"] == result["status"] == 0
