"""get, put, delete, list: one key at a time, or a range of them.

Owns: arguments and output of these commands.
Promises: bytes in are bytes out: `get` adds a newline only on a terminal, `put` takes any bytes from standard input.
Leaves to others: the calls (`kvstore.client`), errors and exit codes (`frame`).
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Collection
from typing import Any

import click
import msgspec

from kvstore.cli.asking import call, talks_to_cluster
from kvstore.cli.frame import (
    EXIT_STORE_SAID_NO,
    VALUE_BYTES_READ_MAX,
    complain,
    emit,
    printable,
    reporting,
    say,
    say_json,
    write_out,
)
from kvstore.client import Client, Item, ListedItem
from kvstore.errors import NotFound, ValueTooLarge
from kvstore.operations import value_members

_PAGE_SIZE = 1000

_if_version = click.option(
    "--if-version", type=click.IntRange(min=0), metavar="N", help="Only if KEY has this version."
)
_token = click.option(
    "--token", type=click.IntRange(min=0), metavar="TOKEN", help="That of the lock named KEY, while a client holds it."
)


@click.command()
@click.argument("key")
@talks_to_cluster
def get(key: str, url: str, as_json: bool) -> None:
    """Print the value of KEY, byte for byte; a newline is added only on a terminal.

    \b
    Exit code 1 if there is no such key. With --json:
      {"key","version","value"|"value_base64","ttl"?}

    \b
    Example:
      kvstore get config/theme
      kvstore get logo.png > logo.png
    """

    async def work(kv: Client) -> None:
        item = await kv.get(key)
        if item is None:
            raise _not_found(key)
        if as_json:
            say_json(_members(key, item))
            return
        write_out(item.value)
        if sys.stdout.isatty():
            write_out(b"\n")

    call(url, as_json, work)


@click.command()
@click.argument("key")
@click.argument("value", required=False)
@click.option("--ttl", type=float, metavar="SECONDS", help="Let it expire; without, it stays until deleted.")
@_if_version
@click.option("--if-absent", is_flag=True, help="Only if there is no such key.")
@_token
@talks_to_cluster
def put(
    key: str,
    value: str | None,
    ttl: float | None,
    if_version: int | None,
    if_absent: bool,
    token: int | None,
    url: str,
    as_json: bool,
) -> None:
    """Store VALUE under KEY and print its version.

    Without VALUE, or with -, the value is read from standard input, byte for byte. With --json: {"key","version"}.
    Exit code 1, and nothing is written, if a condition does not hold or KEY is locked and TOKEN not its holder's.

    \b
    Example:
      kvstore put config/theme dark
      kvstore put session/42 --ttl 3600 < session.bin
      kvstore put -- temperature -5
      kvstore put counter 8 --if-version 41
      kvstore lock n -- sh -c 'kvstore put n 1 --token $KVSTORE_LOCK_TOKEN'
    """
    if if_absent and if_version is not None:
        raise click.UsageError("--if-version and --if-absent contradict each other: give one of them")

    with reporting(as_json):  # before the event loop runs: Ctrl-C must end a read that waits for the terminal
        content = _from_stdin() if value in {None, "-"} else os.fsencode(str(value))

    async def work(kv: Client) -> None:
        version = await kv.put(key, content, ttl=ttl, if_version=if_version, if_absent=if_absent, token=token)
        emit(as_json, {"key": key, "version": version}, f"version {version}")

    call(url, as_json, work)


@click.command()
@click.argument("key")
@_if_version
@_token
@talks_to_cluster
def delete(key: str, if_version: int | None, token: int | None, url: str, as_json: bool) -> None:
    """Delete KEY.

    Exit code 1 if there was no such key, if it has another version than N, or if KEY is locked and TOKEN not its
    holder's. With --json: {"key","deleted":true}.

    \b
    Example:
      kvstore delete config/theme
      kvstore delete config/theme --if-version 41
    """

    async def work(kv: Client) -> None:
        if not await kv.delete(key, if_version=if_version, token=token):
            raise _not_found(key)
        emit(as_json, {"key": key, "deleted": True}, "deleted")

    call(url, as_json, work)


skip_down_option = click.option(
    "--skip-down", is_flag=True, help="Leave out the keys of shards that are down, and say so."
)


@click.command("list")
@click.argument("prefix", default="")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most N keys.")
@click.option("--values", is_flag=True, help="Values, too: KEY, a tab, VALUE (escaped to fit on the line).")
@click.option("--count", is_flag=True, help="Only the number of keys.")
@skip_down_option
@talks_to_cluster
def list_keys(
    prefix: str, limit: int | None, values: bool, count: bool, skip_down: bool, url: str, as_json: bool
) -> None:
    """List the keys that start with PREFIX (all, without), in byte order, one a line.

    Characters that would break a line or steer a terminal are shown escaped. For programs there is --json, a
    line each: {"key","version"}, with --values also "value"|"value_base64" and "ttl"?; with --count one line
    {"count"}, with --skip-down also "missing".

    While a shard is down this fails, since a gap is worse. With --skip-down the keys of the other shards are listed,
    standard error says what is missing ({"missing":[partitions]} with --json), and the exit code is 1 if anything is.

    \b
    Example:
      kvstore list config/
      kvstore list --count
      kvstore list user/ --values --limit 10
      kvstore list --count --skip-down
    """
    if count and (values or limit is not None):
        raise click.UsageError("--count goes with neither --values nor --limit")

    async def work(kv: Client) -> set[int]:
        if not count:
            return await _list(kv, prefix, limit, values, skip_down, as_json)
        if not skip_down:
            number = await kv.count(prefix)
            emit(as_json, {"count": number}, str(number))
            return set()
        counted = await kv.count_what_is_up(prefix)
        emit(as_json, {"count": counted.count, "missing": counted.missing}, str(counted.count))
        return set(counted.missing)

    end_with_missing(call(url, as_json, work), as_json)


async def _list(kv: Client, prefix: str, limit: int | None, values: bool, skip_down: bool, as_json: bool) -> set[int]:
    """The partitions that were left out."""
    left, missing = limit, set[int]()
    size = min(limit or _PAGE_SIZE, _PAGE_SIZE)
    async for page in kv.pages(prefix, values=values, page_size=size, skip_down=skip_down):
        missing.update(page.missing)
        for item in page.items:
            if as_json:
                say_json(listed_members(item))
            else:
                say(_line(item))
            if left is not None and (left := left - 1) <= 0:
                return missing
    return missing


def end_with_missing(missing: Collection[int], as_json: bool) -> None:
    """Say on standard error which partitions were left out, if any were; then the exit code is 1."""
    if not missing:
        return
    count = f"{len(missing):,} partition{'s' if len(missing) > 1 else ''}"
    line = f"kvstore: the keys of {count} are missing, because their shard is down. `kvstore status` shows which."
    complain(msgspec.json.encode({"missing": sorted(missing)}).decode() if as_json else line)
    raise click.exceptions.Exit(EXIT_STORE_SAID_NO)


def listed_members(item: ListedItem) -> dict[str, Any]:
    """The JSON of a listed key; with a value, it is also the form of an export line."""
    if item.value is None:
        return {"key": item.key, "version": item.version}
    return _members(item.key, Item(item.value, item.version, item.ttl))


def _members(key: str, item: Item) -> dict[str, Any]:
    ttl = {} if item.ttl is None else {"ttl": item.ttl}
    return {"key": key, "version": item.version, **value_members(item.value), **ttl}


def _line(item: ListedItem) -> str:
    if item.value is None:
        return printable(item.key)
    return f"{printable(item.key)}\t{printable(item.value.decode('utf-8', 'backslashreplace'))}"


def _from_stdin() -> bytes:
    if sys.stdin is None:
        raise OSError(errno.EBADF, "standard input is closed; give the VALUE as an argument")
    if sys.stdin.isatty():
        complain("kvstore: reading the value from the terminal; Ctrl-D ends it.")
    content = sys.stdin.buffer.read(VALUE_BYTES_READ_MAX + 1)
    if len(content) > VALUE_BYTES_READ_MAX:
        raise ValueTooLarge(f"standard input has more than {VALUE_BYTES_READ_MAX:,} bytes; no cluster takes that.")
    return content


def _not_found(key: str) -> NotFound:
    return NotFound(f"there is no key {key!r}.", next_step="`kvstore list` shows what there is.", key=key)
