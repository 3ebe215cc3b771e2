"""status, ring, explain: what the cluster says about itself, for people; and what a change would move.

Owns: tables and their figures (shares, peak to mean).
Promises: `--json` is what the router said; nothing that is not in it is shown as a fact.
Leaves to others: the facts (router), errors and exit codes (`frame`).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any

import click

from kvstore.cli.asking import call, talks_to_cluster
from kvstore.cli.frame import as_shown, emit, human_bytes, printable, report, reporting, say, say_json
from kvstore.cli.table import Column, Table
from kvstore.client import Client
from kvstore.errors import KvError

_WATCH_EVERY_S = 1.0
_BAR_CHARACTERS = 30
_BAR_CHARACTERS_MIN = 8
_MOVES_SHOWN_MAX = 12
_STATE_COLOURS = {"up": "32", "joining": "33", "leaving": "33", "down": "31;1"}

Document = Mapping[str, Any]


@click.command()
@click.option("--watch", is_flag=True, help="Show it again every second until Ctrl-C.")
@talks_to_cluster
def status(watch: bool, url: str, as_json: bool) -> None:
    """Show the shards, their state and what they hold, what moves between them, and how many transactions are in doubt:
    neither committed nor aborted, for how long at most.

    Of copies: the node of each primary that is not at home (s1 on s2), the
    nodes of the copies, which are in sync or how far they are, which shards
    have too few and what comes next, and the last failovers.

    With --json: GET /v1/cluster as it is (one line, with --watch one a second). Exit code 0 whenever the router
    answered, also when a shard is down.

    \b
    Example:
      kvstore status
      kvstore status --watch
      kvstore status --json | jq '.shards[] | select(.state != "up") | .id'
    """
    if watch:
        with reporting(as_json):
            try:
                asyncio.run(_watch(url, as_json))
            except KeyboardInterrupt:
                return  # that is how one ends it
        return

    async def work(kv: Client) -> None:
        document = await kv.cluster()
        if as_json:
            say_json(document)
        else:
            print_lines(partial(_status, document))

    call(url, as_json, work)


async def _watch(url: str, as_json: bool) -> None:
    if as_json or not sys.stdout.isatty():
        async with Client(url, retries=0) as kv:
            while True:
                await _show_once(kv, as_json)
                await asyncio.sleep(_WATCH_EVERY_S)
    from rich.live import Live
    from rich.text import Text

    async with Client(url, retries=0) as kv:
        with Live(auto_refresh=False, screen=True, redirect_stdout=False) as live:  # a stand-in has no encoding
            while True:
                try:
                    lines = _status(await kv.cluster(), *_terminal())
                except KvError as error:
                    lines = [printable(error.detail)]
                live.update(Text.from_ansi("\n".join(map(as_shown, lines)), no_wrap=True), refresh=True)
                await asyncio.sleep(_WATCH_EVERY_S)


async def _show_once(kv: Client, as_json: bool) -> None:
    """One round of a watch.
    An error is shown and the watch goes on, for it is there to see the recovery, too."""
    try:
        document = await kv.cluster()
    except KvError as error:
        report(error, as_json)
        return
    if as_json:
        say_json(document)
    else:
        print_lines(partial(_status, document))
    sys.stdout.flush()


def _status(document: Document, width: int | None, colour: bool) -> list[str]:
    """The shards, and below them what is said of copies and what moves."""
    lines = [*_title(document).splitlines(), "", *_fitting_shards(document, width, colour)]
    if any(shard["state"] == "down" for shard in document["shards"]):
        lines += ["", "(in parentheses: what was last known of a shard that is down; ?: nothing)"]
    return [*lines, *_replicas(document), *_moves(document, width, colour)]


def _fitting_shards(document: Document, width: int | None, colour: bool) -> list[str]:
    """With addresses as short as they have to be: all of a cluster begin alike."""
    lines = _shard_table(document, "").lines(width, colour=colour)
    if lines == _shard_table(document, "").lines(None, colour=colour):
        return lines
    return _shard_table(document, "http://").lines(width, colour=colour)


def _shard_table(document: Document, scheme: str) -> Table:
    shards = document["shards"]
    columns = [
        Column("shard"),
        Column("address"),
        Column("state", colours=_STATE_COLOURS),
        *(Column(name, right=True) for name in ("weight", "partitions", "keys", "bytes")),
        *([Column("copies")] if has_copies(document) else []),
    ]
    rows = [
        (
            _where(shard),
            printable(str(shard["url"])).removeprefix(scheme),
            str(shard["state"]),
            str(shard["weight"]),
            f"{shard['partitions']:,}",
            held(shard, "keys"),
            held(shard, "bytes", human_bytes),
            *([copies_text(shard)] if has_copies(document) else []),
        )
        for shard in shards
    ]
    partitions = f"{sum(shard['partitions'] for shard in shards):,}"
    sums = (f"{len(shards)} shards", "", "", "", partitions, _sum(shards, "keys"), _sum(shards, "bytes", human_bytes))
    return Table(columns, rows, (*sums, *([""] if has_copies(document) else [])))


def _where(shard: Document) -> str:
    """The shard, with the node that answers for it unless that is its home."""
    name, node = str(shard["id"]), str(shard.get("primary", shard["id"]))
    return printable(name if node == name else f"{name} on {node}")


def has_copies(document: Document) -> bool:
    """There are copies beside the primaries, or are to be."""
    return document["replicas"] > 1 or any(shard.get("copies") for shard in document["shards"])


def copies_text(shard: Document) -> str:
    """The nodes of the shard's copies, each with what it lacks: "s2 in sync, s3 joining 40%"."""
    return ", ".join(map(_copy_text, shard.get("copies") or ())) or "none"


def _copy_text(copy: Document) -> str:
    text = f"{printable(str(copy['node']))} {'in sync' if copy['state'] == 'in-sync' else 'joining'}"
    if total := copy.get("rows_total"):
        return f"{text} {copy['rows_done'] / total:.0%}"
    return f"{text}, {copy['lag']:,} behind" if copy.get("lag") else text


def _replicas(document: Document) -> list[str]:
    """What is under-replicated and what comes next; the last failovers."""
    lines = []
    if under := document.get("under_replicated"):
        lines += ["", "fewer copies than asked for"]
        lines += [
            f"{printable(str(each['shard']))}: {each['in_sync']} of {each['wanted']} in sync; waits for "
            f"{printable(str(each['awaited']))}"
            for each in under[:_MOVES_SHOWN_MAX]
        ]
        if hidden := under[_MOVES_SHOWN_MAX:]:
            lines.append(f"and {len(hidden):,} more shards")
    if failovers := document.get("failovers"):
        lines += ["", "last failovers"]
        lines += [
            f"{_clock(str(each['at']))} shard {printable(str(each['shard']))}: {printable(str(each['cause']))}"
            for each in failovers
        ]
    return lines


def _clock(at: str) -> str:
    """A moment as RFC 3339 has it, by the clock of this machine, to the second."""
    try:
        return datetime.fromisoformat(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return printable(at)


def _grouped(count: float) -> str:
    return f"{count:,}"


def held(shard: Document, name: str, form: Callable[[Any], str] = _grouped) -> str:
    """A figure of a shard.
    In parentheses if it is the last one known of a shard that is down now."""
    figure = known(shard.get(name), form)
    return f"({figure})" if shard["state"] == "down" and figure != "?" else figure


def _sum(shards: Sequence[Document], name: str, form: Callable[[Any], str] = _grouped) -> str:
    figure = form(sum(int(shard.get(name) or 0) for shard in shards))
    return f"({figure})" if any(shard["state"] == "down" for shard in shards) else figure


def _moves(document: Document, width: int | None, colour: bool) -> list[str]:
    """Those under way first; of those that are queued only so many as a screen holds."""
    moves = sorted(document.get("moves") or [], key=lambda move: move["step"] == "queued")
    if not moves:
        return []
    names = ("from", "to", "partitions", "step", "done", "write pause", "waits for")
    columns = [Column(name, right=name in ("partitions", "done", "write pause")) for name in names]
    rows = [
        (
            printable(str(move["from"])),
            printable(str(move["to"])),
            f"{move['partitions']:,}",
            printable(str(move["step"])),
            f"{move['keys_done'] / move['keys_total']:.0%}" if move["keys_total"] else "",
            f"{move['write_pause_ms']:,.0f} ms" if move["write_pause_ms"] else "",
            printable(str(move["detail"])),
        )
        for move in moves[:_MOVES_SHOWN_MAX]
    ]
    lines = ["", "moves", *Table(columns, rows).lines(width, colour=colour)]
    if hidden := moves[_MOVES_SHOWN_MAX:]:
        lines.append(f"and {len(hidden):,} more, {sum(move['partitions'] for move in hidden):,} partitions")
    return lines


def _title(document: Document) -> str:
    title = f"cluster {document['cluster_id']}, epoch {document['epoch']}, replicas {document['replicas']}"
    moves = document.get("moves") or []
    title += f", {len(moves):,} moves under way" if moves else ""
    wanted = document.get("wanted") or []
    title += f", {', '.join(wanted)} being started" if wanted else ""
    ending = document.get("ending") or []
    title += f", {', '.join(ending)} ending" if ending else ""
    lines = [title, _in_doubt(document.get("in_doubt") or {})]
    if "advice" in document:
        lines.append(printable(str(document["advice"])))
    return "\n".join(lines)


def _in_doubt(facts: Document) -> str:
    count, oldest_s = facts.get("count") or 0, facts.get("oldest_s")
    if not count:
        return "no transaction in doubt"
    transactions = "1 transaction" if count == 1 else f"{count:,} transactions"
    oldest = "" if oldest_s is None else f", the oldest for {oldest_s:.1f} s"
    return f"{transactions} in doubt{oldest}"


def known(count: Any, form: Callable[[Any], str]) -> str:
    """A shard that is down cannot say what it holds."""
    return "?" if count is None else form(count)


@click.command()
@talks_to_cluster
def ring(url: str, as_json: bool) -> None:
    """Show how evenly the ring spreads partitions and keys over the shards.

    \b
    A share is compared with what the shard's weight asks for:
    peak/mean 1.00 is perfectly even. With --json: {"partitions",
    "shards":[{"id","weight","partitions","share","keys"}],
    "partitions_peak_to_mean","keys_peak_to_mean"};
    "keys" is null where a shard is down.

    \b
    Example:
      kvstore ring
    """

    async def work(kv: Client) -> None:
        document = spread(await kv.cluster())
        if as_json:
            say_json(document)
        else:
            print_lines(lambda width, _: _ring_table(document, width))
            say(f"peak/mean: partitions {_ratio(document, 'partitions')}, keys {_ratio(document, 'keys')}")

    call(url, as_json, work)


def spread(document: Document) -> dict[str, Any]:
    """The figures of `kvstore ring` from GET /v1/cluster."""
    shards = [
        {
            "id": shard["id"],
            "weight": shard["weight"],
            "partitions": shard["partitions"],
            "share": shard["partitions"] / document["partitions"],
            "keys": None if shard["state"] == "down" else shard.get("keys"),
        }
        for shard in document["shards"]
    ]
    return {
        "partitions": document["partitions"],
        "shards": shards,
        "partitions_peak_to_mean": _peak_to_mean(shards, "partitions"),
        "keys_peak_to_mean": _peak_to_mean(shards, "keys"),
    }


def _peak_to_mean(shards: Sequence[Document], name: str) -> float | None:
    """The most loaded shard in relation to its fair part (by weight).
    None if there is nothing, or not all is known."""
    if any(shard[name] is None for shard in shards):
        return None
    total = sum(shard[name] for shard in shards)
    weights = sum(shard["weight"] for shard in shards)
    if not total or not weights:
        return None
    peak = max(shard[name] / shard["weight"] for shard in shards if shard["weight"])
    return float(peak * weights / total)


def _ratio(document: Document, name: str) -> str:
    ratio = document[f"{name}_peak_to_mean"]
    return "unknown" if ratio is None else f"{ratio:.3f}"


def _ring_table(document: Document, width: int | None) -> list[str]:
    """With a bar of each share, as far as the terminal has room for it."""
    names = ("shard", "weight", "partitions", "share", "keys")
    columns = [Column(name, right=name != "shard") for name in names]
    shards = document["shards"]
    rows = [
        (
            printable(str(shard["id"])),
            str(shard["weight"]),
            f"{shard['partitions']:,}",
            f"{shard['share']:.2%}",
            known(shard["keys"], _grouped),
        )
        for shard in shards
    ]
    plain = Table(columns, rows).lines(width)
    room = _BAR_CHARACTERS if width is None else min(_BAR_CHARACTERS, width - max(map(len, plain)) - 2)
    if room < _BAR_CHARACTERS_MIN:
        return plain
    peak = max((shard["share"] for shard in shards), default=1) or 1
    bars = ["█" * round(room * shard["share"] / peak) for shard in shards]
    return Table([*columns, Column("")], [(*row, bar) for row, bar in zip(rows, bars, strict=True)]).lines(width)


@click.command()
@click.argument("key")
@talks_to_cluster
def explain(key: str, url: str, as_json: bool) -> None:
    """Show the way of KEY: its hash, partition, walk over the ring, owner, value, lock and intent.

    An intent is that of an unfinished transaction which is about to write the key or has read it.

    With --json: GET /v1/explain/KEY as it is. A key that is not there has a way, too.

    \b
    Example:
      kvstore explain config/theme
    """

    async def work(kv: Client) -> None:
        document = await kv.explain(key)
        emit(as_json, document, "\n".join(_facts(document)))

    call(url, as_json, work)


def _facts(document: Document, indent: str = "") -> list[str]:
    """Names and values under one another; what is nested is indented."""
    width = max((len(name) for name in document), default=0)
    lines = []
    for name, fact in document.items():
        if isinstance(fact, dict) and fact:
            lines.append(f"{indent}{printable(name)}")
            lines += _facts(fact, indent + "  ")
        else:
            lines.append(f"{indent}{printable(name):<{width}}  {_fact(fact)}")
    return lines


def _fact(fact: Any) -> str:
    if fact is None:
        return "none"
    if isinstance(fact, bool):
        return "yes" if fact else "no"
    if isinstance(fact, list):
        return printable(" → ".join(str(part) for part in fact)) or "none"
    return printable(str(fact))


def print_plan(plan: Document) -> None:
    """What would move, from POST /v1/shards?plan=true and its like."""
    if not plan["moves"]:
        say("nothing would move")
        return
    columns = [Column("from"), Column("to"), *(Column(name, right=True) for name in ("partitions", "keys", "bytes"))]
    rows = [
        (
            printable(str(move["from"])),
            printable(str(move["to"])),
            f"{move['partitions']:,}",
            known(move["keys"], _grouped),
            known(move["bytes"], human_bytes),
        )
        for move in plan["moves"]
    ]
    sums = ("sum", "", f"{plan['partitions']:,}", known(plan["keys"], _grouped), known(plan["bytes"], human_bytes))
    say("what would move; keys and bytes are estimated")
    print_lines(lambda width, colour: Table(columns, rows, sums).lines(width, colour=colour))


def print_lines(render: Callable[[int | None, bool], list[str]]) -> None:
    """On standard output: what `render` makes of the width (None: any) and of whether there are colours."""
    for line in render(*_terminal()):
        say(line)


def _terminal() -> tuple[int | None, bool]:
    """The width of the terminal, None without one; whether it shows colours (https://no-color.org)."""
    if not sys.stdout.isatty():
        return None, False
    colour = not os.environ.get("NO_COLOR") and os.environ.get("TERM", "") not in ("", "dumb")
    return shutil.get_terminal_size().columns, colour
