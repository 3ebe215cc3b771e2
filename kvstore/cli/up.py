"""up: the whole cluster on this machine, in the foreground.

Owns: the command's arguments and its announcements on standard output.
Leaves to others: starting, supervising and stopping the processes (`kvstore.launcher`).
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import click
import msgspec

from kvstore.cli.frame import reporting, takes_config
from kvstore.launcher import up as launch


@click.command()
@takes_config("The cluster: its processes, their ports, its limits.")
@click.option("--no-restart", is_flag=True, help="Do not start a process again that has died.")
@click.option("--demo", is_flag=True, help="With what the page's play-throughs need; on this machine only.")
@click.option("--json", "as_json", is_flag=True, help='Print {"ready": ADDRESS} instead of `ready: ADDRESS`.')
def up(config: Path, no_restart: bool, demo: bool, as_json: bool) -> None:
    """Run routers, controller and shards as FILE says, until Ctrl-C.

    Prints one line, `ready: http://127.0.0.1:8080`, on standard output once the cluster serves; the processes' logs
    go to standard error. A process that dies is started again. Ctrl-C (or SIGTERM) stops all of them cleanly.
    A browser that opens that address sees the cluster; with --demo it can also kill the coordinator of a transfer,
    and a node, whose shard a copy takes over.

    \b
    Example:
      kvstore up
      kvstore up --config cluster.yaml --no-restart
      kvstore up --demo
    """

    def announce(line: str) -> None:
        name, _, fact = line.partition(": ")
        click.echo(msgspec.json.encode({name: fact}) if as_json else line)

    with reporting(as_json):
        code = asyncio.run(launch(config, restart=not no_restart, announce=announce, demo=demo))
    raise click.exceptions.Exit(code)
