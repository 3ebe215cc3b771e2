"""Where the files of a copy lie, and its times: plain values."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from kvstore.storage.disk import Disk
from kvstore.storage.engine import Engine
from kvstore.storage.segments import SEGMENT_BYTES


class Place(NamedTuple):
    """Where a copy's files lie: `<folder>/<store>.id`, its log, its engine.

    `open` opens the engine that is there; `renew` makes an empty one in its place, with its position at the beginning.
    """

    disk: Disk
    folder: Path
    store: str
    open: Callable[[], Awaitable[Engine]]
    renew: Callable[[], Awaitable[Engine]]
    segment_bytes: int = SEGMENT_BYTES


class Times(NamedTuple):
    """In seconds; see `lease`, and `patience` for what the primary's side uses.

    `sync_inline_ms_max`: a disk that syncs slower is synced in a thread. `apply_delay_s`: how long a copy's record that
    is committed waits until it is applied. `snapshot_share`: of the time in which a snapshot is under way, for it, or
    `snapshot_busy_share` beside clients; a page of it has up to `snapshot_page_rows_max` rows. `log_bytes_max`: of
    records that are kept for a copy that joins. `catch_up_share`: of the time in which a copy that is not waited
    for catches up by records, for sending them. `copy_apply_share`: of that in which a copy has records to apply, for
    applying them.
    """

    lease_s: float
    disk_stall_s: float
    replica_timeout_s: float = 0.8
    failover_after_s: float = 2.0
    sync_inline_ms_max: float = 0.0
    apply_delay_s: float = 0.0
    snapshot_share: float = 2 / 3
    snapshot_page_rows_max: int = 2000
    catch_up_share: float = 0.25
    copy_apply_share: float = 0.05
    snapshot_busy_share: float = 0.1
    log_bytes_max: int = 1 << 30
