"""What writes the log: a sync in a thread is told of with all that it has made durable.

Nothing is answered before it is durable where the place of the syncs changes, either."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.storage.sync_pace import SyncPace


async def test_what_is_appended_before_the_thread_begins_its_sync_is_told_with_it(
    harness: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    writer, log = harness.store.pipeline.writer, harness.store.tables.log
    note = writer._note

    def noted(number: int, started_s: float) -> None:
        told.append(number)  # it is what a sender hears of
        note(number, started_s)

    monkeypatch.setattr(writer, "_note", noted)
    gate = harness.hold("commit", before=True, once=True)
    first = harness.put("a")
    await gate.arrived.wait()
    second = harness.put("b")
    await harness.decided()
    gate.open()
    assert [(await call).status for call in (first, second)] == [201, 201]
    assert told[-1] == log.durable == log.last.number


async def test_a_batch_that_changes_nothing_answers_nothing_of_those_before_it_that_is_not_durable(
    harness: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk has become quick while a sync was due in a thread, and the turn of that sync has not come."""
    writer, log = harness.store.pipeline.writer, harness.store.tables.log
    monkeypatch.setattr(writer, "sync_soon", lambda: None)
    writer.pace = SyncPace(0)
    written = harness.put("a")
    await harness.decided()
    assert log.durable < log.last.number
    writer.pace = SyncPace(1e6)
    assert (await harness.delete("b")).status == 404
    assert (await written).status == 201
    assert log.durable == log.last.number
