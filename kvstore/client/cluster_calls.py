"""The calls of the client that look at the cluster, and change it.

Owns: adding, weighing, removing and giving up shards, moves, changes, explanations.
Promises: every change can be asked for as a plan first, which changes nothing.
Leaves to others: sending (`connection`), keys, locks and transactions (`client`).
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import msgspec

from kvstore.client.connection import Connection
from kvstore.client.results import document_of, quoted, taken_of
from kvstore.errors import Unavailable


class ClusterCalls(Connection):
    """The part of `Client` for the cluster as a whole."""

    async def cluster(self) -> dict[str, Any]:
        """GET /v1/cluster: shards, epoch, moves."""
        return document_of(await self.ask("GET", "/v1/cluster"))

    async def add_shard(
        self, shard_id: str, url: str | None = None, *, weight: int = 1, plan: bool = False
    ) -> dict[str, Any]:
        """Add the shard that serves at `url`, or one that the running `kvstore up` starts.

        Returns {"id","state","epoch","change"}, before anything has moved. `change` is the id with which the call
        `change` tells how far that is, here and in the calls below. With `plan`, here and in the calls below,
        nothing is changed: {"partitions","keys","bytes","moves"} tells what would move. Raises ChangeRefused,
        ForeignData.
        """
        body = {"id": shard_id, "weight": weight} | ({} if url is None else {"url": url})
        return await self._change("POST", "/v1/shards", body, plan)

    async def weigh_shard(self, shard_id: str, weight: int, *, plan: bool = False) -> dict[str, Any]:
        """Change the shard's weight. Raises NotFound, ChangeRefused while it is leaving."""
        return await self._change("PATCH", f"/v1/shards/{quote(shard_id, safe='')}", {"weight": weight}, plan)

    async def remove_shard(self, shard_id: str, *, plan: bool = False) -> dict[str, Any]:
        """Drain and remove the shard. Raises NotFound, ChangeRefused for the last one."""
        return await self._change("DELETE", f"/v1/shards/{quote(shard_id, safe='')}", None, plan)

    async def give_up_shard(self, shard_id: str, *, confirm: str) -> dict[str, Any]:
        """Give up a shard whose disk is lost: its partitions are reopened, empty. `confirm`: its id again.

        {"id","state","epoch","partitions","transactions","change"}: how many partitions that are, and which undecided
        transactions have their first key there. Raises NotFound, ChangeRefused.
        """
        path = f"/v1/shards/{quote(shard_id, safe='')}?lost=true&confirm={quote(confirm, safe='')}"
        return taken_of(await self.ask("DELETE", path, writes=True))

    async def accept_old(self, shard_id: str, confirm: str) -> dict[str, Any]:
        """Let the shard start with an older copy of its file: {"id","told","version"}, as it had told before.

        All that the copy lacks is lost. `confirm` is the shard's id. Raises NotFound, BadBody.
        """
        path = f"/v1/shards/{quote(shard_id, safe='')}/accept-old"
        return await self._change("POST", path, {"confirm": confirm}, False)

    async def promote(self, shard_id: str, to: str) -> dict[str, Any]:
        """Make the copy on node `to` the shard's primary. Raises NotFound, ChangeRefused if it is not in sync."""
        return await self._change("POST", f"/v1/shards/{quote(shard_id, safe='')}/promote", {"to": to}, False)

    async def promote_with_loss(self, shard_id: str, to: str, *, confirm: str | None = None) -> dict[str, Any]:
        """Make a copy that is not in sync the primary, because no other is left; what it lacks is lost.

        `confirm`: the shard's id again. {"id","to","epoch","number","told","change"}: the last record of that copy, and
        of which one the shard had told. Raises NotFound; ChangeRefused, also unconfirmed, with what would be lost.
        """
        body = {"to": to, "accept_loss": True} | ({} if confirm is None else {"confirm": confirm})
        return await self._change("POST", f"/v1/shards/{quote(shard_id, safe='')}/promote", body, False)

    async def replicate(self, replicas: int) -> dict[str, Any]:
        """Keep so many copies of every key. Raises ChangeRefused."""
        return await self._change("PATCH", "/v1/cluster", {"replicas": replicas}, False)

    async def rebalance(self, *, plan: bool = False) -> dict[str, Any]:
        """Plan what the present members and weights ask for, as after `cancel_moves`."""
        return await self._change("POST", "/v1/moves", None, plan)

    async def cancel_moves(self) -> dict[str, Any]:
        """Give up all that has not moved yet; a shard that was leaving stays, one that has nothing yet goes."""
        return await self._change("DELETE", "/v1/moves", None, False)

    async def _change(self, method: str, path: str, body: dict[str, Any] | None, plan: bool) -> dict[str, Any]:
        query = "?plan=true" if plan else ""
        encoded = None if body is None else msgspec.json.encode(body)
        return taken_of(await self.ask(method, path + query, body=encoded, writes=not plan))

    async def change(self, change_id: str) -> dict[str, Any]:
        """GET /v1/changes/{id}: how far a change of the cluster is, or how it ended. Raises NotFound."""
        return document_of(await self.ask("GET", f"/v1/changes/{quote(change_id, safe='')}"))

    async def changes(self) -> list[dict[str, Any]]:
        """GET /v1/changes: those that run and the last that ended, the newest first."""
        items: list[dict[str, Any]] = document_of(await self.ask("GET", "/v1/changes"))["items"]
        return items

    async def explain(self, key: str) -> dict[str, Any]:
        """GET /v1/explain/{key}: hash, partition, ring walk, owner, version."""
        return document_of(await self.ask("GET", f"/v1/explain/{quoted(key)}"))

    async def ready(self) -> bool:
        """Whether the router can serve; False also when no process answers at the address."""
        try:
            await self.ask("GET", "/readyz", retries=0)
        except Unavailable:
            return False
        return True
