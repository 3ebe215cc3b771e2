"""The ring beside uhashring: look-ups per second, balance, and what a join moves.

Owns: this one comparison, `python -m loadtest.ring_benchmark`.
Promises: both rings get the same keys and shards; the rounds alternate, so that a busy moment of the machine
strikes both; every figure of time is a median.
Leaves to others: whole requests over HTTP (the other benchmarks of this folder).

A look-up is what a router does for each key: `owners[partition_of(key)]`, here the shard's id. The ring of
uhashring takes the key as text, this one as bytes: each gets the type that it takes, made beforehand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import click
from uhashring import HashRing

from kvstore.placement.ring import ShardWeight, partition_of, place


def _seconds(look_up: Callable[[Any], str], keys: Sequence[Any]) -> float:
    began_s = perf_counter()
    for key in keys:
        look_up(key)
    return perf_counter() - began_s


def _peak_over_mean(owners: Sequence[str], shards: int) -> float:
    return max(Counter(owners).values()) * shards / len(owners)


@click.command(epilog="Example: python -m loadtest.ring_benchmark --shards 8")
@click.option("--shards", type=click.IntRange(1, 64), default=8, show_default=True)
@click.option("--partitions", type=int, default=4096, show_default=True, help="A power of two, 64 to 65536.")
@click.option("--keys", type=click.IntRange(1), default=50_000, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
def main(shards: int, partitions: int, keys: int, rounds: int) -> None:
    """Compare the ring with uhashring's: look-ups per second, balance, and what a join moves."""
    texts = [f"user:{number}:profile" for number in range(keys)]
    ids = [f"s{number}" for number in range(1, shards + 2)]
    try:
        owners = place([ShardWeight(shard) for shard in ids[:-1]], partitions)
        joined = place([ShardWeight(shard) for shard in ids], partitions, owners)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--partitions") from error
    theirs, theirs_joined = HashRing(nodes=ids[:-1]), HashRing(nodes=ids)
    raw = [text.encode() for text in texts]
    times_s = [
        (_seconds(lambda key: owners[partition_of(key, partitions)], raw), _seconds(theirs.get_node, texts))
        for _ in range(rounds)
    ]
    placed = [partition_of(key, partitions) for key in raw]
    found = {
        "kvstore": ([owners[at] for at in placed], [joined[at] for at in placed]),
        "uhashring": ([theirs.get_node(text) for text in texts], [theirs_joined.get_node(text) for text in texts]),
    }
    click.echo(f"{'':12}{'look-ups/s':>12}{'peak/mean':>12}{'moved share':>14}")
    for number, (name, (before, after)) in enumerate(found.items()):
        per_s = keys / median(times[number] for times in times_s)
        moved = sum(old != new for old, new in zip(before, after, strict=True)) / keys
        click.echo(f"{name:12}{per_s:>12,.0f}{_peak_over_mean(before, shards):>12.4f}{moved:>14.4f}")
    ratio = median(theirs_s / ours_s for ours_s, theirs_s in times_s)
    click.echo(
        f"look-ups: {ratio:.1f} times uhashring's; of partitions peak/mean {_peak_over_mean(owners, shards):.4f};"
    )
    click.echo(f"a join must move {1 / (shards + 1):.4f} of the keys")


if __name__ == "__main__":
    main()
