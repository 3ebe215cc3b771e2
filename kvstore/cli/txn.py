"""txn: a transaction from a file.

Owns: reading it, the table of its results, the exit code.
Promises: what stands in the file is what is sent, byte for byte; the exit code says which branch ran.
Leaves to others: whether it is well formed, and what it does (the router).
"""

from __future__ import annotations

import codecs
import errno
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from kvstore.cli.asking import call, talks_to_cluster
from kvstore.cli.frame import EXIT_STORE_SAID_NO, VALUE_BYTES_READ_MAX, complain, printable, reporting, say, say_json
from kvstore.client import Client
from kvstore.errors import BodyTooLarge, OutcomeUnknown
from kvstore.operations import value_of

_KEY_CHARACTERS_ALIGNED = 40
_VALUE_CHARACTERS_SHOWN = 60
_IDEMPOTENCY_KEY_CHARACTERS_MAX = 255


def _checked_key(context: click.Context, parameter: click.Parameter, key: str | None) -> str | None:
    if key is not None and not (1 <= len(key) <= _IDEMPOTENCY_KEY_CHARACTERS_MAX and key.isprintable()):
        raise click.BadParameter(
            f"1 to {_IDEMPOTENCY_KEY_CHARACTERS_MAX} printable characters, please", context, parameter
        )
    return key


@click.command()
@click.argument("file", metavar="FILE|-")
@click.option(
    "--idempotency-key",
    metavar="KEY",
    callback=_checked_key,
    help="A random text. Repeated with the same FILE it gives the first answer again and writes nothing twice.",
)
@talks_to_cluster
def txn(file: str, idempotency_key: str | None, url: str, as_json: bool) -> None:
    """Run the transaction that FILE (standard input, if it is -) holds as JSON: all of it, or nothing.

    \b
    FILE has conditions, the operations if all of them hold, and those if not;
    `if` and `else` may be left out:
      {"if":   [{"key": "a", "version": 7}, {"key": "b", "exists": false},
                {"lock": "leader", "token": 12}],
       "then": [{"op": "put", "key": "a", "value": "1", "ttl": 60},
                {"op": "delete", "key": "b"}],
       "else": [{"op": "get", "key": "a"}]}

    Gets see the state before the transaction. With --json the answer is {"id","succeeded","version","results"}, on one
    line.

    Exit code: 0 if `then` ran; 1 if `else` ran, or nothing was done because another client holds the lock of a key or
    others stood in the way for too long; 2 if FILE is no transaction, the store cannot be reached, or it is not known
    whether it was done (the same --idempotency-key finds out).

    \b
    Example:
      kvstore txn transfer.json --idempotency-key "$(uuidgen)"
      echo '{"then": [{"op": "get", "key": "a"}]}' | kvstore txn -
    """
    with reporting(as_json):  # before the event loop runs: Ctrl-C must end a read that waits for the terminal
        body = _from_stdin() if file == "-" else _from_file(Path(file))

    async def work(kv: Client) -> bool:
        try:
            document = await kv.txn_json(body, idempotency_key=idempotency_key)
        except OutcomeUnknown as error:
            raise _unknown(error, idempotency_key, kv.url) from None
        if as_json:
            say_json(document)
        else:
            _show(body, document)
        return bool(document["succeeded"])

    if not call(url, as_json, work):
        raise click.exceptions.Exit(EXIT_STORE_SAID_NO)


def _from_stdin() -> bytes:
    if sys.stdin is None:
        raise OSError(errno.EBADF, "standard input is closed; name a FILE")
    if sys.stdin.isatty():
        complain("kvstore: reading the transaction from the terminal; Ctrl-D ends it.")
    return _checked_size(sys.stdin.buffer.read(VALUE_BYTES_READ_MAX + 1))


def _from_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return _checked_size(file.read(VALUE_BYTES_READ_MAX + 1))


def _checked_size(body: bytes) -> bytes:
    if len(body) > VALUE_BYTES_READ_MAX:
        raise BodyTooLarge(f"the transaction has more than {VALUE_BYTES_READ_MAX:,} bytes; no cluster takes that.")
    return body.removeprefix(codecs.BOM_UTF8)  # with which some editors and shells begin a file


def _unknown(error: OutcomeUnknown, idempotency_key: str | None, url: str) -> OutcomeUnknown:
    """The same error, with what to do about it from a command line."""
    members = {name: value for name, value in error.members.items() if name != "next_step"}
    txn_id = members.get("txn_id")
    if idempotency_key is not None:
        next_step = "Run it again with the same --idempotency-key: it is done once."
    elif txn_id is not None:
        next_step = f"GET {url}/v1/txn/{txn_id} tells, while it is in doubt; read the keys before you run it again."
    else:
        next_step = "Read the keys before you run it again, and give an --idempotency-key next time."
    return OutcomeUnknown(error.detail, next_step=next_step, **members)


def _show(body: bytes, document: Mapping[str, Any]) -> None:
    branch = "then" if document["succeeded"] else "else"
    wrote = "nothing was written" if document["version"] is None else f"version {document['version']}"
    why = "" if document["succeeded"] else "a condition does not hold: "
    say(f"{why}`{branch}` ran, {wrote} (transaction {printable(document['id'])})")
    if document["results"]:
        for line in _table(msgspec.json.decode(body)[branch], document["results"]):
            say(line)


def _table(operations: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Its lines. (A table by rich takes 14 s for 20,000 operations.)"""
    rows = [("op", "version", "key", "value")]
    for operation, result in zip(operations, results, strict=True):
        version = "absent" if "version" not in result else str(result["version"])
        rows.append((operation["op"], version, printable(result["key"]), _shown(value_of(result))))
    version_width = max(len(row[1]) for row in rows)
    key_width = min(max(len(row[2]) for row in rows), _KEY_CHARACTERS_ALIGNED)
    for op, version, key, value in rows:
        yield f"{op:<6}  {version:>{version_width}}  {key:<{key_width}}  {value}".rstrip(" ")


def _shown(value: bytes | None) -> str:
    """The value on one line, in quotes; its beginning if it is long."""
    if value is None:
        return ""
    text = printable(value[: 4 * _VALUE_CHARACTERS_SHOWN].decode("utf-8", "backslashreplace"))
    if len(value) <= 4 * _VALUE_CHARACTERS_SHOWN and len(text) <= _VALUE_CHARACTERS_SHOWN:
        return f'"{text}"'
    return f'"{text[:_VALUE_CHARACTERS_SHOWN]}"… ({len(value):,} bytes)'
