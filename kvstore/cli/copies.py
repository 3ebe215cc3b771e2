"""cluster replicas, shard promote: how many copies of every key there are, and which one answers.

Owns: the commands' arguments, and what they say.
Promises: a command that is interrupted says that the change goes on.
Leaves to others: every decision (the controller), asking and following (`shards`).
"""

from __future__ import annotations

import click

from kvstore.cli.frame import talks_to_cluster
from kvstore.cli.shards import ClusterChange, run_change
from kvstore.config import REPLICAS_MAX

_no_wait = click.option("--no-wait", is_flag=True, help="Do not wait until it is done.")


@click.command()
@click.argument("number", metavar="N", type=click.IntRange(1, REPLICAS_MAX))
@_no_wait
@talks_to_cluster
def replicas(number: int, no_wait: bool, url: str, as_json: bool) -> None:
    """Keep N copies of every key (1 to 5), each on another node, and wait until they are in sync.

    The primary counts as one of them. While all N are in sync, N-1 of their
    disks may be lost and nothing acknowledged is lost. No call of any client
    fails during the change. Where there are fewer nodes than N, there are as
    many copies as nodes. Fewer copies are refused while a shard has no
    primary that answers.

    \b
    Exit codes: 0 all copies are there; 1 refused, or superseded; 130
    interrupted. With --json the last line is the change, as in
    GET /v1/changes/{id}.

    \b
    Example:
      kvstore cluster replicas 2
    """
    change = ClusterChange(
        None,
        f"replicas {number}",
        lambda kv, _: kv.replicate(number),
        lambda answer: f"there are to be {answer['replicas']} copies of every key",
        f"{number} {'copy' if number == 1 else 'copies'} of every key",
        moves=False,
    )
    run_change(change, False, no_wait, url, as_json)


@click.command()
@click.argument("shard_id", metavar="ID")
@click.option("--to", metavar="NODE", required=True, help="The node whose copy is to answer for the shard.")
@_no_wait
@talks_to_cluster
def promote(shard_id: str, to: str, no_wait: bool, url: str, as_json: bool) -> None:
    """Make the copy of shard ID on NODE its primary, and wait until it answers.

    The copy must be in sync. No call of any client fails, and the shard stays
    on that node: name its home (the node of its own name) to bring it back.

    \b
    Exit codes and --json: as for `kvstore cluster replicas`.

    \b
    Example:
      kvstore shard promote s1 --to s2
    """
    change = ClusterChange(
        shard_id,
        f"promote {shard_id}",
        lambda kv, _: kv.promote(shard_id, to),
        lambda answer: f"{shard_id} goes to node {answer['to']}",
        f"{shard_id} is served by node {to}",
        moves=False,
    )
    run_change(change, False, no_wait, url, as_json)
