"""A bank: transfers between accounts, and reads of some and of all of them.

Owns: what a client does to the accounts, and how each answer enters the history.
Promises: a transfer is one transaction, on the condition that both accounts still have the versions that were read;
while there is a history it also writes a marker of its own, by which its outcome can be told at the end.
Leaves to others: whether the history can be (loadtest.histories.bank).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from loadtest.histories.bank import marker_text
from loadtest.histories.history import Account, Balances, Markers, Outcome, Transfer
from loadtest.workloads import calls
from loadtest.workloads.answers import Got, Reply, txn_id
from loadtest.workloads.calls import Steps
from loadtest.workloads.place import Place

BALANCE = 1000
_AMOUNT_MAX = 20
_HOT_ACCOUNTS = 12
_HOT_SHARE = 0.2
_LOOKED_UP_MAX = 100


class Told(NamedTuple):
    """The id of a transfer, and what its client was told."""

    marker: str
    id: str
    outcome: Outcome


class Bank:
    """One client."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def step(self) -> Steps[None]:
        rng, accounts = self._place.rng, range(self._place.shape.accounts)
        chosen = rng.random()
        if chosen < 0.05:
            reply, _ = yield from read(self._place, "bank read all", rng.sample(accounts, len(accounts)))
        elif chosen < 0.1:
            reply, _ = yield from read(self._place, "bank read", rng.sample(accounts, 3))
        else:
            reply = yield from self._transfer(*rng.sample(self._some(), 2))
        yield from calls.rest(reply)

    def _some(self) -> range:
        """All accounts, or a few that many transfers want."""
        is_hot = self._place.rng.random() < _HOT_SHARE
        return range(min(_HOT_ACCOUNTS, self._place.shape.accounts) if is_hot else self._place.shape.accounts)

    def _transfer(self, source: int, target: int) -> Steps[Reply]:
        reply, found = yield from read(self._place, "bank read", [source, target])
        if len(found) < 2 or found[source].balance == 0:
            return reply
        amount = self._place.rng.randint(1, min(_AMOUNT_MAX, found[source].balance))
        transfer = Transfer(
            client=self._place.client,
            begin_s=0.0,
            source=source,
            target=target,
            amount=amount,
            marker=str(self._place.number()),
            source_version=found[source].version,
            target_version=found[target].version,
        )
        reply = yield from self._place.write(calls.transaction("bank transfer", self._body(transfer, found)))
        self._note(transfer, reply)
        return reply

    def _body(self, transfer: Transfer, found: dict[int, Account]) -> dict[str, Any]:
        source, target = (key_of(self._place.prefix, number) for number in (transfer.source, transfer.target))
        puts = [
            {"op": "put", "key": source, "value": str(found[transfer.source].balance - transfer.amount)},
            {"op": "put", "key": target, "value": str(found[transfer.target].balance + transfer.amount)},
        ]
        if self._place.noted:
            marker = f"{markers_prefix(self._place.prefix)}{transfer.marker}"
            puts.append({"op": "put", "key": marker, "value": marker_text(transfer)})
        self._place.rng.shuffle(puts)  # the first key is the anchor
        return {
            "if": [
                {"key": source, "version": transfer.source_version},
                {"key": target, "version": transfer.target_version},
            ],
            "then": puts,
            "else": [{"op": "get", "key": source}, {"op": "get", "key": target}],
        }

    def _note(self, transfer: Transfer, reply: Reply) -> None:
        answered = calls.answer_of(reply)
        unmet = answered is not None and not answered.succeeded
        transfer.begin_s = reply.begin_s
        transfer.outcome = "refused" if unmet else reply.outcome
        transfer.end_s = None if transfer.outcome == "unknown" else reply.end_s
        transfer.said = "a condition did not hold" if unmet else reply.said
        transfer.version = answered.version if answered is not None and not unmet else None
        self._place.note(transfer)
        if (named := txn_id(reply)) is not None and not unmet:
            told = self._place.shared.setdefault("told", [])
            told.append(Told(transfer.marker, named, transfer.outcome))
        if answered is not None and unmet:
            note_balances(self._place, reply, [transfer.source, transfer.target], answered.results)


def key_of(prefix: str, number: int) -> str:
    return f"{prefix}bank/account/{number:03d}"


def markers_prefix(prefix: str) -> str:
    return f"{prefix}bank/transfer/"


def read(place: Place, name: str, numbers: Sequence[int]) -> Steps[tuple[Reply, dict[int, Account]]]:
    """These accounts, in one transaction; none if it was not answered."""
    reply = yield calls.transaction(name, calls.reading([key_of(place.prefix, number) for number in numbers]))
    answered = calls.answer_of(reply)
    return reply, {} if answered is None else note_balances(place, reply, numbers, answered.results)


def note_balances(place: Place, reply: Reply, numbers: Sequence[int], results: Sequence[Got]) -> dict[int, Account]:
    found = accounts_of(numbers, results)
    place.record(Balances, reply, accounts=found, whole=len(numbers) == place.shape.accounts)
    return found


def opening(place: Place) -> Steps[bool]:
    """Open all accounts, and read them; False if that cannot be done."""
    puts = [
        {"op": "put", "key": key_of(place.prefix, number), "value": str(BALANCE)}
        for number in range(place.shape.accounts)
    ]
    body = {"if": [{"key": key_of(place.prefix, 0), "exists": False}], "then": puts}
    yield from calls.insist(calls.transaction("bank open", body))
    return (yield from _read_all(place))


def _read_all(place: Place) -> Steps[bool]:
    accounts = range(place.shape.accounts)
    body = calls.reading([key_of(place.prefix, number) for number in accounts])
    reply = yield from calls.insist(calls.transaction("bank read all", body))
    answered = calls.answer_of(reply)
    return answered is not None and len(note_balances(place, reply, accounts, answered.results)) == len(accounts)


def accounts_of(numbers: Sequence[int], results: Sequence[Got]) -> dict[int, Account]:
    """What the gets of these accounts found; one that is not there is left out."""
    found = {}
    for number, result in zip(numbers, results, strict=True):
        if result.value is not None and result.version is not None:
            found[number] = Account(int(result.value), result.version)
    return found


def closing(place: Place) -> Steps[bool]:
    """All accounts and all markers at the end; False if they cannot be read."""
    if not (yield from _read_all(place)):
        return False
    prefix = markers_prefix(place.prefix)
    items, reply = yield from calls.listing("bank markers", prefix, values=True, ask=calls.insist)
    if items is None:
        return False
    texts = {item.key.removeprefix(prefix): item.value or "" for item in items}
    place.record(Markers, reply, markers=texts)
    yield from _look_up(place, texts)
    return True


def _look_up(place: Place, markers: Mapping[str, str]) -> Steps[None]:
    """What GET /v1/txn/{id} says of a cluster at rest must agree with the markers and with what clients were told."""
    for told in place.shared.pop("told", [])[-_LOOKED_UP_MAX:]:
        statuses = {"committed"} if told.marker in markers else {"aborted", "unmet"}
        yield calls.look_up("bank look up", told.id, frozenset({"unknown", *statuses}))
