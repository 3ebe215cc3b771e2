"""Which shards `kvstore up` runs on this host.
What to start, to stop and to set aside as the cluster changes.

Owns: what the controller tells a launcher, the rules, the names of a shard's files.
Promises: a member is never stopped. A file is set aside only when its shard left the cluster while this launcher
looked on, or its setting aside had begun; never while a process has it open; never over another file.
Leaves to others: asking the controller, starting and stopping (`launcher`), how a file is set aside (`set_aside`).

A shard that has left the cluster ends, and `shard-ID.db` becomes `shard-ID.db.removed`, so that the next start does not
begin it again and its id is free. That takes a moment in which this host may die. So the file has both names while it
is on its way (`set_aside`), and the next start finishes it. A file that is of no member and has one name only (copied
here, or of a shard that left while this launcher did not run) is left as it is. If a shard of its id is to be added, it
is set aside if it says that it belongs to this very cluster, which has taken from it all that it had. Else the shard is
started with it, and says for itself what is wrong.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

from kvstore import set_aside
from kvstore.addresses import address_text, listen_address, on_this_host
from kvstore.config import ID_PATTERN, ClusterConfig
from kvstore.process import pid_file_holder

PORT_MAX = 65_535

_PREFIX, _DATA, _REMOVED, _PID = "shard-", ".db", f".db{set_aside.REMOVED}", ".pid"


class Wanted(msgspec.Struct, frozen=True):
    """A shard that is to be started here; it joins when it announces itself."""

    id: str


class Placed(msgspec.Struct, frozen=True):
    """A node of the cluster and where it was last reached."""

    id: str
    url: str


class DesiredShards(msgspec.Struct, frozen=True):
    """What the controller answers to GET /v1/launch.

    `keeps`: its record is lost or an old copy, so it does not know all members: none is to end, and no file goes.
    """

    revision: int
    formed: bool
    wanted: list[Wanted]
    nodes: list[Placed]
    keeps: bool = False

    @property
    def ids(self) -> set[str]:
        """The shards that are to run, here or elsewhere."""
        return {*(shard.id for shard in self.wanted), *(node.id for node in self.nodes)}


class Files(NamedTuple):
    """By id: whose data lie here, whose were set aside, whose setting aside has begun, and whose a process holds."""

    data: frozenset[str] = frozenset()
    removed: frozenset[str] = frozenset()
    leaving: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()


class Steps(NamedTuple):
    """What to do, by id. `start`: with HOST:PORT, or None for any free port.
    `remove`: stop, then set the file aside.

    `later`: what would have to start, but another process has its file open.
    """

    start: dict[str, str | None]
    stop: list[str]
    remove: list[str]
    later: list[str]


# --- the rules: pure --------------------------------------------------------------------------------------------------


def first_shards(config: ClusterConfig, files: Files) -> list[str]:
    """The shards of cluster.yaml to start at once: without those that were removed from the cluster."""
    return [shard.id for shard in config.shards if shard.id in files.data or shard.id not in files.removed]


def decide(
    launch: DesiredShards, config: ClusterConfig, files: Files, running: Collection[str], known: Collection[str]
) -> Steps:
    """What brings the shards that are `running` here to what the controller wants.

    `known`: those that were wanted or members before, as far as this launcher was told.
    """
    listens = {shard.id: shard.listen for shard in config.shards}
    if not launch.formed:
        # No shard was removed from a cluster that does not exist: whatever was set aside is of an earlier one.
        first = {shard_id: listens[shard_id] for shard_id in listens if shard_id not in running}
        # Of a cluster whose controller has lost its file: all of its shards must come, for it to be known again.
        others = {n.id: here(n.url, config) for n in launch.nodes if n.id in files.data and n.id not in running}
        return _steps({**others, **first}, files)
    start: dict[str, str | None] = {}
    for node in launch.nodes:
        if node.id in files.data and node.id not in running:
            start[node.id] = listens.get(node.id) or here(node.url, config)
    for shard in launch.wanted:
        if shard.id not in running:
            start[shard.id] = listens.get(shard.id)
    steps = _steps(start, files)
    for shard_id in running if not launch.keeps else ():
        if shard_id not in launch.ids:
            (steps.remove if shard_id in known else steps.stop).append(shard_id)
    return steps


def _steps(start: Mapping[str, str | None], files: Files) -> Steps:
    free = {shard_id: listen for shard_id, listen in start.items() if shard_id not in files.held}
    return Steps(free, [], [], [shard_id for shard_id in start if shard_id in files.held])


def here(url: str, config: ClusterConfig) -> str | None:
    """HOST:PORT of the url if it is on the host on which shards listen here, else None."""
    host, port = _host_of(config), _port(url)
    told = {host, on_this_host(config.shards[0].listen)[0]}
    return address_text(host, port) if port is not None and urlsplit(url).hostname in told else None


def free_listens(config: ClusterConfig, launch: DesiredShards, taken: Collection[int]) -> Iterator[str]:
    """Addresses for one more shard: on the first shard's host, above the ports of all others, without those `taken`."""
    own = [listen_address(shard.listen)[1] for shard in config.shards]
    others = [listen_address(router.listen)[1] for router in config.routers]
    others += [listen_address(controller.listen)[1] for controller in config.controllers]
    nodes = [port for node in launch.nodes if here(node.url, config) and (port := _port(node.url))]
    lowest = max([*own, *nodes]) + 1
    used = {*own, *others, *nodes, *taken}
    # Up to the end, then, if there is nothing any more, from the end of those that need privileges.
    ports = itertools.chain(range(lowest, PORT_MAX + 1), range(1024, lowest))
    return (address_text(_host_of(config), port) for port in ports if port not in used)


def _host_of(config: ClusterConfig) -> str:
    return listen_address(config.shards[0].listen)[0].lower()


def _port(url: str) -> int | None:
    try:
        return urlsplit(url).port
    except ValueError:
        return None


# --- the files --------------------------------------------------------------------------------------------------------


def look(data_dir: Path) -> Files:
    """What lies in the folder now."""
    data, removed = _ids(data_dir, _DATA), _ids(data_dir, _REMOVED)
    leaving = {shard_id for shard_id in data & removed if set_aside.has_begun(_path(data_dir, shard_id))}
    held = {shard_id for shard_id in _ids(data_dir / "run", _PID) if _is_held(data_dir, shard_id)}
    return Files(frozenset(data - leaving), frozenset(removed), frozenset(leaving), frozenset(held))


def is_out_of_date(data_dir: Path, shard_id: str, launch: DesiredShards) -> bool:
    """Whether the file is of a former member of this cluster.
    Of the same one as a member's file beside it."""
    if launch.keeps or any(node.id == shard_id for node in launch.nodes):
        return False
    cluster_id = _cluster_of(data_dir, shard_id)
    return cluster_id is not None and cluster_id in (_cluster_of(data_dir, node.id) for node in launch.nodes)


def _cluster_of(data_dir: Path, shard_id: str) -> str | None:
    path = _path(data_dir, shard_id)
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            found = connection.execute("SELECT value FROM meta WHERE name = 'cluster_id'").fetchone()
    except sqlite3.Error:
        return None
    return None if found is None else str(found[0])


def begin_removal(data_dir: Path, shard_id: str) -> None:
    """Write down that the shard's file is to be set aside, while its process may still run. Raises OSError."""
    set_aside.begin(_path(data_dir, shard_id))


def finish_removal(data_dir: Path, shard_id: str) -> Path | None:
    """Set the file aside, now that its process has ended; what it is called then, None without a file.
    Raises OSError.

    May be repeated after a crash at any line.
    """
    return set_aside.finish(_path(data_dir, shard_id))


def _ids(folder: Path, suffix: str) -> set[str]:
    names = (path.name for path in folder.glob(f"{_PREFIX}*{suffix}"))
    return {name for each in names if ID_PATTERN.fullmatch(name := each.removeprefix(_PREFIX).removesuffix(suffix))}


def _path(folder: Path, shard_id: str, suffix: str = _DATA) -> Path:
    return folder / f"{_PREFIX}{shard_id}{suffix}"


def _is_held(data_dir: Path, shard_id: str) -> bool:
    return pid_file_holder(_path(data_dir / "run", shard_id, _PID)) is not None
