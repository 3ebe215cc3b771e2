"""The clients of a load test, one answer after the other: what they ask for, what they note, what they count."""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import pytest

from loadtest.histories.history import AnyOperation, Count, Element, Guarded, Lease, Lists, Register, Transfer
from loadtest.workloads import calls
from loadtest.workloads.append import LIST_MAX, Appends
from loadtest.workloads.bank import Bank
from loadtest.workloads.calls import NEVER_SENT, NO_ANSWER, NOTHING, Call, Pause, Reply, Steps, failure
from loadtest.workloads.counter import Counters
from loadtest.workloads.expiry import Expiring
from loadtest.workloads.keys import Keys
from loadtest.workloads.place import LOAD, Place, Workload, _same_again, numbers_of
from loadtest.workloads.register import Registers
from loadtest.workloads.section import CriticalSections
from loadtest.workloads.sets import Sets
from loadtest.workloads.ycsb import Mix, Ycsb, loading, value_of


class Store:
    """One client's answers from a dict, each write with the next version. `answers` come first, whatever is asked."""

    def __init__(self) -> None:
        self.values: dict[str, tuple[bytes, int]] = {}
        self.version = 0
        self.now_s = 0.0
        self.answers: list[Reply | None] = []
        self.asked: list[Call] = []

    def drive(self, workload: Workload) -> None:
        steps: Steps[None] = workload.step()
        reply = NOTHING
        asked = next(steps, None)
        while asked is not None:
            reply = NOTHING if isinstance(asked, Pause) else self._timed(asked)
            try:
                asked = steps.send(reply)
            except StopIteration:
                return

    def _timed(self, call: Call) -> Reply:
        self.asked.append(call)
        begin_s, self.now_s = self.now_s, self.now_s + 1
        forced = self.answers.pop(0) if self.answers else None
        reply = self._answer(call) if forced is None else forced
        return reply._replace(begin_s=begin_s, end_s=self.now_s)

    def _answer(self, call: Call) -> Reply:
        if call.path.startswith("/v1/locks/"):
            self.version += 1
            body = msgspec.json.encode({"token": self.version}) if call.method == "POST" else b""
            return Reply({"POST": 201, "PUT": 200, "DELETE": 204}[call.method], body)
        if call.path == "/v1/txn":
            return self._transact(msgspec.json.decode(call.body or b""))
        if call.path.startswith("/v1/kv?"):
            return Reply(200, b'{"items":[],"next":null}')
        key = call.path.removeprefix("/v1/kv/").partition("?")[0]
        value, version = self.values.get(key, (b"", None))
        if call.method == "GET":
            return Reply(404) if version is None else Reply(200, value, version)
        if call.method == "DELETE":
            return Reply(404 if self.values.pop(key, None) is None else 204)
        wanted = call.headers.get("If-Match")
        if (wanted and wanted != f'"{version}"') or ("If-None-Match" in call.headers and version is not None):
            return Reply(412)
        return Reply(201, b"", self._write(key, call.body or b""))

    def _write(self, key: str, value: bytes) -> int:
        self.version += 1
        self.values[key] = (value, self.version)
        return self.version

    def _transact(self, body: dict[str, list[dict[str, str]]]) -> Reply:
        results, wrote = [], any(step["op"] == "put" for step in body["then"])
        for step in body["then"]:
            value, version = self.values.get(step["key"], (b"", None))
            if step["op"] == "get":
                found = {"exists": False} if version is None else {"value": value.decode(), "version": version}
                results.append({"key": step["key"], **found})
            else:
                self.values[step["key"]] = (step["value"].encode(), self.version + 1)
                results.append({"key": step["key"], "version": self.version + 1})
        self.version += wrote
        answer = {"id": "t", "succeeded": True, "version": self.version if wrote else None, "results": results}
        return Reply(200, msgspec.json.encode(answer))


def place(noted: list[AnyOperation]) -> Place:
    return Place("run/", "0.0", numbers_of(0), random.Random(1), noted.append)


UNANSWERED = Reply(NO_ANSWER, error="timed out")
UNAVAILABLE = Reply(503, b'{"status":503,"code":"unavailable","retry_after_ms":1}')


# --- what an answer means --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "outcome", "said"),
    [
        (Reply(204), "done", "204"),
        (Reply(412, b'{"status":412,"code":"precondition-failed"}'), "done", "412 precondition-failed"),
        (UNAVAILABLE, "refused", "503 unavailable"),
        (Reply(400, b'{"status":400,"code":"bad-body"}'), "refused", "400 bad-body"),
        (Reply(504, b'{"status":504,"code":"outcome-unknown"}'), "unknown", "504 outcome-unknown"),
        (Reply(500, b"<html>"), "unknown", "500"),
        (Reply(NEVER_SENT, error="ConnectionRefusedError"), "refused", "never sent: ConnectionRefusedError"),
        (UNANSWERED, "unknown", "no answer: timed out"),
    ],
)
def test_an_answer_says_whether_it_was_done_and_is_counted_by_its_code(reply: Reply, outcome: str, said: str) -> None:
    assert (reply.outcome, reply.said) == (outcome, said)
    assert failure(Call("any", "PUT", "/", expected=frozenset({204, 412})), reply) == (
        None if reply.status in (204, 412) else said
    )


def test_a_value_under_the_wrong_key_is_a_failure() -> None:
    keys, rng = Keys("p/", 10), random.Random(1)
    asked = next(Ycsb(Mix.C, keys, rng).step())
    assert isinstance(asked, Call)
    key = asked.path.removeprefix("/v1/kv/")
    assert failure(asked, Reply(200, value_of(key, rng))) is None
    assert failure(asked, Reply(404)) is None
    assert failure(asked, Reply(200, value_of("p/other", rng))) == "200 wrong answer: the value of another key"


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        (b'{"items":[{"key":"p/a","version":1},{"key":"p/b","version":1}],"next":null}', None),
        (b'{"items":[{"key":"p/b","version":1},{"key":"p/a","version":1}],"next":null}', "keys out of order"),
        (b'{"items":[{"key":"p/a","version":1},{"key":"p/a","version":1}],"next":null}', "keys out of order"),
        (b'{"items":[{"key":"q/a","version":1}],"next":null}', "a key of another prefix"),
        (b'{"items":[{"key":"p/%d","version":1}]}' % 1, "not that of a listing"),
    ],
)
def test_a_page_that_is_not_one_is_a_failure(body: bytes, wrong: str | None) -> None:
    found = failure(calls.page("list", "p/", 2), Reply(200, body))
    assert found == (None if wrong is None else f"200 wrong answer: {wrong}")


def test_a_batch_fails_with_the_first_of_its_operations_that_failed() -> None:
    body = b'{"results":[{"status":201},{"status":503,"code":"unavailable"}]}'
    assert failure(calls.batch("load", []), Reply(200, body)) == "200 wrong answer: 503 unavailable in a batch"
    assert failure(calls.batch("load", []), Reply(200, b'{"results":[{"status":201},{"status":204}]}')) is None


# --- YCSB ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mix", "shares"),
    [
        (Mix.A, {"read": 0.5, "update": 0.5}),
        (Mix.B, {"read": 0.95, "update": 0.05}),
        (Mix.C, {"read": 1.0}),
        (Mix.D, {"read": 0.95, "insert": 0.05}),
        (Mix.E, {"scan": 0.95, "insert": 0.05}),
        (Mix.F, {"read": 0.5, "modify, read": 0.5}),
    ],
)
def test_a_mix_of_ycsb_asks_for_its_shares(mix: Mix, shares: dict[str, float]) -> None:
    store, client, steps = Store(), Ycsb(mix, Keys("p/", 100), random.Random(1)), 4_000
    for _ in range(steps):
        store.drive(client)
    found = Counter(call.name.removeprefix(f"YCSB {mix.name} ") for call in store.asked)
    del found["modify, write"]
    assert found.keys() == shares.keys()
    for name, share in shares.items():
        assert found[name] / steps == pytest.approx(share, rel=0.2), name


def test_read_modify_write_writes_on_the_version_that_it_read_and_tries_again_when_it_loses() -> None:
    store, client = Store(), Ycsb(Mix.F, Keys("p/", 10), random.Random(1))
    while not any("write" in call.name for call in store.asked):
        store.asked.clear()
        store.answers = [Reply(200, b"", 5), Reply(412), Reply(200, b"", 6), Reply(204)]
        store.drive(client)
    assert [call.headers.get("If-Match") for call in store.asked] == [None, '"5"', None, '"6"']


def test_loading_writes_each_key_once_with_a_value_that_names_it() -> None:
    keys = Keys("p/", 1_234)
    puts = [
        put for call in loading(keys, 1_234, random.Random(1)) for put in msgspec.json.decode(call.body or b"")["ops"]
    ]
    assert sorted(put["key"] for put in puts) == sorted(keys.name(number) for number in range(1_234))
    assert all(put["value"].startswith(f"{put['key']} ") and len(put["value"]) == 100 for put in puts)


# --- what enters a history -------------------------------------------------------------------------------------------


def test_an_operation_without_an_answer_stays_open_and_one_that_was_never_sent_is_refused() -> None:
    for answer, outcome in ((UNANSWERED, "unknown"), (Reply(NEVER_SENT, error="refused"), "refused")):
        noted: list[AnyOperation] = []
        store, client = Store(), Registers(place(noted))
        while not noted:
            store.answers = [answer]
            store.drive(client)
        (operation,) = noted
        assert operation.outcome == outcome
        assert (operation.end_s is None) == (outcome == "unknown")


def test_registers_note_what_was_read_written_swapped_and_deleted_with_versions() -> None:
    noted: list[AnyOperation] = []
    store, client = Store(), Registers(place(noted))
    for _ in range(3_000):
        store.drive(client)
    registers = [operation for operation in noted if isinstance(operation, Register)]
    assert {operation.action for operation in registers} == {"read", "write", "delete", "swap"}
    held: dict[str, str | None] = {}
    for operation in registers:
        if operation.action == "read":
            assert operation.value == held.get(operation.key)
        elif operation.action == "swap":
            assert operation.expected == held.get(operation.key)
        if operation.action != "read":
            held[operation.key] = operation.value
    written = [operation.value for operation in registers if operation.action in ("write", "swap")]
    assert len(set(written)) == len(written)


def test_a_swap_whose_condition_did_not_hold_is_noted_as_done_and_not_met() -> None:
    noted: list[AnyOperation] = []
    store, client = Store(), Registers(place(noted))
    while not any(isinstance(each, Register) and each.action == "swap" for each in noted):
        store.answers = [None, Reply(412)]
        store.drive(client)
    swap = noted[-1]
    assert isinstance(swap, Register)
    assert (swap.outcome, swap.met, swap.version) == ("done", False, None)


def test_a_counter_is_raised_from_what_was_read_until_it_is_done() -> None:
    noted: list[AnyOperation] = []
    store, client = Store(), Counters(place(noted))
    while len(noted) < 2:
        noted.clear()
        store.answers = [Reply(200, b"7", 3), Reply(412), Reply(200, b"8", 4), Reply(204)]
        store.drive(client)
    told = [(each.action, each.value, each.outcome) for each in noted if isinstance(each, Count)]
    assert told == [("read", 7, "done"), ("raise", 8, "refused"), ("read", 8, "done"), ("raise", 9, "done")]


def test_a_critical_section_writes_with_its_token_and_gives_the_lock_back() -> None:
    noted: list[AnyOperation] = []
    store, client = Store(), CriticalSections(place(noted))
    for _ in range(200):
        store.drive(client)
    leases = [each for each in noted if isinstance(each, Lease)]
    acquired = [each.token for each in leases if each.action == "acquire"]
    assert acquired == [each.token for each in leases if each.action == "release"]
    guarded = [each for each in noted if isinstance(each, Guarded)]
    assert [each.token for each in guarded] == acquired
    for lock in {each.lock for each in guarded}:
        values = [each.value for each in guarded if each.lock == lock]
        assert values == list(range(1, len(values) + 1))


def test_a_guarded_write_that_the_store_refused_because_the_lease_was_lost_is_noted_as_refused() -> None:
    noted: list[AnyOperation] = []
    store, client = Store(), CriticalSections(place(noted))
    while not store.asked or store.asked[2].name != "section write":
        noted.clear()
        store.asked.clear()
        store.answers = [None, None, Reply(412, b'{"status":412,"code":"lock-lost"}')]
        store.drive(client)
    assert [each.outcome for each in noted if isinstance(each, Guarded)] == ["refused"]
    assert failure(store.asked[2], Reply(412)) is None


def test_an_element_that_was_added_and_is_not_there_to_be_removed_is_a_failure() -> None:
    noted: list[AnyOperation] = []
    store, client = Store(), Sets(place(noted))
    while not any(isinstance(each, Element) and each.action == "remove" for each in noted):
        store.values.clear()
        store.drive(client)
    assert failure(store.asked[-1], Reply(404, b'{"status":404,"code":"not-found"}')) == "404 not-found"
    assert noted[-1].outcome == "refused"


def test_a_list_that_is_full_is_left_for_its_successor() -> None:
    noted: list[AnyOperation] = []
    store, client = Store(), Appends(place(noted))
    for _ in range(6_000):
        store.drive(client)
    lists = {key: msgspec.json.decode(value) for key, (value, _) in store.values.items()}
    assert any(key.endswith("/0001") for key in lists)
    assert max(map(len, lists.values())) <= LIST_MAX + 1
    appended = [
        value for each in noted if isinstance(each, Lists) for values in each.appends.values() for value in values
    ]
    assert sorted(appended) == sorted(value for values in lists.values() for value in values)
    assert len(set(appended)) == len(appended)


def test_a_transfer_notes_the_versions_that_it_read_and_the_one_that_it_wrote() -> None:
    noted: list[AnyOperation] = []
    store, client = Store(), Bank(place(noted))
    for number in range(100):
        store._write(f"run/bank/account/{number:03d}", b"1000")
    for _ in range(300):
        store.drive(client)
    balances = dict.fromkeys(range(100), 1000)
    transfers = [each for each in noted if isinstance(each, Transfer)]
    for transfer in transfers:
        assert transfer.version is not None
        assert transfer.version > max(transfer.source_version, transfer.target_version)
        balances[transfer.source] -= transfer.amount
        balances[transfer.target] += transfer.amount
    assert {n: int(store.values[f"run/bank/account/{n:03d}"][0]) for n in range(100)} == balances
    assert {key for key in store.values if "/transfer/" in key} == {f"run/bank/transfer/{t.marker}" for t in transfers}


def test_without_a_history_transfers_leave_no_markers() -> None:
    store, client = Store(), Bank(Place("run/", "0.0", numbers_of(0), random.Random(1)))
    for number in range(100):
        store._write(f"run/bank/account/{number:03d}", b"1000")
    for _ in range(50):
        store.drive(client)
    assert len(store.values) == 100
    assert store.version > 100


def test_a_refused_client_waits_as_long_as_it_was_asked_to_within_bounds() -> None:
    assert calls.patience(Reply(503, b'{"retry_after_ms":250}')) == Pause(0.25)
    assert calls.patience(Reply(503, b'{"retry_after_ms":60000}')) == Pause(1.0)
    assert calls.patience(Reply(NEVER_SENT)) == Pause(0.1)


# --- writes with an Idempotency-Key ----------------------------------------------------------------------------------


def keyed(store: Store, *answers: Reply) -> tuple[Reply, list[str | None]]:
    """What a write comes to that always carries a key, and the keys that were sent."""
    where = Place("run/", "0.0", numbers_of(0), random.Random(4), None, LOAD._replace(keyed=1.0))
    found: list[Reply] = []

    class Write:
        def step(self) -> Steps[None]:
            found.append((yield from where.write(calls.put("write", "run/a", b"1"))))

    store.answers = list(answers)
    store.drive(Write())
    return found[0], [call.headers.get("Idempotency-Key") for call in store.asked]


def test_a_write_with_a_key_is_sent_again_with_it_until_its_outcome_is_known() -> None:
    reply, keys = keyed(Store(), UNANSWERED, UNAVAILABLE, Reply(204, version=7))
    assert (reply.status, reply.version, reply.begin_s) == (204, 7, 0.0)
    assert len(keys) >= 3
    assert len(set(keys)) == 1
    assert keys[0] is not None


def test_a_refusal_of_the_first_try_is_final_and_an_outcome_may_stay_unknown() -> None:
    assert keyed(Store(), UNAVAILABLE)[0].outcome == "refused"
    reply, keys = keyed(Store(), *[UNANSWERED] * 20)
    assert reply.outcome == "unknown"
    assert 2 < len(keys) < 10


def test_a_key_that_gets_another_answer_the_second_time_is_a_failure() -> None:
    first, call = Reply(204, version=7), calls.put("write", "a", b"1")
    again = _same_again(call, first)
    assert failure(again, Reply(204, version=7)) is None
    assert failure(again, Reply(204, version=8)) == (
        "204 wrong answer: not the answer that the same Idempotency-Key got before"
    )
    again = _same_again(calls.transaction("write", {}), Reply(200, version=7))
    assert failure(again, Reply(409)) is None  # nothing was done by this try, which says nothing of the first one
    assert failure(again, Reply(200, version=8)) is not None


def test_a_key_that_expires_is_noted_with_a_deletion_that_no_client_asked_for() -> None:
    noted: list[AnyOperation] = []
    store, client = Store(), Expiring(place(noted))
    while not any(isinstance(each, Register) and each.action == "swap" for each in noted):
        noted.clear()
        store.drive(client)
    kinds = [(each.action, each.outcome) for each in noted if isinstance(each, Register)]
    assert kinds == [("write", "done"), ("delete", "unknown"), ("swap", "done"), ("read", "done")]
    write, expiry = noted[:2]
    assert write.begin_s + 0.25 < expiry.begin_s < write.begin_s + 0.3
    assert store.asked[-3].path.endswith("?ttl=0.3")


def test_a_look_up_of_a_transaction_that_cannot_be_is_a_failure() -> None:
    call = calls.look_up("look up", "t", frozenset({"unknown", "committed"}))
    assert failure(call, Reply(404)) is None
    assert failure(call, Reply(200, b'{"status":"committed","succeeded":true}')) is None
    assert "unmet, which cannot be" in (failure(call, Reply(200, b'{"status":"committed","succeeded":false}')) or "")
    assert "pending, which cannot be" in (failure(call, Reply(200, b'{"status":"pending"}')) or "")
