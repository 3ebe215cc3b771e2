"""Small clusters with a story to be told in every way: see `cluster.Scenario`.

Store 0 owns a, store 1 owns b, store 2, where there is one, owns c; L is a lock. A transaction's anchor is the first
key that it names: its store is asked last, and decides.
"""

from __future__ import annotations

from kvstore.model import Condition, IdempotencyKey, Preconditions, TxnOp
from kvstore.protocol import Acquire, Delete, Get, Put, Release
from kvstore.router.participants import Transaction
from tests.unit.transactions.cluster import Scenario
from tests.unit.transactions.serial import Txn

TWO = {"a": 0, "b": 1}
THREE = {"a": 0, "b": 1, "c": 2}


def txn(
    then: str, *, if_: list[Condition] | None = None, otherwise: str = "", value: bytes = b"", once: str = ""
) -> Txn:
    """`then` and `otherwise`: keys, each put; after a `?` got, after a `-` deleted. `value`: what is put."""
    return Txn(
        Transaction(if_ or [], _steps(then, value), _steps(otherwise, value)),
        IdempotencyKey(once, "digest") if once else None,
    )


def _steps(text: str, value: bytes) -> list[TxnOp]:
    kinds = {"?": "get", "-": "delete"}
    return [
        TxnOp(kinds[each[0]], each[1:]) if each[0] in kinds else TxnOp("put", each, value)  # type: ignore[arg-type]
        for each in text.split()
    ]


def put(key: str, value: bytes, token: int | None = None) -> Put:
    return Put(0, key, value, guard=Preconditions(token=token) if token is not None else None)


def put_if_version(key: str, value: bytes, version: int) -> Put:
    return Put(0, key, value, guard=Preconditions(versions=[version]))


def get(key: str) -> Get:
    return Get(0, key)


def exists(key: str, wanted: bool = True) -> Condition:
    return Condition(key, exists=wanted)


def held(lock: str, token: int) -> Condition:
    return Condition(lock, token=token)


BOTH = {"a": b"a0", "b": b"b0"}

SCENARIOS: dict[str, Scenario] = {
    "two transactions over two keys in opposite order": Scenario(
        TWO, [[txn("a b", value=b"1")], [txn("b a", value=b"2")]], BOTH, budget={"double": 1}, attempts=3
    ),
    "two transactions over two keys in opposite order, and another one asks": Scenario(
        TWO, [[txn("a b", value=b"1")], [txn("b a", value=b"2")]], BOTH, budget={"resolve": 1}
    ),
    "two transactions over two keys in opposite order, and messages are late": Scenario(
        TWO, [[txn("a b", value=b"1")], [txn("b a", value=b"2")]], BOTH, budget={"timeout": 1}, attempts=3
    ),
    "two transactions over three keys of three stores in opposite order": Scenario(
        THREE, [[txn("a b c", value=b"1")], [txn("c b a", value=b"2")]], attempts=3
    ),
    "three transactions over three keys of three stores in a circle": Scenario(
        THREE, [[txn("a b", value=b"1")], [txn("b c", value=b"2")], [txn("c a", value=b"3")]], attempts=2
    ),
    "plain writes and reads beside a transaction": Scenario(
        TWO,
        [[txn("a b", value=b"1")], [put("b", b"2"), get("a")], [get("a"), get("b")]],
        BOTH,
        budget={"crash": 1},
    ),
    "several wait for a lock when their time is over": Scenario(
        {"a": 0, "b": 1, "x": 1},
        [[txn("a x", value=b"1")], [txn("a b x", value=b"2")], [put("b", b"3"), get("b")]],
        ages=(20, 10),
        attempts=1,
        budget={"give_up": 1},
    ),
    "reads in both orders beside a transaction": Scenario(
        TWO, [[txn("a b", value=b"1")], [get("a"), get("b")], [get("b"), get("a")]], budget={"resolve": 1, "death": 1}
    ),
    "a doubled prepare after finish and a later put": Scenario(
        TWO, [[txn("a b", value=b"1")], [put("b", b"2")]], budget={"double": 2, "resolve": 1}
    ),
    "another one asks before the commit has arrived": Scenario(
        TWO, [[txn("a b", value=b"1")], [put("b", b"2")]], budget={"resolve": 2, "timeout": 1, "death": 1}
    ),
    "a commit after its tombstone was dropped": Scenario(
        TWO, [[txn("a b", value=b"1")]], budget={"resolve": 1, "drop": 1, "timeout": 1, "double": 1}
    ),
    "a commit repeated after its decision was dropped": Scenario(
        TWO, [[txn("a b", value=b"1")]], budget={"timeout": 1, "finish": 1, "drop": 1, "double": 1}
    ),
    "a commit repeated after its decision was dropped, and a late duplicate asked about": Scenario(
        TWO, [[txn("a b", value=b"1")]], budget={"timeout": 1, "finish": 1, "drop": 1, "double": 1, "resolve": 1}
    ),
    "a transaction waits behind an older one": Scenario(
        {"a": 0, "b": 1, "x": 1}, [[txn("b a", value=b"1")], [txn("a b", value=b"2")], [txn("x a", value=b"3")]]
    ),
    "readers behind plain writes that wait for readers": Scenario(
        TWO, [[txn("?a ?b")], [txn("?a ?b")], [put("a", b"1")], [put("b", b"1")]], BOTH, attempts=1
    ),
    "a router that tries again over three stores": Scenario(
        THREE, [[txn("a b", value=b"1")], [txn("a b c", value=b"2")]], budget={"resolve": 1}
    ),
    "a reading transaction while a key moves there and back again": Scenario(
        TWO, [[txn("?a ?b")], [put("a", b"1"), put("b", b"1")]], BOTH, budget={"move": 2}, attempts=1
    ),
    "a reply outlives a participant that is dead": Scenario(
        TWO,
        [[txn("a b", value=b"1", once="K"), txn("a b", value=b"1", once="K")], [put("a", b"2")]],
        budget={"death": 1, "later": 1},
    ),
    "a commit waits for a lock and another one asks": Scenario(
        {"a": 0, "b": 1, "x": 1},
        [[txn("a b", value=b"1")], [txn("x a", value=b"3")]],
        budget={"resolve": 1},
    ),
    "the decision of three stores is dropped": Scenario(
        THREE, [[txn("a b c", value=b"1")]], budget={"drop": 1, "finish": 1, "death": 1}
    ),
    "a key moves while its transaction runs": Scenario(
        TWO, [[txn("a b", value=b"1")], [put("b", b"2")]], budget={"move": 1, "resolve": 1, "double": 1}
    ),
    "a key moves there and back again": Scenario(TWO, [[txn("a b", value=b"1")]], budget={"move": 2, "resolve": 1}),
    "a key moves and decisions are dropped": Scenario(
        TWO, [[txn("a b", value=b"1")]], budget={"move": 1, "resolve": 1, "drop": 1, "finish": 1, "timeout": 1}
    ),
    "a key of the anchor's store moves": Scenario(
        {"a": 0, "b": 0, "c": 1}, [[txn("a b c", value=b"1")]], budget={"move": 1, "drop": 1, "finish": 1, "timeout": 1}
    ),
    "a key moves to a clock that is behind": Scenario(
        TWO, [[txn("a b", value=b"1")], [put("b", b"2")]], clocks=(0, 20), budget={"move": 1, "double": 1}
    ),
    "a router dies while its messages wait": Scenario(
        {"a": 0, "b": 1, "x": 1},
        [[txn("b a", value=b"1")], [txn("a b x", value=b"2")], [put("b", b"3"), get("x")]],
        ages=(20, 10),
        attempts=1,
        budget={"death": 1, "resolve": 1},
    ),
    "a store dies while two transactions run": Scenario(
        TWO, [[txn("a b", value=b"1")], [txn("b a", value=b"2")]], budget={"crash": 1}
    ),
    "a reading transaction beside a writing one": Scenario(
        TWO, [[txn("?a ?b")], [txn("a b", value=b"1")]], BOTH, budget={"timeout": 1}
    ),
    "a reading transaction beside a writing one, and a store dies": Scenario(
        TWO, [[txn("?a ?b")], [txn("a b", value=b"1")]], BOTH, budget={"crash": 1}
    ),
    "a reading transaction while a key moves": Scenario(
        TWO, [[txn("?a ?b")], [txn("a b", value=b"1")]], BOTH, budget={"move": 1}
    ),
    "a reading transaction whose time is over": Scenario(
        TWO, [[txn("?a ?b")], [txn("a b", value=b"1")]], BOTH, budget={"give_up": 1}
    ),
    "a reading transaction beside plain writes": Scenario(
        TWO, [[txn("?a ?b")], [put("a", b"1"), put("b", b"1")], [get("b"), get("a")]], BOTH, budget={"give_up": 1}
    ),
    "two reading transactions and a restart": Scenario(
        TWO,
        [[txn("?a ?b")], [txn("?a ?b")], [put("a", b"1"), put("b", b"1")]],
        BOTH,
        budget={"crash": 1},
        attempts=1,
    ),
    "the same request twice": Scenario(
        TWO,
        [[txn("a b", value=b"1", once="K")], [txn("a b", value=b"1", once="K")], [put("a", b"2")]],
        budget={"death": 1},
    ),
    "the same request again after its outcome was unknown": Scenario(
        TWO,
        [[txn("a b", value=b"1", once="K"), txn("a b", value=b"1", once="K")], [put("b", b"2")]],
        budget={"death": 1, "finish": 1, "drop": 1},
    ),
    "the same request again, very late": Scenario(
        TWO,
        [[txn("a b", value=b"1", once="K"), txn("a b", value=b"1", once="K")]],
        budget={"drop": 1, "later": 1, "double": 1},
        attempts=1,
    ),
    "the else branch runs": Scenario(
        TWO,
        [[txn("a", if_=[exists("a", False)], otherwise="a b", value=b"1")], [put("b", b"2"), get("a")]],
        {"a": b"a0"},
        budget={"resolve": 1},
    ),
    "each writes what the other one compares": Scenario(
        TWO, [[txn("b", if_=[exists("a")], value=b"1")], [txn("a", if_=[exists("b")], value=b"2")]], {"a": b"a0"}
    ),
    "each deletes what the other one needs": Scenario(
        TWO,
        [[txn("-b", if_=[exists("a")], otherwise="?b")], [txn("-a", if_=[exists("b")], otherwise="?a")]],
        BOTH,
        attempts=2,
    ),
    "compare-and-set beside a transaction": Scenario(
        TWO, [[txn("a ?b b", value=b"1")], [put_if_version("b", b"2", 2), get("b")], [Delete(0, "a")]], BOTH
    ),
    "a transaction of one store beside one of two": Scenario(
        {"a": 0, "b": 0, "c": 1},
        [[txn("a b ?b", value=b"1")], [txn("c a b", value=b"2")], [get("a"), get("b")]],
        budget={"resolve": 1},
    ),
    "a guard's lock is released and granted": Scenario(
        {"a": 0, "L": 1},
        [
            [txn("a", if_=[exists("a"), held("L", 3)], value=b"1")],
            [Release(0, "L", 3), Acquire(0, "L", 9000, 0, ""), get("a")],
        ],
        {"a": b"a0"},
        {"L": 3},
        budget={"resolve": 1, "double": 1},
    ),
    "a guard's lock is due": Scenario(
        {"a": 0, "L": 1},
        [[txn("a", if_=[exists("a"), held("L", 3)], value=b"1")], [Acquire(0, "L", 9000, 9000, ""), get("a")]],
        {"a": b"a0"},
        {"L": 3},
        budget={"later": 1},
        may_wait=True,
    ),
    "a holder's put behind those who wait for its lease": Scenario(
        {"a": 0, "L": 1},
        [
            [put("L", b"1", token=3), Release(0, "L", 3)],
            [Acquire(0, "L", 9000, 9000, "")],
            [txn("a L", if_=[held("L", 3)], value=b"2")],
        ],
        {},
        {"L": 3},
    ),
    "a leased key is written by a transaction without the token": Scenario(
        {"a": 0, "L": 1},
        [[txn("a L", value=b"2")], [Release(0, "L", 3), put("L", b"1")]],
        {},
        {"L": 3},
    ),
}  # fmt: skip
