"""Random histories of a log with a power cut at any call, and what must be there afterwards."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.errors import LogDamaged
from kvstore.storage.log import BEGINNING, Log, LogFull, Position
from loadtest.simulate.disk import Fate, PowerCut, SimulatedDisk, keep_all, lose_all
from tests.unit.storage.log_bench import FOLDER, SEGMENT_BYTES, STORE, STORE_ID


class Step(NamedTuple):
    kind: str
    size: int = 0


STEPS = st.one_of(
    st.builds(Step, st.just("append"), st.integers(0, 700)),
    st.sampled_from([Step("sync"), Step("sync"), Step("prepare"), Step("apply"), Step("note"), Step("reopen")]),
    st.builds(Step, st.sampled_from(["cut", "release", "restart"]), st.integers(0, 5)),
)


class World:
    """A log on a disk, beside a model: `records` by number, up to which they are acknowledged, and what may be cut."""

    def __init__(self) -> None:
        self.disk = SimulatedDisk()
        self.log: Log | None = None
        self.records: dict[int, bytes] = {}
        self.acknowledged = 0
        self.cut_to: int | None = None  # a cut is under way
        self.restart_at: Position | None = None  # a restart is under way
        self.applied = BEGINNING
        self.released = 0
        self.told = 0
        self.drawn = 0

    # --- what happens to it

    def run(self, steps: list[Step]) -> None:
        self.log = self.log or Log.create(self.disk, FOLDER, STORE, STORE_ID, segment_bytes=SEGMENT_BYTES)
        for step in steps:
            getattr(self, f"do_{step.kind}")(step.size)

    def do_append(self, size: int) -> None:
        assert self.log
        self.drawn += 1
        payload = b"%d:" % self.drawn + bytes(size)
        number = self.log.last.number + 1
        try:
            self.records[number] = payload  # at a power cut it may be there, though no number came back
            assert self.log.append(payload, term=3, frees=True) == number
        except LogFull:
            del self.records[number]
            self.do_prepare(0)
            self.do_append(size)

    def do_sync(self, _: int) -> None:
        assert self.log
        self.acknowledged = self.log.sync()

    def do_prepare(self, _: int) -> None:
        assert self.log
        if len(self.log._spare) < 3:
            assert self.log.prepare_segment()

    def do_note(self, _: int) -> None:
        assert self.log
        self.log.note_durable()

    def do_apply(self, _: int) -> None:
        """The file has applied all that is durable, and that was told."""
        assert self.log
        self.applied = self.log.synced
        self.told = self.applied.number

    def do_release(self, _: int) -> None:
        assert self.log
        self.log.release(self.applied.number)
        self.released = self.applied.number

    def do_cut(self, back: int) -> None:
        assert self.log
        number = max(self.applied.number, self.log.last.number - back)
        self.acknowledged = self.log.sync()
        self.cut_to = number
        self.log.cut(number)
        self.records = {each: payload for each, payload in self.records.items() if each <= number}
        self.acknowledged, self.cut_to = number, None

    def do_restart(self, ahead: int) -> None:
        """A snapshot, which the file takes when the log has begun again."""
        assert self.log
        self.restart_at = Position(self.log.last.number + ahead, 1000 + ahead)
        self.log.restart(self.restart_at)
        self.records.clear()
        self.applied = self.restart_at
        self.acknowledged, self.restart_at = self.applied.number, None

    def do_reopen(self, _: int) -> None:
        self.acknowledged = self.log.sync() if self.log else 0
        self.open()

    # --- what must hold

    def open(self) -> None:
        """Open the log, in which all that was acknowledged must be, and nothing that never was appended."""
        applied, told = self.applied, self.told
        try:
            self.log, entries = Log.open(self.disk, FOLDER, STORE, STORE_ID, applied, told, SEGMENT_BYTES)
        except LogDamaged:
            if self.restart_at is None:
                raise
            self.applied, self.records = self.restart_at, {}  # the note of the restart was durable
            self.acknowledged, self.restart_at = self.applied.number, None
            self.open()
            return
        last = self.log.last.number
        lowest = self.acknowledged if self.cut_to is None else self.cut_to
        assert lowest <= last
        assert last <= max([*self.records, self.applied.number])
        wanted = [self.records[number] for number in range(self.applied.number + 1, last + 1)]
        assert [entry.payload for entry in entries] == wanted
        assert [entry.number for entry in entries] == list(range(self.applied.number + 1, last + 1))
        again = list(self.log.entries(self.applied.number))
        assert again == entries
        self.records = {number: payload for number, payload in self.records.items() if number <= last}
        self.acknowledged, self.cut_to, self.restart_at = last, None, None
        assert self.log.durable == last

    def survive(self, cuts: list[int], fate: Fate) -> None:
        """Switch on after a power cut and open the log, with more power cuts during it; then all must be there."""
        for cut in cuts:
            self.disk.restart(fate)
            self.disk.power_cut_at = cut
            try:
                self.start()
                self.disk.power_cut_at = 0
                return
            except PowerCut:
                pass
        self.disk.restart(fate)
        self.start()

    def start(self) -> None:
        if self.log is None:
            self.log = Log.create(self.disk, FOLDER, STORE, STORE_ID, segment_bytes=SEGMENT_BYTES)
        else:
            self.open()


def fate_of(seed: int) -> Fate:
    if seed < 2:
        return (lose_all, keep_all)[seed]
    chance = random.Random(seed)
    return lambda newest: chance.randint(0, newest)


def crash(steps: list[Step], at: int, cuts: list[int], seed: int, more: list[Step]) -> bool:
    """One history with a power cut at that call; False if it has fewer calls."""
    world = World()
    world.disk.power_cut_at = at
    try:
        world.run(steps)
        return False
    except PowerCut:
        pass
    world.survive(cuts, fate_of(seed))
    world.run(more)
    world.disk.restart(lose_all)
    world.acknowledged = min(world.acknowledged, world.log.durable if world.log else 0)
    world.open()
    return True


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.lists(STEPS, max_size=25),
    at=st.integers(0, 1 << 20),
    cuts=st.lists(st.integers(1, 30), max_size=3),
    seed=st.integers(0, 1000),
    more=st.lists(STEPS, max_size=8),
)
def test_what_was_synced_survives_power_cuts_and_what_was_cut_does_not(
    steps: list[Step], at: int, cuts: list[int], seed: int, more: list[Step]
) -> None:
    world = World()
    world.run(steps)
    crash(steps, 1 + at % world.disk.calls, cuts, seed, more)


_A = [Step("append", 500)] * 3
HISTORIES: dict[str, list[Step]] = {
    "appends": [*_A, Step("sync"), *_A, Step("sync"), *_A, Step("sync")],
    "shared-syncs": [*_A, Step("sync"), *_A, *_A, *_A],
    "cut": [*_A, Step("sync"), *_A, Step("sync"), Step("note"), Step("cut", 5), *_A, Step("sync")],
    "cuts": [*_A, *_A, Step("sync"), Step("cut", 2), Step("cut", 2), Step("append", 9), Step("sync")],
    "cut-in-one-segment": [*[Step("append", 40), Step("sync")] * 8, Step("cut", 5)],
    "release": [*_A, *_A, Step("sync"), Step("apply"), *_A, Step("sync"), Step("release"), Step("append", 1)],
    "restart": [*_A, *_A, Step("sync"), Step("apply"), Step("restart", 4), *_A, Step("sync")],
    "reopen": [*_A, Step("sync"), Step("note"), Step("reopen"), *_A, Step("reopen"), Step("append", 600)],
}


@pytest.mark.parametrize("history", HISTORIES)
def test_a_power_cut_at_any_call_of_a_history_loses_nothing(history: str) -> None:
    at = 1
    while crash(HISTORIES[history], at, [], 0, _A):
        for seed in range(1, 5):
            crash(HISTORIES[history], at, [], seed, [Step("append", 5), Step("sync")])
            for again in range(1, 13, 3):
                crash(HISTORIES[history], at, [again, again + 1], seed, [])
        at += 1
    assert at > 10
