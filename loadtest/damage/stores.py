"""Single stores: one that is killed, and damaged copies of it that are opened one by one.

Owns: killing the child, what it had acknowledged; opening a damaged copy and asking for every key, before and after
more writes and a second opening.
Promises: what was acknowledged is kept outside the store. A copy is opened by the code that a shard runs.
Leaves to others: the damage (`inject`), the verdict (`verdicts`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from kvstore.errors import KvError
from kvstore.protocol import Answer, Get
from kvstore.store.store import Store
from loadtest.cluster.local import REPOSITORY
from loadtest.damage.child import LIMITS, PARTITIONS, Waiting, cluster_map, write
from loadtest.damage.inject import damage
from loadtest.damage.verdicts import ENDED, REFUSED, UNCLEAN, Acknowledged, Finding, Tally

log = logging.getLogger(__name__)

FILE = "shard-s1.db"
_TIMEOUT_S = 60.0
_REWRITTEN = 20


async def killed_store(folder: Path, seed: int, writes: int) -> Acknowledged:
    """Fill a store in a process of its own, and kill that after so many acknowledged writes."""
    folder.mkdir(parents=True)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtest.damage.child", str(folder / FILE), str(seed),
        stdout=asyncio.subprocess.PIPE, cwd=REPOSITORY, limit=1 << 20,
    )  # fmt: skip
    assert process.stdout is not None
    certain: dict[str, bytes | None] = {}
    begun: dict[str, bytes | None] = {}
    done = 0
    while line := (await asyncio.wait_for(process.stdout.readline(), _TIMEOUT_S)).decode():
        if not line.endswith("\n"):
            break  # it died as it wrote: what was to be said here was not acted on yet, or not told
        step, key, *value = line.split()
        if step == "begin":
            begun[key] = None if value[0] == "-" else bytes.fromhex(value[0])
        else:
            certain[key] = begun.pop(key)
            done += 1
        if done == writes:
            process.send_signal(signal.SIGKILL)
    await process.wait()
    if done < writes:
        raise RuntimeError(f"the store to be damaged ended by itself after {done} writes")
    keys = certain.keys() | begun.keys()
    return {key: frozenset({certain.get(key), *([begun[key]] if key in begun else [])}) for key in keys}


async def damaged_store(kept: Path, folder: Path, acknowledged: Acknowledged, rng: random.Random) -> Finding | None:
    """Damage a copy of the killed store, open it, and judge all that it answers.
    None if nothing could be damaged."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kept, folder, ignore=shutil.ignore_patterns("*.lock", "*-shm"))
    found = damage(folder / FILE, rng)
    if found is None:
        return None
    try:
        verdict, detail = await asyncio.wait_for(_judged(folder / FILE, dict(acknowledged), rng), _TIMEOUT_S)
    except TimeoutError:
        verdict, detail = UNCLEAN, f"no end within {_TIMEOUT_S:.0f} s"
    return Finding(*found, verdict, detail)


async def _judged(path: Path, allowed: dict[str, frozenset[bytes | None]], rng: random.Random) -> tuple[str, str]:
    tally = Tally()
    for is_last in (False, True):
        fatal: list[BaseException] = []
        try:
            store = await _open(path, fatal)
        except KvError as error:
            return (REFUSED, f"{error.code}: {error.detail}") if not is_last else (REFUSED, f"later: {error.detail}")
        except Exception as error:
            log.debug("opening", exc_info=True)
            return UNCLEAN, f"{type(error).__name__}: {error}"
        try:
            await _read_all(store, allowed, tally, fatal)
            if not is_last and not fatal:
                await _rewrite(store, allowed, rng, fatal)
        finally:
            closed = await _close(store)
        if fatal or closed:
            return _or_worse(tally, ENDED, str([*fatal, *closed][0]))
    return tally.worst


def _or_worse(tally: Tally, verdict: str, detail: str) -> tuple[str, str]:
    tally.add(verdict, detail)
    return tally.worst


async def _open(path: Path, fatal: list[BaseException]) -> Store:
    on_fatal: Callable[..., None] = fatal.append
    store = await Store.open(path, LIMITS, "s1", PARTITIONS, on_fatal)  # type: ignore[arg-type]
    try:
        await store.partitions.adopt(cluster_map())  # as the controller sends it to every shard that starts
    except BaseException:
        await _close(store)
        raise
    return store


async def _close(store: Store) -> list[BaseException]:
    try:
        await asyncio.wait_for(store.close(), 20)
    except Exception as error:
        return [error]
    return []


async def _read_all(
    store: Store, allowed: dict[str, frozenset[bytes | None]], tally: Tally, fatal: list[BaseException]
) -> None:
    for key, values in allowed.items():
        sink = Waiting()
        store.get(Get(1, key), sink)
        while not sink.answer.done() and not fatal:
            await asyncio.wait({sink.answer}, timeout=0.5)
        if fatal:
            return
        answer = sink.answer.result()
        assert isinstance(answer, Answer)
        code = str((answer.problem or {}).get("code", ""))
        tally.judge(key, values, answer.status, answer.value if answer.status == 200 else None, code)


async def _rewrite(
    store: Store, allowed: dict[str, frozenset[bytes | None]], rng: random.Random, fatal: list[BaseException]
) -> None:
    """Write on, as clients would: what is acknowledged must be there after the next opening, too."""
    for key in rng.sample(sorted(allowed), _REWRITTEN):
        value = b"again " + rng.randbytes(200)
        try:
            answer = await write(store, key, value)
        except TimeoutError:
            if not fatal:
                raise
            return
        if answer.status in (201, 204):
            allowed[key] = frozenset({value})
