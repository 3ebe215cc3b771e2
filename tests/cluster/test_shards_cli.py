"""Adding and removing shards from the command line, with real processes: what is said, what runs, what lies where."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvstore.config import Limits
from loadtest.cluster.processes import free_ports
from tests.cluster.actions import (
    ask,
    down,
    facts,
    kill_and_wait,
    kvstore,
    pids,
    stopped,
    wait_gone,
    wait_running,
    wait_until,
)
from tests.cluster.clusters import REPOSITORY, Cluster, running, write_config

pytestmark = pytest.mark.timeout(180)

KEYS = {f"key {number}": "x" * 50 for number in range(3000)}
FIRST = {"controller-0", "router-0", "shard-s1", "shard-s2", "shard-s3"}


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three shards with keys; a test leaves s1, s2 and s3 as members, and nothing that moves."""
    with running(write_config(tmp_path_factory.mktemp("trio"), shards=3)) as cluster:
        store(cluster)
        yield cluster


@pytest.fixture
def three(trio: Cluster) -> Iterator[Cluster]:
    yield trio
    tidy(trio)
    wait_until(lambda: ask(trio.url, "GET", "/v1/kv?count=true").status == 200, "shards that stood still answer")
    assert stored(trio) == KEYS
    assert [shard["state"] for shard in facts(trio)["shards"]] == ["up"] * 3
    assert facts(trio)["moves"] == []
    wait_until(lambda: set(pids(trio)) == FIRST, "only the first processes run")


def tidy(cluster: Cluster) -> None:
    """After a test that failed: as it was before, so that the others can tell something, too."""
    others = shards(cluster).keys() - {"s1", "s2", "s3"}
    if others or moving(cluster):
        ask(cluster.url, "DELETE", "/v1/moves")
        for shard_id in others:
            ask(cluster.url, "DELETE", f"/v1/shards/{shard_id}")
        wait_until(lambda: not moving(cluster) and len(shards(cluster)) == 3, "all is as before")


def store(cluster: Cluster) -> None:
    ops = [{"op": "put", "key": key, "value": value} for key, value in KEYS.items()]
    assert ask(cluster.url, "POST", "/v1/batch", json.dumps({"ops": ops}).encode()).status == 200


def stored(cluster: Cluster) -> dict[str, str]:
    reply = ask(cluster.url, "GET", "/v1/kv?values=true&limit=10000")
    assert reply.status == 200, reply
    page = reply.json
    assert page["next"] is None
    return {item["key"]: item["value"] for item in page["items"]}


def shards(cluster: Cluster) -> dict[str, Any]:
    return {shard["id"]: shard for shard in facts(cluster)["shards"]}


def shard(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return kvstore("shard", *arguments, "--url", cluster.url, timeout_s=90)


def ok(cluster: Cluster, *arguments: str) -> str:
    run = shard(cluster, *arguments)
    assert run.returncode == 0, run
    assert "kvstore:" not in run.stderr  # how far it is may be told, if that takes long
    return run.stdout


@contextmanager
def started(cluster: Cluster, *arguments: str, err: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    """`kvstore shard …` under way."""
    command = [sys.executable, "-m", "kvstore", "shard", *arguments, "--url", cluster.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True, cwd=REPOSITORY) as process:
        try:
            yield process
        finally:
            process.kill()


def moving(cluster: Cluster) -> bool:
    return bool(facts(cluster)["moves"])


# --- there and back ---------------------------------------------------------------------------------------------------


def test_a_shard_is_added_and_removed_with_its_process_its_file_and_its_share(three: Cluster) -> None:
    plan = json.loads(ok(three, "add", "s5", "--plan", "--json"))
    assert plan["partitions"] == 1024
    assert sum(move["keys"] for move in plan["moves"]) == plan["keys"] == pytest.approx(750, abs=100)
    assert "what would move" in ok(three, "add", "s5", "--plan")
    assert shards(three).keys() == {"s1", "s2", "s3"}

    end = json.loads(ok(three, "add", "s5", "--json").splitlines()[-1])
    assert (end["kind"], end["shard"], end["state"], end["partitions_done"]) == ("add", "s5", "done", 1024)
    assert ask(three.url, "GET", f"/v1/changes/{end['id']}").json == end
    added = shards(three)["s5"]
    assert (added["state"], added["partitions"], added["keys"], added["bytes"]) == (
        "up",
        1024,
        end["keys_done"],
        end["bytes_done"],
    )
    assert stored(three) == KEYS
    new = three.pid("shard-s5")
    first_port = int(shards(three)["s1"]["url"].rpartition(":")[2])
    assert added["url"].startswith("http://127.0.0.1:")
    assert int(added["url"].rpartition(":")[2]) > first_port
    os.kill(new, signal.SIGKILL)  # supervised like the others
    wait_until(lambda: pids(three).get("shard-s5", new) != new, "it is started again")
    wait_until(lambda: shards(three)["s5"]["state"] == "up", "it is back")

    said = ok(three, "remove", "s5")
    assert said.startswith("s5 has left: ")
    assert "longest write pause" in said
    assert shards(three).keys() == {"s1", "s2", "s3"}
    assert "shard-s5" not in pids(three)
    assert not (three.data_dir / "shard-s5.db").exists()
    assert (three.data_dir / "shard-s5.db.removed").exists()

    ok(three, "add", "s5")  # its id is free again
    assert shards(three)["s5"]["partitions"] == 1024
    ok(three, "remove", "s5")


def test_weights_are_changed_and_the_shards_listed(three: Cluster) -> None:
    assert ok(three, "weight", "s1", "2").startswith("s1 has weight 2, and its share: ")
    assert [shards(three)[each]["partitions"] for each in ("s1", "s2", "s3")] == [2048, 1024, 1024]
    listed = [json.loads(line) for line in ok(three, "list", "--json").splitlines()]
    assert listed == facts(three)["shards"]
    assert ok(three, "list").splitlines()[0].startswith("s1\tup\tweight 2\t2,048 partitions\t")
    assert json.loads(ok(three, "weight", "s1", "1", "--json"))["shard"] == "s1"
    assert json.loads(ok(three, "rebalance", "--json"))["shard"] is None
    assert ok(three, "rebalance") == "the shards have their shares: nothing had to move\n"
    assert ok(three, "rebalance", "--plan") == "nothing would move\n"


def test_no_wait_returns_at_once_and_status_shows_the_moves(three: Cluster) -> None:
    with stopped(three.pid("shard-s1")):
        assert ok(three, "weight", "s2", "2", "--no-wait").startswith("s2 has weight 2; `kvstore status` shows")
        status = kvstore("status", "--url", three.url).stdout
        assert "moves under way" in status
        assert "s1" in status.partition("waits for")[2]
    wait_until(lambda: not moving(three), "all has moved")
    ok(three, "weight", "s2", "1")


# --- in the middle ----------------------------------------------------------------------------------------------------


def test_a_shard_that_is_down_is_waited_for_and_an_interrupted_command_leaves_the_change_running(
    three: Cluster,
) -> None:
    with down(three, "shard-s2"), started(three, "weight", "s3", "2") as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line == "waiting: s2 to s3: shard s2 cannot be reached\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (130, "")
        assert "the change goes on. `kvstore status` shows how far it is, `kvstore shard cancel` stops it." in err
    wait_until(lambda: not moving(three), "it went on")
    assert shards(three)["s3"]["partitions"] == 2048
    ok(three, "weight", "s3", "1")


def test_a_change_that_is_cancelled_ends_with_1_and_a_sentence_and_leaves_no_trace(three: Cluster) -> None:
    with (
        stopped(three.pid("shard-s1")), stopped(three.pid("shard-s2")), stopped(three.pid("shard-s3")),
        started(three, "add", "s5") as process,
    ):  # fmt: skip
        wait_until(lambda: shards(three).get("s5"), "s5 is a member")
        cancel = json.loads(ok(three, "cancel", "--json"))
        assert (cancel["kind"], cancel["state"]) == ("cancel", "done")
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (1, "")
        assert f"add s5 is cancelled. Cancelled by change {cancel['id']}: " in err
    wait_until(lambda: "shard-s5" not in pids(three), "its process has ended")
    assert shards(three).keys() == {"s1", "s2", "s3"}
    wait_until(lambda: not (three.data_dir / "shard-s5.db").exists(), "its file is set aside")


def test_a_removal_that_is_cancelled_ends_with_1(three: Cluster) -> None:
    with stopped(three.pid("shard-s3")), started(three, "remove", "s3", "--json") as process:
        wait_until(lambda: moving(three), "it is under way")
        ok(three, "cancel")
        _, err = process.communicate(timeout=30)
        assert process.returncode == 1
        problem = json.loads(err.splitlines()[-1])
        assert problem["code"] == "change-refused"
        assert ask(three.url, "GET", f"/v1/changes/{problem['change']}").json["state"] == "cancelled"


def test_router_and_controller_may_be_restarted_while_a_command_waits(three: Cluster) -> None:
    with started(three, "add", "s5") as process:
        with stopped(three.pid("shard-s2")):
            wait_until(lambda: moving(three), "it is under way")
            for name in ("controller-0", "router-0"):
                kill_and_wait(three, name)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out.startswith("s5 is up: ")) == (0, True), err
    ok(three, "remove", "s5")


def test_a_bar_is_drawn_on_a_terminal(three: Cluster) -> None:
    reader, terminal = pty.openpty()
    with started(three, "add", "s5", err=terminal) as process:
        os.close(terminal)
        shown = b""
        while process.poll() is None:
            try:
                shown += os.read(reader, 65_536)
            except OSError:
                break
        assert process.wait(60) == 0
    os.close(reader)
    assert "add s5" in shown.decode()
    assert "max pause" in shown.decode()
    ok(three, "remove", "s5")


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_with_the_mend(three: Cluster) -> None:
    url = shards(three)["s1"]["url"]
    for arguments, code, told in [
        (["add", "s1"], 1, "exists already"),
        (["add", "s9", "--shard-url", "http://127.0.0.1:1"], 1, "no shard answers at http://127.0.0.1:1"),
        (["add", "s9", "--shard-url", url], 1, "is s1, not s9"),
        (["add", "S9"], 2, "is no shard id"),
        (["add", "s9", "--shard-url", "nowhere"], 2, "is no address"),
        (["add", "s9", "--weight", "0"], 2, "not in the range"),
        (["add", "s9", "--plan", "--no-wait"], 2, "--plan changes nothing"),
        (["remove", "s9"], 1, "`kvstore shard list` shows all shards."),
        (["weight", "s9", "2"], 1, "there is no shard 's9'"),
    ]:
        run = shard(three, *arguments)
        assert (run.returncode, run.stdout) == (code, ""), run
        assert told in run.stderr
        assert "Traceback" not in run.stderr


def test_the_last_shard_stays(tmp_path: Path) -> None:
    with running(write_config(tmp_path, shards=1)) as cluster:
        refused = shard(cluster, "remove", "s1")
        assert refused.returncode == 1
        assert "s1 is the last one that stays" in refused.stderr
        assert "Add another shard first. Nothing was changed." in refused.stderr


# --- processes that `up` does not run ---------------------------------------------------------------------------------


@contextmanager
def served(cluster: Cluster, shard_id: str, folder: Path, *options: str) -> Iterator[str]:
    """`kvstore shard serve` by hand; its url."""
    listen = f"127.0.0.1:{free_ports(1)[0]}"
    document = yaml.safe_load((cluster.folder / "cluster.yaml").read_text())
    join = f"http://{document['controllers'][0]['listen']}"
    command = [sys.executable, "-m", "kvstore", "shard", "serve", shard_id, "--join", join, "--listen", listen]
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--data-dir", str(folder / "data"), *options],
            stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=REPOSITORY,
        )  # fmt: skip
    try:
        yield f"http://{listen}"
    finally:
        process.terminate()
        process.communicate(timeout=15)


def test_a_shard_that_serves_by_itself_joins_and_after_its_removal_goes_on_without_keys(
    three: Cluster, tmp_path: Path
) -> None:
    with served(three, "s6", tmp_path) as url:
        wait_until(lambda: shards(three).get("s6", {}).get("state") == "up", "s6 has joined by itself")
        wait_until(lambda: not moving(three), "it has its share")
        assert (shards(three)["s6"]["url"], shards(three)["s6"]["partitions"]) == (url, 1024)
        ok(three, "remove", "s6")
        assert ask(url, "GET", "/healthz").status == 200
        assert (tmp_path / "data" / "shard-s6.db").exists()
        refused = shard(three, "add", "s6", "--shard-url", url)
        assert (refused.returncode, "move shard-s6.* away" in refused.stderr) == (1, True)


def test_a_supervised_shard_joins_when_it_is_named(three: Cluster, tmp_path: Path) -> None:
    with served(three, "s7", tmp_path, "--supervised") as url:
        wait_until(lambda: answers_at(url), "it serves")
        assert "s7" not in shards(three)
        assert ok(three, "add", "s7", "--shard-url", url, "--weight", "2").startswith("s7 is up: ")
        assert shards(three)["s7"]["weight"] == 2
        ok(three, "remove", "s7")


def answers_at(url: str) -> bool:
    try:
        return ask(url, "GET", "/healthz").status == 200
    except OSError:
        return False


# --- restarts ---------------------------------------------------------------------------------------------------------


def test_a_restart_of_everything_keeps_the_members_and_starts_those_whose_data_lie_here(tmp_path: Path) -> None:
    config = write_config(tmp_path, shards=3)
    with running(config) as cluster:
        store(cluster)
        ok(cluster, "add", "s5", "--weight", "2")
        ok(cluster, "remove", "s2")
        before = {shard_id: each["partitions"] for shard_id, each in shards(cluster).items()}
        port = shards(cluster)["s5"]["url"]
    for kill in (False, True):
        with running(config) as cluster:
            wait_running(cluster, "shard-s5")
            wait_until(lambda: shards(cluster)["s5"]["state"] == "up", "s5 serves")
            assert {shard_id: each["partitions"] for shard_id, each in shards(cluster).items()} == before
            assert shards(cluster)["s5"]["url"] == port
            assert set(pids(cluster)) == {"controller-0", "router-0", "shard-s1", "shard-s3", "shard-s5"}
            assert stored(cluster) == KEYS
            if not kill:
                cluster.up.kill()
                cluster.up.wait()
    with running(config) as cluster:
        children = list(pids(cluster).values())
        with started(cluster, "remove", "s5", "--no-wait") as process:
            assert process.wait(30) == 0
        began = time.monotonic()
        cluster.up.terminate()  # in the middle of it
        assert cluster.up.wait(15) == 0
        assert time.monotonic() - began < 10
        wait_gone(children)
    with running(config) as cluster:
        wait_until(lambda: shards(cluster).keys() == {"s1", "s3"}, "s5 has left")
        wait_until(lambda: set(pids(cluster)) == FIRST - {"shard-s2"}, "its process, too")
        assert stored(cluster) == KEYS
        ok(cluster, "add", "s5")  # whatever was left of it is not in the way
        ok(cluster, "add", "s2")
        assert stored(cluster) == KEYS


def test_a_shard_that_was_written_into_the_file_later_is_ended_and_can_be_added(tmp_path: Path) -> None:
    config = write_config(tmp_path, shards=2)
    with running(config):
        pass
    text = config.read_text()
    listen = f"127.0.0.1:{free_ports(1)[0]}"
    config.write_text(text.replace("shards:\n", f"shards:\n- {{id: s9, listen: '{listen}'}}\n"))
    with running(config) as cluster:
        wait_until(lambda: "`kvstore shard add s9` makes it one" in cluster.log, "it is told")
        wait_until(lambda: "shard-s9" not in pids(cluster), "it has ended")
        ok(cluster, "add", "s9")
        assert shards(cluster)["s9"]["url"] == f"http://{listen}"


# --- without the controller -------------------------------------------------------------------------------------------


def test_without_the_controller_changes_are_refused_and_the_cluster_still_tells_what_it_knows(three: Cluster) -> None:
    with stopped(three.pid("controller-0")):
        began = time.monotonic()
        document = facts(three)
        assert time.monotonic() - began < Limits().request_timeout_s  # it does not wait for it as for a shard
        assert (document["moves"], document["ending"], document["last_change"]) == ([], None, None)
    with started(three, "list") as process:
        assert process.wait(30) == 0
    with stopped(three.up.pid):
        os.kill(three.pid("controller-0"), signal.SIGKILL)
        reply = wait_until(lambda: refused_by(three), "the router says so")
        assert (reply.json["code"], reply.headers["retry-after"]) == ("unavailable", "1")
        assert facts(three)["ending"] is None
        run = shard(three, "add", "s9")
        assert (run.returncode, "the controller does not answer" in run.stderr) == (2, True)
    wait_until(lambda: facts(three)["ending"] == [], "the controller is back")


def refused_by(cluster: Cluster) -> Any:
    reply = ask(cluster.url, "DELETE", "/v1/shards/s9")
    return reply if reply.status == 503 else None
