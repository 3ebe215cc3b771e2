"""What is asked of all shards: listings, counts, leases.

Owns: how much is asked of each shard, and again of whom when something is missing.
Promises: a listing or count is of all partitions, or it is an error, or it names those that are left out.
Leaves to others: the cached map and the channels (`service`), putting listings together (`listing`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol

from kvstore.config import Limits
from kvstore.errors import KvError, Unavailable, WrongOwner, from_problem
from kvstore.placement import partition_set
from kvstore.placement.cluster_map import ClusterMap
from kvstore.protocol import Count, Page, Scan, ScanLeases
from kvstore.router.listing import Counted, Item, Listing, Merge, Tally, share
from kvstore.router.unserved import unserved
from kvstore.transport.answers import LARGE_BYTES, Turns
from kvstore.transport.channel import Channel

_SHARE_BEYOND_MEAN = 1.5
_SLICE_BYTES = 524_288  # of one shard: small answers come behind it on the same connection


class Routing(Protocol):
    """What is known of the cluster. `largest_part`: of the partitions, in one shard."""

    cluster_map: ClusterMap | None
    largest_part: float

    @property
    def channels(self) -> Mapping[str, Channel]:
        """By shard id, the channel to the store of its primary."""

    @property
    def partitions(self) -> int:
        """How many there are."""

    async def await_epoch(self, epoch: int, fenced: bool = False) -> None:
        """Wait for a map of that epoch, or a newer one if `fenced`; for a little only."""

    def fails_over(self, shard_id: str) -> bool:
        """Whether the shard has a copy that may take over."""


class AllShards:
    """What is asked of all shards. `partial`: what is down is left out and named, instead of Unavailable."""

    def __init__(self, router: Routing, limits: Limits) -> None:
        self._router = router
        self._limits = limits

    def page_bytes(self, limit: int, values: bool) -> int:
        """How many bytes a page takes of memory while it is made, at most.

        What all shards send, and its JSON.
        """
        brought_bytes = item_bytes = self._limits.key_bytes_max
        if values:
            brought_bytes += LARGE_BYTES
            item_bytes += self._limits.value_bytes_max
        of_shard = min(share(limit, self._router.largest_part) * brought_bytes, self._slice_bytes() + brought_bytes)
        return len(self._router.channels) * of_shard + 2 * min(limit * item_bytes, self._limits.page_bytes_max)

    def _slice_bytes(self) -> int:
        """How many bytes to ask of one shard at once.
        Beyond the mean, since the hash decides where the keys are."""
        share_bytes = int(self._limits.page_bytes_max * min(1.0, _SHARE_BEYOND_MEAN * self._router.largest_part))
        return min(share_bytes, _SLICE_BYTES)

    async def page(
        self,
        prefix: str,
        after: str,
        limit: int,
        values: bool,
        *,
        partial: bool = False,
        turns: Turns | None = None,
    ) -> Listing:
        """A page of keys over all shards, in byte order, without values of more than `LARGE_BYTES`.

        Shards are asked in `turns`. Raises Unavailable when one is down: a gap is worse.
        """

        def make(limit: int, after: str, wanted: bytes, until: str) -> Scan:
            return Scan(0, prefix, after, limit, values, wanted, until, self._slice_bytes(), LARGE_BYTES)

        return await self._merged(after, limit, make, partial, turns)

    async def leases(self, prefix: str, after: str, limit: int, *, partial: bool = False) -> Listing:
        """A page of leases over all shards, by name: (name, token, owner, milliseconds left). Raises Unavailable."""

        def make(limit: int, after: str, wanted: bytes, until: str) -> ScanLeases:
            return ScanLeases(0, prefix, after, limit, wanted, until)

        return await self._merged(after, limit, make, partial)

    async def _merged(
        self,
        after: str,
        limit: int,
        make: Callable[[int, str, bytes, str], Scan | ScanLeases],
        is_partial: bool,
        turns: Turns | None = None,
    ) -> Listing:
        """Full, unless there are no more, or it has at least half as many bytes as a page may have."""
        items: list[Item] = []
        left_out: dict[str, int] = {}
        size = missing = 0
        while True:
            left = limit - len(items)
            merge = Merge(self._router.partitions)
            asked = partial(make, share(left, self._router.largest_part), after)
            async with turns or nullcontext():
                missing |= await self._cover(merge, asked, is_partial)
                listing, added = merge.listing(left).cut(self._limits.page_bytes_max - size)
            items += listing.items
            left_out |= listing.left_out
            size += added
            if listing.last is None or len(items) == limit or size >= self._limits.page_bytes_max // 2:
                return Listing(items, listing.last, missing, left_out)
            after = listing.last

    async def count(self, prefix: str, *, partial: bool = False) -> Counted:
        """The number of keys that start with `prefix`. Raises Unavailable when a shard is down."""
        tally = Tally(self._router.partitions)
        missing = await self._cover(tally, lambda wanted, _: Count(0, prefix, wanted), partial)
        return Counted(tally.count, missing)

    async def _cover(
        self, gathered: Merge | Tally, make: Callable[[bytes, str], Scan | ScanLeases | Count], is_partial: bool
    ) -> int:
        """Ask all members, and again for what is missing, until nothing is. `make`: of which partitions, and up to
        where. Raises Unavailable, and what a member answered that owns what is missing. With `is_partial` it returns
        the set of what is down or not to be had in time, instead."""
        deadline_s = asyncio.get_running_loop().time() + self._limits.reroute_timeout_s
        wanted = b""
        while True:
            if self._router.cluster_map is None:
                raise Unavailable("this router has no cluster map yet.", retry_after_ms=500)
            wait_s = max(0.0, deadline_s - asyncio.get_running_loop().time()) if is_partial else None
            failed = await self._gather(gathered, partial(make, wanted, gathered.horizon or ""), wait_s)
            is_late = asyncio.get_running_loop().time() > deadline_s
            down = self._not_shown(gathered.missing, failed, is_partial, is_late)
            if gathered.missing == down:
                return down
            if is_late:
                if is_partial:
                    return gathered.missing
                raise unserved(self._owners_of(gathered.missing))
            await self._router.await_epoch(0)
            wanted = partition_set.encode(gathered.missing, self._router.partitions)

    def _owners_of(self, partitions: int) -> list[str]:
        """The ids of the shards that own them, as of the cached map."""
        assert self._router.cluster_map is not None
        shards, owners = self._router.cluster_map.shards, self._router.cluster_map.owners
        return [shards[owners[partition]].id for partition in partition_set.listed(partitions)]

    def _not_shown(self, missing: int, failed: dict[str, KvError], is_partial: bool, is_late: bool) -> int:
        """Of the partitions that are missing those whose owner is down. Raises its error if that must not be.

        A shard with copies is waited for until it `is_late`: another one takes over.
        """
        assert self._router.cluster_map is not None
        down = 0
        for shard_id, error in failed.items():
            theirs = sum(1 << partition for partition in self._router.cluster_map.owned_by(shard_id)) & missing
            if isinstance(error, WrongOwner):
                continue  # router or shard has not heard of the last strike: soon it has
            if isinstance(error, Unavailable) and not is_late and not is_partial and self._router.fails_over(shard_id):
                continue
            if theirs and not (is_partial and isinstance(error, Unavailable)):
                raise error
            down |= theirs
        return down

    async def _gather(
        self, gathered: Merge | Tally, make: Callable[[], Scan | ScanLeases | Count], wait_s: float | None
    ) -> dict[str, KvError]:
        """Ask all members, and take their pages until nothing is missing. Who could not answer, in that time, and
        why."""
        failed: dict[str, KvError] = {}
        asked: dict[asyncio.Future[Any], str] = {}
        for shard_id, channel in self._router.channels.items():
            try:
                asked[channel.request(make())] = shard_id
            except KvError as error:
                failed[shard_id] = error
        pending = set(asked)
        while pending and gathered.missing:
            done, pending = await asyncio.wait(pending, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                silent = Unavailable("the shard does not answer.", retry_after_ms=1000)
                return failed | {asked[future]: silent for future in asked if future in pending}
            for future in (each for each in asked if each in done):  # in the order of the questions
                try:
                    reply = future.result()
                except KvError as error:
                    failed[asked[future]] = error
                    continue
                if isinstance(reply, Page):
                    gathered.take(reply)
                else:
                    failed[asked[future]] = from_problem(reply.problem)
        return failed
