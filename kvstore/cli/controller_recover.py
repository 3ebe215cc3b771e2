"""controller recover: show the newest map that the nodes have, and have the controller go on with it.

Owns: the command's arguments, what it shows, the confirmation.
Promises: nothing is taken that was not shown: the epoch must be typed, or given by --confirm.
Leaves to others: which map is the newest and whether it may be taken (the controller).
"""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import click
import msgspec

from kvstore.cli.asking import checked_url
from kvstore.cli.frame import complain, emit, printable, reporting
from kvstore.errors import ChangeRefused, KvError, OutcomeUnknown, Unavailable, from_problem

DEFAULT_URL = "http://127.0.0.1:8090"
_TIMEOUT_S = 30.0


@click.command()
@click.option(
    "--controller",
    "url",
    default=DEFAULT_URL,
    show_default=True,
    metavar="URL",
    callback=checked_url,
    help="Address of the controller.",
)
@click.option("--without", multiple=True, metavar="ID", help="A silent member that will never come back; repeatable.")
@click.option("--confirm", metavar="EPOCH", type=int, help="For programs: the epoch that is to be taken, unasked.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def recover(url: str, without: tuple[str, ...], confirm: int | None, as_json: bool) -> None:
    """Give a controller the map again that it has lost.

    For a controller whose file was lost, or restored from an old backup: it changes nothing until then, while all keys
    go on being served. This asks all shards for the map that they follow, shows the newest one, and takes it when you
    type its epoch. It is refused while a member is silent, since that one may have a newer map: start it first, or, if
    its disk is lost, name it with --without.

    \b
    Exit codes: 0 taken, or shown with --json and without --confirm; 1 refused;
    2 the controller cannot be reached. With --json: the map, or {"epoch"}.

    \b
    Example:
      kvstore controller recover
      kvstore controller recover --confirm 12 --without s3
    """
    with reporting(as_json):
        found = asyncio.run(_ask(url, "GET", None))
        if confirm is None:
            if as_json:
                emit(True, found, "")
                return
            complain(_shown(found))
            confirm = click.prompt("Type the epoch to take this map", type=int, err=True)
        if confirm != found["epoch"]:
            raise ChangeRefused(f"the newest map is that of epoch {found['epoch']}.", next_step="Nothing was changed.")
        body = {"cluster_id": found["cluster_id"], "epoch": confirm, "without": list(without)}
        answer = asyncio.run(_ask(url, "POST", body))
        emit(as_json, answer, f"the controller goes on with that map, as epoch {answer['epoch']}")


def _shown(found: dict[str, Any]) -> str:
    lines = [
        f"cluster {found['cluster_id']}, epoch {found['epoch']}: {found['partitions']:,} partitions, "
        f"{found['moves']} moves to be begun again"
    ]
    for member in found["members"]:
        silent = "  SILENT: it may have a newer map" if member["id"] in found["silent"] else ""
        facts = f"{member['state']}, weight {member['weight']}, {member['partitions']:,} partitions"
        lines.append(f"  {printable(member['id'])}: {facts}, {printable(member['url'])}{silent}")
    return "\n".join(lines)


async def _ask(url: str, method: str, body: dict[str, Any] | None) -> dict[str, Any]:
    """Raises the controller's refusal, Unavailable, OutcomeUnknown."""
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.request(method, f"{url}/v1/recovery", json=body, allow_redirects=False) as answer,
        ):
            document = msgspec.json.decode(await answer.read(), type=dict[str, Any])
            status = answer.status
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise Unavailable(
            f"no controller can be reached at {url}: {error}.", next_step="Name it by --controller."
        ) from None
    except (aiohttp.ClientError, TimeoutError) as error:
        kind = OutcomeUnknown if method == "POST" else Unavailable
        raise kind(f"the controller at {url} did not answer: {error}", next_step="Ask again.") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise KvError(f"what answers at {url} is no controller.", next_step="Name it by --controller.") from None
    if status >= 300:
        refusal = from_problem(document)
        raise type(refusal)(refusal.detail, next_step="Nothing was changed.")
    return document
