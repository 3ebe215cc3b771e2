"""cluster adopt: make a copy of a data directory a cluster of its own, offline.

Owns: the command's arguments, the question before it.
Promises: nothing is changed before the copied cluster's id was typed, or given by --confirm.
Leaves to others: what is changed, and that nothing runs on it (`kvstore.controller.adoption`).
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import click

from kvstore.cli.frame import EXIT_NO_DECISION, EXIT_STORE_SAID_NO, complain, emit, report, reporting, takes_config
from kvstore.config import load_config
from kvstore.controller.adoption import Adoption, opened
from kvstore.errors import KvError

_ID_CHARS_MIN = 8


@click.command()
@takes_config("That of the copy: its data_dir is adopted.")
@click.option("--confirm", metavar="ID", help="The id of the copied cluster, instead of being asked for it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def adopt(config: Path, confirm: str | None, as_json: bool) -> None:
    """Make the data directory of FILE, a copy of another one, a cluster of its own.

    A copy has all the ids of its original. Its processes leave those of the
    original alone, and say so; but a client of both cannot tell them
    apart. This gives the copy a new cluster id and new store ids; keys,
    versions, locks and owners stay as they are. Run it on the copy, not on the
    original, while nothing runs on the copy. Interrupted, it goes on when it is
    called again.

    \b
    Exit codes: 0 adopted; 1 not confirmed; 2 it cannot be adopted: a process
    runs on it, a file is missing or damaged.
    With --json: {"cluster_id","copied_from","shards"}.

    \b
    Example:
      kvstore cluster adopt --config copy/cluster.yaml
      kvstore cluster adopt --config copy/cluster.yaml --confirm 0f5c7a1e
    """
    with reporting(as_json):
        try:
            done = asyncio.run(_adopt(config, confirm))
        except KvError as error:
            report(error, as_json)
            raise click.exceptions.Exit(EXIT_NO_DECISION) from None
        begun, shards = done.begun, [shard.id for shard in done.cluster_map.shards]
        document = {"cluster_id": begun.cluster_id, "copied_from": begun.copied_from, "shards": shards}
        emit(as_json, document, f"this is cluster {begun.cluster_id} now, with {len(shards)} shards")


async def _adopt(config_path: Path, confirm: str | None) -> Adoption:
    """Raises KvError, Exit (1) if it is not confirmed."""
    config = load_config(config_path)
    async with opened(Path(config.data_dir), config) as adoption:
        _ask(adoption, config.data_dir, confirm)
        await adoption.run()
        return adoption


def _ask(adoption: Adoption, data_dir: str, confirm: str | None) -> None:
    copied = adoption.begun.copied_from
    cluster_map = adoption.cluster_map
    complain(
        f"kvstore: {data_dir} has cluster {copied}, epoch {cluster_map.epoch}, with {len(cluster_map.shards)} shards. "
        "It becomes a cluster of its own, which cannot be undone. Do this to the copy, not to the original."
    )
    if confirm is None and sys.stdin.isatty():
        confirm = click.prompt(f"Type the id, or its first {_ID_CHARS_MIN} characters, to go on", err=True)
    if confirm is None or len(confirm) < _ID_CHARS_MIN or not copied.startswith(confirm):
        complain(f"kvstore: nothing was done. --confirm {copied[:_ID_CHARS_MIN]} confirms it.")
        raise click.exceptions.Exit(EXIT_STORE_SAID_NO)
