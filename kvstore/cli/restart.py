"""shard restart: nodes that `kvstore up` runs on this host, one after the other.

Owns: the order, and what is waited for between two of them; which process is whose, by its pid file.
Promises: a node is told to stop only while every shard answers and has all its copies in sync, so that others can take
over; what does not come about ends the command, and no further node is touched.
Leaves to others: handing on (the nodes, the controller), starting again (`kvstore up`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from kvstore.cli.asking import call, talks_to_cluster
from kvstore.cli.frame import emit, printable, takes_config
from kvstore.client import Client
from kvstore.config import load_config
from kvstore.errors import ChangeRefused, KvError, NotFound
from kvstore.process import pid_file_holder

_WAIT_S_MAX = 120.0
_LOOK_S = 0.05


@click.command()
@click.argument("shard_ids", metavar="[ID]...", nargs=-1)
@click.option("--all", "all_of_them", is_flag=True, help="All shards of the cluster that run on this host.")
@takes_config("The cluster.yaml of the `kvstore up` that runs here.")
@talks_to_cluster
def restart(shard_ids: Sequence[str], all_of_them: bool, config: Path, url: str, as_json: bool) -> None:
    """Restart the processes of these shards, which `kvstore up` runs on this host, one after the other.

    Each hands its shards on to copies in sync first, and the next one waits
    until all copies are in sync again: no call of any client fails. With one
    copy of every key, or none in sync, calls for a shard's keys may fail until
    it is back. Ten seconds after its restart a shard goes home by itself. A
    process that `kvstore up` did not start is restarted where it was started.

    \b
    Exit codes: 0 all are back; 1 one is not, or there is none of that name;
    130 interrupted. With --json a line each: {"id","pid","seconds"}.

    \b
    Example:
      kvstore shard restart s1
      kvstore shard restart --all
    """
    if bool(shard_ids) == all_of_them:
        raise click.UsageError("name shards, or say --all")

    async def work(kv: Client) -> None:
        run = Path(load_config(config).data_dir) / "run"
        names = shard_ids or [name for shard in (await kv.cluster())["shards"] if _pid(run, name := shard["id"])]
        for shard_id in names:
            _checked_pid(run, shard_id)  # of all, before the first one is touched
        for shard_id in names:
            await _until(kv, shard_id, is_settled, "not all shards have their copies in sync")
            began_s = time.monotonic()
            pid = await _restarted(run, shard_id)
            await _until(kv, shard_id, is_settled, f"shard {shard_id} is started again, and not all is in sync yet")
            seconds = time.monotonic() - began_s
            told = {"id": shard_id, "pid": pid, "seconds": round(seconds, 3)}
            emit(as_json, told, f"{printable(shard_id)} is back, in sync after {seconds:.1f} s")

    call(url, as_json, work)


def is_settled(document: Mapping[str, Any]) -> bool:
    """Whether every shard answers, and has as many copies in sync as are asked for, or as there are nodes."""
    copies = min(document["replicas"], len(document["nodes"])) - 1
    return all(
        shard["state"] != "down" and sum(copy["state"] == "in-sync" for copy in shard["copies"]) >= copies
        for shard in document["shards"]
    )


async def _until(kv: Client, shard_id: str, condition: Callable[[Mapping[str, Any]], bool], complaint: str) -> None:
    """Raises ChangeRefused with that complaint if it does not come about."""
    ends_s = time.monotonic() + _WAIT_S_MAX
    while True:
        with suppress(KvError):  # it may be the answer of a router whose shard has just gone
            if condition(await kv.cluster()):
                return
        if time.monotonic() > ends_s:
            raise ChangeRefused(f"{complaint}: no further process is restarted.", next_step="See `kvstore status`.")
        await asyncio.sleep(_LOOK_S)


async def _restarted(run: Path, shard_id: str) -> int:
    """Tell the process to stop, and wait for the next one; its pid. Raises ChangeRefused if none comes."""
    before = _checked_pid(run, shard_id)
    os.kill(before, signal.SIGTERM)
    ends_s = time.monotonic() + _WAIT_S_MAX
    while (pid := _pid(run, shard_id)) in (None, before):
        if time.monotonic() > ends_s:
            raise ChangeRefused(f"shard {shard_id} has not been started again.", next_step="See the log of `up`.")
        await asyncio.sleep(_LOOK_S)
    assert pid is not None
    return pid


def _pid(run: Path, shard_id: str) -> int | None:
    """Of the shard's process on this host; None if none runs on that data_dir."""
    held = pid_file_holder(run / f"shard-{shard_id}.pid")
    return int(held) if held else None


def _checked_pid(run: Path, shard_id: str) -> int:
    """As `_pid`, of a process that is started again. Raises NotFound, ChangeRefused."""
    pid = _pid(run, shard_id)
    if pid is None:
        raise NotFound(
            f"no process of shard {shard_id} runs here on {run.parent}.",
            next_step="Run this where `kvstore up` runs, with its --config.",
        )
    if b"--supervised" not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
        raise ChangeRefused(
            f"shard {shard_id} (pid {pid}) was not started by `kvstore up`, and would not come back.",
            next_step="Restart it as it was started; at SIGTERM it hands on first what it serves.",
        )
    return pid
