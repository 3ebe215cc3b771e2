"""loadtest.chaos.schedule: a seed is a schedule, every nemesis has a turn, and in the end it is calm."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.chaos.nemeses import AT_A_POINT, SLOW_AT_A_POINT, some_pairs, some_point, victims
from loadtest.chaos.schedule import CALM_S, KINDS, NEMESES, OF_ONE, PHASE_S_MIN, SWEEP, Nemesis, phases, plan
from loadtest.cluster.proxy import CLIENTS

MEMBERS = {"controller-0", "router-0", "router-1", "shard-s1", "shard-s2", "shard-s3"}

seeds = st.integers(0, 2**40)
lengths_s = st.floats(PHASE_S_MIN, 90.0)
some_nemeses = st.lists(st.sampled_from(NEMESES), unique=True)


@given(seeds, st.integers(1, 50), lengths_s, some_nemeses)
def test_the_seed_alone_decides_on_the_faults(seed: int, phase: int, seconds: float, some: list[Nemesis]) -> None:
    first = plan(seed, phase, seconds, some)
    assert first == plan(seed, phase, seconds, some[::-1])
    if some:
        assert first != plan(seed + 1, phase, seconds, some)
        assert first != plan(seed, phase + 1, seconds, some)


@given(seeds, lengths_s, some_nemeses)
def test_all_faults_are_over_before_the_calm(seed: int, seconds: float, some: list[Nemesis]) -> None:
    steps = plan(seed, 1, seconds, some)
    assert steps == sorted(steps)
    for step in steps:
        assert step.at_s >= 0
        assert step.for_s >= 0
        assert step.end_s <= seconds - CALM_S + 1e-6
        assert step.kind in KINDS[step.nemesis]
        assert step.nemesis in some


@given(seeds, lengths_s, some_nemeses)
def test_every_nemesis_asked_for_has_its_turn_in_every_phase(seed: int, seconds: float, some: list[Nemesis]) -> None:
    assert {step.nemesis for step in plan(seed, 1, seconds, some)} == set(some)


@given(seeds)
def test_a_minute_has_a_pause_longer_than_any_time_out_and_many_kinds_of_each_nemesis(seed: int) -> None:
    steps = plan(seed, 1, 60.0, OF_ONE)
    assert max(step.for_s for step in steps if step.nemesis == "pause") >= 7.0
    for nemesis in OF_ONE:
        kinds = {step.kind for step in steps if step.nemesis == nemesis}
        assert len(kinds) >= min(3, len(KINDS[nemesis]))


@given(seeds)
def test_every_change_of_shards_meets_another_fault_soon(seed: int) -> None:
    steps = plan(seed, 1, 60.0, ["kill", "reshard"])
    for change in [step for step in steps if step.nemesis == "reshard"]:
        assert any(-1.0 <= step.at_s - change.at_s <= 1.2 for step in steps if step.nemesis == "kill")


def test_all_kinds_come_in_a_run_of_ten_minutes() -> None:
    steps = [step for phase in range(1, 11) for step in plan(1, phase, 60.0, NEMESES)]
    assert {(step.nemesis, step.kind) for step in steps} == {(n, kind) for n in NEMESES for kind in KINDS[n]}


def test_a_sweep_lasts_from_the_beginning_of_a_phase_to_its_calm() -> None:
    (step,) = plan(1, 1, 60.0, [SWEEP])
    assert step.nemesis == SWEEP
    assert step.at_s < 5
    assert step.end_s == pytest.approx(60.0 - CALM_S)


@given(st.floats(1.0, 10_000.0))
def test_a_run_is_cut_into_phases_of_about_a_minute(seconds: float) -> None:
    lengths = phases(seconds)
    assert sum(lengths) >= seconds - 1e-6
    assert all(PHASE_S_MIN <= length <= 90 for length in lengths)
    assert sum(lengths) <= max(seconds, PHASE_S_MIN) + 1e-6


@given(
    st.sampled_from(
        sorted({*KINDS["kill"], *KINDS["pause"], *KINDS["die"], *KINDS["stop"]} - {AT_A_POINT, SLOW_AT_A_POINT})
    ),
    st.randoms(use_true_random=False),
)
def test_a_fault_falls_on_processes_that_fit_its_name(kind: str, rng: random.Random) -> None:
    names = victims(kind, MEMBERS, rng)
    assert names
    assert set(names) <= MEMBERS
    assert len(set(names)) == len(names)
    if kind in ("router", "shard", "controller"):
        assert [name.partition("-")[0] for name in names] == [kind]
    if kind == "all":
        assert set(names) == MEMBERS
    if kind.endswith(("node", "nodes", "and controller")):
        assert len(names) == (1 if kind == "one node" else 2)
        assert {name.partition("-")[0] for name in names} == {"shard", *(["controller"] if "and" in kind else [])}
    if kind == "several":
        assert 2 <= len(names) < len(MEMBERS)


@given(st.randoms(use_true_random=False))
def test_a_process_is_met_at_a_point_that_it_comes_by(rng: random.Random) -> None:
    name, point = some_point(MEMBERS, rng)
    assert name in MEMBERS
    assert (name.partition("-")[0] == "router") == point.startswith("txn-")
    assert point.startswith("controller-") <= (name == "controller-0")


@given(st.randoms(use_true_random=False))
def test_links_that_break_are_links_that_are_used(rng: random.Random) -> None:
    roles = {
        (CLIENTS, "router"),
        ("router", "shard"),
        ("shard", "shard"),
        ("router", "controller"),
        ("shard", "controller"),
    }
    pairs = some_pairs(sorted(MEMBERS), rng)
    assert 1 <= len(pairs) <= 3
    assert {(one.partition("-")[0], other.partition("-")[0]) for one, other in pairs} <= roles
    assert all(one != other for one, other in pairs)
