"""loadtest.crash_model: the rule of the crash rounds finds every fault that it claims to find, and no others."""

from __future__ import annotations

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer

from loadtest.crash_model import KeyHistory, Kind
from loadtest.crash_rounds import Writer


def history_with(*puts: tuple[bytes, int]) -> KeyHistory:
    """A key whose puts were all acknowledged."""
    key = KeyHistory("k")
    for number, (value, version) in enumerate(puts):
        key.put_acknowledged(value, version, created=number == 0)
    assert key.violations == []
    return key


def kinds(key: KeyHistory) -> list[Kind]:
    return [violation.kind for violation in key.violations]


# --- what is right is not blamed -------------------------------------------------------------------------------


def test_the_acknowledged_value_at_its_version_is_right_however_often_it_is_read() -> None:
    key = history_with((b"a", 3), (b"b", 7))
    key.observed(b"b", 7)
    key.observed(b"b", 7)
    assert kinds(key) == []


def test_a_key_never_written_or_deleted_is_rightly_absent() -> None:
    key = KeyHistory("k")
    key.observed(None, None)
    key.put_acknowledged(b"a", 1, created=True)
    key.delete_acknowledged(existed=True)
    key.observed(None, None)
    key.delete_acknowledged(existed=False)
    key.put_acknowledged(b"b", 2, created=True)
    assert kinds(key) == []


def test_a_write_of_unknown_outcome_may_be_there_or_not() -> None:
    done, not_done = history_with((b"a", 3)), history_with((b"a", 3))
    for key in (done, not_done):
        key.outcome_unknown(b"b")
    done.observed(b"b", 4)
    not_done.observed(b"a", 3)
    assert kinds(done) == kinds(not_done) == []


def test_a_delete_of_unknown_outcome_may_be_done_or_not() -> None:
    done, not_done = history_with((b"a", 3)), history_with((b"a", 3))
    for key in (done, not_done):
        key.outcome_unknown(None)
    done.observed(None, None)
    not_done.observed(b"a", 3)
    assert kinds(done) == kinds(not_done) == []


def test_after_an_unknown_delete_a_put_may_create_or_replace() -> None:
    for created in (True, False):
        key = history_with((b"a", 3))
        key.outcome_unknown(None)
        key.put_acknowledged(b"b", 5, created=created)
        assert kinds(key) == []


def test_one_of_several_unknown_writes_may_show_and_a_later_one_after_it() -> None:
    key = history_with((b"a", 3))
    for value in (b"b", b"c", b"d"):
        key.outcome_unknown(value)
    key.observed(b"c", 5)
    key.observed(b"d", 6)
    assert kinds(key) == []


# --- what is wrong is found ------------------------------------------------------------------------------------


def test_a_lost_write_shows_as_the_older_value() -> None:
    key = history_with((b"a", 3), (b"b", 7))
    key.observed(b"a", 3)
    assert kinds(key) == [Kind.LOST]


def test_a_lost_write_shows_as_absence() -> None:
    key = history_with((b"a", 3))
    key.observed(None, None)
    assert kinds(key) == [Kind.LOST]


def test_a_lost_write_shows_in_the_answer_to_the_next_put() -> None:
    key = history_with((b"a", 3))
    key.put_acknowledged(b"b", 4, created=True)
    assert kinds(key) == [Kind.WRONG_ANSWER]


def test_a_lost_write_shows_in_the_answer_to_a_delete() -> None:
    key = history_with((b"a", 3))
    key.delete_acknowledged(existed=False)
    assert kinds(key) == [Kind.LOST]


def test_a_delete_that_is_undone_is_found() -> None:
    key = history_with((b"a", 3))
    key.delete_acknowledged(existed=True)
    key.observed(b"a", 3)
    assert kinds(key) == [Kind.RESURRECTED]


def test_a_delete_that_is_undone_shows_in_the_answer_to_the_next_put() -> None:
    key = history_with((b"a", 3))
    key.delete_acknowledged(existed=True)
    key.put_acknowledged(b"b", 4, created=False)
    assert kinds(key) == [Kind.WRONG_ANSWER]


def test_a_version_that_goes_back_or_is_given_twice_is_found_at_a_put() -> None:
    for version in (6, 7):
        key = history_with((b"a", 7))
        key.put_acknowledged(b"b", version, created=False)
        assert kinds(key) == [Kind.VERSION_BACK]


def test_a_version_that_starts_anew_after_a_delete_is_found() -> None:
    key = history_with((b"a", 7))
    key.delete_acknowledged(existed=True)
    key.put_acknowledged(b"b", 1, created=True)
    assert kinds(key) == [Kind.VERSION_BACK]


def test_an_unknown_write_that_shows_at_an_old_version_is_found() -> None:
    key = history_with((b"a", 7))
    key.outcome_unknown(b"b")
    key.observed(b"b", 7)
    assert kinds(key) == [Kind.VERSION_BACK]


def test_another_version_of_the_same_value_is_found() -> None:
    key = history_with((b"a", 7))
    key.observed(b"a", 8)
    assert kinds(key) == [Kind.VERSION_CHANGED]


def test_an_unknown_write_that_comes_after_a_later_acknowledged_one_is_found() -> None:
    key = history_with((b"a", 3))
    key.outcome_unknown(b"b")
    key.put_acknowledged(b"c", 5, created=False)
    key.observed(b"b", 6)
    assert kinds(key) == [Kind.LATE]


def test_unknown_writes_in_the_wrong_order_are_found() -> None:
    key = history_with((b"a", 3))
    key.outcome_unknown(b"b")
    key.outcome_unknown(b"c")
    key.observed(b"c", 5)
    key.observed(b"b", 6)
    assert kinds(key) == [Kind.LATE]


def test_a_seen_write_that_goes_back_to_what_was_before_is_found() -> None:
    key = history_with((b"a", 3))
    key.outcome_unknown(b"b")
    key.observed(b"b", 5)
    key.observed(b"a", 3)
    assert kinds(key) == [Kind.LOST]


def test_a_refused_write_that_was_done_is_found() -> None:
    key = history_with((b"a", 3))
    key.refused(b"b")
    key.observed(b"b", 4)
    assert kinds(key) == [Kind.REFUSED]


def test_a_value_that_nobody_wrote_is_found() -> None:
    key = history_with((b"a", 3))
    key.observed(b"torn", 3)
    assert kinds(key) == [Kind.FOREIGN]


def test_one_fault_is_told_once() -> None:
    key = history_with((b"a", 3), (b"b", 7))
    for _ in range(3):
        key.observed(b"a", 3)
    assert kinds(key) == [Kind.LOST]
    assert "acknowledged: b'b' at version 7" in str(key.violations[0])


# --- the same through HTTP: a writer against a store with a planted bug --------------------------------------------


class TinyStore:
    """Keys and values in memory, answered as the contract says; `lossy` forgets every third put after its answer."""

    def __init__(self, lossy: bool = False, silent: bool = False) -> None:
        self.values: dict[str, tuple[bytes, int]] = {}
        self.lossy = lossy
        self.silent = silent
        self.requests = 0

    async def handle(self, request: web.Request) -> web.Response:
        self.requests += 1
        key, held = request.path, self.values.get(request.path)
        if request.method == "GET":
            return web.Response(status=404) if held is None else self._answer(200, held[1], held[0])
        if request.method == "DELETE":
            self.values.pop(key, None)
            return web.Response(status=404 if held is None else 204)
        body = await request.read()
        if not (self.lossy and self.requests % 3 == 0):
            self.values[key] = (body, self.requests)
        if self.silent and request.transport is not None:
            request.transport.abort()  # the write is done, and its writer never hears of it
        return self._answer(201 if held is None else 204, self.requests)

    @staticmethod
    def _answer(status: int, version: int, body: bytes = b"") -> web.Response:
        return web.Response(status=status, body=body or None, headers={"ETag": f'"{version}"'})


async def work_on(store: TinyStore, steps: int = 60) -> tuple[Writer, list[Kind]]:
    app = web.Application()
    app.router.add_route("*", "/v1/kv/{key}", store.handle)
    async with TestServer(app) as server, aiohttp.ClientSession() as http:
        http._retry_connection = False
        writer = Writer("w", [KeyHistory(f"k{number}") for number in range(4)], http, seed=1)
        writer.url = str(server.make_url("")).rstrip("/")
        for _ in range(steps):
            await writer.step()
        for key in writer.keys:
            await writer.read(key)
    return writer, [kind for key in writer.keys for kind in kinds(key)]


async def test_a_writer_finds_nothing_wrong_with_a_store_that_keeps_its_word() -> None:
    writer, found = await work_on(TinyStore())
    assert found == []
    assert writer.counts["acknowledged"] > 20


async def test_a_writer_finds_that_a_store_forgets_what_it_acknowledged() -> None:
    _, found = await work_on(TinyStore(lossy=True))
    assert {Kind.LOST, Kind.WRONG_ANSWER} & set(found)


async def test_a_write_without_an_answer_counts_as_unknown_and_is_sent_once() -> None:
    store = TinyStore(silent=True)
    writer, found = await work_on(store, steps=30)
    assert found == []
    assert writer.counts["unknown"] > 10
    assert store.requests == sum(writer.counts.values())
