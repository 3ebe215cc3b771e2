"""store check, store log, store cut: one store's file and log, while no process has it.

Owns: the commands' arguments, the report for people and programs, the question before something is lost.
Promises: check and log change nothing. cut asks for the shard's id before it takes anything away.
Leaves to others: all looking and cutting (`kvstore.store.offline`).
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from kvstore.cli.frame import (
    EXIT_NO_DECISION,
    EXIT_STORE_SAID_NO,
    complain,
    emit,
    human_bytes,
    printable,
    report,
    reporting,
    say,
    say_json,
)
from kvstore.cli.progress import Progress, progress
from kvstore.config import Limits
from kvstore.errors import KvError, LogDamaged
from kvstore.storage.log_check import Logged, LogReport
from kvstore.storage.record import CommitRecord, decode_record
from kvstore.storage.rows import Row
from kvstore.store import offline

_SHOWN_CHARS_MAX = 60
F = TypeVar("F", bound=Callable[..., Any])


def _of_file(command: F) -> F:
    """The argument FILE and the option `--json`."""
    as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
    return click.argument("file", type=click.Path(path_type=Path))(as_json(command))


@contextmanager
def _store(file: Path, as_json: bool) -> Iterator[None]:
    """Hold the store; what keeps it from being looked at ends the command with 2."""
    try:
        with reporting(as_json), offline.locked(file):
            try:
                yield
            except sqlite3.Error as error:
                raise offline.damage_of(file, error) from error
            except LogDamaged as error:
                report(error, as_json)
                raise click.exceptions.Exit(EXIT_STORE_SAID_NO) from None
    except click.exceptions.Exit as ended:
        cause = ended.__context__
        is_damage = isinstance(cause, LogDamaged)
        refused = isinstance(cause, KvError) and not is_damage
        raise click.exceptions.Exit(EXIT_NO_DECISION if refused else ended.exit_code) from None


# --- check ------------------------------------------------------------------------------------------------------------


@click.command()
@_of_file
def check(file: Path, as_json: bool) -> None:
    """Check the store whose file is FILE (shard-ID.db) and the log beside it.

    Nothing is changed. Refused while a process has the store. Looked at are:
    the chain of the log and each record; each row by its checksum and by the
    indexes that lead to it; all entries that are no rows; SQLite's structure.

    \b
    Exit codes: 0 all is as it was written; 1 something is damaged, and the
    first of it is named with what to do; 2 it could not be checked.

    \b
    Example:
      kvstore store check data/shard-s1.db
      kvstore store check data/shard-s1.db --json
    """
    with _store(file, as_json):
        with _progress() as show:
            found = offline.check(file, show)
        if as_json:
            say_json(_document(file, found))
        else:
            _tell(file, found)
        if found.damaged:
            raise click.exceptions.Exit(EXIT_STORE_SAID_NO)


@contextmanager
def _progress() -> Iterator[offline.Progress]:
    with progress("check", None) as bar:

        def show(label: str, done: int, total: int) -> None:
            bar.label, bar.total = f"check {label}", total
            _advance(bar, done)

        yield show


def _advance(bar: Progress, done: int) -> None:
    bar.steps = bar.records = done
    bar.refresh()


def _document(file: Path, found: offline.StoreReport) -> dict[str, Any]:
    log = found.log
    return {
        "file": str(file),
        "shard": found.file.meta.get("shard_id"),
        "store_id": found.file.meta.get("store_id"),
        "rows": found.file.rows,
        "applied": found.file.applied.number if found.file.applied else None,
        "log": {
            "segments": log.segments,
            "bytes": log.bytes,
            "records": log.records,
            "first": log.first,
            "last": log.last.number,
            "durable": log.proven,
            "torn": log.torn.number if log.torn else None,
            "cut_to": log.cut_to,
            "damage": log.damage.members | {"detail": log.damage.detail} if log.damage else None,
        },
        "damaged": found.damaged,
        "findings": found.findings,
    }


def _tell(file: Path, found: offline.StoreReport) -> None:
    meta, applied = found.file.meta, found.file.applied
    say(f"{file}: shard {meta.get('shard_id', '?')}, store {meta.get('store_id', '?')}")
    say(f"  log   {_log_line(found.log)}")
    say(f"  file  {found.file.rows:,} rows, applied up to record {applied.number if applied else '?'}")
    for finding in found.findings:
        say(f"  damaged: {printable(finding)}")
    if found.damaged > len(found.findings):
        say(f"  … and {found.damaged - len(found.findings):,} more")
    if found.damaged:
        say("Restore this store from a copy of file and log taken together, and keep these files for examination.")
        say("Where there is none, the shard opens with what can be read, unless it says otherwise at its start.")
    else:
        say("All is as it was written.")


def _log_line(log: LogReport) -> str:
    if not log.segments:
        return "cannot be read"
    records = f"records {log.first} to {log.last.number}" if log.records else f"no records, up to {log.last.number}"
    torn = f", and a torn end behind it, which the next start cuts off (record {log.torn.number})" if log.torn else ""
    cut = f", an unfinished cut to {log.cut_to}" if log.cut_to is not None else ""
    return f"{records}, {log.segments} segments, {human_bytes(log.bytes)}{torn}{cut}"


# --- log --------------------------------------------------------------------------------------------------------------


@click.command("log")
@_of_file
@click.option("--after", type=click.IntRange(0), default=0, metavar="N", help="Only records behind number N.")
@click.option("--values", is_flag=True, help="Show the beginnings of values, too.")
def print_log(file: Path, as_json: bool, after: int, values: bool) -> None:
    """Print the records of the log beside FILE (shard-ID.db), oldest first.

    Records that were applied long ago are no more in the log. Nothing is
    changed. Refused while a process has the store.

    \b
    Exit codes: 0 printed up to the end; 1 a record is damaged, and named;
    2 the log could not be looked at.

    \b
    Example:
      kvstore store log data/shard-s1.db --after 1200
      kvstore store log data/shard-s1.db --json | tail -1
    """
    with _store(file, as_json):
        for logged in offline.records(file, after):
            record = decode_record(logged.entry.payload)
            if as_json:
                say_json(_record_document(logged, record, values))
            else:
                _tell_record(logged, record, values)


def _record_document(logged: Logged, record: CommitRecord, values: bool) -> dict[str, Any]:
    return {
        "number": logged.entry.number,
        "term": logged.entry.term,
        "file": str(logged.file),
        "offset": logged.offset,
        "checksum": f"{logged.entry.checksum:016x}",
        "durable": logged.durable,
        "clock": record.clock._asdict(),
        "rows": [_row_document(row, values) for row in record.rows],
        "cluster_map": record.cluster_map is not None,
        "freezes": None if record.freezes is None else {move: sorted(found) for move, found in record.freezes.items()},
        "dropped": record.dropped,
    }


def _row_document(row: Row, values: bool) -> dict[str, Any]:
    body = {"body": (row.body or b"").decode("utf-8", "replace")} if values else {}
    return {
        "kind": row.kind, "key": row.key, "partition": row.partition, "version": row.version,
        "expires_at_ms": row.expires_at_ms or None, "bytes": None if row.body is None else len(row.body),
        "intent": row.intent is not None, **body,
    }  # fmt: skip


def _tell_record(logged: Logged, record: CommitRecord, values: bool) -> None:
    extras = [
        *(["a cluster map"] if record.cluster_map is not None else []),
        *(["freezes"] if record.freezes is not None else []),
        *([f"partitions dropped: {len(record.dropped)}"] if record.dropped else []),
    ]
    what = ", ".join([f"{len(record.rows)} rows", *extras])
    say(f"{logged.entry.number}  {logged.file.name}:{logged.offset}  version clock {record.clock.version}  {what}")
    for row in record.rows:
        body = "deleted" if row.body is None else f"{len(row.body)} bytes"
        shown = f"  {printable((row.body or b'')[:_SHOWN_CHARS_MAX].decode('utf-8', 'replace'))}" if values else ""
        intent = ", intent of a transaction" if row.intent is not None else ""
        say(f"    {row.kind} {printable(row.key)[:_SHOWN_CHARS_MAX]}  version {row.version}, {body}{intent}{shown}")


# --- cut --------------------------------------------------------------------------------------------------------------


@click.command()
@_of_file
@click.option("--after", type=click.IntRange(0), required=True, metavar="N", help="The last record that stays.")
@click.option("--accept-loss", is_flag=True, required=True, help="What follows was acknowledged, and is lost.")
@click.option("--confirm", metavar="ID", help="The shard's id, instead of being asked for it.")
def cut(file: Path, as_json: bool, after: int, accept_loss: bool, confirm: str | None) -> None:
    """Cut the log beside FILE (shard-ID.db) behind record N, and lose the rest.

    The last way out, where a record of the log is damaged and there is no
    copy to restore: the shard then opens with all up to record N. Copy file
    and log away before. Refused while a process has the store.

    \b
    Exit codes: 0 cut; 1 not confirmed; 2 it could not be cut.

    \b
    Example:
      kvstore store check data/shard-s1.db
      kvstore store cut data/shard-s1.db --after 1233 --accept-loss
    """
    with _store(file, as_json):
        loss = offline.loss_of_cut(file, after)
        _ask(loss, confirm)
        aside = offline.cut(file, loss, Limits().log_segment_bytes)
        lost = max(0, loss.last - after)
        document = {"after": after, "lost": lost, "moved_aside": [str(path) for path in aside]}
        moved = f" The old log was moved aside: {', '.join(path.name for path in aside)}." if aside else ""
        emit(as_json, document, f"The log ends with record {after} now; {lost} records or more are lost.{moved}")


def _ask(loss: offline.Loss, confirm: str | None) -> None:
    """Ask for the shard's id. Raises Exit (1) if it is not given."""
    complain(
        f"kvstore: records {loss.first} to {loss.last} of shard {loss.shard_id} will be lost, and what was "
        "acknowledged with them. Versions and fencing tokens may be given out twice."
    )
    if confirm is None and sys.stdin.isatty():
        confirm = click.prompt("Type the id of the shard to go on", err=True)
    if confirm != loss.shard_id:
        complain(f"kvstore: nothing was done. --confirm {loss.shard_id} confirms it.")
        raise click.exceptions.Exit(EXIT_STORE_SAID_NO)
