"""A mixed load for Locust: reads, writes, compare-and-set and listings over keys of which few are hot.

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8080
    locust -f loadtest/locustfile.py --host http://127.0.0.1:8080 --headless -u 100 -r 50 -t 60s

The first of these serves Locust's web page at port 8089.

Owns: the mix, the choice of keys (Zipf-distributed, as in YCSB), and what counts as a failure.
Promises: an answer that the workload expects (404 of a read, 412 of a lost compare-and-set) is not a failure; what
fails is counted under its problem code.
Leaves to others: a verdict on consistency (`loadtest.crash_rounds`), rates to compare (`loadtest.compare`).
"""

from __future__ import annotations

import itertools
import random

from locust import task
from locust.contrib.fasthttp import FastHttpUser, FastResponse

KEYS = 10_000
ZIPF_EXPONENT = 0.99
VALUE = "v" * 100

_weights = list(itertools.accumulate(1 / rank**ZIPF_EXPONENT for rank in range(1, KEYS + 1)))


def hot_key() -> str:
    """A key, the first of them far more often than the last."""
    return f"load/{random.choices(range(KEYS), cum_weights=_weights)[0]:06d}"


class KeyValueUser(FastHttpUser):
    """A client that waits for nothing but answers (a closed loop without think time)."""

    def _judge(self, response: FastResponse, *expected: int) -> None:
        if response.status_code in expected:
            response.success()  # type: ignore[no-untyped-call]
        else:
            code = "no-answer"
            if response.headers and "problem+json" in response.headers.get("Content-Type", ""):
                code = response.json()["code"]
            response.failure(f"{response.status_code} {code}")  # type: ignore[no-untyped-call]

    @task(60)
    def get(self) -> None:
        with self.client.get(f"/v1/kv/{hot_key()}", name="GET key", catch_response=True) as response:
            self._judge(response, 200, 404)

    @task(30)
    def put(self) -> None:
        with self.client.put(f"/v1/kv/{hot_key()}", data=VALUE, name="PUT key", catch_response=True) as response:
            self._judge(response, 201, 204)

    @task(6)
    def compare_and_set(self) -> None:
        path = f"/v1/kv/{hot_key()}"
        with self.client.get(path, name="GET key (before CAS)", catch_response=True) as response:
            self._judge(response, 200, 404)
            etag = (response.headers or {}).get("ETag")
        condition = {"If-Match": etag} if etag else {"If-None-Match": "*"}
        with self.client.put(
            path, data=VALUE, headers=condition, name="PUT key (CAS)", catch_response=True
        ) as response:
            self._judge(response, 201, 204, 412)

    @task(2)
    def delete(self) -> None:
        with self.client.delete(f"/v1/kv/{hot_key()}", name="DELETE key", catch_response=True) as response:
            self._judge(response, 204, 404)

    @task(2)
    def list_page(self) -> None:
        path = f"/v1/kv?prefix=load/{random.randrange(100):02d}&limit=100"
        with self.client.get(path, name="GET list of 100", catch_response=True) as response:
            self._judge(response, 200)
