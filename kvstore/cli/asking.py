"""How a command asks a cluster: its address and its client.

Owns: `--url` and `--json`; that a command waits for what passes by itself, and tells of it.
Leaves to others: the calls (`kvstore.client`), output, errors and exit codes (`frame`). A command that asks no router
does without this module, whose HTTP takes most of a command's start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import click

from kvstore.addresses import DEFAULT_URL
from kvstore.cli.frame import complain, reporting, sentence
from kvstore.client import Client, base_url
from kvstore.errors import KvError

_WAIT_TOLD_S = 1.0

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def checked_url(context: click.Context, parameter: click.Parameter, url: str) -> str:
    """A callback for options that are the address of a process."""
    try:
        return base_url(url)
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from None


def talks_to_cluster(command: F) -> F:
    """The options `--url` and `--json`, as arguments `url` and `as_json`."""
    url = click.option(
        "--url",
        envvar="KVSTORE_URL",
        default=DEFAULT_URL,
        show_default=True,
        show_envvar=True,
        callback=checked_url,
        help="Address of a router.",
    )
    as_json = click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Print JSON for programs; an error is then a JSON line (problem document) on standard error.",
    )
    return url(as_json(command))


def call(url: str, as_json: bool, work: Callable[[Client], Awaitable[T]]) -> T:
    """Run `work` with a client. Errors end the command by `reporting`.

    That another client holds a lock is an answer: a lease lasts longer than one waits at a prompt without being told.
    What passes by itself is waited for a few seconds, which is told where it takes one or more.
    """

    async def entry() -> T:
        async with Client(url, retry_locked=False, on_wait=None if as_json else _WaitTold().note) as kv:
            return await work(kv)

    with reporting(as_json):
        return asyncio.run(entry())


class _WaitTold:
    """Says once that a command waits, and for what."""

    def __init__(self) -> None:
        self._waited_s = 0.0
        self._is_told = False

    def note(self, error: KvError, wait_s: float) -> None:
        """The client is about to wait so long before it repeats what failed with that error."""
        self._waited_s += wait_s
        if self._waited_s >= _WAIT_TOLD_S and not self._is_told:
            self._is_told = True
            complain(f"kvstore: {sentence(error.detail)} Trying again for a few seconds (Ctrl-C ends that).")
