"""The ring beside uhashring: look-ups per second, balance, and what a join moves.

Owns: this one comparison, `python -m loadtest.ring_benchmark`.
Promises: both rings get the same keys and shards; the rounds alternate, so that a busy moment of the machine
strikes both; every figure of time is a median.
Leaves to others: whole requests over HTTP (the other benchmarks of this folder).

A look-up is what a router does for each key: `owners[partition_of(key)]`, here the shard's id. The ring of
uhashring takes the key as text, ours as bytes: each gets the type that it takes, made beforehand.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import click
from uhashring import HashRing

from kvstore.placement.ring import ShardWeight, partition_of, place


def benchmark(*, shards: int, partitions: int, keys: int, rounds: int) -> dict[str, Any]:
    """Figures of both rings, and `ratio`: their time over ours for the same look-ups, the median of the rounds.

    `peak_over_mean` counts keys, and `peak_over_mean_partitions` what the ring decides: partitions.
    `moved_share` is the part of the keys whose shard changes when one joins; at least 1 / (shards + 1) must.

    Raises ValueError for `partitions` or `shards` that the ring refuses.
    """
    texts = [f"user:{number}:profile" for number in range(keys)]
    raw = [text.encode() for text in texts]
    ids = [f"s{number}" for number in range(1, shards + 2)]

    owners = place([ShardWeight(shard) for shard in ids[:-1]], partitions)
    owners_joined = place([ShardWeight(shard) for shard in ids], partitions, owners)
    theirs, theirs_joined = HashRing(nodes=ids[:-1]), HashRing(nodes=ids)

    seconds: dict[str, list[float]] = {"kvstore": [], "uhashring": []}
    for _ in range(rounds):
        seconds["kvstore"].append(_seconds_for_ours(owners, raw))
        seconds["uhashring"].append(_seconds_for_theirs(theirs.get_node, texts))

    key_partitions = [partition_of(key, partitions) for key in raw]
    found = {
        "kvstore": ([owners[at] for at in key_partitions], [owners_joined[at] for at in key_partitions]),
        "uhashring": (list(map(theirs.get_node, texts)), list(map(theirs_joined.get_node, texts))),
    }
    report: dict[str, Any] = {
        name: {
            "lookups_per_s": round(keys / median(seconds[name])),
            "peak_over_mean": round(_peak_over_mean(before, shards), 4),
            "moved_share": round(_moved_share(before, after), 4),
        }
        for name, (before, after) in found.items()
    }
    report["kvstore"]["peak_over_mean_partitions"] = round(_peak_over_mean(owners, shards), 4)
    report["moved_share_minimum"] = round(1 / (shards + 1), 4)
    pairs = zip(seconds["uhashring"], seconds["kvstore"], strict=True)
    report["ratio"] = round(median(theirs_s / ours_s for theirs_s, ours_s in pairs), 2)
    report["settings"] = {"shards": shards, "partitions": partitions, "keys": keys, "rounds": rounds}
    return report


def _seconds_for_ours(owners: Sequence[str], keys: Sequence[bytes]) -> float:
    partitions = len(owners)
    began = perf_counter()
    for key in keys:
        owners[partition_of(key, partitions)]
    return perf_counter() - began


def _seconds_for_theirs(get_node: Callable[[str], str], keys: Sequence[str]) -> float:
    began = perf_counter()
    for key in keys:
        get_node(key)
    return perf_counter() - began


def _peak_over_mean(owners: Sequence[str], shards: int) -> float:
    return max(Counter(owners).values()) * shards / len(owners)


def _moved_share(before: Sequence[str], after: Sequence[str]) -> float:
    return sum(old != new for old, new in zip(before, after, strict=True)) / len(before)


def _table(report: dict[str, Any]) -> str:
    lines = [f"{'':24}{'kvstore':>12}{'uhashring':>12}"]
    for name, form in (("lookups_per_s", ",.0f"), ("peak_over_mean", ".4f"), ("moved_share", ".4f")):
        ours, theirs = report["kvstore"][name], report["uhashring"][name]
        lines.append(f"{name:24}{format(ours, form):>12}{format(theirs, form):>12}")
    of_partitions = report["kvstore"]["peak_over_mean_partitions"]
    lines.append(f"{'  in partitions':24}{of_partitions:>12.4f}")
    lines.append(f"{'moved_share_minimum':24}{report['moved_share_minimum']:>12.4f}")
    lines.append(f"{'ratio':24}{report['ratio']:>12.2f}")
    return "\n".join(lines)


@click.command(epilog="Example: python -m loadtest.ring_benchmark --shards 8 --json")
@click.option("--shards", type=click.IntRange(1, 64), default=8, show_default=True)
@click.option("--partitions", type=int, default=4096, show_default=True, help="A power of two, 64 to 65536.")
@click.option("--keys", type=click.IntRange(1), default=50_000, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object in place of the table.")
def main(shards: int, partitions: int, keys: int, rounds: int, as_json: bool) -> None:
    """Compare the ring with uhashring's: look-ups per second, balance, and what a join moves."""
    try:
        report = benchmark(shards=shards, partitions=partitions, keys=keys, rounds=rounds)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--partitions") from error
    click.echo(json.dumps(report) if as_json else _table(report))
