"""`kvstore up` and its processes: what is printed, which pid files there are, how things start, end and come back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from loadtest.cluster.processes import free_ports
from tests.cluster.actions import (
    answers,
    ask,
    down,
    facts,
    get,
    is_running,
    keys_of,
    kill_and_wait,
    kvstore,
    pids,
    put,
    stopped,
    wait_gone,
    wait_running,
    wait_until,
)
from tests.cluster.clusters import REPOSITORY, Cluster, running, write_config

pytestmark = pytest.mark.timeout(120)

NAMES = {"controller-0", "router-0", "shard-s1", "shard-s2"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two shards, shared by tests that leave all processes running, though perhaps as other processes."""
    with running(write_config(tmp_path_factory.mktemp("pair"), shards=2)) as cluster:
        yield cluster


# --- start and stop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_says_ready_once_and_on_a_signal_stops_every_child_within_10_s(
    tmp_path: Path, number: signal.Signals
) -> None:
    with running(write_config(tmp_path, shards=2)) as cluster:
        assert ask(cluster.url, "GET", "/readyz").status == 200
        run_dir = cluster.data_dir / "run"
        assert {path.name for path in run_dir.iterdir()} == {f"{name}.pid" for name in NAMES}
        children = pids(cluster)
        assert children.keys() == NAMES
        began = time.monotonic()
        cluster.up.send_signal(number)
        assert cluster.up.wait(15) == 0
        assert time.monotonic() - began < 10
        assert not any(map(is_running, children.values()))
        assert list(run_dir.iterdir()) == []
        assert cluster.up.stdout is not None
        assert cluster.up.stdout.read() == ""  # nothing after the one line


def test_no_child_outlives_an_up_that_was_killed_and_the_next_one_starts_at_once(tmp_path: Path) -> None:
    config = write_config(tmp_path, shards=2)
    with running(config) as cluster:
        children = list(pids(cluster).values())
        assert put(cluster, "a", b"1").status == 201
        before = facts(cluster)
        cluster.up.kill()
        cluster.up.wait()
        with running(config) as again:  # it waits for the children that are just ending
            assert get(again, "a").body == b"1"
            assert (facts(again)["cluster_id"], facts(again)["epoch"]) == (before["cluster_id"], before["epoch"])
        wait_gone(children)


def test_a_restart_keeps_data_versions_and_cluster_id_and_follows_a_shard_to_a_new_address(tmp_path: Path) -> None:
    config = write_config(tmp_path, shards=2, partitions=64)
    with running(config) as cluster:
        before = facts(cluster)
        etags = {key: put(cluster, key, key.encode()).headers["etag"] for key in map(str, range(40))}
    document = yaml.safe_load(config.read_text())
    document["shards"][1]["listen"] = f"127.0.0.1:{free_ports(1)[0]}"
    config.write_text(yaml.safe_dump(document))
    with running(config) as cluster:
        after = facts(cluster)
        assert (after["cluster_id"], after["epoch"]) == (before["cluster_id"], before["epoch"] + 1)
        assert after["shards"][1]["url"] == f"http://{document['shards'][1]['listen']}"
        for key, etag in etags.items():
            reply = get(cluster, key)
            assert (reply.status, reply.body, reply.headers["etag"]) == (200, key.encode(), etag)


def test_cluster_yaml_edited_under_a_cluster_stops_neither_its_shards_nor_a_new_one(tmp_path: Path) -> None:
    config = write_config(tmp_path, shards=2, partitions=64)
    with running(config) as cluster:
        assert put(cluster, "a", b"1").status == 201
    config.write_text(config.read_text().replace("partitions: 64", "partitions: 128"))
    with running(config) as cluster:
        assert get(cluster, "a").body == b"1"
        assert "partitions: the map has 64, cluster.yaml 128" in cluster.log
        config.write_text(config.read_text() + "limits: {a typo}\n")
        for name in sorted(NAMES):  # each is started with what `up` read, not with what the file says by now
            kill_and_wait(cluster, name)
        wait_until(lambda: kvstore("get", "a", "--url", cluster.url).returncode == 0, "all are back")
        added = kvstore("shard", "add", "s3", "--url", cluster.url)
        assert added.returncode == 0, added.stderr
        assert facts(cluster)["partitions"] == sum(shard["partitions"] for shard in facts(cluster)["shards"]) == 64


def test_all_processes_run_on_plain_asyncio_too(tmp_path: Path) -> None:
    env = {**os.environ, "KVSTORE_LOOP": "asyncio"}
    with running(write_config(tmp_path, shards=2), env) as cluster:
        for pid in pids(cluster).values():
            assert b"KVSTORE_LOOP=asyncio" in Path(f"/proc/{pid}/environ").read_bytes()
        for number in range(20):
            assert put(cluster, f"k{number}", b"%d" % number).status == 201
        assert get(cluster, "k7").body == b"7"
        assert ask(cluster.url, "GET", "/v1/kv?count=true").json == {"count": 20}
        kill_and_wait(cluster, "shard-s1")
        wait_until(lambda: ask(cluster.url, "GET", "/v1/kv?count=true").status == 200, "the shard is back")


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_refused_with_the_pid_that_holds_it(tmp_path: Path) -> None:
    config = write_config(tmp_path, shards=2)
    port = int(yaml.safe_load(config.read_text())["shards"][1]["listen"].rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)):
        refused = kvstore("up", "--config", str(config))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"port {port} is in use by pid {os.getpid()} " in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_process_that_serves_logs_json_for_programs(tmp_path: Path) -> None:
    config = write_config(tmp_path, shards=2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        refused = kvstore(
            "controller", "serve", "0", "--listen", listen, "--data-dir", str(tmp_path / "d"),
            "--config", str(config), "--json",
        )  # fmt: skip
    assert refused.returncode == 2
    last = json.loads(refused.stderr.splitlines()[-1])
    assert (last["level"], last["process"]) == ("error", "controller-0")
    assert f"is in use by pid {os.getpid()} " in last["message"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("limits: {wal_bytes: 1}\n", ":1: limits.wal_bytes is unknown; did you mean wal_bytes_max?"),
        ("shards:\n- {id: s1, listen: a:1}\n- {id: s1, listen: a:2}\n", ":3: shards[1].id s1 is that of shards[0]"),
    ],
)
def test_a_wrong_cluster_yaml_is_refused_with_file_line_and_mend(tmp_path: Path, wrong: str, message: str) -> None:
    document = yaml.safe_load(write_config(tmp_path).read_text())
    rest = {name: document[name] for name in document if not wrong.startswith(name)}
    config = tmp_path / "wrong.yaml"
    config.write_text(wrong + yaml.safe_dump(rest))
    refused = kvstore("up", "--config", str(config))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"{config}{message}" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "data").exists()


def test_a_second_up_is_refused_and_the_first_goes_on(pair: Cluster) -> None:
    before = pids(pair)
    refused = kvstore("up", "--config", str(pair.folder / "cluster.yaml"))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"kvstore up: this cluster runs already, started by pid {pair.up.pid}: ")
    assert refused.stderr.count("\n") == 1
    assert pids(pair) == before


def test_a_second_up_with_other_ports_cannot_touch_data_in_use(pair: Cluster, tmp_path: Path) -> None:
    before = pids(pair)
    assert put(pair, "second-up", b"1").status in (201, 204)
    config = write_config(tmp_path, shards=2, data_dir=str(pair.data_dir))
    refused = kvstore("up", "--config", str(config))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"kvstore up: this cluster runs already, started by pid {pair.up.pid}: ")
    assert refused.stderr.count("\n") == 1
    assert pids(pair) == before
    assert get(pair, "second-up").body == b"1"


# --- children that die -----------------------------------------------------------------------------------------------


def test_each_child_that_is_killed_is_started_again_and_serves(pair: Cluster) -> None:
    keys = [keys_of(pair, shard_id, 1)[0] for shard_id in ("s1", "s2")]
    for key in keys:
        put(pair, key, b"before")

    def all_answer() -> bool:
        try:
            return all(get(pair, key).body == b"before" for key in keys)
        except OSError:
            return False

    for name in sorted(NAMES):
        before = pids(pair)
        kill_and_wait(pair, name)
        now = pids(pair)
        assert {other for other in NAMES if now[other] != before[other]} == {name}
        wait_until(all_answer, f"all keys are back after the death of {name}")


def test_with_no_restart_the_first_death_ends_everything(tmp_path: Path) -> None:
    config = write_config(tmp_path, shards=2)
    command = [sys.executable, "-m", "kvstore", "up", "--no-restart", "--config", str(config)]
    with (tmp_path / "up.log").open("w") as log:
        up = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=REPOSITORY)
    assert up.stdout is not None
    with up.stdout:
        try:
            assert up.stdout.readline().startswith("ready: ")
            children = pids(Cluster("", tmp_path, up))
            os.kill(children["shard-s1"], signal.SIGKILL)
            assert up.wait(15) == 1
            assert not any(map(is_running, children.values()))
            assert "shard-s1 (pid" in (tmp_path / "up.log").read_text()
        finally:
            up.kill()
            up.wait()


# --- without the controller ------------------------------------------------------------------------------------------


def test_while_the_controller_hangs_all_goes_on_and_a_shard_restarts_from_its_own_map(pair: Cluster) -> None:
    old, new = keys_of(pair, "s1", 2, "hang-")
    put(pair, old, b"1")
    with stopped(pair.pid("controller-0")):
        assert put(pair, new, b"2").status == 201
        kill_and_wait(pair, "shard-s1")
        wait_until(lambda: answers(pair, old), "the shard serves again")
        assert get(pair, old).body == b"1"
        assert get(pair, new).body == b"2"
        assert put(pair, new, b"3").status == 204


def test_a_controller_that_lost_its_file_takes_the_map_of_the_shards_when_a_person_says_so(pair: Cluster) -> None:
    (key,) = keys_of(pair, "s1", 1, "lost-")
    put(pair, key, b"1")
    before = facts(pair)
    for path in pair.data_dir.glob("controller-0.db*"):
        path.unlink()
    kill_and_wait(pair, "controller-0")
    config = yaml.safe_load((pair.folder / "cluster.yaml").read_text())
    recover = ("controller", "recover", "--controller", f"http://{config['controllers'][0]['listen']}", "--json")

    def shown() -> Any:
        done = kvstore(*recover)
        return json.loads(done.stdout) if done.returncode == 0 and not json.loads(done.stdout)["silent"] else None

    found = wait_until(shown, "both shards have told their maps")
    assert (found["cluster_id"], found["epoch"]) == (before["cluster_id"], before["epoch"])
    refused = ask(pair.url, "PATCH", "/v1/shards/s1", b'{"weight":1}')
    assert (refused.status, refused.json["code"]) == (503, "controller-behind")
    assert (get(pair, key).body, put(pair, key, b"2").status) == (b"1", 204)
    assert kvstore(*recover, "--confirm", str(before["epoch"] + 1)).returncode == 1
    taken = kvstore(*recover, "--confirm", str(before["epoch"]))
    assert taken.returncode == 0, taken.stderr
    wait_until(lambda: facts(pair)["epoch"] > before["epoch"], "the cluster follows the map")
    assert ask(pair.url, "PATCH", "/v1/shards/s1", b'{"weight":1}').status == 202
    assert facts(pair)["cluster_id"] == before["cluster_id"]
    assert get(pair, key).body == b"2"


def test_while_the_controller_is_dead_reads_and_writes_go_on(pair: Cluster) -> None:
    keys = [keys_of(pair, shard_id, 1, "dead-")[0] for shard_id in ("s1", "s2")]
    with down(pair, "controller-0"):
        for key in keys:
            assert put(pair, key, b"1").status == 201
            assert get(pair, key).body == b"1"
    wait_running(pair, "controller-0")


def test_a_router_that_starts_while_the_controller_hangs_says_that_it_has_no_map(pair: Cluster) -> None:
    put(pair, "no-map", b"1")

    def refused() -> bool:
        try:
            reply = get(pair, "no-map")
        except OSError:
            return False  # it is still starting
        assert (reply.status, reply.json["code"]) == (503, "unavailable")
        assert "map" in reply.json["detail"]
        assert ask(pair.url, "GET", "/readyz").status == 503
        assert ask(pair.url, "GET", "/healthz").status == 200
        return "retry-after" in reply.headers

    with stopped(pair.pid("controller-0")):
        kill_and_wait(pair, "router-0")
        wait_until(refused, "the router answers")
    wait_until(lambda: answers(pair, "no-map"), "the router has a map")
    assert get(pair, "no-map").body == b"1"


# --- a shard whose disk is lost ---------------------------------------------------------------------------------------


def test_a_shard_that_is_given_up_leaves_its_partitions_empty_and_open_and_all_others_as_they_were(
    tmp_path: Path,
) -> None:
    with running(write_config(tmp_path, shards=3, partitions=64)) as cluster:
        lost, kept = keys_of(cluster, "s1", 3, "gone-"), keys_of(cluster, "s2", 2, "kept-") + keys_of(cluster, "s3", 1)
        before = [int(put(cluster, key, b"1").headers["etag"].strip('"')) for key in (*lost, *kept)]
        name = lost[0]
        token = ask(cluster.url, "POST", f"/v1/locks/{name}", b"{}").json["token"]
        pid = cluster.pid("shard-s1")
        for path in cluster.data_dir.glob("shard-s1.*"):
            path.unlink(missing_ok=True)  # a segment of the log may be renamed at this moment, since it is ready
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: "empty or foreign file" in cluster.log, "its empty file is refused")
        assert get(cluster, lost[0]).status == 503
        unconfirmed = ask(cluster.url, "DELETE", "/v1/shards/s1?lost=true")
        assert (unconfirmed.status, unconfirmed.json["code"]) == (409, "change-refused")
        asked = kvstore(
            "shard", "remove", "s1", "--lost", "--url", cluster.url
        )  # there is no terminal to type the id at
        assert asked.returncode != 0
        assert "partitions of shard s1 would be reopened, empty" in asked.stderr
        assert "0 undecided transactions" in asked.stderr
        done = kvstore("shard", "remove", "s1", "--lost", "--confirm", "s1", "--url", cluster.url)
        assert done.returncode == 0, done.stderr
        assert [shard["id"] for shard in facts(cluster)["shards"]] == ["s2", "s3"]
        assert sum(shard["partitions"] for shard in facts(cluster)["shards"]) == 64
        assert ask(cluster.url, "GET", "/v1/kv?count=true").json == {"count": len(kept)}
        assert [get(cluster, key).status for key in (*lost, *kept)] == [404] * 3 + [200] * 3
        again = put(cluster, lost[0], b"2")
        assert again.status == 201
        assert int(again.headers["etag"].strip('"')) > 2**32 > max(before)
        assert ask(cluster.url, "POST", f"/v1/locks/{name}", b"{}").json["token"] > 2**32 > token
        steps = [{"op": "put", "key": key, "value": "3"} for key in (lost[1], *kept)]
        assert ask(cluster.url, "POST", "/v1/txn", json.dumps({"then": steps}).encode()).status == 200
        wait_until(lambda: "shard-s1" not in pids(cluster), "its process is stopped")
        for other in ("shard-s2", "router-0", "controller-0"):
            kill_and_wait(cluster, other)
        wait_until(lambda: kvstore("get", lost[0], "--url", cluster.url).stdout == "2", "all are back")
        added = kvstore("shard", "add", "s1", "--url", cluster.url)
        assert added.returncode == 0, added.stderr
        assert ask(cluster.url, "GET", "/v1/kv?count=true").json == {"count": len(kept) + 2}
        assert get(cluster, lost[1]).body == b"3"
