"""What a store durably knows of the cluster: its partitions, the moves that it takes part in, what is frozen.

Owns: the view and how a cluster map and freezes make it.
Promises: pure.
Leaves to others: making it durable and acting by it (`partitions`).
"""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

from kvstore.placement.cluster_map import ClusterMap
from kvstore.storage.engine import Freezes


class View(NamedTuple):
    """`leaving`, `receiving`: the partitions of each standing move from and to this store, by the move's id.

    Of those that leave some may be frozen: `freezes`, by the move's id. Of a move to this store it says that all has
    come, and freezes nothing.
    """

    epoch: int = 0
    owned: frozenset[int] = frozenset()
    leaving: dict[str, frozenset[int]] = {}
    receiving: dict[str, frozenset[int]] = {}
    freezes: Freezes = {}

    @property
    def frozen(self) -> frozenset[int]:
        """The partitions that are frozen: owned or not, they are not served."""
        return frozenset().union(*self.freezes.values())

    @property
    def served(self) -> frozenset[int]:
        """The partitions that are owned and not frozen."""
        return self.owned - self.frozen

    @property
    def coming(self) -> frozenset[int]:
        """All that a standing move brings."""
        return frozenset().union(*self.receiving.values())

    @property
    def going(self) -> frozenset[int]:
        """All that a standing move takes away."""
        return frozenset().union(*self.leaving.values())

    @property
    def takes_part(self) -> bool:
        """Whether it takes part in a move that stands."""
        return bool(self.leaving or self.receiving)

    def orphaned(self, partitions: Set[int]) -> frozenset[int]:
        """Those whose rows belong to other stores."""
        return frozenset(partitions) - self.owned - self.coming


def view_of(shard_id: str, cluster_map: ClusterMap, freezes: Freezes) -> View:
    """The view with that map; freezes of moves that do not stand in it have ended."""
    moves = cluster_map.moves
    standing = {move.id for move in moves}
    return View(
        cluster_map.epoch,
        frozenset(cluster_map.owned_by(shard_id)),
        {move.id: frozenset(move.partitions) for move in moves if move.source == shard_id},
        {move.id: frozenset(move.partitions) for move in moves if move.to == shard_id},
        {move: partitions for move, partitions in freezes.items() if move in standing},
    )
