"""shard accept-old: let a shard start with an older copy of its file than it has told of.

Owns: the question before it, what is lost, in words.
Promises: nothing is done without the shard's id as confirmation.
Leaves to others: what was told (the controller), refusing the copy (the shard).
"""

from __future__ import annotations

import sys

import click

from kvstore.cli.asking import call, talks_to_cluster
from kvstore.cli.frame import EXIT_STORE_SAID_NO, complain, emit, printable
from kvstore.client import Client


@click.command("accept-old")
@click.argument("shard_id", metavar="ID")
@click.option("--confirm", metavar="ID", help="The shard's id, instead of being asked for it.")
@talks_to_cluster
def accept_old(shard_id: str, confirm: str | None, url: str, as_json: bool) -> None:
    """Let shard ID start with an older copy of its file than it has told of.

    A shard that opens with less than it had is refused: a backup was put back,
    or its log was lost. What the copy lacks was acknowledged, and is lost with
    this; transactions that it took part in may stay done in part. Versions and
    fencing tokens go on above all that it told of. Partitions that moved to it
    after the copy was made open empty, or with a part of their keys: its log
    names them when it starts. Without a terminal --confirm ID is needed. Start
    the shard after it.

    \b
    Exit codes: 0 it may start; 1 not confirmed, or there is no such shard.
    With --json: {"id","told","version"}, what it had told before.

    \b
    Example:
      kvstore shard accept-old s1
      kvstore shard accept-old s1 --confirm s1
    """
    complain(
        f"kvstore: all that the copy of shard {printable(shard_id)} lacks will be lost, though it was acknowledged, "
        "and with it what moved to the shard since: its log names those partitions when it starts."
    )
    if confirm is None and sys.stdin.isatty():
        confirm = click.prompt("Type the id of the shard to go on", err=True)
    if confirm != shard_id:
        complain(f"kvstore: nothing was done. --confirm {printable(shard_id)} confirms it.")
        raise click.exceptions.Exit(EXIT_STORE_SAID_NO)

    async def work(kv: Client) -> None:
        answer = await kv.accept_old(shard_id, shard_id)
        line = f"{shard_id} may start; it had told of record {answer['told']} and version {answer['version']}, "
        line += "above which it goes on"
        emit(as_json, answer, line)

    call(url, as_json, work)
