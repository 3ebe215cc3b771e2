"""lock: a command that runs while a lock is held; locks: who holds what.

Owns: the arguments and output of both, and what becomes of the command when the lease is lost (`--on-lost`).
Promises: the command starts after the grant and, but for `--on-lost warn`, is ended once the lease may have ended; the
exit code is the command's. A command that outlives this process (kill -9) runs on, and its lease ends within the ttl.
Leaves to others: acquiring, renewing and releasing (`kvstore.client`), the command as a process (`locked_command`).

Between the moment when the store lets the lease end and the moment when the command has gone, both this command and
the next holder run. Only the store can close that gap: what the command writes with `--token $KVSTORE_LOCK_TOKEN` is
refused as soon as the lease has ended.
"""

from __future__ import annotations

import asyncio
import getpass
import os
import shlex
import socket
from collections.abc import Sequence
from pathlib import Path
from shutil import which
from typing import NamedTuple

import click

from kvstore.cli.asking import call, talks_to_cluster
from kvstore.cli.frame import EXIT_STORE_SAID_NO, complain, printable, report, say, say_json, sentence
from kvstore.cli.locked_command import EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, LockedCommand, dying_of_signals
from kvstore.client import Client, Holder
from kvstore.client.held_lock import HeldLock
from kvstore.errors import KvError, Locked, LockLost

_OWNER_BYTES_MAX = 256


@click.command()
@click.argument("name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
@click.option("--ttl", type=float, default=30.0, show_default=True, metavar="SECONDS", help="Length of the lease.")
@click.option(
    "--wait",
    type=float,
    default=0.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to queue for it.",
)
@click.option("--owner", metavar="TEXT", help="Who holds it, for people.  [default: user@host:pid]")
@click.option(
    "--on-lost",
    type=click.Choice(["kill", "warn"]),
    default="kill",
    show_default=True,
    help="When the lease is lost: end the command, or only say so.",
)
@talks_to_cluster
def lock(
    name: str,
    command: Sequence[str],
    ttl: float,
    wait: float,
    owner: str | None,
    on_lost: str,
    url: str,
    as_json: bool,
) -> None:
    """Run COMMAND while holding the lock NAME, renewing it until COMMAND ends.

    COMMAND finds the fencing token in KVSTORE_LOCK_TOKEN, the name in KVSTORE_LOCK_NAME and the router's address in
    KVSTORE_URL. SIGINT, SIGTERM, SIGHUP and SIGQUIT are passed on to it, and to what it started (on a terminal, whose
    Ctrl-C reaches all by itself, to COMMAND only). When the lease is lost, --on-lost kill sends SIGTERM, and SIGKILL
    5 seconds later.

    A --wait of more than 60 seconds asks again every 60 seconds, and the place in the queue is not kept: those who came
    later may have the lock first. A signal that comes while the lock is waited for ends the waiting, and what might be
    granted in that moment is given back.

    Exit code: COMMAND's (128 + N if signal N ended it); 1 if another client holds the lock, or the lease was lost
    (with --on-lost warn: COMMAND's); 2 if the store cannot be reached; 126 if COMMAND cannot be executed, 127 if it
    cannot be found. With --json: errors are JSON lines on standard error.

    \b
    Example:
      kvstore lock nightly-backup -- ./backup.sh --full
      kvstore lock deploy --ttl 10 --wait 60 --owner "$USER on CI" -- make deploy
      kvstore lock n -- sh -c 'kvstore put n 1 --token $KVSTORE_LOCK_TOKEN'
    """
    if (code := _cannot_run(command[0])) is not None:
        raise click.exceptions.Exit(code)
    wanted = _Wanted(name, tuple(command), ttl, wait, default_owner() if owner is None else owner, on_lost == "kill")
    raise click.exceptions.Exit(call(url, as_json, lambda kv: _hold_or_die(kv, wanted, as_json)))


class _Wanted(NamedTuple):
    """The command line, checked; times in seconds."""

    name: str
    command: tuple[str, ...]
    ttl_s: float
    wait_s: float
    owner: str
    kill_when_lost: bool


def default_owner() -> str:
    """`user@host:pid`, within the limit of an owner."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    text = f"{user}@{socket.gethostname()}:{os.getpid()}"
    return text.encode("utf-8", "replace")[-_OWNER_BYTES_MAX:].decode("utf-8", "ignore")


def _cannot_run(program: str) -> int | None:
    """The exit code if there is no such program, having said so before the lock is asked for; else None."""
    if which(program) is not None:
        return None
    if os.sep in program and Path(program).exists():
        complain(f"kvstore: {printable(program)} cannot be executed.")
        return EXIT_NOT_EXECUTABLE
    complain(f"kvstore: the command {printable(program)} is not found.")
    return EXIT_NOT_FOUND


async def _hold_or_die(kv: Client, wanted: _Wanted, as_json: bool) -> int:
    async with dying_of_signals():
        return await _hold(kv, wanted, as_json)


async def _hold(kv: Client, wanted: _Wanted, as_json: bool) -> int:
    """The exit code. Raises what acquiring raises."""
    code: int | None = None
    held = kv.lock(wanted.name, ttl=wanted.ttl_s, wait=wanted.wait_s, owner=wanted.owner)
    try:
        async with held:
            code = await _run(held, wanted, kv.url, as_json)
    except LockLost:
        if code is None:  # the lock was never held
            raise
        if not held.lost:  # found out by the release: the renewals were held up (this process was stopped)
            report(_lost(wanted, "It may have run beside the next holder."), as_json)
        return EXIT_STORE_SAID_NO if wanted.kill_when_lost else code
    except Locked as error:
        raise _taken(error, wanted) from None
    except KvError as error:
        if code is None:
            raise
        complain(f"kvstore: the lock {printable(wanted.name)} could not be released: {sentence(error.detail)}")
    return code


async def _run(held: HeldLock, wanted: _Wanted, url: str, as_json: bool) -> int:
    environment = {
        **os.environ,
        "KVSTORE_LOCK_NAME": wanted.name,
        "KVSTORE_LOCK_TOKEN": str(held.token),
        "KVSTORE_URL": url,
    }
    async with LockedCommand(wanted.command, environment) as running:
        try:
            return await running.ended()
        except asyncio.CancelledError:
            # The lease has ended, and the lock cancels the block that it was held for: this task.
            if not held.lost or (task := asyncio.current_task()) is None:
                raise
            task.uncancel()
        report(_lost(wanted, "It is ended now." if wanted.kill_when_lost else "It goes on."), as_json)
        return await (running.end() if wanted.kill_when_lost else running.ended())


def _lost(wanted: _Wanted, consequence: str) -> LockLost:
    return LockLost(
        f"the lease on {wanted.name!r} was lost while {shlex.join(wanted.command)} ran. {consequence}.",
        next_step="Another client may hold the lock by now.",
        name=wanted.name,
    )


def _taken(error: Locked, wanted: _Wanted) -> Locked:
    members = {name: value for name, value in error.members.items() if name != "next_step"}
    return Locked(error.detail, next_step=f"Wait for it: kvstore lock {wanted.name} --wait 60 -- …", **members)


@click.command()
@click.argument("prefix", default="")
@talks_to_cluster
def locks(prefix: str, url: str, as_json: bool) -> None:
    """List the locks that are held and whose names start with PREFIX (all, without), by name.

    One a line: name, owner, token, the seconds that the lease has left at most. With --json, a line each:
    {"name","owner","token","ttl_left"}.

    \b
    Example:
      kvstore locks
      kvstore locks jobs/ --json | jq -r .owner
    """

    async def work(kv: Client) -> None:
        async for holder in kv.holders(prefix):
            if as_json:
                say_json(_members(holder))
            else:
                say(_line(holder))

    call(url, as_json, work)


def _members(holder: Holder) -> dict[str, object]:
    return {"name": holder.name, "owner": holder.owner, "token": holder.token, "ttl_left": holder.ttl_left}


def _line(holder: Holder) -> str:
    owner = printable(holder.owner) or "-"
    return f"{printable(holder.name)}\t{owner}\ttoken {holder.token}\t{holder.ttl_left:.1f} s left"
