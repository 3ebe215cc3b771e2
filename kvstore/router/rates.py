"""Rates and latencies of the last second, from the counts that the router keeps for its metrics anyway.

Owns: which requests count as reads, writes, locks and transactions; percentiles between two looks at the histograms.
Promises: pure; the hot path pays nothing: the counts are only read. The page's own questions are not counted.
Leaves to others: counting (`metrics.RequestStats`), the pace of the looks (`events`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from kvstore.metrics import Histogram

HISTORY_MAX = 300
_KINDS = {
    ("/v1/kv/{key}", "GET"): "reads",
    ("/v1/kv/{key}", "HEAD"): "reads",
    ("/v1/kv/{key}", "PUT"): "writes",
    ("/v1/kv/{key}", "DELETE"): "writes",
    ("/v1/kv", "GET"): "listings",
    ("/v1/batch", "POST"): "batches",
    ("/v1/txn", "POST"): "transactions",
    ("/v1/locks/{name}", "POST"): "locks",
    ("/v1/locks/{name}", "PUT"): "locks",
    ("/v1/locks/{name}", "DELETE"): "locks",
}
NAMES = ("reads", "writes", "listings", "batches", "transactions", "locks")

Histograms = Mapping[tuple[str, str, int], Histogram]


class _Look(NamedTuple):
    at_s: float
    counts: dict[tuple[str, str, int], list[int]]


class Rates:
    """Call `look` about once a second."""

    def __init__(self) -> None:
        self.history: deque[dict[str, Any]] = deque(maxlen=HISTORY_MAX)
        self._last: _Look | None = None

    def begin(self, histograms: Histograms, now_s: float) -> None:
        """From here on. What was counted before, while no client listened, is not part of the first second."""
        self._last = _Look(now_s, {key: list(found.counts) for key, found in histograms.items()})

    def look(self, histograms: Histograms, now_s: float, now_ms: int) -> dict[str, Any]:
        """What has been answered since the look before: requests a second by kind, p50 and p99 in milliseconds."""
        before = self._last or _Look(now_s, {})
        self.begin(histograms, now_s)
        seconds = max(now_s - before.at_s, 0.001)
        sums = dict.fromkeys((*NAMES, "errors", "refused"), 0)
        latencies: dict[str, list[int]] = {}
        bounds: tuple[float, ...] = ()
        for key, found in histograms.items():
            kind = _KINDS.get(key[:2])
            if kind is None:
                continue
            bounds = found.bounds
            seen = before.counts.get(key, [0] * len(found.counts))
            fresh = [now - then for now, then in zip(found.counts, seen, strict=True)]
            count, status = sum(fresh), key[2]
            sums[kind] += count
            if status >= 500 or status == 429:
                sums["errors"] += count
            elif status >= 400:
                sums["refused"] += count
            group = "read" if kind == "reads" else "write" if kind == "writes" else None
            if group is not None:
                latencies[group] = [a + b for a, b in zip(latencies.get(group, [0] * len(fresh)), fresh, strict=True)]
        sample: dict[str, Any] = {"at_ms": now_ms, **{name: round(n / seconds, 1) for name, n in sums.items()}}
        for group in ("read", "write"):
            for percent in (50, 99):
                sample[f"{group}_p{percent}_ms"] = percentile_ms(latencies.get(group, []), bounds, percent)
        self.history.append(sample)
        return sample


def percentile_ms(counts: list[int], bounds: tuple[float, ...], percent: int) -> float | None:
    """The percentile in milliseconds, about: within a bucket values are taken to be even.

    `counts` are those of the buckets, whose `bounds` are in seconds. None when there is nothing to measure.
    """
    total = sum(counts)
    if not total:
        return None
    wanted, running = total * percent / 100, 0
    for i, count in enumerate(counts):
        if count and running + count >= wanted:
            low = bounds[i - 1] if i else 0.0
            high = bounds[i] if i < len(bounds) else bounds[-1]
            return round((low + (high - low) * (wanted - running) / count) * 1000, 3)
        running += count
    return round(bounds[-1] * 1000, 3)
