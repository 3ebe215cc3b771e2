"""Which shards run on a host, and what becomes of their files: the rules by themselves, the files in a folder."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path

import msgspec
import pytest

from kvstore.config import ClusterConfig, ControllerConfig, RouterConfig, ShardConfig
from kvstore.roster import (
    DesiredShards,
    Files,
    Placed,
    Steps,
    Wanted,
    begin_removal,
    decide,
    finish_removal,
    first_shards,
    free_listens,
    is_out_of_date,
    look,
)

CONFIG = ClusterConfig(
    routers=[RouterConfig("0", "127.0.0.1:8080")],
    controllers=[ControllerConfig("0", "127.0.0.1:8090")],
    shards=[ShardConfig(f"s{n}", f"127.0.0.1:{9100 + n}") for n in (1, 2, 3)],
)
FIRST = ["s1", "s2", "s3"]


def launch(members: str, wanted: str = "", *, formed: bool = True, **urls: str) -> DesiredShards:
    """Members and wanted shards by their ids; a member is at port 9100 + its number unless `urls` says otherwise."""
    placed = [Placed(each, urls.get(each, f"http://127.0.0.1:{9100 + int(each[1:])}")) for each in members.split()]
    return DesiredShards(7, formed, [Wanted(each) for each in wanted.split()], placed)


def files(data: str = "", removed: str = "", leaving: str = "", held: str = "") -> Files:
    return Files(*(frozenset(ids.split()) for ids in (data, removed, leaving, held)))


def steps(
    told: DesiredShards, lie: Files, running: list[str] = FIRST, known: str = "", config: ClusterConfig = CONFIG
) -> Steps:
    return decide(told, config, lie, running, known.split())


def start(**listens: str | None) -> Steps:
    return Steps(listens, [], [], [])


NOTHING = start()


# --- the start of `up` ------------------------------------------------------------------------------------------------


def test_at_the_start_the_shards_of_the_file_run_but_those_that_were_removed() -> None:
    assert first_shards(CONFIG, files()) == FIRST
    assert first_shards(CONFIG, files(data="s1 s3", removed="s2")) == ["s1", "s3"]
    assert first_shards(CONFIG, files(data="s1 s2", removed="s2")) == FIRST  # it was added again since
    assert first_shards(CONFIG, files(removed="s1 s2 s3", leaving="s2")) == []


def test_what_was_removed_from_an_earlier_cluster_is_a_first_member_of_the_next_one() -> None:
    assert steps(launch("", formed=False), files(removed="s2"), ["s1", "s3"]) == start(s2="127.0.0.1:9102")


def test_shards_that_a_lost_map_names_are_started_where_their_files_lie() -> None:
    lost = launch("s1 s7 s8", formed=False)
    here_too = steps(lost, files(data="s1 s2 s3 s7"), ["s1", "s2", "s3"])
    assert here_too == steps(launch("s1 s2 s3 s7"), files(data="s1 s2 s3 s7"), ["s1", "s2", "s3"])
    assert list(here_too.start) == ["s7"]


def test_before_the_cluster_is_formed_no_shard_is_stopped() -> None:
    assert steps(launch("", formed=False), files(), [*FIRST, "s9"], "s9") == NOTHING


def test_a_member_that_is_not_in_the_file_runs_where_its_data_lie_at_the_port_it_had() -> None:
    told = launch("s1 s2 s3 s5 s6 s7", s6="http://192.0.2.1:9106", s7="http://127.0.0.1:9300")
    assert steps(told, files(data="s5 s7")) == start(s5="127.0.0.1:9105", s7="127.0.0.1:9300")
    assert steps(told, files()) == NOTHING  # it runs somewhere else


def test_a_member_whose_data_were_brought_here_from_another_host_gets_a_port_of_this_one() -> None:
    assert steps(launch("s1 s2 s3 s6", s6="http://192.0.2.1:9106"), files(data="s6")) == start(s6=None)
    assert steps(launch("s1 s2 s3 s6", s6="http://127.0.0.1:port"), files(data="s6")) == start(s6=None)


def test_a_member_of_the_file_runs_where_the_file_says() -> None:
    told = launch("s1 s2 s3", s2="http://127.0.0.1:9999")
    assert steps(told, files(data="s2"), ["s1", "s3"]) == start(s2="127.0.0.1:9102")


def test_whatever_another_process_has_open_is_started_later() -> None:
    assert steps(launch("s1 s2 s3 s5"), files(data="s5", held="s5")) == Steps({}, [], [], ["s5"])


# --- while it runs ----------------------------------------------------------------------------------------------------


def test_a_shard_that_is_wanted_is_started_once() -> None:
    assert steps(launch("s1 s2 s3", "s5"), files()) == start(s5=None)
    assert steps(launch("s1 s2 s3", "s5"), files(), [*FIRST, "s5"], "s5") == NOTHING
    assert steps(launch("s1 s2 s3 s5"), files(data="s5"), [*FIRST, "s5"], "s5") == NOTHING


def test_a_shard_of_the_file_that_is_wanted_again_runs_where_the_file_says() -> None:
    assert steps(launch("s1 s3", "s2"), files(removed="s2"), ["s1", "s3"]) == start(s2="127.0.0.1:9102")


def test_a_shard_that_was_a_member_or_wanted_and_is_neither_any_more_is_removed() -> None:
    gone = Steps({}, [], ["s2"], [])
    assert steps(launch("s1 s3"), files(data="s1 s2 s3"), FIRST, "s1 s2 s3") == gone
    assert steps(launch("s1 s2 s3"), files(data="s5"), [*FIRST, "s5"], "s5") == Steps({}, [], ["s5"], [])


def test_a_shard_that_never_was_a_member_while_we_looked_on_is_stopped_and_keeps_its_file() -> None:
    assert steps(launch("s1 s3"), files(data="s1 s2 s3")) == Steps({}, ["s2"], [], [])


def test_data_of_no_member_are_left_alone() -> None:
    assert steps(launch("s1 s2 s3"), files(data="s1 s2 s3 s8", removed="s9", leaving="s9")) == NOTHING


def test_new_shards_listen_above_all_others_on_the_same_host() -> None:
    told = launch("s1 s2 s3 s5 s6", s6="http://192.0.2.1:60000")
    assert list(islice(free_listens(CONFIG, told, [9107]), 2)) == ["127.0.0.1:9106", "127.0.0.1:9108"]


def test_at_the_upper_end_of_all_ports_the_lower_ones_are_taken() -> None:
    told = launch("s1 s2 s3 s5", s5="http://127.0.0.1:65535")
    assert next(free_listens(CONFIG, told, [])) == "127.0.0.1:1024"


def test_an_ipv6_address_keeps_its_brackets() -> None:
    config = msgspec.structs.replace(CONFIG, shards=[ShardConfig("s1", "[::1]:9101")])
    told = launch("s1 s5", s1="http://[::1]:9101", s5="http://[::1]:9105")
    assert next(free_listens(config, told, [])) == "[::1]:9106"
    assert steps(told, files(data="s5"), ["s1"], config=config) == start(s5="[::1]:9105")


def test_shards_on_all_addresses_are_known_by_the_one_that_was_announced_and_by_that_of_earlier_versions() -> None:
    config = msgspec.structs.replace(CONFIG, shards=[ShardConfig("s1", "0.0.0.0:9101")])
    told = launch("s1 s5 s6", s1="http://127.0.0.1:9101", s5="http://127.0.0.1:9105", s6="http://0.0.0.0:9106")
    assert steps(told, files(data="s5 s6"), ["s1"], config=config) == start(s5="0.0.0.0:9105", s6="0.0.0.0:9106")
    assert next(free_listens(config, told, [])) == "0.0.0.0:9107"


# --- the files --------------------------------------------------------------------------------------------------------


def names(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


@contextmanager
def held(folder: Path, shard_id: str) -> Iterator[None]:
    (folder / "run").mkdir(exist_ok=True)
    descriptor = os.open(folder / "run" / f"shard-{shard_id}.pid", os.O_CREAT | os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)


def test_a_look_at_the_folder_tells_data_from_what_was_set_aside_and_who_has_it_open(tmp_path: Path) -> None:
    assert look(tmp_path / "none") == files()
    others = ("controller-0.db", "shard-S1.db", "shard-s5.db-wal", "shard-s4.db.removed.1")
    for name in ("shard-s1.db", "shard-s2.db.removed", "shard-s3.db", *others):
        (tmp_path / name).touch()
    begin_removal(tmp_path, "s3")
    with held(tmp_path, "s1"):
        (tmp_path / "run" / "shard-s2.pid").touch()  # left behind by one that was killed
        assert look(tmp_path) == files("s1", "s2 s3", "s3", "s1")
    assert look(tmp_path).held == set()


def cluster_file(folder: Path, shard_id: str, cluster_id: str | None) -> None:
    with closing(sqlite3.connect(folder / f"shard-{shard_id}.db")) as connection, connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT)")
        if cluster_id is not None:
            connection.execute("INSERT INTO meta VALUES ('cluster_id', ?)", [cluster_id])


def test_a_file_of_a_former_member_of_this_very_cluster_is_out_of_date(tmp_path: Path) -> None:
    for shard_id, cluster_id in (("s1", "ours"), ("s2", "ours"), ("s5", "theirs"), ("s6", None)):
        cluster_file(tmp_path, shard_id, cluster_id)
    (tmp_path / "shard-s7.db").write_text("this is no database, but long enough to look like one")
    told = launch("s1 s3", "s2 s5 s6 s7 s8")
    ids = [f"s{n}" for n in range(1, 9)]
    assert [shard_id for shard_id in ids if is_out_of_date(tmp_path, shard_id, told)] == ["s2"]
    assert not is_out_of_date(tmp_path, "s2", launch("s3", "s2"))  # no member's file is here to compare it with
    assert not is_out_of_date(tmp_path, "s2", msgspec.structs.replace(told, keeps=True)), "it may be a member by now"
    assert {path.name for path in tmp_path.iterdir()} >= {"shard-s2.db", "shard-s7.db"}
    assert not (tmp_path / "shard-s8.db").exists()


def test_a_file_is_set_aside_with_what_belongs_to_it(tmp_path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / f"shard-s2.db{suffix}").write_text(f"of s2{suffix}")
    begin_removal(tmp_path, "s2")
    assert finish_removal(tmp_path, "s2") == tmp_path / "shard-s2.db.removed"
    assert names(tmp_path) == {f"shard-s2.db.removed{suffix}": f"of s2{suffix}" for suffix in ("", "-wal", "-shm")}
    assert finish_removal(tmp_path, "s2") is None


def test_the_log_of_a_removed_shard_keeps_its_records_and_not_the_room_for_more(tmp_path: Path) -> None:
    segment = b"records" + bytes(1 << 20)
    (tmp_path / "shard-s2.db").write_bytes(b"rows")
    (tmp_path / "shard-s2.log.000001").write_bytes(segment)
    finish_removal(tmp_path, "s2")
    kept = tmp_path / "shard-s2.db.removed.log.000001"
    assert kept.read_bytes() == segment
    assert kept.stat().st_blocks * 512 <= 64 * 1024


def test_nothing_that_was_set_aside_before_is_lost(tmp_path: Path) -> None:
    for content in ("first", "second", "third"):
        (tmp_path / "shard-s2.db").write_text(content)
        (tmp_path / "shard-s2.db-wal").write_text(f"{content} wal")
        begin_removal(tmp_path, "s2")
        begin_removal(tmp_path, "s2")
        finish_removal(tmp_path, "s2")
    kept = {"": "third", ".1": "first", ".2": "second"}
    assert names(tmp_path) == {
        f"shard-s2.db.removed{number}{suffix}": content + suffix.replace("-", " ")
        for number, content in kept.items()
        for suffix in ("", "-wal")
    }


class Crash(Exception):
    pass


@pytest.mark.parametrize("crash_at", range(8))
def test_a_crash_at_any_rename_is_finished_by_the_next_start(
    tmp_path: Path, crash_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shard-s2.db.removed").write_text("older")
    for suffix in ("", "-wal"):
        (tmp_path / f"shard-s2.db{suffix}").write_text(f"newer{suffix}")
    left = crash_at

    def crashing(patching: pytest.MonkeyPatch, name: str) -> None:
        real = getattr(Path, name)

        def call(self: Path, *arguments: Path) -> object:
            nonlocal left
            if left == 0:
                raise Crash
            left -= 1
            return real(self, *arguments)

        patching.setattr(Path, name, call)

    with monkeypatch.context() as patching:
        for name in ("rename", "hardlink_to", "unlink"):
            crashing(patching, name)
        try:
            begin_removal(tmp_path, "s2")
            finish_removal(tmp_path, "s2")
        except Crash:
            pass
    begun = look(tmp_path).leaving
    if begun or not (tmp_path / "shard-s2.db").exists():
        finish_removal(tmp_path, "s2")
        assert names(tmp_path) == {
            "shard-s2.db.removed.1": "older", "shard-s2.db.removed": "newer", "shard-s2.db.removed-wal": "newer-wal"
        }  # fmt: skip
    else:  # it had not begun: all is there as before
        assert {"older", "newer", "newer-wal"} == set(names(tmp_path).values())
        assert "shard-s2.db-wal" in names(tmp_path)


def test_without_links_a_file_is_set_aside_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, target: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    (tmp_path / "shard-s2.db").write_text("s2")
    begin_removal(tmp_path, "s2")
    assert names(tmp_path) == {"shard-s2.db": "s2"}
    finish_removal(tmp_path, "s2")
    assert names(tmp_path) == {"shard-s2.db.removed": "s2"}
