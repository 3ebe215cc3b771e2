"""Batches of 100 puts or 100 gets, and pages of 100 keys.

Owns: which keys each batch has and where each page begins, and the check that a system carries them out.
Promises: the same batches and pages for every system; the keys of one batch are distinct; all pages are full; a system
that does not show all that a batch wrote, or not the right keys on a page, is not measured.
Leaves to others: the form of a request (dialects.py), replaying them and looking at the answers (batches.lua).
"""

from __future__ import annotations

import random
from pathlib import Path

from loadtest.bench.data import Data
from loadtest.bench.dialects import Dialect
from loadtest.bench.http1 import Request, ask, ask_done

SCRIPT = Path(__file__).with_name("batches.lua")
OPERATIONS = 100
PAGE_KEYS = 100
_BATCHES = 1000  # of 15 to 20 KB each: wrk holds them all in memory
_CHECKED = 2
_SEED = 4


def put_requests(dialect: Dialect, data: Data) -> list[Request]:
    """Raises Unsupported for a system without batches, RuntimeError when there are too few keys."""
    return [dialect.put_batch(data.puts(numbers)) for numbers in drawn(data)]


def get_requests(dialect: Dialect, data: Data) -> list[Request]:
    """Raises as `put_requests` does."""
    return [dialect.get_batch([data.keys[number] for number in numbers]) for numbers in drawn(data)]


def page_requests(dialect: Dialect, data: Data) -> list[Request]:
    """A page behind each key that has enough keys behind it; raises as `put_requests` does."""
    if len(data.keys) <= PAGE_KEYS:
        raise RuntimeError(f"a page behind a key has {PAGE_KEYS} keys, and there are {len(data.keys)}")
    return [dialect.page(_prefix(data), key, PAGE_KEYS) for key in data.keys[:-PAGE_KEYS]]


def drawn(data: Data) -> list[list[int]]:
    """The numbers of the keys of each batch; the same whenever they are asked for."""
    if len(data.keys) < OPERATIONS:
        raise RuntimeError(f"a batch has {OPERATIONS} keys, and there are {len(data.keys)}")
    rng = random.Random(_SEED)
    return [rng.sample(range(len(data.keys)), OPERATIONS) for _ in range(_BATCHES)]


def _prefix(data: Data) -> str:
    return data.keys[0].partition("-")[0] + "-"


# --- does the system do what is to be measured? RuntimeError if it does not ------------------------------------------


async def check_puts(url: str, dialect: Dialect, data: Data) -> None:
    """Each key is written twice: what is shown at last has not been there before."""
    for numbers in drawn(data)[:_CHECKED]:
        for values in (data.stored, data.written):
            await ask_done(url, dialect.put_batch(data._replace(written=values).puts(numbers)))
            for number in numbers:
                answer = await ask(url, dialect.get(data.keys[number]))
                if not dialect.shows(answer.body, values[number]):
                    raise RuntimeError(f"{dialect.name} does not show what a batch wrote to {data.keys[number]}")


async def check_gets(url: str, dialect: Dialect, data: Data) -> None:
    for numbers in drawn(data)[:_CHECKED]:
        answer = await ask_done(url, dialect.get_batch([data.keys[number] for number in numbers]))
        for number in numbers:
            if not any(dialect.shows(answer.body, values[number]) for values in (data.stored, data.written)):
                raise RuntimeError(f"{dialect.name} does not show {data.keys[number]} in a batch of gets")


async def check_pages(url: str, dialect: Dialect, data: Data) -> None:
    for number in (0, len(data.keys) - PAGE_KEYS - 1):
        answer = await ask_done(url, dialect.page(_prefix(data), data.keys[number], PAGE_KEYS))
        found, behind = dialect.listed(answer.body), slice(number + 1, number + 1 + PAGE_KEYS)
        if [key for key, _ in found] != list(data.keys[behind]):
            raise RuntimeError(f"{dialect.name} does not list the {PAGE_KEYS} keys behind {data.keys[number]}")
        for (key, value), stored, written in zip(found, data.stored[behind], data.written[behind], strict=True):
            if value not in (stored, written):
                raise RuntimeError(f"{dialect.name} lists a value of {key} that no client wrote")
