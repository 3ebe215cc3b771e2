"""One process of a cluster whose every connection to another one goes through the proxy of a chaos run.

    python -m loadtest.chaos.child --name shard-s1 [--proxy HOST:PORT] [--slow FILE] [--bug NAME] -- <kvstore arguments>

Owns: the greeting, by which a connection to an address of this machine becomes one through the proxy.
Promises: kvstore's own command line runs in this very process, so that pid files, signals, failpoints and the pipe of
the supervisor work as they always do; a connection is made when its destination has accepted it, refused when that
refuses, and hangs while the link is closed. Addresses of other machines are reached as ever.
Leaves to others: the proxy (`proxy`), what a bug is (`kvstore.failpoints`), what becomes of a disk (`weather`).

All outgoing connections of kvstore's servers are aiohttp's, and aiohttp makes every one in
`aiohappyeyeballs.start_connection`: that is the one place that is changed.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohappyeyeballs
import aiohttp.connector

from kvstore import failpoints
from kvstore.cli.commands import main
from loadtest.chaos import weather
from loadtest.cluster.proxy import CONNECTED

PLANT_BUGS = "KVSTORE_PLANT_BUGS"

_EXIT_USAGE = 2
_THIS_MACHINE = "127."


def command(name: str, proxy: str, argv: Sequence[str], bug: str = "", slow: str = "") -> tuple[str, ...]:
    """The command that runs `argv`, which is PYTHON -m kvstore …, as the child `name`.
    Raises ValueError if it is not.

    `proxy`: the proxy's HOST:PORT; empty: none. `slow`: while that file is there, a shard's disk is slow.
    """
    python, *words = argv
    if words[:1] == ["-P"]:  # this module lies in the folder where it runs, perhaps nowhere else
        words = words[1:]
    if words[:2] != ["-m", "kvstore"]:
        raise ValueError(f"{argv} is no command of kvstore: give PYTHON -m kvstore and its arguments")
    options = (
        *(("--proxy", proxy) if proxy else ()),
        *(("--bug", bug) if bug else ()),
        *(("--slow", slow) if slow else ()),
    )
    return (python, "-m", "loadtest.chaos.child", "--name", name, *options, "--", *words[2:])


def connect_through(name: str, host: str, port: int) -> None:
    """From now on aiohttp's connections to this machine go through the proxy there, as those of the process `name`.

    Raises RuntimeError if aiohttp does not connect in the known way any more.
    """
    if getattr(aiohttp.connector, "aiohappyeyeballs", None) is not aiohappyeyeballs:
        raise RuntimeError("aiohttp connects in another way than it did: adapt loadtest.chaos.child to it")
    straight = aiohappyeyeballs.start_connection

    async def start_connection(addr_infos: Any, *args: Any, **settings: Any) -> Any:
        family, kind, protocol, name_there, address = addr_infos[0]
        if family != socket.AF_INET or not address[0].startswith(_THIS_MACHINE):
            return await straight(addr_infos, *args, **settings)
        sock = await straight([(family, kind, protocol, name_there, (host, port))], *args, **settings)
        try:
            await _greet(sock, f"{name} {address[0]}:{address[1]}\n")
        except BaseException:
            sock.close()
            raise
        return sock

    aiohappyeyeballs.start_connection = start_connection


async def _greet(sock: Any, line: str) -> None:
    """Raises ConnectionRefusedError."""
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_sendall(sock, line.encode())
        answer = await loop.sock_recv(sock, len(CONNECTED))
    except (ConnectionResetError, BrokenPipeError):
        answer = b""
    if answer != CONNECTED:
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.chaos.child", description="One process of a chaos run.")
    parser.add_argument("--name", required=True, help="as the proxy knows it: shard-s1, router-0, controller-0")
    parser.add_argument("--proxy", metavar="HOST:PORT", help="where the proxy listens [default: none]")
    parser.add_argument("--slow", metavar="FILE", type=Path, help="its disk forgets, and is slow while FILE is there")
    parser.add_argument("--bug", choices=sorted(failpoints.BUGS), help=argparse.SUPPRESS)
    parser.add_argument("kvstore", nargs="+", help="the arguments of kvstore, after --")
    return parser.parse_args()


def run() -> int:
    """The exit code of kvstore."""
    arguments = _arguments()
    if arguments.bug and os.environ.get(PLANT_BUGS) != "1":
        print(f"--bug breaks the store on purpose: set {PLANT_BUGS}=1 if that is what you want.", file=sys.stderr)
        return _EXIT_USAGE
    if arguments.proxy:
        host, _, port = arguments.proxy.rpartition(":")
        connect_through(arguments.name, host, int(port))
    if arguments.slow:
        weather.begin(arguments.slow)
    if arguments.bug:
        failpoints.plant(arguments.bug)
    sys.argv = ["kvstore", *arguments.kvstore]
    return main(arguments.kvstore)


if __name__ == "__main__":
    sys.exit(run())
