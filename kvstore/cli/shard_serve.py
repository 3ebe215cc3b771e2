"""shard serve: one shard as a process of its own.

Owns: its command line.
Leaves to others: serving (`kvstore.shard.app`), signals, pid file and log (`kvstore.process`).
"""

from __future__ import annotations

from pathlib import Path

import click

from kvstore.cli.serve_options import data_dir_option, join_option, read_config, serve_options
from kvstore.process import run_process
from kvstore.shard import app


@click.command()
@serve_options
@join_option
@data_dir_option
def serve(
    process_id: str,
    listen: str,
    advertise: str | None,
    join: str,
    data_dir: Path,
    config_path: Path | None,
    supervised: bool,
    json_log: bool,
) -> None:
    """Serve shard ID on this host, with its data in DIR, until SIGTERM or Ctrl-C.

    If it is no member of the cluster yet, it joins, and its share of the keys moves to it. `kvstore shard remove ID`
    drains it before you end it for good.

    \b
    Example:
      kvstore shard serve s1 --join http://127.0.0.1:8090 \\
          --listen 127.0.0.1:9101 --data-dir ./data
    """
    config = read_config(config_path, supervised=supervised)
    data_dir = data_dir.absolute()
    code = run_process(
        role="shard",
        process_id=process_id,
        data_dir=data_dir,
        supervised=supervised,
        json_log=json_log,
        main=lambda stop: app.serve(
            shard_id=process_id,
            listen=listen,
            advertise=advertise,
            join=join,
            data_dir=data_dir,
            config=config,
            stop=stop,
            may_join=not supervised,
        ),
    )
    raise click.exceptions.Exit(code)
