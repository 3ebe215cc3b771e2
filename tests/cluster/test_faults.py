"""Processes that die, hang or find wrong data, disks that fill up: a clear answer, and nothing acknowledged is lost."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import pytest

from tests.cluster.actions import (
    WAIT_S,
    answers,
    ask,
    assert_unavailable,
    delete,
    down,
    facts,
    get,
    keys_of,
    pids,
    put,
    small_disk,
    stopped,
    take_all_room,
    wait_running,
    wait_until,
)
from tests.cluster.clusters import REPOSITORY, Cluster, running, write_config

pytestmark = pytest.mark.timeout(120)

MIB = 1024 * 1024
REQUEST_TIMEOUT_S = 1.5


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two shards and an impatient router; a test leaves all processes running."""
    limits = {"request_timeout_s": REQUEST_TIMEOUT_S, "reroute_timeout_s": 1.0}
    with running(write_config(tmp_path_factory.mktemp("pair"), shards=2, limits=limits)) as cluster:
        yield cluster


# --- a shard that is away --------------------------------------------------------------------------------------------


def test_while_a_shard_is_down_its_keys_answer_503_and_all_others_go_on(pair: Cluster) -> None:
    lost, kept = keys_of(pair, "s1", 3, "down-"), keys_of(pair, "s2", 3, "down-")
    for key in lost[:2] + kept[:2]:
        put(pair, key, b"before")
    with down(pair, "shard-s1"):
        for method in ("GET", "PUT", "DELETE", "HEAD"):
            reply = ask(pair.url, method, f"/v1/kv/{lost[0]}", b"x" if method == "PUT" else None)
            assert reply.status == 503
            assert int(reply.headers["retry-after"]) >= 1
        assert_unavailable(get(pair, lost[0]))
        assert_unavailable(ask(pair.url, "GET", "/v1/kv?prefix=down-"))  # a gap would be worse than no listing
        partial = ask(pair.url, "GET", "/v1/kv?prefix=down-&partial=true").json
        assert [item["key"] for item in partial["items"]] == sorted(kept[:2])
        assert len(partial["missing"]) == facts(pair)["shards"][0]["partitions"]
        counted = ask(pair.url, "GET", "/v1/kv?prefix=down-&count=true&partial=true").json
        assert counted == {"count": 2, "missing": partial["missing"]}
        locks = ask(pair.url, "GET", "/v1/locks?partial=true").json
        assert locks == {"items": [], "next": None, "missing": partial["missing"]}
        command = [sys.executable, "-m", "kvstore", "list", "down-", "--skip-down", "--url", pair.url]
        listed = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
        assert (listed.returncode, listed.stdout.split()) == (1, sorted(kept[:2])), listed.stderr
        assert get(pair, kept[0]).body == b"before"
        assert put(pair, kept[2], b"during").status == 201
        assert delete(pair, kept[1]).status == 204

        ops = [{"op": "get", "key": lost[0]}, {"op": "get", "key": kept[0]}, {"op": "delete", "key": lost[1]}]
        batch = ask(pair.url, "POST", "/v1/batch", msgspec.json.encode({"ops": ops}))
        assert [result["status"] for result in batch.json["results"]] == [503, 200, 503]

        assert [shard["state"] for shard in facts(pair)["shards"]] == ["down", "up"]
        assert ask(pair.url, "GET", "/readyz").status == 200  # the router itself can serve
        assert ask(pair.url, "GET", f"/v1/explain/{lost[0]}").json["owner_state"] == "down"
    wait_until(lambda: answers(pair, lost[0]), "the shard is back")
    assert [get(pair, key).body for key in lost[:2]] == [b"before"] * 2
    assert get(pair, lost[2]).status == 404
    assert get(pair, kept[2]).body == b"during"
    wait_until(lambda: facts(pair)["shards"][0]["state"] == "up", "it is shown as up")


def test_while_a_shard_hangs_a_write_is_unknown_and_a_read_unavailable_and_then_all_goes_on(pair: Cluster) -> None:
    hung, other = keys_of(pair, "s1", 2, "hang-"), keys_of(pair, "s2", 1, "hang-")[0]
    put(pair, hung[0], b"before")
    wait_running(pair, "shard-s1")
    with stopped(pair.pid("shard-s1")), ThreadPoolExecutor() as threads:
        write = threads.submit(put, pair, hung[1], b"perhaps")
        read = threads.submit(get, pair, hung[0])
        began = time.monotonic()
        assert put(pair, other, b"1").status == 201
        assert time.monotonic() - began < REQUEST_TIMEOUT_S
        assert (write.result().status, write.result().json["code"]) == (504, "outcome-unknown")
        assert_unavailable(read.result())
        wait_until(lambda: get(pair, hung[0]).status == 503, "the router knows that it hangs")
    wait_until(lambda: answers(pair, hung[0]), "the shard is back")
    assert get(pair, hung[0]).body == b"before"
    perhaps = get(pair, hung[1])
    assert perhaps.status == 404 or perhaps.body == b"perhaps"
    assert put(pair, hung[1], b"sure").status in (201, 204)
    assert get(pair, hung[1]).body == b"sure"


# --- a router that dies ----------------------------------------------------------------------------------------------


def test_a_request_that_the_router_took_to_its_grave_gets_no_answer_at_all(pair: Cluster) -> None:
    key = keys_of(pair, "s1", 1, "grave-")[0]
    put(pair, key, b"before")
    requests = (f"GET /v1/kv/{key}", f"PUT /v1/kv/{key}")
    connections = [socket.create_connection(("127.0.0.1", pair.port)) for _ in requests]
    wait_running(pair, "shard-s1", "router-0")
    with stopped(pair.pid("shard-s1")):
        for connection, request in zip(connections, requests, strict=True):
            connection.settimeout(WAIT_S)
            connection.sendall(f"{request} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode())
        under_way = 'kvstore_requests_under_way{router="0"} 3'  # with the one that asks
        wait_until(lambda: under_way in ask(pair.url, "GET", "/metrics").body.decode(), "the router has them")
        os.kill(pair.pid("router-0"), signal.SIGKILL)
        for connection in connections:
            with connection:
                try:
                    assert connection.recv(1) == b""
                except ConnectionResetError:
                    pass

    def back() -> bool:
        try:
            return answers(pair, key)
        except OSError:
            return False

    wait_until(back, "router and shard are back")
    assert get(pair, key).body in (b"before", b"")


def test_a_router_killed_under_load_gives_whole_answers_or_none_and_loses_nothing(pair: Cluster) -> None:
    value = bytes(range(256)) * 1024  # large enough that an answer travels in several pieces
    acknowledged: dict[str, bytes] = {}
    reads = 0
    killed = threading.Event()

    def load(worker: int) -> None:
        nonlocal reads
        number = 0
        with closing(http.client.HTTPConnection("127.0.0.1", pair.port, timeout=WAIT_S)) as connection:
            while True:
                number += 1
                key = f"load-{worker}-{number}"
                try:
                    connection.request("PUT", f"/v1/kv/{key}", value)
                    response = connection.getresponse()
                    response.read()
                    assert response.status == 201
                    acknowledged[key] = value
                    connection.request("GET", f"/v1/kv/{key}")
                    response = connection.getresponse()
                    body = response.read()  # raises IncompleteRead for a half one
                except http.client.IncompleteRead:
                    return  # it is told by Content-Length: it is not taken for the value
                except (OSError, http.client.HTTPException):
                    assert killed.is_set()
                    return
                assert (response.status, body) == (200, value)
                reads += 1

    with ThreadPoolExecutor() as threads:
        workers = [threads.submit(load, worker) for worker in range(4)]
        wait_until(lambda: reads >= 40 or any(worker.done() for worker in workers), "there is load")
        wait_running(pair, "router-0")
        killed.set()
        os.kill(pair.pid("router-0"), signal.SIGKILL)
        for worker in workers:
            worker.result(WAIT_S)

    def back() -> bool:
        try:
            return ask(pair.url, "GET", "/readyz").status == 200
        except OSError:
            return False

    wait_until(back, "the router is back")
    for key in acknowledged:
        assert get(pair, key).body == value


# --- a shard that dies in the middle of a batch ----------------------------------------------------------------------


@pytest.mark.parametrize(("failpoint", "is_there"), [("batch-before-commit", False), ("batch-after-commit", True)])
def test_a_batch_is_done_as_a_whole_or_not_at_all_and_a_shard_that_dies_in_it_answers_no_client(
    tmp_path: Path, failpoint: str, is_there: bool
) -> None:
    env = {**os.environ, "KVSTORE_FAILPOINTS": f"{failpoint}=kill@3"}
    with running(write_config(tmp_path, shards=1), env) as cluster:
        assert put(cluster, "a", b"1").status == 201
        assert delete(cluster, "a").status == 204
        reply = put(cluster, "b", b"2")
        assert (reply.status, reply.json["code"]) == (504, "outcome-unknown")
        wait_until(lambda: answers(cluster, "b"), "the shard is back")
        assert get(cluster, "a").status == 404
        assert get(cluster, "b").status == (200 if is_there else 404)
        again = put(cluster, "b", b"3")
        assert again.status == (204 if is_there else 201)
        assert again.headers["etag"] == ('"4"' if is_there else '"3"')  # never a version twice


# --- wrong data ------------------------------------------------------------------------------------------------------


def other_format(db: Path, foreign: Path) -> None:
    with closing(sqlite3.connect(db)) as connection, connection:
        connection.execute("UPDATE meta SET value = '99' WHERE name = 'format'")


def emptied(db: Path, foreign: Path) -> None:
    for path in files_of(db):
        path.unlink()


def of_another_cluster(db: Path, foreign: Path) -> None:
    emptied(db, foreign)
    for path in files_of(foreign):
        shutil.copy(path, db.parent)


def files_of(db: Path) -> list[Path]:
    """The file of a store, its log, and what lies beside them, but for the lock."""
    found = (*db.parent.glob(f"{db.stem}.db*"), *db.parent.glob(f"{db.stem}.log*"))
    return [path for path in found if path.suffix != ".lock"]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a shard s1 of another cluster, which owns all keys there."""
    with running(write_config(tmp_path_factory.mktemp("foreign"), shards=1)) as cluster:
        put(cluster, "from-elsewhere", b"1")
    return cluster.data_dir / "shard-s1.db"


@contextmanager
def exchanged_file(cluster: Cluster, exchange: Callable[[Path, Path], None], foreign: Path) -> Iterator[None]:
    """Shard s1 finds another file at its next start; at the end its own one is there again."""
    db, kept = cluster.data_dir / "shard-s1.db", cluster.data_dir / "kept"
    kept.mkdir()
    with down(cluster, "shard-s1"):
        with closing(sqlite3.connect(db)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for path in files_of(db):
            shutil.copy(path, kept)
        exchange(db, foreign)
    try:
        yield
    finally:
        with down(cluster, "shard-s1"):
            emptied(db, foreign)
            for path in kept.iterdir():
                shutil.copy(path, cluster.data_dir)
        shutil.rmtree(kept)


@pytest.mark.parametrize(
    ("exchange", "message"),
    [
        (other_format, "has format 99; this program reads formats 1 to 4"),
        (emptied, "shard s1 has an empty or foreign file"),
        (of_another_cluster, "belongs to cluster"),
    ],
)
def test_a_shard_with_wrong_data_is_refused_and_its_keys_are_unavailable_not_lost(
    pair: Cluster, foreign: Path, exchange: Callable[[Path, Path], None], message: str
) -> None:
    key, other = keys_of(pair, "s1", 1, "wrong-")[0], keys_of(pair, "s2", 1, "wrong-")[0]
    put(pair, key, b"1")
    log_before = len(pair.log)
    with exchanged_file(pair, exchange, foreign):

        def refused() -> bool:
            assert_unavailable(get(pair, key))  # never 404: the key is not lost
            assert_unavailable(put(pair, key, b"lost, if it were taken"))
            return message in pair.log[log_before:]

        wait_until(refused, "it was refused")
        assert put(pair, other, b"2").status in (201, 204)
        wait_until(lambda: "kill -HUP" in pair.log[log_before:], "it is not tried for ever")
        assert "Traceback" not in pair.log[log_before:]
    pair.up.send_signal(signal.SIGHUP)
    wait_until(lambda: answers(pair, key), "the shard has its own file again")
    assert get(pair, key).body == b"1"


def test_a_foreign_file_is_not_served_either_while_the_controller_cannot_refuse_it(
    pair: Cluster, foreign: Path
) -> None:
    key = keys_of(pair, "s1", 1, "wrong-")[0]
    put(pair, key, b"1")
    wait_running(pair, "controller-0")
    with stopped(pair.pid("controller-0")):
        with exchanged_file(pair, of_another_cluster, foreign):
            wait_running(pair, "shard-s1")
            shard_url = facts(pair)["shards"][0]["url"]

            def listens() -> bool:
                try:
                    return ask(shard_url, "GET", "/healthz").status == 200
                except OSError:
                    return False

            wait_until(listens, "the shard with the foreign file is up")
            until = time.monotonic() + 2.5  # longer than the router takes to connect again
            while time.monotonic() < until:
                assert_unavailable(get(pair, key))
        wait_until(lambda: answers(pair, key), "the shard has its own file again")
        assert get(pair, key).body == b"1"


# --- disks -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_refuses_puts_with_507_lets_deletes_through_and_recovers_by_itself(tmp_path: Path) -> None:
    limits = {"disk_reserve_bytes": 8 * MIB, "wal_bytes_max": MIB, "batch_bytes_max": MIB}
    limits |= {"log_segment_bytes": 4 * MIB, "body_bytes_max": 2 * MIB}
    value = os.urandom(200_000)
    with small_disk(tmp_path / "data", mib=64) as disk:
        config = write_config(tmp_path, shards=2, limits=limits)
        with running(config) as cluster:
            acknowledged = fill(cluster, disk, value)
            assert len(acknowledged) > 60
            shards = pids(cluster)

            # Deletes go on, and the room that they make is used again by itself.
            for key in sorted(acknowledged)[: len(acknowledged) // 2]:
                assert delete(cluster, key).status == 204
                acknowledged.discard(key)
            wait_until(lambda: put(cluster, "after-deletes", value).status == 201, "there is room again")
            acknowledged.add("after-deletes")

            # Another client takes all that is left, to the last byte.
            take_all_room(disk / "hog")
            for number in range(8):
                assert put(cluster, f"refused-{number}", value).status == 507
            for key in acknowledged:
                assert get(cluster, key).body == value
            (disk / "hog").unlink()
            wait_until(lambda: put(cluster, "at-last", value).status in (201, 204), "there is room again")
            acknowledged.add("at-last")

            assert pids(cluster) == shards  # no process had to die for it
            keys = ask(cluster.url, "GET", "/v1/kv?limit=10000").json["items"]
            assert {item["key"] for item in keys} == acknowledged
            for key in acknowledged:
                assert get(cluster, key).body == value


def fill(cluster: Cluster, disk: Path, value: bytes) -> set[str]:
    """Put until both shards have refused; the keys that were acknowledged."""
    acknowledged: set[str] = set()
    refused: set[str] = set()

    def one(number: int) -> None:
        key = f"fill-{number:04d}"
        reply = put(cluster, key, value)
        if reply.status == 507:
            assert reply.json["code"] == "disk-full"
            refused.add(ask(cluster.url, "GET", f"/v1/explain/{key}").json["owner"])
            assert get(cluster, key).status == 404
        else:
            assert reply.status == 201, reply
            acknowledged.add(key)

    with ThreadPoolExecutor(8) as threads:
        for first in range(0, 2000, 16):
            list(threads.map(one, range(first, first + 16)))
            if refused == {"s1", "s2"}:
                return acknowledged
    raise AssertionError(f"no 507 from both shards: {len(acknowledged)} puts, {shutil.disk_usage(disk)}")


def test_the_write_ahead_log_stays_bounded_under_a_load_that_never_pauses(tmp_path: Path) -> None:
    wal_bytes_max, batch_bytes_max, unapplied_bytes_max = MIB, MIB // 2, MIB
    limits = {"wal_bytes_max": wal_bytes_max, "batch_bytes_max": batch_bytes_max, "cache_bytes_max": MIB}
    limits["unapplied_bytes_max"] = unapplied_bytes_max
    with running(write_config(tmp_path, shards=1, limits=limits)) as cluster:
        largest, writers_left = 0, 8
        written = 0

        def write(worker: int) -> None:
            nonlocal writers_left, written
            try:
                with closing(http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=WAIT_S)) as connection:
                    for number in range(60):
                        body = b"%d-%d" % (worker, number) + b"." * (40_000 if number % 2 else 100)
                        connection.request("PUT", f"/v1/kv/{worker}-{number % 40}", body)
                        response = connection.getresponse()
                        response.read()
                        assert response.status in (201, 204)
                        written += len(body)
            finally:
                writers_left -= 1

        def list_all() -> None:
            while writers_left:
                assert ask(cluster.url, "GET", "/v1/kv?limit=1000&values=true").status == 200

        with ThreadPoolExecutor() as threads:
            tasks = [threads.submit(write, worker) for worker in range(8)]
            tasks += [threads.submit(list_all) for _ in range(2)]
            wal = cluster.data_dir / "shard-s1.db-wal"
            while writers_left:
                largest = max(largest, wal.stat().st_size)
                time.sleep(0.005)  # a measurement, not a wait
            for task in tasks:
                task.result()
        assert written > 8 * wal_bytes_max
        assert 0 < largest <= 2 * wal_bytes_max + batch_bytes_max + unapplied_bytes_max, f"{largest:,} bytes"
