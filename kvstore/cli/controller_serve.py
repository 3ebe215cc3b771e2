"""controller serve: the controller as a process of its own.

Owns: its command line.
Leaves to others: serving (`kvstore.controller.app`), signals, pid file and log (`kvstore.process`).
"""

from __future__ import annotations

from pathlib import Path

import click

from kvstore.cli.serve_options import data_dir_option, read_config, serve_options
from kvstore.controller import app
from kvstore.process import run_process


@click.command()
@serve_options
@data_dir_option
def serve(
    process_id: str,
    listen: str,
    advertise: str | None,
    data_dir: Path,
    config_path: Path | None,
    supervised: bool,
    json_log: bool,
) -> None:
    """Serve controller ID on this host, with the cluster map in DIR, until SIGTERM or Ctrl-C.

    \b
    Example:
      kvstore controller serve 0 --listen 127.0.0.1:8090 --data-dir ./data \\
          --config cluster.yaml
    """
    config = read_config(config_path, supervised=supervised)
    data_dir = data_dir.absolute()
    code = run_process(
        role="controller",
        process_id=process_id,
        data_dir=data_dir,
        supervised=supervised,
        json_log=json_log,
        main=lambda stop: app.serve(
            controller_id=process_id, listen=listen, advertise=advertise, data_dir=data_dir, config=config, stop=stop
        ),
    )
    raise click.exceptions.Exit(code)
