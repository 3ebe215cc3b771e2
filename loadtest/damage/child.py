"""A store that is written to until it is killed: `python -m loadtest.damage.child FILE SEED`.

Owns: the writes; a line on standard output before each write, and one when it was acknowledged.
Promises: each key has one writer, so at most one write of each key is open when the process dies.
Leaves to others: killing it, and remembering what was acknowledged (`stores`).
"""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path
from typing import NoReturn

from kvstore.config import Limits
from kvstore.placement.cluster_map import ClusterMap, at_home, map_of
from kvstore.protocol import Answer, Delete, Put, Reply
from kvstore.store.store import Store

PARTITIONS = 64
LIMITS = Limits(
    log_segment_bytes=256 * 1024, batch_bytes_max=32 * 1024, wal_bytes_max=512 * 1024, value_bytes_max=16 * 1024,
    body_bytes_max=32 * 1024, txn_read_bytes_max=32 * 1024, expiry_sweep_s=3600.0,
)  # fmt: skip
_WRITERS = 8
_KEYS_OF_WRITER = 150


def cluster_map() -> ClusterMap:
    """Of one shard, which owns everything."""
    member = at_home("s1", "http://127.0.0.1:1", "s1")
    return map_of([member], cluster_id="damage", epoch=7, partitions=PARTITIONS, owners=[0] * PARTITIONS, moves=[])


def end(error: BaseException) -> NoReturn:
    """As a shard's process does."""
    raise SystemExit(74) from error


class Waiting:
    """A sink with a future for the answer."""

    closed = False

    def __init__(self) -> None:
        self.answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

    def send(self, reply: Reply, /) -> None:
        if not self.answer.done():
            self.answer.set_result(reply)


async def write(store: Store, key: str, value: bytes | None) -> Answer:
    """Put the value, or delete the key (None)."""
    sink = Waiting()
    store.write(Delete(1, key) if value is None else Put(1, key, value, 0), sink)
    answer = await asyncio.wait_for(sink.answer, 30)
    assert isinstance(answer, Answer)
    return answer


async def _writer(store: Store, name: int, rng: random.Random) -> None:
    for count in range(sys.maxsize):
        key = f"{name}/key-{rng.randrange(_KEYS_OF_WRITER):03d}"
        size = rng.choice((8, 40, 200, 200, 6000 if rng.random() < 0.2 else 100))
        value = None if rng.random() < 0.1 else b"%s#%d#" % (key.encode(), count) + rng.randbytes(size)
        print("begin", key, "-" if value is None else value.hex(), flush=True)
        answer = await write(store, key, value)
        if answer.status not in (201, 204, 404):
            raise RuntimeError(f"a write was answered {answer}")
        print("done", key, flush=True)


async def main(path: Path, seed: int) -> None:
    store = await Store.open(path, LIMITS, "s1", PARTITIONS, end)
    await store.partitions.adopt(cluster_map())
    await asyncio.gather(*(_writer(store, name, random.Random(f"{seed}/{name}")) for name in range(_WRITERS)))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
