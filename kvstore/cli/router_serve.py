"""router serve: one router as a process of its own.

Owns: its command line.
Leaves to others: serving (`kvstore.router.serve`), signals, pid file and log (`kvstore.process`).
"""

from __future__ import annotations

from pathlib import Path

import click

from kvstore.cli.asking import checked_url
from kvstore.cli.serve_options import join_option, read_config, serve_options
from kvstore.demo import DOOR_VARIABLE
from kvstore.process import run_process
from kvstore.router.serve import serve as serve_router


def _checked_url(context: click.Context, parameter: click.Parameter, url: str | None) -> str | None:
    return None if url is None else checked_url(context, parameter, url)


@click.command()
@serve_options
@join_option
@click.option("--demo-url", metavar="URL", callback=_checked_url, hidden=True, help="The router that plays through.")
@click.option("--demo-door", metavar="PLACE", envvar=DOOR_VARIABLE, hidden=True, help="Where nodes are killed.")
@click.option("--demo-coordinator", is_flag=True, hidden=True, help="Be the router that plays through.")
def serve(
    process_id: str,
    listen: str,
    advertise: str | None,
    join: str,
    config_path: Path | None,
    supervised: bool,
    json_log: bool,
    demo_url: str | None,
    demo_door: str | None,
    demo_coordinator: bool,
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
        main=lambda stop: serve_router(
            router_id=process_id,
            listen=listen,
            advertise=advertise,
            join=join,
            config=config,
            stop=stop,
            demo_url=demo_url,
            demo_door=demo_door,
            is_demo_coordinator=demo_coordinator,
        ),
    )
    raise click.exceptions.Exit(code)
