"""What the three `serve` commands share: their options, and the configuration that they read.

Owns: the arguments ID, `--listen`, `--advertise`, `--join`, `--data-dir`, `--config`, `--supervised`, `--json`, and
their checks.
Promises: a wrong option is told in one line, with exit code 2, before anything is started.
Leaves to others: the process's shell (`kvstore.process`), the roles (`shard`, `router`, `controller`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import click

from kvstore.addresses import listen_address
from kvstore.cli.asking import checked_url
from kvstore.cli.frame import complain, report
from kvstore.config import CONFIG_VARIABLE, ID_PATTERN, ClusterConfig, decode_config, default_config, load_config
from kvstore.errors import ConfigError, KvError
from kvstore.process import EXIT_NEEDS_A_PERSON

F = TypeVar("F", bound=Callable[..., Any])


def _checked_id(context: click.Context, parameter: click.Parameter, process_id: str) -> str:
    if not ID_PATTERN.fullmatch(process_id):
        raise click.BadParameter("1 to 32 of a-z, 0-9 and -, not beginning with -", context, parameter)
    return process_id


def _checked_listen(context: click.Context, parameter: click.Parameter, listen: str | None) -> str | None:
    try:
        if listen is not None:
            listen_address(listen)
    except ConfigError as error:
        raise click.BadParameter(error.detail, context, parameter) from None
    return listen


def _expanded(context: click.Context, parameter: click.Parameter, path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise click.BadParameter("names no user with a home; write the whole path", context, parameter) from None


def serve_options(command: F) -> F:
    """ID, `--listen`, `--advertise`, `--config`, `--supervised`, `--json` as arguments `process_id`, `listen`,
    `advertise`, `config_path`, `supervised`, `json_log`."""
    process_id = click.argument("process_id", metavar="ID", callback=_checked_id)
    listen = click.option(
        "--listen", required=True, metavar="HOST:PORT", callback=_checked_listen, help="Where to serve."
    )
    advertise = click.option(
        "--advertise",
        metavar="HOST:PORT",
        callback=_checked_listen,
        help="Where others reach it, if not at --listen; port 0: the port it listens at.",
    )
    config = click.option(
        "--config",
        "config_path",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="cluster.yaml with the limits [default: the defaults of all settings].",
    )
    supervised = click.option(
        "--supervised", is_flag=True, help="End in order when standard input, a pipe, ends (`kvstore up` does this)."
    )
    json_log = click.option(
        "--json", "json_log", is_flag=True, help="Log JSON, an object a line, as with KVSTORE_LOG=json."
    )
    return process_id(listen(advertise(config(supervised(json_log(command))))))


join_option = click.option(
    "--join", required=True, metavar="URL", callback=checked_url, help="Address of the controller."
)
data_dir_option = click.option(
    "--data-dir",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    callback=_expanded,  # most shells leave the ~ of --data-dir=~/DIR as it is
    metavar="DIR",
    help="Where its file lies.",
)


def read_config(path: Path | None, *, supervised: bool = False) -> ClusterConfig:
    """The configuration, if `supervised` the one that `kvstore up` read.

    Ends the command, with the code of a process that needs a person, if the file is wrong.
    """
    handed_down = os.environ.get(CONFIG_VARIABLE) if supervised else None
    if handed_down is not None:
        with suppress(ConfigError):  # of a kvstore that was replaced while `up` runs: then the file counts
            return decode_config(handed_down)
    try:
        return default_config() if path is None else load_config(path, lambda line: complain(f"kvstore: {line}"))
    except ConfigError as error:
        report(KvError(error.detail, next_step=""), as_json=False)
        raise click.exceptions.Exit(EXIT_NEEDS_A_PERSON) from None
