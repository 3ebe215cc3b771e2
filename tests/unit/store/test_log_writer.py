"""What writes the log: a sync in a thread is told of with all that it has made durable."""

from __future__ import annotations

from typing import Any

import pytest


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
