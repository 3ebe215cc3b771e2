"""status, ring, explain: what the cluster says about itself, for people; and what a change would move.

Owns: tables and their figures (shares, peak to mean).
Promises: `--json` is what the router said; nothing that is not in it is shown as a fact.
Leaves to others: the facts (router), errors and exit codes (`frame`).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from kvstore.cli.frame import (
    call,
    emit,
    human_bytes,
    printable,
    report,
    reporting,
    say,
    say_json,
    talks_to_cluster,
)
from kvstore.client import Client
from kvstore.errors import KvError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_WATCH_EVERY_S = 1.0
_PLAIN_WIDTH = 160
_MOVES_SHOWN_MAX = 12
_STATE_STYLES = {"up": "green", "joining": "yellow", "leaving": "yellow", "down": "bold red"}


@click.command()
@click.option("--watch", is_flag=True, help="Show it anew every second until Ctrl-C.")
@talks_to_cluster
def status(watch: bool, url: str, as_json: bool) -> None:
    """Show the shards, their state and what they hold, what moves between them, and how many transactions are in doubt:
    neither committed nor aborted, for how long at most.

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
            print_table(_status(document))

    call(url, as_json, work)


async def _watch(url: str, as_json: bool) -> None:
    if as_json or not sys.stdout.isatty():
        async with Client(url, retries=0) as kv:
            while True:
                await _show_once(kv, as_json)
                await asyncio.sleep(_WATCH_EVERY_S)
    from rich.live import Live

    async with Client(url, retries=0) as kv:
        with Live(auto_refresh=False, screen=True) as live:
            while True:
                try:
                    live.update(_status(await kv.cluster()), refresh=True)
                except KvError as error:
                    live.update(printable(error.detail), refresh=True)
                await asyncio.sleep(_WATCH_EVERY_S)


async def _show_once(kv: Client, as_json: bool) -> None:
    """One round of a watch: an error is shown and the watch goes on, for it is there to see the recovery, too."""
    try:
        document = await kv.cluster()
    except KvError as error:
        report(error, as_json)
        return
    if as_json:
        say_json(document)
    else:
        print_table(_status(document))
    sys.stdout.flush()


def _status(document: Mapping[str, Any]) -> RenderableType:
    """The shards, and below them what moves."""
    from rich.console import Group

    shards = _shard_table(document)
    return Group(shards, _move_table(document)) if document.get("moves") else shards


def _shard_table(document: Mapping[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    shards: Sequence[Mapping[str, Any]] = document["shards"]
    table = Table(title=Text(_title(document)), title_justify="left", show_footer=True)
    totals = {name: sum(int(shard.get(name) or 0) for shard in shards) for name in ("partitions", "keys", "bytes")}
    table.add_column("shard", footer=f"{len(shards)} shards")
    table.add_column("address")
    table.add_column("state")
    table.add_column("weight", justify="right")
    table.add_column("partitions", justify="right", footer=f"{totals['partitions']:,}")
    table.add_column("keys", justify="right", footer=f"{totals['keys']:,}")
    table.add_column("bytes", justify="right", footer=human_bytes(totals["bytes"]))
    for shard in shards:
        state = str(shard["state"])
        table.add_row(
            Text(str(shard["id"])),
            Text(str(shard["url"])),
            Text(state, style=_STATE_STYLES.get(state, "")),
            str(shard["weight"]),
            f"{shard['partitions']:,}",
            known(shard.get("keys"), lambda count: f"{count:,}"),
            known(shard.get("bytes"), human_bytes),
        )
    return table


def _move_table(document: Mapping[str, Any]) -> Table:
    """Those under way first; of those that are queued only so many as a screen holds."""
    from rich.table import Table
    from rich.text import Text

    moves = sorted(document["moves"], key=lambda move: move["step"] == "queued")
    hidden = moves[_MOVES_SHOWN_MAX:]
    table = Table(title="moves", title_justify="left", caption_justify="left")
    if hidden:
        table.caption = f"and {len(hidden):,} more, {sum(move['partitions'] for move in hidden):,} partitions"
    for name in ("from", "to", "partitions", "step", "done", "write pause", "waits for"):
        table.add_column(name, justify="right" if name in ("partitions", "done", "write pause") else "left")
    for move in moves[:_MOVES_SHOWN_MAX]:
        done = f"{move['keys_done'] / move['keys_total']:.0%}" if move["keys_total"] else ""
        pause = f"{move['write_pause_ms']:,.0f} ms" if move["write_pause_ms"] else ""
        table.add_row(
            Text(str(move["from"])),
            Text(str(move["to"])),
            f"{move['partitions']:,}",
            Text(str(move["step"])),
            done,
            pause,
            Text(printable(str(move["detail"]))),
        )
    return table


def _title(document: Mapping[str, Any]) -> str:
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


def _in_doubt(facts: Mapping[str, Any]) -> str:
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
    A share is compared with what the shard's weight asks for: peak/mean 1.00 is perfectly even.
    With --json: {"partitions","shards":[{"id","weight","partitions","share","keys"}],
    "partitions_peak_to_mean","keys_peak_to_mean"}.

    \b
    Example:
      kvstore ring
    """

    async def work(kv: Client) -> None:
        document = spread(await kv.cluster())
        if as_json:
            say_json(document)
        else:
            print_table(_ring_table(document))
            say(f"peak/mean: partitions {_ratio(document, 'partitions')}, keys {_ratio(document, 'keys')}")

    call(url, as_json, work)


def spread(document: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of `kvstore ring` from GET /v1/cluster."""
    shards = [
        {
            "id": shard["id"],
            "weight": shard["weight"],
            "partitions": shard["partitions"],
            "share": shard["partitions"] / document["partitions"],
            "keys": shard.get("keys"),
        }
        for shard in document["shards"]
    ]
    return {
        "partitions": document["partitions"],
        "shards": shards,
        "partitions_peak_to_mean": _peak_to_mean(shards, "partitions"),
        "keys_peak_to_mean": _peak_to_mean(shards, "keys"),
    }


def _peak_to_mean(shards: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The most loaded shard in relation to its fair part (by weight); None if there is nothing, or not all is known."""
    if any(shard[name] is None for shard in shards):
        return None
    total = sum(shard[name] for shard in shards)
    weights = sum(shard["weight"] for shard in shards)
    if not total or not weights:
        return None
    peak = max(shard[name] / shard["weight"] for shard in shards if shard["weight"])
    return float(peak * weights / total)


def _ratio(document: Mapping[str, Any], name: str) -> str:
    ratio = document[f"{name}_peak_to_mean"]
    return "unknown" if ratio is None else f"{ratio:.3f}"


def _ring_table(document: Mapping[str, Any]) -> Table:
    from rich.bar import Bar
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in ("shard", "weight", "partitions", "share", "keys"):
        table.add_column(name, justify="left" if name == "shard" else "right")
    table.add_column("", width=30)
    peak = max((shard["share"] for shard in document["shards"]), default=1) or 1
    for shard in document["shards"]:
        table.add_row(
            Text(str(shard["id"])),
            str(shard["weight"]),
            f"{shard['partitions']:,}",
            f"{shard['share']:.2%}",
            known(shard["keys"], lambda count: f"{count:,}"),
            Bar(peak, 0, shard["share"], width=30),
        )
    return table


@click.command()
@click.argument("key")
@talks_to_cluster
def explain(key: str, url: str, as_json: bool) -> None:
    """Show the way of KEY: its hash, its partition, the walk over the ring, its owner, what is stored there, who holds
    its lock, and which unfinished transaction is about to write it or has read it (intent).

    With --json: GET /v1/explain/KEY as it is. A key that is not there has a way, too.

    \b
    Example:
      kvstore explain config/theme
    """

    async def work(kv: Client) -> None:
        document = await kv.explain(key)
        emit(as_json, document, "\n".join(_facts(document)))

    call(url, as_json, work)


def _facts(document: Mapping[str, Any], indent: str = "") -> list[str]:
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


def print_plan(plan: Mapping[str, Any]) -> None:
    """What would move, from POST /v1/shards?plan=true and its like."""
    from rich.table import Table
    from rich.text import Text

    if not plan["moves"]:
        say("nothing would move")
        return
    table = Table(title="what would move; keys and bytes are estimated", title_justify="left", show_footer=True)
    sums = [f"{plan['partitions']:,}", known(plan["keys"], lambda n: f"{n:,}"), known(plan["bytes"], human_bytes)]
    table.add_column("from", footer="sum")
    table.add_column("to")
    for name, total in zip(("partitions", "keys", "bytes"), sums, strict=True):
        table.add_column(name, justify="right", footer=total)
    for move in plan["moves"]:
        table.add_row(
            Text(str(move["from"])),
            Text(str(move["to"])),
            f"{move['partitions']:,}",
            known(move["keys"], lambda count: f"{count:,}"),
            known(move["bytes"], human_bytes),
        )
    print_table(table)


def print_table(table: RenderableType) -> None:
    """On standard output, in the width of the terminal."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=_PLAIN_WIDTH)
    console.print(table)
