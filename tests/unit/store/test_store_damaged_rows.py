"""Damaged rows and pages of the file: answered as such, mended by writing, and no other read suffers."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.errors import DataCorrupt
from kvstore.model import Attempt, Preconditions, TxnOp
from kvstore.protocol import Acquire, Prepare, Put, Scan
from tests.unit.store.real_files import threads


async def test_a_damaged_row_is_answered_as_such_and_the_others_go_on(harness: Any) -> None:
    await harness.put("bad", b"value")
    await harness.put("good", b"value")
    harness.forget_cache()
    await harness.sql("UPDATE rows SET body = x'76616c7565ff' WHERE key = 'bad'")
    answer = await harness.get("bad")
    assert (answer.status, answer.problem["code"]) == (500, "data-corrupt")
    assert "bad" in answer.problem["detail"]
    assert (await harness.get("bad")).status == 500, "and not cached"
    assert (await harness.get("good")).status == 200
    assert (await harness.store.inspection.explain("bad"))["row"] == "damaged"
    with pytest.raises(DataCorrupt):
        await harness.store.scans.scan(Scan(1, "", "", 10, True))
    assert await harness.keys() == ["bad", "good"], "the names can still be listed"


DAMAGES = [
    "body = 'text instead of bytes'",
    "body = 7",
    "version = version + 1",
    "version = 'seven'",
    "expires_at_ms = 99999999999999",
    "expires_at_ms = 'soon'",
    "checksum = checksum + 1",
]


@pytest.mark.parametrize("damage", [*DAMAGES, "body = x'00'", "body = NULL", "version = 9223372036854775807"])
@pytest.mark.parametrize("by", ["put", "delete"])
async def test_a_damaged_row_is_mended_by_writing_it_again(harness: Any, damage: str, by: str) -> None:
    before = await harness.put("bad", b"value")
    harness.forget_cache()
    await harness.sql(f"UPDATE rows SET {damage} WHERE key = 'bad'")
    assert (await harness.get("bad")).status == 500
    mended = await (harness.put("bad", b"again") if by == "put" else harness.delete("bad"))
    assert mended.status == 204
    assert before.version < mended.version < 1000, "what the damaged row says of its version is not believed"
    harness.forget_cache()
    await harness.flush()
    found = await harness.get("bad")
    assert (found.status, found.value) == ((200, b"again") if by == "put" else (404, None))
    assert harness.store.clock.version == mended.version


async def test_a_write_with_a_condition_and_a_transaction_do_not_replace_a_damaged_row(harness: Any) -> None:
    granted = await harness.write(Acquire(1, "bad", 60_000, 0, "me"))
    await harness.write(Put(1, "bad", b"value", 0, Preconditions(token=granted.version)))
    await harness.flush()
    harness.forget_cache()
    await harness.sql("UPDATE rows SET body = x'00' WHERE key = 'bad'")
    for condition in ({"present": True}, {"absent": True}, {"versions": [2]}, {"not_versions": [7]}):
        answer = await harness.write(Put(1, "bad", b"again", 0, Preconditions(granted.version, **condition)))
        assert (answer.status, answer.problem["code"]) == (500, "data-corrupt")
    attempt = Attempt(100, 100, "router01", 4)
    prepared = await harness.write(Prepare(1, "elsewhere", attempt, [], [TxnOp("put", "bad", b"x")], []))
    assert (prepared.status, prepared.problem["code"]) == (500, "data-corrupt")
    assert (await harness.put("bad", b"again")).status == 423, "a lease protects a damaged row as any other"
    assert (await harness.get("bad")).status == 500
    assert (await harness.write(Put(1, "bad", b"again", 0, Preconditions(token=granted.version)))).status == 204
    assert (await harness.get("bad")).value == b"again"


async def test_a_damaged_row_that_a_refused_write_still_holds_in_memory_is_mended_by_the_next(harness: Any) -> None:
    await harness.put("bad", b"value")
    await harness.flush()
    harness.forget_cache()
    await harness.sql("UPDATE rows SET body = x'00' WHERE key = 'bad'")
    gate = harness.hold("commit", before=True)
    first = harness.put("other")
    await gate.arrived.wait()
    refused = harness.write(Put(1, "bad", b"no", 0, Preconditions(present=True)))
    await harness.decided()
    mending = harness.put("bad", b"again")
    later = harness.write(Put(1, "bad", b"later", 0, Preconditions(present=True)))
    assert not any(call.done for call in (first, refused, mending, later)), "answers leave in order"
    gate.open()
    assert [(await call).status for call in (first, refused, mending, later)] == [201, 500, 204, 204]
    assert (await harness.get("bad")).value == b"later"


@pytest.mark.parametrize("damage", DAMAGES)
async def test_whatever_was_done_to_a_row_by_hand_it_is_seen_and_the_store_survives(harness: Any, damage: str) -> None:
    await harness.put("bad", b"value")
    harness.forget_cache()
    await harness.sql(f"UPDATE rows SET {damage}")
    assert (await harness.get("bad")).status == 500
    with pytest.raises(DataCorrupt):
        await harness.store.scans.scan(Scan(1, "", "", 10, True))


async def test_a_destroyed_page_of_the_file_costs_the_keys_on_it_and_all_writes_but_no_other_read(harness: Any) -> None:
    for number in range(400):
        await harness.put(f"key-{number:03}", b"marker-%03d" % number + b"v" * 90)
    await harness.close()
    content = bytearray(harness.path.read_bytes())
    page = content.index(b"marker-200") // 4096 * 4096
    content[page : page + 8] = b"\xff" * 8
    harness.path.write_bytes(content)
    await harness.reopen_after_close()
    lost = await harness.get("key-200")
    assert (lost.status, lost.problem["code"]) == (500, "data-corrupt")
    assert (await harness.get("key-399")).status == 200
    with pytest.raises(DataCorrupt):
        await harness.store.scans.scan(Scan(1, "key-2", "", 10))
    with pytest.raises(DataCorrupt):
        await harness.store.tables.verification.writable()
    assert (await harness.put("zz")).problem["code"] == "data-corrupt"


async def test_a_store_that_cannot_be_opened_leaves_no_thread_behind_that_would_keep_the_process_alive(
    harness: Any,
) -> None:
    await harness.write(Acquire(1, "lock", 60_000, 0, "me"))
    await harness.sql("UPDATE rows SET body = x'00' WHERE kind = 'lease'")
    await harness.close()
    before = threads()
    with pytest.raises(DataCorrupt):
        await harness.reopen_after_close()
    for thread in threads() - before:
        thread.join(10)
        assert not thread.is_alive()
