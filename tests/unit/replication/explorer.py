"""The search: breadth first through all worlds that a scenario can come to, each looked at once."""

from __future__ import annotations

from typing import NamedTuple

from tests.unit.replication.model import Left, Model, Violation, World, check, cluster


class Scenario(NamedTuple):
    """`copies` and `spare` as in `model.cluster`; `late` kinds of messages; `never`: events left out."""

    copies: str
    left: Left
    late: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    spare: int = 0


class Explored(NamedTuple):
    worlds: int
    depth: int
    whole: bool  # nothing was left to look at


Came = dict[World, tuple[World, str] | None]


def explore(scenario: Scenario, worlds_max: int = 1_000_000) -> Explored:
    """Look at all worlds, or so many. Raises Violation with the story of how it came to that, the shortest one."""
    model = Model(frozenset(scenario.late), frozenset(scenario.never))
    first = cluster(scenario.copies, scenario.left, spare=scenario.spare)
    came: Came = {first: None}
    layer, depth = [first], 0
    while layer and len(came) < worlds_max:
        following: list[World] = []
        for world in layer:
            _look(model, world, came, following)
            if len(came) >= worlds_max:
                break
        layer, depth = following, depth + 1
    return Explored(len(came), depth, not layer)


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
