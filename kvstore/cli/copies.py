"""cluster replicas, shard promote: how many copies of every key there are, and which one answers.

Owns: the commands' arguments, and what they say.
Promises: a command that is interrupted says that the change goes on.
Leaves to others: every decision (the controller), asking and following (`shards`).
"""

from __future__ import annotations

import click

from kvstore.cli.asking import call, talks_to_cluster
from kvstore.cli.frame import EXIT_STORE_SAID_NO, complain
from kvstore.cli.shards import ClusterChange, run_change
from kvstore.client import Client
from kvstore.config import REPLICAS_MAX
from kvstore.errors import ChangeRefused, KvError, NotFound

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
    Exit codes: 0 all copies are there, or as many as there are nodes; 1
    refused, or superseded; 130 interrupted. With --json the last line is
    the change, as in GET /v1/changes/{id}.

    \b
    Example:
      kvstore cluster replicas 2
    """
    change = ClusterChange(
        None,
        f"replicas {number}",
        lambda kv, _: kv.replicate(number),
        lambda answer: f"there are to be {answer['replicas']} copies of every key",
        "",
        moves=False,
    )
    run_change(change, False, no_wait, url, as_json)


@click.command()
@click.argument("shard_id", metavar="ID")
@click.option("--to", metavar="NODE", required=True, help="The node whose copy is to answer for the shard.")
@click.option("--accept-loss", is_flag=True, help="Although that copy is not in sync: what it lacks is lost.")
@click.option("--confirm", metavar="ID", help="With --accept-loss, for programs: the id of the shard again.")
@_no_wait
@talks_to_cluster
def promote(
    shard_id: str, to: str, accept_loss: bool, confirm: str | None, no_wait: bool, url: str, as_json: bool
) -> None:
    """Make the copy of shard ID on NODE its primary, and wait until it answers.

    The copy must be in sync. No call of any client fails, and the shard stays
    on that node: name its home (the node of its own name) to bring it back.

    With --accept-loss, when the disks of the primary and of all copies in sync
    are lost, an older copy goes on. What it lacks was acknowledged and is lost
    for good, also if those nodes return; transactions of that time may be done
    in part. You are told how old it is, and asked for the shard's id. Refused
    while the primary or a copy in sync is heard.

    \b
    Exit codes and --json: as for `kvstore cluster replicas`.

    \b
    Example:
      kvstore shard promote s1 --to s2
      kvstore shard promote s1 --to s3 --accept-loss
    """
    if confirm is not None and not accept_loss:
        raise click.UsageError("--confirm goes with --accept-loss")
    if accept_loss:
        confirm = _confirmed(shard_id, to, confirm, url, as_json)
    change = ClusterChange(
        shard_id,
        f"promote {shard_id}",
        lambda kv, _: (
            kv.promote(shard_id, to) if confirm is None else kv.promote_with_loss(shard_id, to, confirm=confirm)
        ),
        lambda answer: f"{shard_id} goes to node {answer['to']}",
        f"{shard_id} is served by node {to}",
        moves=False,
    )
    run_change(change, False, no_wait, url, as_json)


def _confirmed(shard_id: str, to: str, confirm: str | None, url: str, as_json: bool) -> str:
    """The shard's id, typed again; what would be lost is told before."""
    if confirm is None:
        refused = call(url, as_json, lambda kv: _loss(kv, shard_id, to))
        complain(refused.detail.partition(" If that is meant")[0])
        if "number" not in refused.members:
            raise click.exceptions.Exit(EXIT_STORE_SAID_NO)
        confirm = str(click.prompt("Type the id of the shard to go on", err=True))
    if confirm != shard_id:
        raise click.UsageError(f"{confirm!r} is not {shard_id!r}: nothing was changed")
    return confirm


async def _loss(kv: Client, shard_id: str, to: str) -> KvError:
    """What the controller says of it, which it refuses unconfirmed."""
    try:
        await kv.promote_with_loss(shard_id, to)
    except (ChangeRefused, NotFound) as refused:
        return refused
    raise AssertionError("the controller takes it only with the shard's id")
