"""The command line: the names of all commands, and how one run of `kvstore` begins and ends.

Owns: the table of commands, `main`, the exit code of the process.
Promises: a command imports what it needs and no more (`get` no rich and no server, `shard serve` no router).
Leaves to others: the commands, one module each; their common frame (`frame`), and loading by name (`lazy`).
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence

import click

from kvstore.cli.lazy import LazyCommand, LazyGroup
from kvstore.cli.terminal import drop_output, open_streams

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE: what the shell sees of any program that writes to a reader that has gone
_EXIT_OUTPUT_LOST = 2

_EPILOG = (
    "Exit codes: 0 done; 1 the store said no (no such key, condition, lock, value too large, disk full); "
    "2 usage, or the store cannot be reached or gave no decision; 130 interrupted; 141 broken pipe. "
    "Processes that serve: 74 the disk failed, 78 configuration or data that only a person can mend."
)


def _print_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """That of the installed package."""
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version  # slow to load, and rarely needed

    try:
        number = version("kvstore")
    except PackageNotFoundError:  # run from a source tree that is not installed
        number = "0+source"
    click.echo(f"kvstore {number}")
    context.exit()


_version_option = click.Option(
    ["--version"],
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Show the version.",
)

_shard = LazyGroup(
    "shard",
    short_help="Add, remove and list shards; serve one.",
    help="Shards: the processes that keep the data. They are added and removed while the cluster runs.",
    lazy={
        "add": LazyCommand("kvstore.cli.shards:add", "Add a shard and move its share to it."),
        "remove": LazyCommand("kvstore.cli.shards:remove", "Drain a shard and remove it."),
        "weight": LazyCommand("kvstore.cli.shards:weight", "Change a shard's share."),
        "rebalance": LazyCommand("kvstore.cli.shards:rebalance", "Move keys to where they belong."),
        "cancel": LazyCommand("kvstore.cli.shards:cancel", "Stop what is moving."),
        "accept-old": LazyCommand("kvstore.cli.accept_old:accept_old", "Let a shard start with an older copy."),
        "restart": LazyCommand("kvstore.cli.restart:restart", "Restart shards one after the other."),
        "promote": LazyCommand("kvstore.cli.copies:promote", "Make another copy of a shard its primary."),
        "list": LazyCommand("kvstore.cli.shards:list_shards", "List the shards."),
        "serve": LazyCommand("kvstore.cli.shard_serve:serve", "Serve one shard on this host."),
    },
)
_store = LazyGroup(
    "store",
    short_help="Check one store's file and log, offline.",
    help="One store's file and log, while no process has it.",
    lazy={
        "check": LazyCommand("kvstore.cli.store:check", "Check file and log for damage."),
        "log": LazyCommand("kvstore.cli.store:print_log", "Print the records of the log."),
        "cut": LazyCommand("kvstore.cli.store:cut", "Cut the log behind a record, and lose the rest."),
    },
)
_cluster = LazyGroup(
    "cluster",
    short_help="Change how many copies there are; adopt a copied data directory.",
    help="A cluster as a whole.",
    lazy={
        "adopt": LazyCommand("kvstore.cli.cluster_adopt:adopt", "Make a copy a cluster of its own, offline."),
        "replicas": LazyCommand("kvstore.cli.copies:replicas", "Keep more or fewer copies of every key."),
    },
)
_router = LazyGroup(
    "router",
    short_help="Serve a router.",
    help="Routers: the addresses that clients talk to.",
    lazy={"serve": LazyCommand("kvstore.cli.router_serve:serve", "Serve one router on this host.")},
)
_controller = LazyGroup(
    "controller",
    short_help="Serve a controller, or give it its map again.",
    help="Controllers: the processes that own the cluster map.",
    lazy={
        "recover": LazyCommand("kvstore.cli.controller_recover:recover", "Give a controller its map again."),
        "serve": LazyCommand("kvstore.cli.controller_serve:serve", "Serve one controller on this host."),
    },
)

root = LazyGroup(
    "kvstore",
    help="A sharded, durable key-value store. `kvstore COMMAND --help` shows an example of each command.",
    epilog=_EPILOG,
    params=[_version_option],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    lazy={
        "up": LazyCommand("kvstore.cli.up:up", "Run the whole cluster on this machine."),
        "get": LazyCommand("kvstore.cli.data:get", "Print the value of a key."),
        "put": LazyCommand("kvstore.cli.data:put", "Store a value under a key."),
        "delete": LazyCommand("kvstore.cli.data:delete", "Delete a key."),
        "list": LazyCommand("kvstore.cli.data:list_keys", "List keys in order, or count them."),
        "txn": LazyCommand("kvstore.cli.txn:txn", "Change many keys, all or nothing."),
        "lock": LazyCommand("kvstore.cli.lock:lock", "Run a command while holding a lock."),
        "locks": LazyCommand("kvstore.cli.lock:locks", "List the locks that are held."),
        "import": LazyCommand("kvstore.cli.import_command:import_", "Load NDJSON, or a folder's files."),
        "export": LazyCommand("kvstore.cli.export_command:export", "Write keys and values as NDJSON."),
        "status": LazyCommand("kvstore.cli.cluster:status", "Show the shards and what they hold."),
        "ring": LazyCommand("kvstore.cli.cluster:ring", "Show how evenly keys are spread."),
        "explain": LazyCommand("kvstore.cli.cluster:explain", "Show the way of a key to its shard."),
        "deploy": LazyCommand("kvstore.cli.deploy:deploy", "Write files for proxies and monitoring."),
        "shard": _shard,
        "store": _store,
        "cluster": _cluster,
        "router": _router,
        "controller": _controller,
    },
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name; None: that of the process) and return its exit code."""
    open_streams()
    given = sys.argv[1:] if arguments is None else arguments
    try:
        code = _run(given)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        drop_output()
        return EXIT_BROKEN_PIPE
    except OSError as error:  # of standard output, such as a full disk: as a rule, others were told by the command
        drop_output()
        click.echo(f"kvstore: {error.filename or 'standard output'}: {error.strerror}.", err=True)
        return _EXIT_OUTPUT_LOST


def _run(given: Sequence[str]) -> int:
    streams = sys.stdout, sys.stderr
    try:
        code = root.main(args=list(given), prog_name="kvstore", standalone_mode=False)
    except click.ClickException as error:
        if "--json" in itertools.takewhile(lambda argument: argument != "--", given):
            click.echo(_problem(error), err=True)
        else:
            error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except SystemExit:
        if sys.stdout is streams[0]:
            raise
        # The reader of the help has gone: click has put a wrapper in the place of both streams, and would end with 1.
        sys.stdout, sys.stderr = streams
        raise BrokenPipeError from None
    return code if isinstance(code, int) else 0


def _problem(error: click.ClickException) -> str:
    """Wrong usage for programs: one line of JSON in the form of the store's own errors."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "kvstore"
    document = {
        "type": "/problems/usage",
        "code": "usage",
        "title": "The command line is wrong",
        "detail": error.format_message(),
        "next_step": f"`{command} --help` shows how it is used.",
    }
    return json.dumps(document, ensure_ascii=False)
