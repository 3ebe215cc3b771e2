"""The ring: which shard keeps which key.

Owns: the hash of a key, its partition, and the placement of partitions on shards.
Promises: pure, and the same result whatever the order in which shards are named; every partition has one
owner among them; no shard gets more than its fair share rounded up; a change moves no more than that needs.
Leaves to others: who is a member (`cluster_map`); carrying the data to the new owner (the controller).

The problem
-----------
`hash(key) % shards` moves nearly every key when a shard joins. Consistent hashing (Karger et al. 1997) moves
only those that the newcomer takes: shards and keys are points on one circle of 2**64, each shard at many of
them, its *virtual nodes*, in proportion to its weight; a key belongs to the first virtual node clockwise.

            0 ─ s2 ─ ·           s1, s2, s3   virtual nodes: hash("s1/0"), hash("s1/1"), …
         s3           s1         p            a partition: the arc that begins at this point
        ·    clockwise   ·
         s1      ↻    p ──▶ s3   p walks to s3; if s3 is full, on to s2, and so on
            s2 ─ · ─ s3

That leaves two weaknesses. Chance decides how long the arcs are: at 100 virtual nodes each, the fullest of
eight shards typically carries a seventh more than its share. And a look-up searches thousands of points.

What we do
----------
1. *Partitions.* The circle is cut into a power of two of equal arcs. The top bits of a key's hash name its
   arc, and one array, the cluster map's `owners`, names the arc's shard: a look-up is one hash and one array
   look-up. The ring is asked only when the shards change; it places some thousand partitions, never keys.
2. *Bounded loads* (Mirrokni, Thorup, Zadimoghaddam 2016, "Consistent Hashing with Bounded Loads"). A shard
   takes no more partitions than its capacity; from a full one a partition walks on to the next.
3. *Capacities by Adams' divisor method.* The capacities add up to exactly all partitions. They are dealt out one at a
   time, each to the shard with the most weight per partition so far (none yet is most of all; ties go by id).
   So all claims stand in one order, a shard's k-th being worth weight / (k - 1), and the first are met.
   - **No capacity is above the fair share rounded up.** Let the last claim that is met be worth d. A shard's
     next claim is worth no more, weight / capacity <= d: so its capacity is weight / d or more. Summed over all,
     weights / d <= partitions: so weight / d is at most the fair share. And its last claim that is met is
     worth d or more: capacity - 1 <= weight / d <= the fair share. Were both equalities, the sum would be one as
     well, hence every capacity exactly weight / d, and this one not one more.
   - **A join moves partitions only to the newcomer, a departure only the leaver's.** A newcomer adds claims
     to the order: of the others' some are no longer met, none is met again. And so for the other changes.
   - What moves is the newcomer's or leaver's own capacity: the minimum, to within one partition.
   Rounding each share by its remainder, the obvious way, has no such order: there a join can enlarge the
   capacity of a shard that has nothing to do with it.
4. *Start from what is.* Only a partition that has no living owner, or is beyond its owner's capacity, is placed
   again. From a shard that has too many, those go whose walk passes fewest virtual nodes before one that has
   free capacity, at best none: the ring still decides.

The ring that many articles show asks whether the key's own hash is in the *set* of the virtual nodes'
hashes. That tests for being equal where it should walk to the next point, so no ordinary key finds a shard;
and as it hashes the same bare name for each replica, a shard's virtual nodes all are one point. Here no key
can miss: every partition has an owner.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

_HASH_BITS = 64
VIRTUAL_NODES_PER_WEIGHT = 64
_VIRTUAL_NODES_MAX = 65_536

# By how much a hash is shifted to leave the number of its partition; also the list of the allowed counts.
_SHIFT = {1 << bits: _HASH_BITS - bits for bits in range(6, 17)}


class ShardWeight(NamedTuple):
    """A shard as the ring sees it. `weight`, 1 or more, is its share in proportion to the others' weights."""

    id: str
    weight: int = 1


def key_hash(key: bytes) -> int:
    """xxh3-64 of the key's bytes, 0 to 2**64 - 1. Frozen: with another hash no stored key would be found."""
    return xxh3_64_intdigest(key)


def partition_of(key: bytes, partitions: int) -> int:
    """The partition of a key: the top bits of its hash. Raises KeyError for a count that `place` refuses."""
    return xxh3_64_intdigest(key) >> _SHIFT[partitions]


def place(shards: Sequence[ShardWeight], partitions: int, present: Sequence[str | None] | None = None) -> list[str]:
    """The owner's id for each partition, as near to the `present` placement as capacities allow (None: fresh).

    An entry of `present` that is None or not among `shards` has no owner any more: it is placed again.
    How many partitions a shard gets follows from the weights alone; which ones, from `present` and the ring.

    Raises ValueError: no shards, an id twice, a weight below 1, `partitions` no power of two from 64 to
    65,536, or `present` of another length.
    """
    _check(shards, partitions)
    if present is not None and len(present) != partitions:
        raise ValueError(f"the present placement has {len(present)} partitions, the cluster {partitions}")
    free = _capacities(shards, partitions)
    owners = [owner if owner in free else None for owner in present or [None] * partitions]
    free.subtract(owner for owner in owners if owner is not None)

    ring = _Ring(virtual_nodes(shards))
    for partition in _surplus(owners, free, ring):
        owners[partition] = None
    return _fill(owners, free, ring)


def walk(shards: Sequence[ShardWeight], partition: int, partitions: int) -> list[str]:
    """All shard ids, each once, in the order in which the walk from the partition's point meets them.

    The first is where the partition lives while every shard has free capacity. Raises ValueError as `place` does, and
    for a partition that does not exist.
    """
    _check(shards, partitions)
    if not 0 <= partition < partitions:
        raise ValueError(f"there is no partition {partition}: they are 0 to {partitions - 1}")
    ring = virtual_nodes(shards)
    start = bisect_left(ring, (partition << _SHIFT[partitions], ""))
    return list(dict.fromkeys(shard for _, shard in ring[start:] + ring[:start]))


class _Ring:
    """Virtual nodes clockwise: `points[i]` on the circle belongs to `shards[i]`."""

    def __init__(self, virtual_nodes: Sequence[tuple[int, str]]) -> None:
        self.points = [point for point, _ in virtual_nodes]
        self.shards = [shard for _, shard in virtual_nodes]

    def at(self, point: int) -> int:
        """The index of the first virtual node clockwise from `point`."""
        return bisect_left(self.points, point) % len(self.points)

    def with_capacity(self, free: Counter[str]) -> _Ring:
        """The ring as a walk sees it that passes by the shards without free capacity."""
        return _Ring([node for node in zip(self.points, self.shards, strict=True) if free[node[1]] > 0])

    def passed_by(self, free: Counter[str]) -> list[int]:
        """For each virtual node, how many a walk from there passes before it meets a shard with free capacity."""
        passed, counts = 0, []
        for shard in reversed(self.shards * 2):  # twice around: the first lap finds where the second begins
            passed = 0 if free[shard] > 0 else passed + 1
            counts.append(passed)
        return counts[: -len(self.shards) - 1 : -1]


def _check(shards: Sequence[ShardWeight], partitions: int) -> None:
    if partitions not in _SHIFT:
        raise ValueError(f"partitions must be a power of two from {min(_SHIFT)} to {max(_SHIFT)}, not {partitions}")
    if not shards:
        raise ValueError("there are no shards to place partitions on: name at least one")
    for shard_id, times in Counter(shard.id for shard in shards).items():
        if times > 1:
            raise ValueError(f"shard {shard_id!r} is named {times} times: every id must be unique")
    for shard_id, weight in shards:
        if weight < 1:
            raise ValueError(f"shard {shard_id!r} has weight {weight}: it must be 1 or more")


def virtual_nodes(shards: Sequence[ShardWeight]) -> list[tuple[int, str]]:
    """(point, shard id) of every virtual node, clockwise from 0; in proportion to weight.

    A shard has `VIRTUAL_NODES_PER_WEIGHT` of them per unit of weight, all shards together about 65,536 at most, and
    each one at least one.
    """
    wanted = sum(shard.weight for shard in shards) * VIRTUAL_NODES_PER_WEIGHT
    # Halved until there are few enough: a weight may be 1, 2 or 3, but also a disk's size in gigabytes.
    halvings = ((wanted - 1) // _VIRTUAL_NODES_MAX).bit_length()
    return sorted(
        (key_hash(f"{shard.id}/{number}".encode()), shard.id)
        for shard in shards
        for number in range(max(1, shard.weight * VIRTUAL_NODES_PER_WEIGHT >> halvings))
    )


def _capacities(shards: Sequence[ShardWeight], partitions: int) -> Counter[str]:
    """How many partitions each shard may have, by Adams' divisor method (see the essay); in sum, all."""
    # Begin where all claims worth more than weight_sum / (partitions - shards) are met: quotients that add up
    # to partitions - shards, rounded up. That leaves at most one partition per shard to deal out.
    weight_sum = sum(shard.weight for shard in shards)
    dealt = max(0, partitions - len(shards))
    capacity = Counter({shard.id: -(-shard.weight * dealt // weight_sum) for shard in shards})

    def next_claim(shard: ShardWeight) -> tuple[bool, Fraction, str]:
        return capacity[shard.id] == 0, Fraction(shard.weight, max(1, capacity[shard.id])), shard.id

    while capacity.total() < partitions:
        capacity[max(shards, key=next_claim).id] += 1
    return capacity


def _surplus(owners: Sequence[str | None], free: Counter[str], ring: _Ring) -> list[int]:
    """The partitions that must leave: of each shard beyond its capacity, those with the shortest walk.

    Counts them out of `free`, which is nowhere negative afterwards.
    """
    crowded = {shard for shard in free if free[shard] < 0}
    partitions = (partition for partition, owner in enumerate(owners) if owner in crowded)
    shift = _SHIFT[len(owners)]
    passed = ring.passed_by(free)
    leaving = []
    for partition in sorted(partitions, key=lambda partition: passed[ring.at(partition << shift)]):
        owner = owners[partition]
        if owner is not None and free[owner] < 0:
            free[owner] += 1
            leaving.append(partition)
    return leaving


def _fill(owners: Sequence[str | None], free: Counter[str], ring: _Ring) -> list[str]:
    """`owners`, each None replaced by the first shard on the walk that has free capacity; uses up `free`."""
    ring = ring.with_capacity(free)
    shift = _SHIFT[len(owners)]
    filled = []
    for partition, owner in enumerate(owners):
        if owner is None:
            owner = ring.shards[ring.at(partition << shift)]
            free[owner] -= 1
            if free[owner] == 0:
                ring = ring.with_capacity(free)
        filled.append(owner)
    return filled
