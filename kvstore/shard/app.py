"""The process of a node: its HTTP door for the routers' channels, from its start to its end.

Owns: which port a node listens on; how the process ends when a commit fails.
Promises: nothing listens before all of its stores are open.
Leaves to others: its calls (`routes`), the node itself (`node`), each of its stores (`hosted`), requests (`service`).
"""

from __future__ import annotations

import logging
import os
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import NoReturn

import aiohttp
import msgspec

from kvstore.addresses import address_text, advertised, advertised_host, listen_address
from kvstore.config import ClusterConfig, ShardConfig
from kvstore.environment import SYSTEM, StopAsked
from kvstore.shard import disk_watch
from kvstore.shard.copy_wires import connect
from kvstore.shard.disk_watch import DiskWatch
from kvstore.shard.folder import FileFolder
from kvstore.shard.hellos import SessionFile
from kvstore.shard.hosted import Surroundings
from kvstore.shard.node import Node, OtherPartitions
from kvstore.shard.routes import NodeRoutes, make_table
from kvstore.transport.http.requests import HostGuard
from kvstore.transport.http.routes import answer_call
from kvstore.transport.http.server import Server, start_server, stop_listening, warn_if_exposed
from kvstore.transport.sessions import ClusterSession
from kvstore.transport.versions import FIELDS

log = logging.getLogger(__name__)

_SHUTDOWN_TIMEOUT_S = 1.0
_EXIT_COMMIT_FAILED = 74  # EX_IOERR of sysexits.h


def _end_process(error: BaseException) -> NoReturn:
    """A commit failed: its outcome is unknown, so nothing may be answered any more. Restarting reads what is true."""
    log.critical("the store cannot go on: the process ends", exc_info=error)
    logging.shutdown()
    os._exit(_EXIT_COMMIT_FAILED)


async def serve(
    *,
    shard_id: str,
    listen: str,
    join: str,
    data_dir: Path,
    config: ClusterConfig,
    stop: StopAsked,
    may_join: bool = False,
    advertise: str | None = None,
) -> None:
    """Run the shard until `stop` is asked for, and others have taken over from it.

    Raises ForeignData, ConfigError, OSError (the port is taken).

    `advertise` (HOST:PORT): where routers and other shards reach it, if that is not `listen`. `may_join`: if it is no
    member, it asks to become one.
    """
    advertised_host(listen, advertise)  # before anything is opened
    for_good = listen, join, data_dir
    try:
        await _serve(shard_id, *for_good, config, stop, may_join, advertise)
    except OtherPartitions as theirs:
        partitions = theirs.partitions
        log.warning(
            "the cluster has %d partitions, cluster.yaml %d: the cluster's count", partitions, config.partitions
        )
        config = msgspec.structs.replace(config, partitions=partitions)
        await _serve(shard_id, *for_good, config, stop, may_join, advertise)


async def _serve(
    shard_id: str,
    listen: str,
    join: str,
    data_dir: Path,
    config: ClusterConfig,
    stop: StopAsked,
    may_join: bool,
    advertise: str | None,
) -> None:
    """Raises OtherPartitions, with their number, if that is what is wrong with a new file."""
    limits = config.limits
    home = next((shard for shard in config.shards if shard.id == shard_id), ShardConfig(shard_id, listen))
    async with AsyncExitStack() as at_the_end:
        session = await at_the_end.enter_async_context(aiohttp.ClientSession(headers=FIELDS))
        folder, cluster = FileFolder(data_dir, shard_id, limits), ClusterSession()
        dial = partial(connect, session, cluster)
        around = Surroundings(shard_id, folder, limits, session, cluster, join, _end_process, SYSTEM, dial)
        node = await Node.open(around, config.partitions, SessionFile(data_dir, shard_id), at_the_end)
        watch = DiskWatch(limits.disk_stall_s, node.stores.by_shard.logs_with_copies, disk_watch.end_process)
        watch.start()
        at_the_end.callback(watch.close)
        routes = NodeRoutes(node, limits)
        table = make_table(routes, shard_id, limits)
        own = [advertised_host(listen, advertise), listen_address(listen)[0]]
        guard = HostGuard([*own, *config.allowed_hosts], takes_pages=False)
        server = Server(partial(answer_call, table, guard), limits)
        runner = await start_server(server, *listen_address(listen), _SHUTDOWN_TIMEOUT_S)
        at_the_end.push_async_callback(runner.cleanup)
        at_the_end.push_async_callback(routes.close)
        at_the_end.push_async_callback(stop_listening, runner)  # first: routers come back at once
        url = f"http://{advertised(listen, advertise, runner.addresses[0][1])}"
        if url != f"http://{listen}":  # else its parent knows
            bound = address_text(*runner.addresses[0][:2])
            log.info("shard %s listens on %s and is reached at %s", shard_id, bound, url)
        warn_if_exposed(listen, "read and write its keys")
        await node.run(url, home.weight, may_join, stop, home.host, home.zone)
