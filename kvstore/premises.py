"""Whether a cluster may run here: its ports are free, and no other `kvstore up` has its data folder.

Owns: the look at the ports, with a person's words for who has them; `up.lock` in the data folder, which is locked by
the `kvstore up` that runs there, has its pid in it, and is never renamed or deleted.
Promises: of any number that start at the very same time on one data folder, one goes on.
Leaves to others: the files of each process, which have locks of their own (`process`, `store.opening`).
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from pathlib import Path

from kvstore.addresses import listen_address
from kvstore.config import ClusterConfig
from kvstore.errors import ConfigError, DataInUse
from kvstore.process import parent_of, port_holder, port_in_use

_LEFTOVER_WAIT_S = 3.0
_ENDING_S = 1.0
_RETRY_S = 0.05


def _runs_already(pid: str) -> str:
    return (
        f"this cluster runs already, started by pid {pid}: use it, or end that process (Ctrl-C) first. "
        "A second cluster needs a cluster.yaml with a data_dir and ports of its own."
    )


# --- the data folder --------------------------------------------------------------------------------------------------


async def claim(data_dir: Path) -> AbstractContextManager[object]:
    """The folder is this launcher's while that context lasts. Raises DataInUse, if another one has it and stays.

    A folder in which nothing can be written is left to the children: they say what is wrong with it.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        file = (data_dir / "up.lock").open("a+b", buffering=0)
    except OSError:
        return nullcontext()
    clock = asyncio.get_running_loop()
    ends_at = clock.time() + _ENDING_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if clock.time() < ends_at:
                await asyncio.sleep(_RETRY_S)
                continue
            file.seek(0)
            holder = file.read(32).decode("ascii", "replace").strip()
            file.close()
            raise DataInUse(_runs_already(holder or "unknown")) from None
        with suppress(OSError):  # the disk is full: its pid is a courtesy
            file.truncate(0)
            file.write(f"{os.getpid()}\n".encode())
        return closing(file)


# --- ports ------------------------------------------------------------------------------------------------------------


async def ports_in_use(config: ClusterConfig) -> list[str]:
    """A line for each port of the cluster that is taken.

    Children of an earlier launcher that was killed are just ending: they are waited for a little. So is a holder
    that cannot be told: it may have ended since the look at its port.
    """
    listens = [router.listen for router in config.routers]
    listens += [controller.listen for controller in config.controllers]
    listens += [shard.listen for shard in config.shards]
    clock = asyncio.get_running_loop()
    deadline = clock.time() + _LEFTOVER_WAIT_S
    while True:
        taken = [port for host, port in map(listen_address, listens) if is_taken(host, port)]
        leftovers = _known_pids(Path(config.data_dir) / "run")
        holders = [port_holder(port) for port in taken]
        ending = all(holder is None or holder.pid in leftovers for holder in holders)
        if not taken or not ending or clock.time() > deadline:
            return _refusals(taken, {holder.pid for holder in holders if holder is not None} & leftovers)
        await asyncio.sleep(0.1)


def _refusals(taken: Sequence[int], our_children: set[int]) -> list[str]:
    launchers = {parent_of(pid) for pid in our_children} - {None, 1}
    if len(launchers) == 1:
        return [_runs_already(str(launchers.pop()))]
    return [port_in_use(port) for port in taken]


def is_taken(host: str, port: int) -> bool:
    """Whether a process listens at that address.

    Raises ConfigError for one that cannot be listened on for another reason.
    """
    try:
        # Same options as the loops set when they listen: what succeeds here succeeds there.
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return True
        raise ConfigError(f"{host}:{port} cannot be listened on: {error}; change it in cluster.yaml.") from None
    return False


def _known_pids(run_dir: Path) -> set[int]:
    pids = set()
    for path in run_dir.glob("*.pid"):
        with suppress(OSError, ValueError):
            pids.add(int(path.read_text()))
    return pids
