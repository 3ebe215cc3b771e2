"""Judging the history of a phase in a process of its own, while the load goes on.

Owns: that process: it has little priority, and ends when its verdict is not waited for any more.
Promises: whatever the judge cannot do is an error that says so, never a silent "held".
Leaves to others: what is judged, and how (loadtest.histories).
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

import msgspec

from loadtest.histories.verdict import Verdict

_TIMEOUT_S = 300.0
_NICENESS = 10
_EXIT_HELD, _EXIT_WRONG = 0, 1


class JudgeError(Exception):
    """The history was not judged; the message says why."""


async def judge(path: Path) -> Verdict:
    """The verdict on the history in that file. Raises JudgeError."""
    command = ["nice", "-n", str(_NICENESS), sys.executable, "-m", "loadtest.histories", str(path), "--json"]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the run, which decides whether it still wants the verdict
    )
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            output, errors = await process.communicate()
    except TimeoutError:
        raise JudgeError(f"{path.name} was not judged within {_TIMEOUT_S:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode not in (_EXIT_HELD, _EXIT_WRONG):
        raise JudgeError(f"{path.name} was not judged: {errors.decode(errors='replace')[-1000:]}")
    try:
        return msgspec.json.decode(output, type=Verdict)
    except msgspec.DecodeError as error:
        raise JudgeError(f"{path.name} was not judged: {error}: {output[:300]!r}") from None
