"""The supervisor with real, tiny children: started again when they die, stopped in order, never left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import uvloop

from kvstore.config import Limits
from kvstore.supervisor import Child, Log, Supervisor, json_line, next_wait_s

LIMITS = Limits(stop_timeout_s=30.0, restart_wait_s_max=0.05)

# A child that says its pid, serves until SIGTERM or the end of its standard input, and says that it goes.
SERVE = """
import os, signal, sys
def go(*_):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # a signal that came before calls this at once
    os.write(1, b"going\\n")
    os._exit(0)
signal.signal(signal.SIGTERM, go)
print("pid", os.getpid(), flush=True)
sys.stdin.read()
go()
"""
# One that says on SIGTERM whether its standard input has ended by then.
TOLD = """
import os, select, signal, sys, time
def go(*_):
    print("all ends" if select.select([0], [], [], 0)[0] else "it ends alone", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, go)
print("pid", os.getpid(), flush=True)
time.sleep(600)
"""
# One that leaves behind a process of its own, which holds its standard input and output; its end is the test's.
LITTERS = """
import subprocess, sys
left = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], stdin=0)
print("left", left.pid, flush=True)
sys.stdin.read()
"""
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"


def child(name: str, script: str = SERVE) -> Child:
    role, _, child_id = name.partition("-")
    return Child(role, child_id, (sys.executable, "-S", "-c", script))


class Lines(Log):
    """A log that tests read line by line."""

    def __init__(self) -> None:
        self.written: asyncio.Queue[str] = asyncio.Queue()

    def write(self, source: str, line: str) -> None:
        self.written.put_nowait(f"[{source}] {line}")

    async def until(self, wanted: str) -> str:
        """The next line that holds `wanted`; lines before it are passed over."""
        async with asyncio.timeout(60):
            while wanted not in (line := await self.written.get()):
                pass
            return line

    async def pid(self, name: str, word: str = "pid") -> int:
        return int((await self.until(f"[{name}] {word}")).rpartition(" ")[2])


@pytest.fixture
def lines() -> Lines:
    return Lines()


Make = Callable[..., Supervisor]


@pytest.fixture
async def make(lines: Lines) -> AsyncIterator[Make]:
    made: list[Supervisor] = []

    def supervisor(limits: Limits = LIMITS, *, restart: bool = True) -> Supervisor:
        made.append(Supervisor(limits, restart=restart, log=lines))
        return made[-1]

    yield supervisor
    for one in made:
        one.kill()
        await one.stop()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_child_that_lived_is_started_again_at_once_and_one_that_did_not_waits_longer_each_time() -> None:
    waits = [next_wait_s(0.2, 0.0, 2.0)]
    for _ in range(6):
        waits.append(next_wait_s(0.2, waits[-1], 2.0))
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert next_wait_s(1.0, 2.0, 2.0) == 0.0


# --- keeping children running ----------------------------------------------------------------------------------------


async def test_what_a_child_prints_is_forwarded_with_its_name(make: Make, lines: Lines) -> None:
    make().add(child("shard-s1", "import sys; print('out'); sys.stdout.flush(); print('ä', file=sys.stderr, end='')"))
    assert await lines.until("out") == "[shard-s1] out"
    assert await lines.until("ä") == "[shard-s1] ä"


async def test_a_line_without_end_is_cut(make: Make, lines: Lines) -> None:
    make().add(child("shard-s1", "print('x' * 1_000_000)"))
    line = await lines.until("xxx")
    assert 64 * 1024 <= len(line) < 200_000


async def test_a_killed_child_is_started_again(make: Make, lines: Lines) -> None:
    make().add(child("shard-s1"))
    first = await lines.pid("shard-s1")
    os.kill(first, signal.SIGKILL)
    assert f"shard-s1 (pid {first}) ended by SIGKILL: starting it again" in await lines.until("[up]")
    assert await lines.pid("shard-s1") != first


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_child_whose_own_process_outlives_it_and_holds_its_output_is_started_again_and_stopped(
    lines: Lines, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def play() -> None:
        supervisor = Supervisor(LIMITS, restart=True, log=lines)
        supervisor.add(child("shard-s1", LITTERS))
        left.append(await lines.pid("shard-s1", "left"))
        first = supervisor.pid("shard-s1")
        assert first is not None
        os.kill(first, signal.SIGKILL)
        assert f"shard-s1 (pid {first}) ended by SIGKILL: starting it again" in await lines.until("[up]")
        left.append(await lines.pid("shard-s1", "left"))
        async with asyncio.timeout(60):
            await supervisor.stop()

    left: list[int] = []
    try:
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(play())
        assert all(is_running(pid) for pid in left)
    finally:
        for pid in left:
            os.kill(pid, signal.SIGKILL)


async def test_a_child_that_is_killed_for_a_time_comes_back_after_it_even_where_deaths_end_everything(
    make: Make, lines: Lines
) -> None:
    supervisor = make(restart=False)
    supervisor.add(child("shard-s1"))
    first = await lines.pid("shard-s1")
    clock = asyncio.get_running_loop()
    killed_s = clock.time()
    assert supervisor.kill_for("shard-s1", 0.4) == first
    assert "ended by SIGKILL: starting it again in 0.4 s" in await lines.until("[up]")
    assert await lines.pid("shard-s1") != first
    assert clock.time() - killed_s >= 0.4
    assert not supervisor.gave_up


async def test_a_child_that_is_away_is_not_killed_again_and_does_not_hold_up_a_stop(make: Make, lines: Lines) -> None:
    supervisor = make()
    supervisor.add(child("shard-s1"))
    await lines.pid("shard-s1")
    supervisor.kill_for("shard-s1", 600.0)
    await lines.until("starting it again in 600.0 s")
    with pytest.raises(ValueError, match="does not run"):
        supervisor.kill_for("shard-s1", 1.0)
    with pytest.raises(KeyError):
        supervisor.kill_for("shard-s9", 1.0)
    async with asyncio.timeout(30):
        await supervisor.stop()


async def test_a_child_that_refuses_to_start_is_tried_for_ever_and_its_message_is_seen(
    make: Make, lines: Lines
) -> None:
    make().add(child("shard-s1", "import sys; print('foreign data'); sys.exit(2)"))
    for _ in range(4):
        assert await lines.until("foreign data") == "[shard-s1] foreign data"
        assert "ended with exit code 2: starting it again" in await lines.until("[up]")


async def test_a_child_that_only_a_person_can_mend_is_started_again_when_a_person_asks(
    make: Make, lines: Lines, tmp_path: Path
) -> None:
    mended = tmp_path / "mended"
    script = f"import os, sys; os.path.exists({str(mended)!r}) or sys.exit(78)\n{SERVE}"
    supervisor = make()
    supervisor.add(child("shard-s1", script))
    supervisor.add(child("shard-s2"))
    told = await lines.until("[up] shard-s1")
    assert "ended with exit code 78" in told
    assert told.endswith(f"`kill -HUP {os.getpid()}`")
    assert supervisor.retry_set_aside() == ["shard-s1"]
    assert "ended with exit code 78" in await lines.until("[up] shard-s1")
    mended.touch()
    assert supervisor.retry_set_aside() == ["shard-s1"]
    await lines.pid("shard-s1")
    assert supervisor.retry_set_aside() == []


async def test_a_child_that_was_set_aside_can_be_removed(make: Make, lines: Lines) -> None:
    supervisor = make()
    supervisor.add(child("shard-s1", "import sys; sys.exit(78)"))
    await lines.until("exit code 78")
    await supervisor.remove("shard-s1")
    assert supervisor.ids("shard") == []


async def test_a_program_that_cannot_be_started_is_tried_for_ever(make: Make, lines: Lines) -> None:
    make().add(Child("shard", "s1", ("/nonexistent/program",)))
    for _ in range(2):
        assert "could not be started" in await lines.until("[up]")


async def test_without_restart_the_first_death_asks_everything_to_stop(make: Make, lines: Lines) -> None:
    supervisor = make(restart=False)
    supervisor.add(child("shard-s1"))
    os.kill(await lines.pid("shard-s1"), signal.SIGKILL)
    async with asyncio.timeout(60):
        await supervisor.stop_asked.wait()
    assert supervisor.gave_up


async def test_all_children_stop_in_order_of_their_roles(make: Make, lines: Lines) -> None:
    supervisor = make()
    names = ["controller-0", "shard-s1", "shard-s2", "router-0", "other-x"]
    for name in names:
        supervisor.add(child(name))
        await lines.pid(name)
    await supervisor.stop()
    said = [lines.written.get_nowait() for _ in names]
    assert [said[0], *sorted(said[1:3]), *said[3:]] == [
        "[router-0] going", "[shard-s1] going", "[shard-s2] going", "[controller-0] going", "[other-x] going",
    ]  # fmt: skip
    assert lines.written.empty()


async def test_a_child_that_does_not_stop_is_killed_and_the_others_still_stop_in_order(
    make: Make, lines: Lines
) -> None:
    supervisor = make(Limits(stop_timeout_s=2.0))
    supervisor.add(child("router-0", DEAF))
    await lines.until("deaf")
    supervisor.add(child("shard-s1"))
    await lines.pid("shard-s1")
    await supervisor.stop()
    assert await lines.until("going") == "[shard-s1] going"


async def test_stopping_right_after_starting_leaves_nothing_running(make: Make, lines: Lines) -> None:
    supervisor = make()
    for i in range(3):
        supervisor.add(child(f"shard-s{i}"))
    await supervisor.stop()
    while not lines.written.empty():
        line = lines.written.get_nowait()
        assert "starting it again" not in line
        assert "pid" not in line or not is_running(int(line.rpartition(" ")[2]))


async def test_children_can_be_added_and_removed_while_others_run(make: Make, lines: Lines) -> None:
    supervisor = make()
    supervisor.add(child("shard-s1"))
    stays = await lines.pid("shard-s1")
    supervisor.add(child("shard-s2"))
    goes = await lines.pid("shard-s2")
    with pytest.raises(ValueError, match="runs already"):
        supervisor.add(child("shard-s2"))
    await supervisor.remove("shard-s2")
    assert await lines.until("going") == "[shard-s2] going"
    assert not is_running(goes)
    assert is_running(stays)
    supervisor.add(child("shard-s2"))
    await lines.pid("shard-s2")
    with pytest.raises(KeyError):
        await supervisor.remove("shard-s9")
    await supervisor.stop()
    with pytest.raises(ValueError, match="too late"):
        supervisor.add(child("shard-s3"))


async def test_removing_a_child_that_does_not_stop_kills_it(make: Make, lines: Lines) -> None:
    supervisor = make(Limits(stop_timeout_s=0.2))
    supervisor.add(child("shard-s1", DEAF))
    await lines.until("deaf")
    await supervisor.remove("shard-s1")
    supervisor.add(child("shard-s1"))


# --- the log ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ('{"level": "info", "process": "shard-s1", "message": "ä"}', {"level": "info", "message": "ä"}),
        ('{"level": "info", "message": "ä"}', {"level": "info", "message": "ä"}),
        ("Traceback (most recent call last):", {"level": "warning", "message": "Traceback (most recent call last):"}),
        ("[1, 2]", {"level": "warning", "message": "[1, 2]"}),
        ("[" * 100_000, {"level": "warning", "message": "[" * 100_000}),
    ],
)
def test_each_line_of_a_child_is_one_json_object_with_its_name(line: str, wanted: dict[str, str]) -> None:
    written = json_line("shard-s1", line)
    assert "\n" not in written
    document = json.loads(written)
    assert document["process"] == "shard-s1"
    assert wanted.items() <= document.items()


def test_what_the_launcher_says_is_json_with_the_time_if_that_is_asked_for() -> None:
    reading, writing = os.pipe()
    log = Log(writing, as_json=True)
    log.write("up", "stopping")
    log.close()
    os.close(writing)
    (line,) = read_all(reading).splitlines()
    os.close(reading)
    document = json.loads(line)
    assert (document["process"], document["level"], document["message"]) == ("up", "info", "stopping")
    assert document["at"].endswith("Z")


def read_all(descriptor: int) -> bytes:
    chunks = []
    while chunk := os.read(descriptor, 65_536):
        chunks.append(chunk)
    return b"".join(chunks)


async def test_a_log_that_is_not_read_stops_no_process_and_tells_what_it_dropped() -> None:
    reading, writing = os.pipe()
    log = Log(writing)
    for i in range(20_000):
        log.write("shard-s1", f"line {i} " + "x" * 50)
    received = asyncio.create_task(asyncio.to_thread(read_all, reading))
    await until(log._lines.empty)
    log.write("shard-s1", "after")
    await asyncio.to_thread(log.close)
    os.close(writing)
    lines = (await received).decode().splitlines()
    os.close(reading)
    assert lines[0].startswith("[shard-s1] line 0 ")
    assert lines[-1] == "[shard-s1] after"
    told = [line for line in lines if line.endswith("lines were dropped: standard error was not read")]
    assert told, "a gap is never silent"
    written = len(lines) - len(told) - 1
    assert written + sum(int(line.split()[1]) for line in told) == 20_000


async def test_a_log_on_a_disk_that_was_full_goes_on_when_there_is_room_and_tells_what_it_lost() -> None:
    class Counting(Log):
        tried = 0

        def _write_line(self, line: bytes) -> None:
            try:
                super()._write_line(line)
            finally:
                self.tried += 1

    descriptor = os.open("/dev/full", os.O_WRONLY)
    log = Counting(descriptor)
    for word in ("one", "two", "three"):
        log.write("shard-s1", word)
    await until(lambda: log.tried == 3)
    reading, writing = os.pipe()
    os.dup2(writing, descriptor)
    os.close(writing)
    log.write("shard-s1", "four")
    await asyncio.to_thread(log.close)
    os.close(descriptor)
    lines = read_all(reading).decode().splitlines()
    os.close(reading)
    assert lines == ["[up] 3 lines were lost: No space left on device", "[shard-s1] four"]


async def test_a_log_whose_reader_is_gone_stops_no_process() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    log = Log(writing)
    for _ in range(20_000):
        log.write("up", "hello")
    await until(log._lines.empty)  # what is left would go to the next file with this number
    await asyncio.to_thread(log.close)
    os.close(writing)


async def test_children_that_are_stopped_know_whether_all_end_or_they_alone(lines: Lines) -> None:
    supervisor = Supervisor(LIMITS, restart=True, log=lines)
    for name in ("shard-s1", "shard-s2"):
        supervisor.add(child(name, TOLD))
        await lines.pid(name)
    await supervisor.remove("shard-s1")
    await lines.until("[shard-s1] it ends alone")
    await supervisor.stop()
    await lines.until("[shard-s2] all ends")
