"""loadtest.compare: figures from runs, and requests from workloads."""

from __future__ import annotations

import base64
import json

import pytest

from loadtest.bench import dialects
from loadtest.bench.data import make_data
from loadtest.bench.drive import Run, read_result
from loadtest.bench.http1 import Request, write_replay
from loadtest.bench.report import SystemFacts, render, shapes, summarize, targets
from loadtest.bench.workloads import WORKLOADS, preload


def run(system: str, per_s: float, *, number: int = 1, work: str = "get", connections: int = 32, **more: object) -> Run:
    fields = {"p50_ms": 1.0, "p99_ms": 2.0, "max_ms": 3.0, "cpu_us_per_op": 100.0, "wrk_cpu_us_per_op": 10.0, **more}
    errors = fields.pop("errors", {})
    return Run(  # type: ignore[misc]
        round=number,
        work=work,
        connections=connections,
        system=system,
        seconds=1.0,
        operations=int(per_s),
        per_s=per_s,
        errors=errors,
        **fields,
    )


FACTS = [
    SystemFacts(system="kvstore", version="1", ready_s=2.0, idle_pss_mb=300.0),
    SystemFacts(system="etcd", version="3", ready_s=1.0, idle_pss_mb=30.0),
]


def test_each_figure_is_the_median_over_the_rounds() -> None:
    runs = [
        run("kvstore", per_s, number=number, p50_ms=per_s / 10, p99_ms=per_s / 5, cpu_us_per_op=per_s / 2)
        for number, per_s in enumerate([100, 900, 200], start=1)
    ]
    (cell,) = summarize(runs)
    assert (cell.rounds, cell.per_s, cell.p50_ms, cell.p99_ms, cell.cpu_us_per_op) == (3, 200, 20, 40, 100)


def test_a_ratio_compares_runs_of_the_same_round_only() -> None:
    # the machine was slow in round 2 for both: the ratio of the medians would say 2.0, and no round ever did
    runs = [
        *(run("kvstore", per_s, number=number) for number, per_s in enumerate([300, 30, 200], start=1)),
        *(run("etcd", per_s, number=number) for number, per_s in enumerate([100, 10, 100], start=1)),
    ]
    ratio = summarize(runs)[0].to["etcd"]
    assert (ratio.median, ratio.low, ratio.high) == (3.0, 2.0, 3.0)


def test_without_the_peer_there_is_no_ratio() -> None:
    (cell,) = summarize([run("kvstore", 100)])
    assert cell.to == {}
    runs = [run("kvstore", 100, connections=1), run("etcd", 100, connections=32)]
    assert "etcd" not in summarize(runs)[0].to


def test_errors_of_all_rounds_are_added_and_shown() -> None:
    runs = [run("kvstore", 100, number=1, errors={"status": 3}), run("kvstore", 100, number=2, errors={"timeout": 4})]
    (cell,) = summarize(runs)
    assert cell.errors == 7
    assert "| 7 (status: 3, timeout: 4) |" in " ".join(render([cell], FACTS, []).split())


def test_errors_are_told_by_status_where_the_script_counts_them_so() -> None:
    runs = [
        run("kvstore", 100, number=1, errors={"503": 1, "409": 2}, attempts=103),
        run("kvstore", 100, number=2, errors={"409": 3}, attempts=103),
    ]
    (cell,) = summarize(runs)
    assert cell.errors_by_kind == {"409": 5, "503": 1}
    assert "| 6 (409: 5, 503: 1) |" in " ".join(render([cell], FACTS, []).split())


def test_the_abort_rate_is_conflicts_per_attempt_and_the_median_over_the_rounds() -> None:
    conflicts = enumerate([0, 10, 50], start=1)
    runs = [
        run("kvstore", 100, work="txn-zipf", number=number, errors={"409": count, "503": 5}, attempts=100)
        for number, count in conflicts
    ]
    cells = summarize([*runs, run("etcd", 100, work="txn-zipf", attempts=100), run("etcd", 100)])
    assert [cell.abort_rate for cell in cells] == [0.1, 0, None]
    table = " ".join(render(cells, FACTS, []).split())
    assert all(text in table for text in ("| 409/attempt |", "| 10.00% |", "| 0.00% |", "| – |"))
    assert "409/attempt" not in render(summarize([run("kvstore", 100)]), FACTS, [])


def test_the_table_has_the_systems_in_one_order_whatever_ran_first() -> None:
    runs = [
        run("kvstore", 300, number=1),
        run("etcd", 100, number=1),
        run("etcd", 100, number=1, connections=1),
        run("kvstore", 300, number=1, connections=1),
    ]
    rows = [
        line.split("|")[2:4] for line in render(summarize(runs), FACTS, []).splitlines() if line.startswith("| get")
    ]
    assert [[field.strip() for field in row] for row in rows] == [
        ["1", "kvstore"],
        ["1", "etcd"],
        ["32", "kvstore"],
        ["32", "etcd"],
    ]


def test_cpu_time_is_split_by_process_with_the_largest_first() -> None:
    cells = summarize(
        [run("kvstore", 100, cpu_us_per_op_by_process={"router": 30.0, "shard": 69.0, "controller": 1.0})]
    )
    assert "shard 69, router 30 " in render(cells, FACTS, [])


def test_aims_say_reached_missed_or_not_measured() -> None:
    cells = summarize([run("kvstore", 310), run("etcd", 100), run("bare", 1000)])
    found = {target.text: target.reached for target in targets(cells, FACTS)}
    assert found["GET at 32 connections ≥ 3 × etcd"] is True
    assert found["GET at 32 connections ≥ 0.5 × bare"] is False
    assert found["GET at 128 connections ≥ 2.5 × etcd"] is None
    assert found["idle memory (PSS) ≤ 300 MB"] is True
    assert found["ready in ≤ 3 s"] is True


def test_compare_and_set_has_an_aim_of_its_own() -> None:
    cells = summarize([run("kvstore", 169, work="cas"), run("etcd", 100, work="cas")])
    found = {target.text: target.reached for target in targets(cells, FACTS)}
    assert found["CAS at 32 connections ≥ 2 × etcd"] is False
    assert found["CAS at 128 connections ≥ 2.5 × etcd"] is None


def test_transactions_have_aims_of_their_own() -> None:
    rates = {"txn4": 95, "txn1": 150}
    cells = summarize(
        run(system, per_s, work=work, connections=connections)
        for work, mine in rates.items()
        for connections in (32, 128)
        for system, per_s in (("kvstore", mine), ("etcd", 100))
    )
    found = {target.text: target.reached for target in targets(cells, FACTS) if target.text.startswith("TXN")}
    assert found == {
        "TXN4 at 32 connections ≥ 0.9 × etcd": True,
        "TXN4 at 128 connections ≥ 1.2 × etcd": False,
        "TXN1 at 32 connections ≥ 1.5 × etcd": True,
        "TXN1 at 128 connections ≥ 1.5 × etcd": True,
    }


def test_refusals_are_told_apart_from_errors_and_only_where_there_are_any() -> None:
    cells = summarize([run("kvstore", 100, work="cas-hot", refused=250)])
    assert (cells[0].errors, cells[0].refused_per_op) == (0, 2.5)
    assert "| refused/op |" in render(cells, FACTS, [])
    assert "| refused/op |" not in render(summarize([run("kvstore", 100)]), FACTS, [])


def test_the_aims_are_for_the_cluster_of_4_shards_and_1_router_if_there_are_several() -> None:
    shapes = [(1, 1), (4, 1), (4, 2)]
    facts = [
        SystemFacts(
            system=f"kvstore-{shards}s-{routers}r",
            version="1",
            shards=shards,
            routers=routers,
            ready_s=1.0,
            idle_pss_mb=100.0 * shards * routers,
        )
        for shards, routers in shapes
    ]
    runs = [run(fact.system, 100 * fact.shards * fact.routers) for fact in facts]
    cells = summarize([*runs, run("etcd", 100)])
    found = {target.text: target.figure for target in targets(cells, facts)}
    assert found["GET at 32 connections ≥ 3 × etcd"] == 4.0
    assert found["idle memory (PSS) ≤ 300 MB"] == 400.0
    found = {target.text: target.figure for target in targets(cells, [facts[0], facts[2]])}
    assert found["GET at 32 connections ≥ 3 × etcd"] is None
    assert found["idle memory (PSS) ≤ 300 MB"] is None


def test_a_cluster_that_is_alone_is_judged_whatever_its_shape() -> None:
    facts = [SystemFacts(system="kvstore", version="1", shards=2, routers=1, ready_s=1.0, idle_pss_mb=100.0)]
    assert {target.text: target.reached for target in targets([], facts)}["ready in ≤ 3 s"] is True


def test_the_header_tells_what_each_cluster_consists_of() -> None:
    assert shapes(FACTS) == []
    facts = [
        SystemFacts(system=name, version="1", shards=shards, routers=routers, ready_s=1.0, idle_pss_mb=1.0)
        for name, shards, routers in (("a", 1, 1), ("b", 4, 2))
    ]
    assert shapes([*facts, *FACTS]) == ["a: 1 shard, 1 router; b: 4 shards, 2 routers"]


def test_where_a_request_is_several_operations_the_rate_of_requests_is_told_too() -> None:
    cells = summarize([run("kvstore", 5_000, work="batch100", requests=50)])
    table = [line for line in render(cells, FACTS, []).splitlines() if line.startswith("| batch100")]
    assert "| 5,000 | 50 |" in " ".join(" ".join(table).split())
    assert "requests/s" not in render(summarize([run("kvstore", 100, requests=100)]), FACTS, [])


def test_the_p99_aim_compares_with_etcd() -> None:
    for mine, reached in ((1.9, True), (2.1, False)):
        cells = summarize([run("kvstore", 1, work="put", p99_ms=mine), run("etcd", 1, work="put", p99_ms=2.0)])
        found = {target.text: target.reached for target in targets(cells, FACTS)}
        assert found["PUT at 32 connections: p99 ≤ 1 × etcd's"] is reached


def test_wrk_output_without_figures_is_an_error_that_shows_it() -> None:
    assert read_result('Running 1s test\nRESULT {"requests": 5}\n') == {"requests": 5}
    with pytest.raises(RuntimeError, match="unable to connect"):
        read_result("unable to connect to 127.0.0.1:1 Connection refused\n")


# --- requests --------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_keys_and_values_of_100_bytes() -> None:
    data = make_data(50, seed=1)
    assert data == make_data(50, seed=1)
    assert len(set(data.keys)) == 50
    assert {len(value) for value in (*data.stored, *data.written)} == {100}
    assert all(stored != written for stored, written in zip(data.stored, data.written, strict=True))


@pytest.mark.parametrize("dialect", [dialects.Kvstore(), dialects.Etcd(), dialects.Webdis(), dialects.Bare()])
def test_every_system_is_asked_for_every_key_by_every_workload_of_single_keys(dialect: dialects.Dialect) -> None:
    data = make_data(3, seed=1)
    for workload in (WORKLOADS["get"], WORKLOADS["put"]):
        assert workload.requests is not None
        rendered = [request.render("h:1") for request in workload.requests(dialect, data)]
        assert len(rendered) == 3
        for key, request in zip(data.keys, rendered, strict=True):
            assert key.encode() in request or base64.b64encode(key.encode()) in request
    assert all(value in preload_body(dialect, data_index) for data_index, value in enumerate(data.stored))


def preload_body(dialect: dialects.Dialect, place: int) -> bytes:
    body = preload(dialect, make_data(3, seed=1))[place].body
    return base64.b64decode(json.loads(body)["value"]) if body.startswith(b"{") else body


def test_a_request_is_written_as_http_1_1() -> None:
    assert Request("GET", "/k").render("h:1") == b"GET /k HTTP/1.1\r\nHost: h:1\r\n\r\n"
    assert Request("PUT", "/k", b"").render("h:1") == b"PUT /k HTTP/1.1\r\nHost: h:1\r\nContent-Length: 0\r\n\r\n"
    assert Request("PUT", "/k", b"xy", ("If-Match: *",)).render("h:1") == (
        b"PUT /k HTTP/1.1\r\nHost: h:1\r\nIf-Match: *\r\nContent-Length: 2\r\n\r\nxy"
    )


def test_a_replay_file_holds_each_request_after_its_length() -> None:
    requests = [Request("GET", "/a"), Request("PUT", "/b", b"1\n2")]
    content = write_replay(requests, "http://h:1")
    assert content == b"".join(b"%d\n" % len(data) + data for data in (request.render("h:1") for request in requests))


def test_the_chart_has_a_bar_for_each_rate_beside_etcd_as_long_as_its_ratio() -> None:
    runs = [run("kvstore", 300), run("etcd", 100), run("bare", 900), run("kvstore", 50, work="put")]
    runs.append(run("etcd", 100, work="put"))
    text = render(summarize(runs), FACTS, [])
    bars = {line[:8].split()[0]: line.count("█") for line in text.splitlines() if "kvstore █" in line}
    assert bars == {"get": 60, "put": 10}
    assert not any("bare" in line for line in text.splitlines() if "█" in line)


def test_without_etcd_there_is_no_chart() -> None:
    assert "█" not in render(summarize([run("kvstore", 300)]), FACTS[:1], [])
