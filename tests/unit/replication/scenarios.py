"""The small configurations that are explored, by what may happen in them."""

from __future__ import annotations

from tests.unit.replication.explorer import Scenario
from tests.unit.replication.model import Left

SCENARIOS = {
    "a primary dies and its copy is promoted": Scenario(
        "i", Left(writes=1, crashes=1, changes=2), never=("snapshot", "name", "in-sync")
    ),
    "a lease and a promotion, late beats": Scenario(
        "i",
        Left(writes=1, ticks=2, changes=2, crashes=1),
        late=("beacon", "grant"),
        never=("snapshot", "name", "in-sync"),
    ),
    "a planned change": Scenario(
        "i",
        Left(writes=1, ticks=1, plans=1, changes=1),
        late=("beacon", "grant", "return"),
        never=("snapshot", "promote", "out"),
    ),
    "a copy joins, a late request": Scenario(
        "j", Left(writes=1, crashes=1, changes=3), late=("request",), never=("snapshot", "promote", "name")
    ),
    "a copy joins and is promoted": Scenario("j", Left(writes=1, changes=3, ticks=1), never=("snapshot", "name")),
    "a copy falls out and joins again, late requests": Scenario(
        "i", Left(writes=1, changes=3), late=("request",), never=("snapshot", "promote", "name")
    ),
    "a copy loses its disk": Scenario("i", Left(writes=1, losses=1, changes=3), never=("snapshot",)),
    "a first copy for a store that is alone": Scenario(
        "", Left(writes=0, crashes=1, changes=4), spare=1, never=("snapshot",)
    ),
    "late records, two of three": Scenario(
        "ii", Left(writes=1, changes=2), late=("record",), never=("snapshot", "name", "in-sync")
    ),
    "late records and acknowledgements": Scenario(
        "i",
        Left(writes=2, crashes=1, changes=2, doubles=1),
        late=("record", "ack"),
        never=("snapshot", "name", "promote"),
    ),
    "late begin": Scenario(
        "j", Left(writes=1, crashes=1, changes=1, doubles=1), late=("begin",), never=("snapshot", "name", "promote")
    ),
    "snapshot": Scenario("j", Left(writes=1, changes=1, doubles=1), late=("snapshot",), never=("name", "promote")),
    "a copy joins, late acknowledgements": Scenario(
        "j", Left(writes=1, crashes=1, changes=2), late=("ack",), never=("snapshot", "promote", "name", "out")
    ),
    "a joining copy loses its disk, late acknowledgements": Scenario(
        "j", Left(writes=0, losses=1, changes=2), late=("ack",), never=("snapshot", "promote", "out")
    ),
    "a log is released": Scenario("i", Left(writes=1, crashes=1, changes=2, releases=1), never=("promote", "name")),
    "a log is released while a copy joins": Scenario(
        "j", Left(writes=1, crashes=1, changes=2, releases=1), never=("promote", "name")
    ),
    "there and back": Scenario(
        "i", Left(writes=2, changes=3), late=("record", "committed"), never=("snapshot", "name", "in-sync")
    ),
    "three nodes, a crash": Scenario("ii", Left(writes=1, crashes=1, changes=2), never=("snapshot", "name", "in-sync")),
    "three nodes, a lost disk": Scenario(
        "ii", Left(writes=1, losses=1, changes=2), never=("snapshot", "name", "in-sync")
    ),
    "three nodes, two promotions": Scenario("ii", Left(writes=1, changes=4), never=("snapshot", "name", "in-sync")),
    "a term is opened twice, a late request": Scenario(
        "j", Left(writes=1, crashes=2, changes=2), late=("request",), never=("snapshot", "promote", "name", "out")
    ),
    "a first copy, and a crash of the primary that has not followed": Scenario(
        "", Left(writes=0, crashes=2, changes=4), spare=1, never=("snapshot", "out")
    ),
    "three nodes and a lease": Scenario(
        "ii", Left(writes=1, ticks=1, changes=3), never=("snapshot", "name", "in-sync")
    ),
    "a late record of an older term": Scenario(
        "i",
        Left(writes=1, crashes=1, changes=1),
        late=("record",),
        never=("snapshot", "name", "promote", "out", "in-sync"),
    ),
    "a committed number before the session begins": Scenario(
        "j",
        Left(writes=1, crashes=1, changes=1),
        late=("begin",),
        never=("snapshot", "name", "promote", "out", "in-sync"),
    ),
    "a lease and a promotion": Scenario("i", Left(ticks=1, changes=2), never=("snapshot", "name", "in-sync")),
    "a copy does not answer an opening": Scenario(
        "i", Left(writes=1, crashes=1, changes=2), never=("snapshot", "name", "promote", "in-sync")
    ),
    "a term is opened twice": Scenario(
        "j", Left(writes=1, crashes=1, changes=1), late=("request",), never=("snapshot", "promote", "name", "out")
    ),
    "a log is released while a copy joins, late acknowledgements": Scenario(
        "j", Left(writes=1, crashes=1, changes=1, releases=1), late=("ack",), never=("promote", "name", "out")
    ),
    "an acknowledgement of an older term": Scenario(
        "j",
        Left(writes=1, crashes=1, changes=2),
        late=("ack",),
        faulty=(0,),
        never=("snapshot", "promote", "name", "out"),
    ),
    "a begin that is lost": Scenario(
        "j",
        Left(writes=1, crashes=1, changes=1),
        late=("begin",),
        faulty=(0,),
        never=("snapshot", "name", "promote", "out", "in-sync"),
    ),
    "a request of an older term": Scenario(
        "j", Left(crashes=1, changes=2), late=("request",), faulty=(0,), never=("snapshot", "promote", "name", "out")
    ),
    "the lease of three": Scenario(
        "ii",
        Left(ticks=1, changes=2),
        never=("snapshot", "name", "in-sync", "tick"),
        begins=("0 beats to 2", "1 is promoted", "1 follows", "1 opens", "1 asks 2"),
    ),
    "a late grant": Scenario("i", Left(ticks=1, changes=2), late=("grant",), never=("snapshot", "name", "in-sync")),
    "a copy that granted starts again": Scenario(
        "i", Left(ticks=1, crashes=1, changes=2), faulty=(1,), never=("snapshot", "name", "in-sync")
    ),
    "a lease is given back": Scenario(
        "i", Left(ticks=1, plans=1, changes=2), never=("snapshot", "name", "in-sync", "promote")
    ),
    "a late giving back": Scenario(
        "i",
        Left(ticks=1, plans=1, crashes=1, changes=3),
        late=("return",),
        faulty=(0,),
        never=("snapshot", "name", "in-sync"),
        begins=(
            "0 gives its lease back",
            "0 crashes",
            "0 follows",
            "0 is given",
            "0 follows",
            "0 opens",
            "0 asks 1",
            "0 begins",
            "0 syncs",
            "0 greets 1",
        ),
    ),
    "a store that was alone": Scenario(
        "", Left(writes=1, crashes=2, changes=3), spare=1, faulty=(0,), never=("snapshot", "promote", "out")
    ),
}
