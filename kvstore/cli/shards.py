"""shard add, remove, weight, rebalance, cancel, list: who keeps which part of the keys, changed while the load runs.

Owns: the commands' arguments, what they tell people and programs, how they end.
Promises: a command that is interrupted says that the change goes on, and how to stop it.
Leaves to others: every decision (the controller), following a change (`change`), tables (`cluster`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import click

from kvstore.cli.asking import call, checked_url, talks_to_cluster
from kvstore.cli.change import follow
from kvstore.cli.cluster import copies_text, has_copies, held, print_plan
from kvstore.cli.frame import (
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
from kvstore.cli.move_progress import move_progress
from kvstore.client import Client
from kvstore.errors import BadBody, BadParameter, ChangeRefused, ForeignData, KvError, NotFound, OutcomeUnknown

_WEIGHT = click.IntRange(1, 1000)
_WATCH_TIMEOUT_S = 5.0

Answer = Mapping[str, Any]
F = TypeVar("F", bound=Callable[..., Any])


def _changes(command: F) -> F:
    """The options `--plan` and `--no-wait`."""
    plan = click.option("--plan", is_flag=True, help="Only show what would move; change nothing.")
    no_wait = click.option("--no-wait", is_flag=True, help="Do not wait until all has moved.")
    return plan(no_wait(talks_to_cluster(command)))


def _checked_shard_url(context: click.Context, parameter: click.Parameter, url: str | None) -> str | None:
    return None if url is None else checked_url(context, parameter, url)


class ClusterChange(NamedTuple):
    """One command: what it asks for, and how it says what comes of it.

    `ask` is called with `plan`. `done` names the state at the end, as in "s5 is up"; without it the change itself says
    so. `weight`: of a shard that is added. `moves`: partitions may have to move for it.
    """

    shard_id: str | None
    label: str
    ask: Callable[[Client, bool], Awaitable[Answer]]
    taken: Callable[[Answer], str]
    done: str
    weight: int | None = None
    moves: bool = True


@click.command()
@click.argument("shard_id", metavar="ID")
@click.option(
    "--shard-url",
    metavar="URL",
    callback=_checked_shard_url,
    help="Where it serves already [default: the running `kvstore up` starts it].",
)
@click.option("--weight", type=_WEIGHT, default=1, show_default=True, help="Its share in proportion to the others'.")
@_changes
def add(shard_id: str, shard_url: str | None, weight: int, plan: bool, no_wait: bool, url: str, as_json: bool) -> None:
    """Add shard ID to the running cluster, and wait until its share of the keys has moved to it.

    No call of any client fails during it. Ctrl-C leaves the moves running; `kvstore status` shows them and
    `kvstore shard cancel` stops them, and the same command again waits for them. Without --shard-url the running
    `kvstore up` starts its process.

    \b
    Exit codes: 0 the shard is up and its share has moved; 1 refused, cancelled
    or superseded; 130 interrupted. With --json the last line is the change, as
    in GET /v1/changes/{id}.

    \b
    Example:
      kvstore shard add s5 --plan
      kvstore shard add s5
      kvstore shard add s6 --shard-url http://10.0.0.7:9101 --weight 2
    """

    def taken(answer: Answer) -> str:
        return f"{shard_id} is {'being started by `kvstore up`' if answer['state'] == 'wanted' else 'joining'}"

    change = ClusterChange(
        shard_id,
        f"add {shard_id}",
        lambda kv, only_plan: kv.add_shard(shard_id, shard_url, weight=weight, plan=only_plan),
        taken,
        f"{shard_id} is up",
        weight,
    )
    run_change(change, plan, no_wait, url, as_json)


@click.command()
@click.argument("shard_id", metavar="ID")
@click.option("--lost", is_flag=True, help="Its disk is lost: give up all that it has.")
@click.option("--confirm", metavar="ID", help="With --lost, for programs: the id of the shard again.")
@_changes
def remove(shard_id: str, lost: bool, confirm: str | None, plan: bool, no_wait: bool, url: str, as_json: bool) -> None:
    """Move all that shard ID has to the others, take it out of the cluster and end its process.

    No call of any client fails during it. Its file is kept as shard-ID.db.removed beside where it was. A process that
    `kvstore up` did not start goes on, without keys: end it yourself. The last shard cannot be removed.

    With --lost the shard's disk is taken for lost, and you are asked for its id again. Its partitions are reopened,
    empty, by the other shards, which must all be up for it. What was acknowledged there is gone for good; transactions
    whose first key was there may be done in part; Idempotency-Keys that it kept run again; its locks end early. Should
    its file come back, it is refused for ever.

    \b
    Exit codes and --json: as for `kvstore shard add`.

    \b
    Example:
      kvstore shard remove s2
      kvstore shard remove s3 --lost
    """
    if lost:
        _give_up(shard_id, confirm, plan, no_wait, url, as_json)
        return
    if confirm is not None:
        raise click.UsageError("--confirm goes with --lost")
    change = ClusterChange(
        shard_id,
        f"remove {shard_id}",
        lambda kv, only_plan: kv.remove_shard(shard_id, plan=only_plan),
        lambda answer: f"{shard_id} is {'not wanted any more' if answer['state'] == 'gone' else 'leaving'}",
        f"{shard_id} has left",
    )
    run_change(change, plan, no_wait, url, as_json)


def _give_up(shard_id: str, confirm: str | None, plan: bool, no_wait: bool, url: str, as_json: bool) -> None:
    if plan:
        raise click.UsageError("--plan does not go with --lost: nothing moves")
    if confirm is None:
        _tell_loss(call(url, as_json, lambda kv: _loss(kv, shard_id)))
        confirm = str(click.prompt("Type its id to give it up", err=True))
    if confirm != shard_id:
        raise click.UsageError(f"{confirm!r} is not {shard_id!r}: nothing was changed")
    change = ClusterChange(
        shard_id,
        f"give up {shard_id}",
        lambda kv, _: kv.give_up_shard(shard_id, confirm=shard_id),
        lambda answer: f"{shard_id} is given up with {answer['partitions']} partitions",
        f"{shard_id} is given up, and its partitions are open",
    )
    run_change(change, plan, no_wait, url, as_json)


async def _loss(kv: Client, shard_id: str) -> KvError:
    """What the controller says of giving the shard up, which it refuses unconfirmed. Raises NotFound, Unavailable."""
    try:
        await kv.give_up_shard(shard_id, confirm="")
    except ChangeRefused as refused:
        return refused
    raise NotFound(f"there is no shard {shard_id}.", next_step="`kvstore shard list` shows them.")


def _tell_loss(refused: KvError) -> None:
    complain(refused.detail.partition(" If that is meant")[0])
    for transaction in refused.members.get("transactions", ()):
        complain(f"  transaction {printable(transaction['id'])}, first key {printable(transaction['anchor'])}")


@click.command()
@click.argument("shard_id", metavar="ID")
@click.argument("weight", metavar="N", type=_WEIGHT)
@_changes
def weight(shard_id: str, weight: int, plan: bool, no_wait: bool, url: str, as_json: bool) -> None:
    """Change the weight of shard ID to N (1 to 1000), and wait until the keys lie accordingly.

    A shard's share of the keys is in proportion to its weight.

    \b
    Exit codes and --json: as for `kvstore shard add`.

    \b
    Example:
      kvstore shard weight s1 2
    """
    change = ClusterChange(
        shard_id,
        f"weight of {shard_id}",
        lambda kv, only_plan: kv.weigh_shard(shard_id, weight, plan=only_plan),
        lambda _: f"{shard_id} has weight {weight}",
        f"{shard_id} has weight {weight}, and its share",
    )
    run_change(change, plan, no_wait, url, as_json)


@click.command()
@_changes
def rebalance(plan: bool, no_wait: bool, url: str, as_json: bool) -> None:
    """Move keys until they lie as the present shards and weights ask for: after a cancel, for example.

    \b
    Exit codes and --json: as for `kvstore shard add`.

    \b
    Example:
      kvstore shard rebalance --plan
      kvstore shard rebalance
    """
    change = ClusterChange(
        None,
        "rebalance",
        lambda kv, only_plan: kv.rebalance(plan=only_plan),
        lambda _: "the moves are planned",
        "the shards have their shares",
    )
    run_change(change, plan, no_wait, url, as_json)


@click.command()
@talks_to_cluster
def cancel(url: str, as_json: bool) -> None:
    """Stop all that is moving. What has moved stays where it is; no key is lost, and no call fails.

    A shard that was being removed stays. One that was being added stays if it has got anything yet, with that.
    `kvstore shard rebalance` takes up the rest.

    \b
    With --json: the cancelling as a change, as in GET /v1/changes/{id}.

    \b
    Example:
      kvstore shard cancel
    """

    async def work(kv: Client) -> None:
        change = await kv.change((await kv.cancel_moves())["change"])
        emit(as_json, change, f"all moves that were not done are cancelled: {change['detail'].lower()}")

    call(url, as_json, work)


@click.command("list")
@talks_to_cluster
def list_shards(url: str, as_json: bool) -> None:
    """List the shards, one a line: id, state, weight, partitions, keys, bytes, address; where there are copies, the
    primary's node and the copies' nodes, too.

    With --json a line each, as in "shards" of GET /v1/cluster.

    \b
    Example:
      kvstore shard list
      kvstore shard list --json | jq -r 'select(.state != "up") | .id'
    """

    async def work(kv: Client) -> None:
        document = await kv.cluster()
        for shard in document["shards"]:
            if as_json:
                say_json(shard)
            else:
                say(_line(shard, shows_copies=has_copies(document)))

    call(url, as_json, work)


def _line(shard: Answer, *, shows_copies: bool) -> str:
    keys, size = held(shard, "keys"), held(shard, "bytes", human_bytes)
    facts = (
        printable(str(shard["id"])), shard["state"], f"weight {shard['weight']}",
        f"{shard['partitions']:,} partitions", f"{keys} keys", size, printable(str(shard["url"])),
    )  # fmt: skip
    if shows_copies:
        where = f"primary on {printable(str(shard['primary']))}"
        return "\t".join((*facts, where, f"copies: {copies_text(shard)}"))
    return "\t".join(facts)


# --- one change, from the question to its end -------------------------------------------------------------------------


def run_change(change: ClusterChange, plan: bool, no_wait: bool, url: str, as_json: bool) -> None:
    """Ask for the change, and tell how it goes until it has ended."""
    if plan and no_wait:
        raise click.UsageError("--plan changes nothing, so there is nothing that --no-wait could be about")
    running = _Running(change, as_json)
    with reporting(as_json):
        try:
            asyncio.run(running.run(url, plan, no_wait))
        except KeyboardInterrupt:
            if running.is_taken:
                stops = "`kvstore shard cancel` stops it" if change.moves else "the command for what was takes it back"
                complain(f"kvstore: interrupted; the change goes on. `kvstore status` shows how far it is, {stops}.")
            raise


class _Running:
    """`is_taken`: the cluster has taken the change, which goes on whatever becomes of this command."""

    def __init__(self, change: ClusterChange, as_json: bool) -> None:
        self._change = change
        self._as_json = as_json
        self.is_taken = False

    async def run(self, url: str, plan: bool, no_wait: bool) -> None:
        async with Client(url) as kv:
            answer = await self._asked_before(kv) if self._change.weight is not None and not plan else None
            answer = answer or await self._ask(kv, plan)
        if plan:
            if self._as_json:
                say_json(answer)
            else:
                print_plan(answer)
            return
        self.is_taken = True
        async with Client(url, retries=0, timeout_s=_WATCH_TIMEOUT_S) as kv:
            if no_wait:
                text = f"{self._change.taken(answer)}; `kvstore status` shows what moves"
                emit(self._as_json, await kv.change(answer["change"]) if self._as_json else answer, text)
                return
            with move_progress(self._change.label) as progress:
                ended = await follow(kv, answer["change"], progress)
        self._show_end(ended)

    async def _asked_before(self, kv: Client) -> Answer | None:
        """The shard is being added already, just so: that is waited for."""
        goal = {"kind": "add", "shard": self._change.shard_id, "weight": self._change.weight, "state": "running"}
        same = next((change for change in await kv.changes() if goal.items() <= change.items()), None)
        return None if same is None else {"id": self._change.shard_id, "state": "joining", "change": same["id"]}

    async def _ask(self, kv: Client, plan: bool) -> Answer:
        try:
            return await self._change.ask(kv, plan)
        except NotFound as error:
            raise NotFound(error.detail, next_step="`kvstore shard list` shows all shards.") from None
        except (BadBody, BadParameter, ChangeRefused, ForeignData) as error:  # their detail says what to do
            raise type(error)(error.detail, **(error.members | {"next_step": "Nothing was changed."})) from None
        except OutcomeUnknown as error:
            next_step = "`kvstore status` shows whether it was taken; the same command again does no harm."
            raise OutcomeUnknown(error.detail, next_step=next_step) from None

    def _show_end(self, ended: Answer) -> None:
        if ended["state"] != "done":
            report(_not_done(self._change, ended), self._as_json)
            raise click.exceptions.Exit(EXIT_STORE_SAID_NO)
        moved = "nothing had to move" if self._change.moves else f"it took {ended['seconds']:.1f} s"
        if ended["partitions_total"]:
            moved = (
                f"{ended['keys_done']:,} keys ({human_bytes(ended['bytes_done'])}) moved in {ended['seconds']:.1f} s, "
                f"longest write pause {ended['write_pause_ms_max']:,.0f} ms"
            )
        text = f"{self._change.done}: {moved}" if self._change.done else f"{ended['detail']} {moved.capitalize()}."
        emit(self._as_json, ended, text)


def _not_done(change: ClusterChange, ended: Answer) -> ChangeRefused:
    return ChangeRefused(
        f"{change.label} is {ended['state']}. {ended['detail']}",
        next_step="`kvstore status` shows what is; the same command, or `kvstore shard rebalance`, asks for it again.",
        change=ended["id"],
    )
