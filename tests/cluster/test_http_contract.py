"""The HTTP API of a running cluster, call by call: what it answers when it is used as documented."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import time
from collections.abc import AsyncIterator
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

from kvstore.placement.ring import key_hash, partition_of
from tests.cluster.clusters import Cluster
from tests.cluster.wire import HEALTH, request, wire

VERSION_MAX = 2**53
VALUE_BYTES_MAX = 1024 * 1024
SHARDS = ["s1", "s2", "s3", "s4"]
WAIT_S = 10.0


class Api:
    """The calls of the API, each target sent as it is given here."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session

    async def call(self, method: str, target: str, body: Any = None, **headers: str) -> tuple[Any, bytes]:
        url = URL(self._url + target, encoded=True)
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        if isinstance(body, bytes):
            body = io.BytesIO(body)  # aiohttp warns of large bytes
        async with self._session.request(method, url, data=body, headers=fields, allow_redirects=False) as answer:
            return answer, await answer.read()

    async def json(self, method: str, target: str, body: Any = None, status: int = 200) -> Any:
        answer, _ = await self.call(method, target, body)
        assert answer.status == status, await answer.text()
        expected = "application/json" if status < 400 else "application/problem+json"
        assert answer.headers["Content-Type"] == expected
        return await answer.json(content_type=None)

    async def put(self, key: str, value: bytes = b"x", query: str = "") -> int:
        """The version that the value has now."""
        answer, _ = await self.call("PUT", kv(key) + query, value)
        assert answer.status in (201, 204), await answer.text()
        return version_of(answer)

    async def batch(self, ops: list[dict[str, Any]], **headers: str) -> list[dict[str, Any]]:
        answer, _ = await self.call("POST", "/v1/batch", json.dumps({"ops": ops}).encode(), **headers)
        assert answer.status == 200, await answer.text()
        return list((await answer.json())["results"])

    async def pages(self, query: str) -> list[list[dict[str, Any]]]:
        """All pages of a listing."""
        pages, cursor = [], ""
        while True:
            page = await self.json("GET", f"/v1/kv?{query}{cursor}")
            assert page.keys() == {"items", "next"}
            pages.append(page["items"])
            if page["next"] is None:
                return pages
            cursor = f"&after={quote(page['next'], safe='')}"


@pytest_asyncio.fixture
async def api(cluster: Cluster) -> AsyncIterator[Api]:
    async with aiohttp.ClientSession() as session:
        yield Api(cluster.url, session)


def kv(key: str) -> str:
    return "/v1/kv/" + quote(key, safe="/")


def version_of(answer: Any) -> int:
    etag = answer.headers["ETag"]
    assert etag == f'"{int(etag[1:-1])}"'
    assert 0 < int(etag[1:-1]) < VERSION_MAX
    return int(etag[1:-1])


def assert_problem(answer: Any, document: Any, status: int, code: str) -> None:
    assert answer.status == status, document
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert document["status"] == status
    assert document["code"] == code
    assert document["type"] == f"/problems/{code}"
    assert document["title"]
    assert document["detail"]
    assert document["next_step"]


# --- one key ----------------------------------------------------------------------------------------------------------


async def test_put_answers_201_for_a_new_key_and_204_for_a_replaced_one(api: Api, prefix: str) -> None:
    created, body = await api.call("PUT", kv(prefix + "k"), b"1")
    assert (created.status, body, created.headers["Content-Length"]) == (201, b"", "0")
    replaced, body = await api.call("PUT", kv(prefix + "k"), b"2")
    assert (replaced.status, body) == (204, b"")
    assert "Content-Length" not in replaced.headers
    assert version_of(replaced) > version_of(created)
    for answer in (created, replaced):
        assert answer.headers["Kv-Shard"] in SHARDS
        assert 0 <= int(answer.headers["Kv-Partition"]) < 4096


async def test_get_brings_the_bytes_and_says_what_they_are(api: Api, prefix: str) -> None:
    value = bytes(range(256))
    put, _ = await api.call("PUT", kv(prefix + "k"), value)
    answer, body = await api.call("GET", kv(prefix + "k"))
    assert (answer.status, body) == (200, value)
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.headers["Content-Length"] == "256"
    assert "Kv-Ttl" not in answer.headers
    for name in ("ETag", "Kv-Shard", "Kv-Partition"):
        assert answer.headers[name] == put.headers[name]
    assert abs(parsedate_to_datetime(answer.headers["Date"]).timestamp() - time.time()) < 5


async def test_a_value_is_any_bytes_from_none_to_the_limit(api: Api, prefix: str) -> None:
    for value in (b"", b"\0", b"\xff\xfe\r\n", b'{"a": 1}', bytes(range(256)) * (VALUE_BYTES_MAX // 256)):
        await api.put(prefix + "k", value)
        answer, body = await api.call("GET", kv(prefix + "k"))
        assert (answer.status, body == value) == (200, True)


async def test_a_value_may_come_in_chunks_and_under_any_content_type(api: Api, prefix: str) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for n in range(50):
            yield b"%d," % n * 1000

    answer, _ = await api.call("PUT", kv(prefix + "k"), chunks(), Content_Type="application/x-www-form-urlencoded")
    assert answer.status == 201
    _, body = await api.call("GET", kv(prefix + "k"))
    assert body == b"".join(b"%d," % n * 1000 for n in range(50))


async def test_head_answers_as_get_does_without_the_body(cluster: Cluster, api: Api, prefix: str) -> None:
    await api.put(prefix + "k", b"12345", "?ttl=600")
    with wire(cluster) as connection:
        for target, status in ((kv(prefix + "k"), 200), (kv(prefix + "absent"), 404)):
            connection.send(request("GET", target))
            of_get = connection.answer()
            connection.send(request("HEAD", target))
            of_head = connection.answer(to_head=True)
            assert (of_get.status, of_head.status) == (status, status)
            assert of_head.headers["content-length"] == of_get.headers["content-length"] == str(len(of_get.body))
            varying = {"date", "kv-ttl"}
            assert of_head.headers.keys() == of_get.headers.keys()
            assert {k: v for k, v in of_head.headers.items() if k not in varying} == {
                k: v for k, v in of_get.headers.items() if k not in varying
            }
        connection.send(HEALTH)
        assert connection.answer().status == 200


async def test_delete_answers_204_and_404_when_there_was_none(api: Api, prefix: str) -> None:
    await api.put(prefix + "k")
    answer, body = await api.call("DELETE", kv(prefix + "k"))
    assert (answer.status, body) == (204, b"")
    for method in ("DELETE", "GET"):
        answer, _ = await api.call(method, kv(prefix + "k"))
        assert_problem(answer, await answer.json(content_type=None), 404, "not-found")
        assert "ETag" not in answer.headers


async def test_versions_rise_with_every_change_and_do_not_restart_after_a_delete(api: Api, prefix: str) -> None:
    versions = []
    for _ in range(3):
        versions.append(await api.put(prefix + "k", b"same"))
        versions.append(await api.put(prefix + "k", b"same"))
        await api.call("DELETE", kv(prefix + "k"))
    assert versions == sorted(set(versions))


async def test_a_matching_if_none_match_is_answered_with_304_and_no_body(api: Api, prefix: str) -> None:
    version = await api.put(prefix + "k", b"value")
    for condition in (f'"{version}"', f'W/"{version}"', f'"0", "{version}"', "*"):
        answer, body = await api.call("GET", kv(prefix + "k"), If_None_Match=condition)
        assert (answer.status, body) == (304, b""), condition
        assert version_of(answer) == version
        assert answer.headers["Cache-Control"] == "no-cache"
    answer, body = await api.call("GET", kv(prefix + "k"), If_None_Match=f'"{version + 1}", "other"')
    assert (answer.status, body) == (200, b"value")
    answer, _ = await api.call("GET", kv(prefix + "absent"), If_None_Match="*")
    assert answer.status == 404


async def test_a_get_with_if_match_reads_only_that_version(api: Api, prefix: str) -> None:
    version = await api.put(prefix + "k", b"value")
    answer, body = await api.call("GET", kv(prefix + "k"), If_Match=f'"{version}"')
    assert (answer.status, body) == (200, b"value")
    answer, _ = await api.call("GET", kv(prefix + "k"), If_Match=f'"{version + 1}", W/"{version}"')
    assert_problem(answer, await answer.json(content_type=None), 412, "precondition-failed")
    assert version_of(answer) == version
    answer, _ = await api.call("GET", kv(prefix + "absent"), If_Match="*")
    assert_problem(answer, await answer.json(content_type=None), 412, "precondition-failed")
    answer, _ = await api.call("GET", kv(prefix + "k"), If_Match=str(version))
    assert_problem(answer, await answer.json(content_type=None), 400, "bad-condition")


# --- time to live -----------------------------------------------------------------------------------------------------


async def test_a_value_with_a_ttl_is_gone_from_every_answer_when_it_has_passed(api: Api, prefix: str) -> None:
    await api.put(prefix + "stays")
    began = time.monotonic()
    version = await api.put(prefix + "goes", b"x", "?ttl=0.3")
    answer, _ = await api.call("GET", kv(prefix + "goes"))
    if answer.status == 200:
        assert 0 < float(answer.headers["Kv-Ttl"]) <= 0.3
    else:
        assert time.monotonic() - began >= 0.3
    while (await api.call("GET", kv(prefix + "goes")))[0].status == 200:
        assert time.monotonic() - began < WAIT_S
        await asyncio.sleep(0.01)
    assert time.monotonic() - began >= 0.3
    assert await api.json("GET", f"/v1/kv?prefix={prefix}&count=true") == {"count": 1}
    listed = await api.json("GET", f"/v1/kv?prefix={prefix}")
    assert [item["key"] for item in listed["items"]] == [prefix + "stays"]
    results = await api.batch([{"op": "get", "key": prefix + "goes"}, {"op": "delete", "key": prefix + "goes"}])
    assert [result["status"] for result in results] == [404, 404]
    answer, _ = await api.call("PUT", kv(prefix + "goes"), b"again")
    assert answer.status == 201
    assert version_of(answer) > version


async def test_a_put_without_ttl_clears_an_earlier_one(api: Api, prefix: str) -> None:
    await api.put(prefix + "k", b"1", "?ttl=600")
    answer, _ = await api.call("GET", kv(prefix + "k"))
    assert 590 < float(answer.headers["Kv-Ttl"]) <= 600
    await api.put(prefix + "k", b"2")
    answer, _ = await api.call("GET", kv(prefix + "k"))
    assert "Kv-Ttl" not in answer.headers


async def test_a_put_with_ttl_sets_it_for_a_key_that_had_none_or_another(api: Api, prefix: str) -> None:
    await api.put(prefix + "k", b"1")
    for ttl in ("600", "1.5", ".5", "00010", "315360000"):
        await api.put(prefix + "k", b"1", f"?ttl={ttl}")
        answer, _ = await api.call("GET", kv(prefix + "k"))
        assert float(ttl) - 10 < float(answer.headers["Kv-Ttl"]) <= float(ttl)


# --- listing ----------------------------------------------------------------------------------------------------------

NAMES = ["", "a", "a/", "a/b", "a b", "aa", "A", "Z", "\0", "\x01", "\x7f", "%", "&=+?#", "é", "e\u0301", "ÿ", "日本",
         "\ue000", "\uffff", "\U00010000", "😀", "\U0010ffff", "\U0010ffff\U0010ffff",
         *(f"n{number}" for number in range(20))]  # fmt: skip


async def test_keys_are_listed_in_byte_order_over_all_shards_in_pages_of_every_size(api: Api, prefix: str) -> None:
    versions = {}
    shards = set()
    for name in NAMES:
        answer, _ = await api.call("PUT", kv(prefix + name), b"")
        versions[prefix + name] = version_of(answer)
        shards.add(answer.headers["Kv-Shard"])
    assert shards == set(SHARDS)
    expected = [{"key": key, "version": versions[key]} for key in sorted(versions, key=str.encode)]
    assert await api.json("GET", f"/v1/kv?prefix={prefix}") == {"items": expected, "next": None}
    for limit in (1, 2, 3, 5, 7, len(NAMES) - 1, len(NAMES), len(NAMES) + 1, 10_000):
        pages = await api.pages(f"prefix={prefix}&limit={limit}")
        assert all(len(page) <= limit for page in pages)
        assert list(itertools.chain(*pages)) == expected, limit


async def test_a_prefix_chooses_keys_by_their_bytes(api: Api, prefix: str) -> None:
    await api.batch([{"op": "put", "key": prefix + name, "value": ""} for name in NAMES])
    for part in ("", "a", "a/", "e", "é", "\0", "%", "&=+?#", "😀", "\U0010ffff", "日", "n1", "none such", "A"):
        encoded = quote(prefix + part, safe="")
        listed = await api.json("GET", f"/v1/kv?prefix={encoded}")
        expected = sorted((prefix + name for name in NAMES if name.startswith(part)), key=str.encode)
        assert [item["key"] for item in listed["items"]] == expected
        assert await api.json("GET", f"/v1/kv?prefix={encoded}&count=true") == {"count": len(expected)}


async def test_a_listing_goes_on_after_a_key_that_was_deleted(api: Api, prefix: str) -> None:
    await api.batch([{"op": "put", "key": f"{prefix}{n}", "value": ""} for n in range(6)])
    page = await api.json("GET", f"/v1/kv?prefix={prefix}&limit=3")
    await api.batch([{"op": "delete", "key": f"{prefix}{n}"} for n in (2, 3)])
    page = await api.json("GET", f"/v1/kv?prefix={prefix}&limit=3&after={page['next']}")
    assert [item["key"] for item in page["items"]] == [prefix + "4", prefix + "5"]


async def test_values_are_listed_as_text_where_they_are_utf8_and_else_as_base64(api: Api, prefix: str) -> None:
    await api.put(prefix + "1", "grün\0".encode())
    await api.put(prefix + "2", b"\xff\x00")
    await api.put(prefix + "3", b"")
    listed = await api.json("GET", f"/v1/kv?prefix={prefix}&values=true")
    values = [{name: value for name, value in item.items() if name.startswith("value")} for item in listed["items"]]
    assert values == [{"value": "grün\0"}, {"value_base64": "/wA="}, {"value": ""}]
    listed = await api.json("GET", f"/v1/kv?prefix={prefix}&values=false&count=false")
    assert [item.keys() for item in listed["items"]] == [{"key", "version"}] * 3


async def test_a_page_has_1000_keys_unless_a_limit_is_given(api: Api, prefix: str) -> None:
    results = await api.batch([{"op": "put", "key": f"{prefix}{n:04}", "value": ""} for n in range(1003)])
    assert {result["status"] for result in results} == {201}
    assert [len(page) for page in await api.pages(f"prefix={prefix}")] == [1000, 3]
    assert await api.json("GET", f"/v1/kv?prefix={prefix}&count=true") == {"count": 1003}


async def test_a_page_of_large_values_comes_in_pieces_that_miss_nothing(api: Api, prefix: str) -> None:
    for n in range(12):
        await api.put(f"{prefix}{n:02}", b"%02d" % n * (VALUE_BYTES_MAX // 2))
    pages = await api.pages(f"prefix={prefix}&values=true")
    items = list(itertools.chain(*pages))
    assert [item["key"] for item in items] == [f"{prefix}{n:02}" for n in range(12)]
    assert all(item["value"] == f"{n:02}" * (VALUE_BYTES_MAX // 2) for n, item in enumerate(items))


# --- batch ------------------------------------------------------------------------------------------------------------


async def test_a_batch_answers_in_the_order_of_its_operations_errors_among_them(api: Api, prefix: str) -> None:
    version = await api.put(prefix + "there", b"\xff")
    results = await api.batch(
        [
            {"op": "get", "key": prefix + "there"},
            {"op": "put", "key": prefix + "new", "value": "é"},
            {"op": "put", "key": "", "value": "x"},
            {"op": "get", "key": prefix + "absent"},
            {"op": "put", "key": prefix + "ttl", "value": "x", "ttl": 0},
            {"op": "put", "key": "k" * 1025, "value": "x"},
            {"op": "put", "key": prefix + "large", "value": "x" * (VALUE_BYTES_MAX + 1)},
            {"op": "delete", "key": prefix + "absent"},
            {"op": "put", "key": prefix + "bytes", "value_base64": "AP8=", "ttl": 0.5e3},
        ]
    )
    assert results[0] == {"status": 200, "key": prefix + "there", "version": version, "value_base64": "/w=="}
    assert results[1].keys() == {"status", "key", "version"}
    assert [result["status"] for result in results] == [200, 201, 400, 404, 400, 400, 413, 404, 201]
    assert [result.get("code") for result in results] == [
        None, None, "key-empty", "not-found", "bad-ttl", "key-too-long", "value-too-large", "not-found", None
    ]  # fmt: skip
    assert all(result["detail"] for result in results if "code" in result)
    new = {"op": "put", "key": prefix + "new", "value": ""}
    results = await api.batch([new, {"op": "delete", "key": prefix + "there"}])
    assert [(result["status"], result["key"]) for result in results] == [(204, prefix + "new"), (204, prefix + "there")]
    answer, body = await api.call("GET", kv(prefix + "bytes"))
    assert body == b"\0\xff"
    assert 490 < float(answer.headers["Kv-Ttl"]) <= 500


async def test_a_batch_takes_any_number_of_operations_under_any_content_type(api: Api, prefix: str) -> None:
    keys = [f"{prefix}{n}" for n in range(3000)]
    puts = await api.batch([{"op": "put", "key": key, "value": key * 20} for key in keys], Content_Type="text/plain")
    assert [result["key"] for result in puts] == keys
    gets = await api.batch([{"op": "get", "key": key} for key in keys])
    assert [result for result in gets if "value" not in result] == []
    assert [result["value"] for result in gets] == [key * 20 for key in keys]
    assert [result["version"] for result in gets] == [result["version"] for result in puts]


async def test_a_batch_of_small_values_is_done_whatever_large_ones_were_read_before(api: Api, prefix: str) -> None:
    keys = [f"{prefix}{n}" for n in range(1000)]
    await api.batch([{"op": "put", "key": key, "value": "x"} for key in keys])
    await api.put(prefix + "large", b"x" * VALUE_BYTES_MAX)
    for _ in range(20):
        await api.call("GET", kv(prefix + "large"))
    gets = await api.batch([{"op": "get", "key": key} for key in keys])
    assert [result for result in gets if "value" not in result] == []


async def test_a_large_answer_of_a_batch_reaches_a_client_that_speaks_http_1_0(
    cluster: Cluster, api: Api, prefix: str
) -> None:
    await api.put(prefix + "k", b"x" * VALUE_BYTES_MAX)
    body = b'{"ops":[%s]}' % b",".join([b'{"op":"get","key":"%sk"}' % prefix.encode()] * 5)
    with wire(cluster) as connection:
        connection.send(b"POST /v1/batch HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        answer = connection.answer()
    assert answer.status == 200
    assert [len(result["value"]) for result in answer.json["results"]] == [VALUE_BYTES_MAX] * 5


# --- the cluster ------------------------------------------------------------------------------------------------------


async def test_the_cluster_document_names_its_shards_in_order_with_what_they_hold(
    cluster: Cluster, api: Api, prefix: str
) -> None:
    before = await api.json("GET", "/v1/cluster")
    await api.batch([{"op": "put", "key": f"{prefix}{n}", "value": "x" * 100} for n in range(100)])
    document = await api.json("GET", "/v1/cluster")
    first = {"cluster_id", "epoch", "partitions", "replicas", "nodes", "shards", "moves", "in_doubt"}
    assert document.keys() == first | {"wanted", "ending", "last_change", "advice", "under_replicated", "failovers"}
    assert document["advice"] == "All is well: 4 shards up, every partition has an owner, nothing moves."
    assert (document["wanted"], document["ending"]) == ([], [])
    assert document["cluster_id"]
    assert document["epoch"] >= 1
    assert (document["partitions"], document["replicas"], document["moves"]) == (4096, 1, [])
    assert document["in_doubt"] == {"count": 0, "oldest_s": None}
    assert [shard["id"] for shard in document["shards"]] == SHARDS
    urls = {shard["id"]: shard["url"] for shard in document["shards"]}
    assert document["nodes"] == [{"id": node, "url": urls[node], "state": "up"} for node in SHARDS]
    for shard in document["shards"]:
        figures = {"weight", "partitions", "keys", "bytes"}
        assert shard.keys() == {"id", "url", "state", "primary", "term", "copies"} | figures
        assert (shard["primary"], shard["term"], shard["copies"]) == (shard["id"], 1, [])
        assert (shard["state"], shard["weight"]) == ("up", 1)
        assert shard["url"].startswith("http://127.0.0.1:")
        assert abs(shard["partitions"] - 1024) <= 21
    assert sum(shard["partitions"] for shard in document["shards"]) == 4096
    assert sum(shard["keys"] for shard in document["shards"]) >= sum(shard["keys"] for shard in before["shards"]) + 100
    assert sum(shard["bytes"] for shard in document["shards"]) >= 100 * 100


@pytest.mark.parametrize("name", ["k", "a/b", "with space", "..", "ü?#%", "😀"])
async def test_explain_names_the_place_that_the_key_is_really_at(api: Api, prefix: str, name: str) -> None:
    key = prefix + name
    encoded = quote(key, safe="")
    absent = await api.json("GET", f"/v1/explain/{encoded}")
    version = await api.put(key, b"12345", "?ttl=600")
    answer, _ = await api.call("GET", f"/v1/kv/{encoded}")
    explained = await api.json("GET", f"/v1/explain/{encoded}")
    assert explained["key"] == key
    assert explained["hash"] == f"{key_hash(key.encode()):016x}"
    assert explained["partition"] == partition_of(key.encode(), 4096) == int(answer.headers["Kv-Partition"])
    assert explained["owner"] == answer.headers["Kv-Shard"] == absent["owner"]
    assert sorted(explained["walk"]) == SHARDS
    assert (explained["version"], explained["bytes"]) == (version, 5)
    assert absent["row"] != explained["row"]
    assert "version" not in absent


def by_labels(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Prometheus samples by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics_count_requests_and_time_them_per_route_and_status(api: Api, prefix: str) -> None:
    async def metrics() -> dict[Any, float]:
        answer, body = await api.call("GET", "/metrics")
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return by_labels(body.decode())

    expected = {("PUT", "/v1/kv/{key}", "201"): 2, ("GET", "/v1/kv/{key}", "404"): 1, ("GET", "/v1/kv", "400"): 1}
    before = await metrics()
    await api.put(prefix + "1")
    await api.put(prefix + "2")
    await api.call("GET", kv(prefix + "3"))
    await api.call("GET", "/v1/kv?limit=0")
    after = await metrics()
    for (method, route, status), count in expected.items():
        labels = frozenset({"method": method, "route": route, "status": status}.items())
        for name, more in (("count", frozenset[Any]()), ("bucket", frozenset({("le", "+Inf")}))):
            series = (f"kvstore_request_seconds_{name}", labels | more)
            assert after[series] - before.get(series, 0) == count
        assert after["kvstore_request_seconds_sum", labels] > 0


async def test_metrics_show_batches_commits_queues_and_the_wal_of_each_shard(api: Api, prefix: str) -> None:
    await api.batch([{"op": "put", "key": f"{prefix}{n}", "value": ""} for n in range(200)])
    _, body = await api.call("GET", "/metrics")
    samples = by_labels(body.decode())
    for shard in SHARDS:
        label = frozenset({("shard", shard), ("node", shard), ("role", "primary")})
        ops = samples["kvstore_shard_batch_ops_sum", label]
        assert ops >= samples["kvstore_shard_batch_ops_count", label] > 0
        commits = next(name for name, labels in samples if name.startswith("kvstore_shard_commit") and "_sum" in name)
        assert samples[commits, label] > 0
        assert samples["kvstore_shard_wal_bytes", label] > 0
        assert samples["kvstore_shard_keys", label] > 0
        assert samples["kvstore_shard_write_queue_ops", label] >= 0
        assert samples["kvstore_shard_read_queue_ops", label] >= 0


@pytest.mark.parametrize("route", ["/", "/healthz", "/readyz", "/metrics", "/openapi.json", "/v1/cluster", "/v1/kv"])
async def test_every_route_that_takes_get_takes_head(api: Api, route: str) -> None:
    got, body = await api.call("GET", route)
    head, nothing = await api.call("HEAD", route)
    assert (got.status, head.status, nothing) == (200, 200, b"")
    assert body
    assert head.headers["Content-Type"] == got.headers["Content-Type"]
    assert int(head.headers["Content-Length"]) > 0


async def test_a_router_says_that_it_is_alive_and_ready_and_what_there_is_to_call(api: Api) -> None:
    assert (await api.json("GET", "/healthz"))["status"] == "alive"
    assert (await api.json("GET", "/readyz"))["status"] == "ready"
    index = await api.json("GET", "/")
    assert {"/v1/kv", "/v1/kv/{key}", "/v1/batch", "/v1/cluster", "/v1/explain/{key}"} <= set(index["routes"])
    assert {"/healthz", "/readyz", "/metrics"} <= set(index["routes"])
    assert (await api.json("GET", index["documentation"]))["openapi"].startswith("3.1")


# --- connections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "field", "kept"),
    [(b"1.1", b"", True), (b"1.1", b"Connection: close\r\n", False), (b"1.0", b"Connection: keep-alive\r\n", True),
     (b"1.0", b"", False), (b"1.0", b"Connection: close\r\n", False)],
)  # fmt: skip
def test_a_connection_is_kept_or_closed_as_its_client_asks(
    cluster: Cluster, version: bytes, field: bytes, kept: bool
) -> None:
    asked = b"GET /healthz HTTP/%s\r\nHost: localhost\r\n%s\r\n" % (version, field)
    with wire(cluster) as connection:
        connection.send(asked)
        answer = connection.answer()
        assert answer.status == 200
        if kept:
            assert answer.headers.get("connection") == ("keep-alive" if version == b"1.0" else None)
            connection.send(asked)
            assert connection.answer().status == 200
        else:
            assert answer.headers["connection"] == "close"
            assert connection.rest() == b""


def test_pipelined_requests_are_answered_in_their_order(cluster: Cluster, prefix: str) -> None:
    with wire(cluster) as connection:
        sent = []
        for n in range(100):
            sent += [request("PUT", f"{kv(prefix)}{n}", body=b"%d" % n), request("GET", f"{kv(prefix)}{n}")]
        connection.send(b"".join(sent))
        for n in range(100):
            assert connection.answer().status == 201
            assert connection.answer().body == b"%d" % n


def test_a_client_that_half_closes_gets_the_answers_to_all_that_it_sent(cluster: Cluster, prefix: str) -> None:
    with wire(cluster) as connection:
        sent = [request("PUT", f"{kv(prefix)}{n}", body=b"x") for n in range(5)]
        connection.send(b"".join(sent) + request("GET", f"/v1/kv?prefix={prefix}&count=true"))
        connection.end()
        assert [connection.answer().status for _ in sent] == [201] * 5
        assert connection.answer().json == {"count": 5}
        assert connection.rest() == b""


def test_a_request_may_come_byte_by_byte(cluster: Cluster, prefix: str) -> None:
    with wire(cluster) as connection:
        for byte in request("PUT", f"{kv(prefix)}%C3%BC", body=b"slow"):
            connection.send(bytes([byte]))
        assert connection.answer().status == 201
        connection.send(request("GET", f"{kv(prefix)}%C3%BC"))
        assert connection.answer().body == b"slow"
