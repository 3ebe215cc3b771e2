"""Nothing that was acknowledged is lost or answered otherwise, in any order of events of small configurations.

Here each scenario is looked at up to a bounded number of worlds, nearest first. `deeper` looks further.
"""

from __future__ import annotations

import pytest

from tests.unit.replication.explorer import Scenario, explore
from tests.unit.replication.model import Left
from tests.unit.replication.scenarios import SCENARIOS

WORLDS_MAX = 6_000


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_order_of_events_breaks_a_promise(name: str) -> None:
    explored = explore(SCENARIOS[name], WORLDS_MAX)
    assert explored.whole or explored.worlds >= WORLDS_MAX


def test_the_explorer_comes_to_promotions_that_serve_and_to_copies_that_join() -> None:
    """It would find nothing if the steps of a scenario ended early."""
    promoted = explore(Scenario("i", Left(ticks=1, changes=2), never=("snapshot", "name", "in-sync")))
    assert promoted.whole
    assert promoted.terms_served == {1, 2, 3}
    joined = explore(Scenario("j", Left(changes=1), never=("snapshot", "name", "promote", "out")))
    assert joined.in_sync_most == 1
