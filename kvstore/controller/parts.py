"""What a controller consists of, apart from its store and its HTTP: put together once, for processes and simulations.

Owns: who tells whom what.
Promises: none of it does anything before it is run.
Leaves to others: HTTP and how the process ends (`app`), the parts themselves.
"""

from __future__ import annotations

from collections.abc import Coroutine
from functools import partial
from typing import Any, NamedTuple

from kvstore.config import ClusterConfig
from kvstore.controller.closer import ChangeCloser
from kvstore.controller.copy_keeper import CopyKeeper
from kvstore.controller.document import ClusterDocument
from kvstore.controller.first_look import FirstLook
from kvstore.controller.given_up import Retirer
from kvstore.controller.launches import Launches
from kvstore.controller.lost import Reopener
from kvstore.controller.mover import Mover, new_move_id
from kvstore.controller.operator_changes import OperatorChanges
from kvstore.controller.planning import Planner
from kvstore.controller.recovery import Recovery
from kvstore.controller.service import ClusterService
from kvstore.controller.shards import ShardClients
from kvstore.environment import SYSTEM, Environment


class Parts(NamedTuple):
    """`service`, `changes` and `launches` answer; the others work by themselves."""

    service: ClusterService
    changes: OperatorChanges
    launches: Launches
    mover: Mover
    reopener: Reopener
    keeper: CopyKeeper
    closer: ChangeCloser
    retirer: Retirer

    def works(self) -> list[Coroutine[Any, Any, Any]]:
        """What goes on for ever; an error of one ends the process, which starts again from the document."""
        parts = (self.mover, self.reopener, self.closer, self.keeper, self.retirer)
        return [part.run() for part in parts]


def assemble(
    document: ClusterDocument,
    config: ClusterConfig,
    shards: ShardClients,
    session_id: str,
    environment: Environment = SYSTEM,
) -> Parts:
    """The parts of a controller's process, which has drawn that id for its session."""
    limits = config.limits
    mover = Mover(document, shards, limits, environment)
    recovery = Recovery(document, shards)
    planner = Planner(document, recovery, shards, limits, environment)
    service = ClusterService(document, planner, recovery, config, shards, environment)
    launches = Launches(document, recovery, limits, environment)
    changes = OperatorChanges(document, planner, recovery, launches, shards, limits, environment)
    reopener = Reopener(document, shards, limits)
    new_id = partial(new_move_id, environment)
    keeper = CopyKeeper(document, limits, session_id, service.hear, new_id, environment)
    closer = ChangeCloser(document, mover, launches.may_run, limits, environment, keeper.places)
    mover.is_dead, mover.holds_still = keeper.is_dead, keeper.holds_still
    look = FirstLook(limits.failover_after_s, environment)
    document.first_look, service.on_told, keeper.on_told = look.wait, look.note, look.note
    service.on_clock, service.on_announced = reopener.tell, keeper.announced
    return Parts(service, changes, launches, mover, reopener, keeper, closer, Retirer(document, changes.remove))
