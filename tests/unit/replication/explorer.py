"""The search: breadth first through all worlds that a scenario can come to, each looked at once.
Leaves to others: which scenarios there are (`scenarios`), looking further than the tests do (`deeper`).
"""

from __future__ import annotations

from typing import NamedTuple

from tests.unit.replication.model import Left, Model, Violation, World, check, cluster


class Scenario(NamedTuple):
    """`copies` and `spare` as in `model.cluster`; `late` kinds of messages; `never`: events left out;
    `faulty`: the nodes that may crash or lose their disk; `begins`: how the names of the first steps begin, where not
    everything is explored from the start."""

    copies: str
    left: Left
    late: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    spare: int = 0
    faulty: tuple[int, ...] = (0, 1, 2)
    begins: tuple[str, ...] = ()


class Explored(NamedTuple):
    worlds: int
    depth: int
    whole: bool  # nothing was left to look at
    terms_served: set[int]
    in_sync_most: int  # of copies, as the controller's map counts them


Came = dict[World, tuple[World, str] | None]


def explore(scenario: Scenario, worlds_max: int = 1_000_000) -> Explored:
    """Look at all worlds, or so many. Raises Violation with the story of how it came to that, the shortest one."""
    model = Model(frozenset(scenario.late), frozenset(scenario.never), frozenset(scenario.faulty))
    first = cluster(scenario.copies, scenario.left, spare=scenario.spare)
    for begin in scenario.begins:
        first = next(after for name, after in model.steps(first) if name.startswith(begin))
    came: Came = {first: None}
    layer, depth = [first], 0
    while layer and len(came) < worlds_max:
        following: list[World] = []
        for world in layer:
            _look(model, world, came, following)
            if len(came) >= worlds_max:
                break
        layer, depth = following, depth + 1
    served = {node.ship.config.term for world in came for node in world.nodes if node.ship and node.ship.serves}
    return Explored(len(came), depth, not layer, served, max(len(world.config.in_sync) for world in came))


def _look(model: Model, world: World, came: Came, following: list[World]) -> None:
    """Add what may come right after that world."""
    at = world
    try:
        for name, after in model.steps(world):
            if after not in came:
                came[after] = (world, name)
                following.append(after)
                at = after
                check(after)
                at = world
    except Violation as error:
        raise Violation("\n".join([str(error), *_story(came, at)])) from None


def _story(came: Came, world: World) -> list[str]:
    told: list[str] = []
    while (step := came[world]) is not None:
        world = step[0]
        told.append(step[1])
    return told[::-1]
