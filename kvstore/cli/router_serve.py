"""router serve: one router as a process of its own.

Owns: its command line.
Leaves to others: serving (`kvstore.router.app`), signals, pid file and log (`kvstore.process`).
"""

from __future__ import annotations

from pathlib import Path

import click

from kvstore.cli.serve_options import join_option, read_config, serve_options
from kvstore.process import run_process
from kvstore.router import app


@click.command()
@serve_options
@join_option
def serve(
    process_id: str,
    listen: str,
    advertise: str | None,
    join: str,
    config_path: Path | None,
    supervised: bool,
    json_log: bool,
) -> None:
    """Serve router ID on this host until SIGTERM or Ctrl-C. It keeps no data.

    \b
    Example:
      kvstore router serve 0 --join http://127.0.0.1:8090 --listen 127.0.0.1:8080
    """
    config = read_config(config_path, supervised=supervised)
    code = run_process(
        role="router",
        process_id=process_id,
        data_dir=Path(config.data_dir),
        supervised=supervised,
        json_log=json_log,
        main=lambda stop: app.serve(
            router_id=process_id, listen=listen, advertise=advertise, join=join, config=config, stop=stop
        ),
    )
    raise click.exceptions.Exit(code)
