"""What the systems are filled with.

Owns: the keys, their values, and which shard of this cluster keeps which key.
Promises: the same for the same seed, whatever systems there are: pure.
Leaves to others: what is done with them (workloads.py, transactions.py, stateful.py).
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from typing import NamedTuple

from kvstore.config import default_config
from kvstore.placement.ring import ShardWeight, partition_of, place

VALUE_BYTES = 100
SHARDS = 4
_ALPHABET = string.ascii_letters + string.digits


class Data(NamedTuple):
    """The keys and what belongs to each.
    The value stored before the first run, the one that the runs write, and its shard."""

    keys: Sequence[str]
    stored: Sequence[bytes]
    written: Sequence[bytes]
    owners: Sequence[str]

    def puts(self, numbers: Sequence[int]) -> list[tuple[str, bytes]]:
        """The keys of these numbers, and what the runs write to them."""
        return [(self.keys[number], self.written[number]) for number in numbers]


def make_data(keys: int, seed: int, shards: int = SHARDS) -> Data:
    """`keys` keys with two values of 100 bytes each; the same for the same seed."""
    rng = random.Random(seed)

    def values() -> list[bytes]:
        return ["".join(rng.choices(_ALPHABET, k=VALUE_BYTES)).encode() for _ in range(keys)]

    names = [f"key-{number:08d}" for number in range(keys)]
    return Data(names, values(), values(), _owners(names, shards))


def placed(data: Data, shards: int) -> Data:
    """The same keys and values in a cluster of that many shards."""
    return data._replace(owners=_owners(data.keys, shards))


def _owners(keys: Sequence[str], shards: int) -> list[str]:
    """In a new cluster of `shards` shards as `loadtest.cluster` makes it (transactions.py asks a running one)."""
    partitions = default_config().partitions
    owners = place([ShardWeight(f"s{number}") for number in range(1, shards + 1)], partitions)
    return [owners[partition_of(key.encode(), partitions)] for key in keys]
