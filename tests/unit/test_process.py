"""The shell around a serving process, seen from outside: real processes, signals, pipes and files."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.process import port_holder, port_in_use

SCRIPT = """
import asyncio, sys
from pathlib import Path
from kvstore.errors import ConfigError, ForeignData, LogDamaged
from kvstore.process import run_process

async def main(stop):
    {body}

data_dir = Path(sys.argv[1]) if len(sys.argv) > 1 else None
sys.exit(run_process(role="shard", process_id="s1", data_dir=data_dir, supervised={supervised}, main=main))
"""
SERVE = (
    'print("up", type(asyncio.get_running_loop()).__module__, flush=True); await stop.wait(); print("down", flush=True)'
)

Process = subprocess.Popen[str]


class Start:
    """Starts processes whose `main` has that body; kills what is left at the end."""

    def __init__(self, tmp_path: Path) -> None:
        self._data_dir = tmp_path
        self.pid_file = tmp_path / "run" / "shard-s1.pid"
        self._started: list[Process] = []

    def __call__(
        self,
        body: str = SERVE,
        *,
        supervised: bool = False,
        data: bool = True,
        prefix: tuple[str, ...] = (),
        **env: str,
    ) -> Process:
        script = SCRIPT.format(body=body, supervised=supervised)
        process = subprocess.Popen(
            [*prefix, sys.executable, "-c", script, *([str(self._data_dir)] if data else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
        )
        self._started.append(process)
        return process

    def end(self) -> None:
        for process in self._started:
            process.kill()
            process.wait(60)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    starter = Start(tmp_path)
    yield starter
    starter.end()


def first_line(process: Process) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end_of(process: Process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out.strip(), err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_in_order_and_removes_the_pid_file(start: Start, number: signal.Signals) -> None:
    process = start()
    assert first_line(process) == "up uvloop"
    assert start.pid_file.read_text() == f"{process.pid}\n"
    process.send_signal(number)
    assert end_of(process)[:2] == (0, "down")
    assert list(start.pid_file.parent.iterdir()) == []


ASKED = (
    'print("up", flush=True); await stop.wait(); print(stop.at_once.is_set(), flush=True); await stop.at_once.wait(); '
    'print("at once", flush=True)'
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_only_sigterm_leaves_time_for_others_to_take_over(start: Start, number: signal.Signals) -> None:
    process = start(ASKED)
    assert first_line(process) == "up"
    process.send_signal(number)
    assert end_of(process)[:2] == (0, "True\nat once")
    process = start(ASKED)
    assert first_line(process) == "up"
    process.terminate()
    assert first_line(process) == "False"
    process.terminate()  # a second time: whoever asks does not want to wait
    assert end_of(process)[:2] == (0, "at once")


def test_what_nohup_ignores_stays_ignored_and_what_a_shell_ignores_for_its_background_does_not(start: Start) -> None:
    process = start(prefix=("sh", "-c", 'trap "" HUP INT QUIT; exec "$@"', "sh"))
    assert first_line(process) == "up uvloop"
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    assert end_of(process)[:2] == (0, "down")


def test_plain_asyncio_is_used_when_asked(start: Start) -> None:
    process = start(KVSTORE_LOOP="asyncio")
    assert first_line(process) == "up asyncio.unix_events"
    process.terminate()
    assert end_of(process)[0] == 0


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_supervised_process_ends_with_its_supervisor(start: Start, loop: str) -> None:
    process = start(supervised=True, KVSTORE_LOOP=loop)
    assert first_line(process).startswith("up")
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 0
    assert not start.pid_file.exists()


def test_an_unsupervised_process_does_not_care_about_its_standard_input(start: Start) -> None:
    process = start()
    first_line(process)
    assert process.stdin is not None
    process.stdin.close()
    process.terminate()
    assert process.wait(60) == 0


def test_supervised_without_a_pipe_is_refused(tmp_path: Path) -> None:
    script = SCRIPT.format(body=SERVE, supervised=True)
    done = subprocess.run(
        [sys.executable, "-c", script], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 78
    assert "--supervised needs a pipe" in done.stderr


def test_what_is_loaded_is_set_aside_without_a_look_for_garbage() -> None:
    looks = 'sum(each["collections"] for each in gc.get_stats())'
    body = f"print({looks} - before, gc.get_freeze_count() > 10_000)"
    script = f"import gc\ngc.disable()\nbefore = {looks}" + SCRIPT.format(body=body, supervised=False)
    done = subprocess.run(
        [sys.executable, "-c", script], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("0 True\n", "")


def test_without_data_dir_there_is_no_pid_file(start: Start) -> None:
    process = start(data=False)
    first_line(process)
    assert not start.pid_file.exists()
    process.terminate()
    assert end_of(process)[0] == 0


def test_the_pid_file_of_a_killed_process_is_taken_over(start: Start) -> None:
    killed = start()
    first_line(killed)
    killed.kill()
    killed.wait(60)
    assert start.pid_file.read_text() == f"{killed.pid}\n"
    process = start()
    first_line(process)
    assert start.pid_file.read_text() == f"{process.pid}\n"
    process.terminate()
    assert end_of(process)[0] == 0


def test_a_second_process_of_that_id_is_refused_and_the_first_keeps_its_pid_file(start: Start) -> None:
    first = start()
    first_line(first)
    code, out, err = end_of(start())
    assert (code, out) == (2, "")
    assert f"shard s1 already runs as pid {first.pid}" in err
    assert start.pid_file.read_text() == f"{first.pid}\n"


def test_a_refusal_that_only_a_person_can_mend_is_one_line_with_the_next_step_and_exit_code_78(start: Start) -> None:
    code, _, err = end_of(start("raise ForeignData('the file is of another store.')"))
    assert code == 78
    assert err == (
        "kvstore shard s1: the file is of another store. Point data_dir at the right data, or move the file away.\n"
    )
    assert not start.pid_file.exists()
    assert end_of(start("raise ConfigError('x.yaml:1: mend it')"))[2] == "kvstore shard s1: x.yaml:1: mend it\n"
    code, _, err = end_of(start("raise LogDamaged('Record 7 is damaged.')"))
    assert (code, err.startswith("kvstore shard s1: Record 7 is damaged. Restore this copy")) == (78, True)


@pytest.mark.parametrize(
    ("number", "code", "mend"),
    [
        (errno.EACCES, 78, "give the user of this process the right to it"),
        (errno.EROFS, 78, "mount it for writing"),
        (errno.ENOTDIR, 78, "mend that"),
        (errno.EIO, 74, "the disk failed"),
        (errno.ENOSPC, 2, "`df -i`"),
    ],
)
def test_an_error_of_the_system_is_one_line_with_the_file_the_mend_and_a_code_that_says_whether_it_may_pass(
    start: Start, number: int, code: int, mend: str
) -> None:
    ended, _, err = end_of(start(f"raise OSError({number}, 'no', '/data/x.db')"))
    assert ended == code
    assert err.startswith("kvstore shard s1: /data/x.db: no; ")
    assert mend in err
    assert err.count("\n") == 1


def test_a_data_dir_in_whose_place_a_file_is_needs_a_person(start: Start, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    code, _, err = end_of(start())
    assert (code, err.count("\n")) == (78, 1)
    assert f"{tmp_path}/run" in err


def test_a_bug_shows_its_traceback_and_is_exit_code_1(start: Start) -> None:
    code, _, err = end_of(start("{}['absent']"))
    assert code == 1
    assert "KeyError: 'absent'" in err


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_taken_port_is_named_with_the_process_that_holds_it(start: Start, loop: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        body = f"await asyncio.get_running_loop().create_server(asyncio.Protocol, '127.0.0.1', {port})"
        code, _, err = end_of(start(body, KVSTORE_LOOP=loop))
    assert code == 2
    assert err.startswith(f"kvstore shard s1: port {port} is in use by pid {os.getpid()} (")
    assert err.count("\n") == 1


def test_a_port_that_is_free_has_no_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        holder = port_holder(port)
        assert holder is not None
        assert holder.pid == os.getpid()
    assert port_holder(port) is None
    assert port_in_use(port).startswith(f"port {port} is in use: ")


def test_the_log_is_text_or_json_on_standard_error(start: Start) -> None:
    body = "import logging; logging.getLogger('kvstore.x').warning('hello %s', 'ä')"
    assert end_of(start(body))[2].endswith(" WARNING kvstore.x: hello ä\n")
    line = json.loads(end_of(start(body, KVSTORE_LOG="json"))[2])
    assert line.pop("at").startswith(time.strftime("%Y-"))
    assert line == {"level": "warning", "process": "shard-s1", "logger": "kvstore.x", "message": "hello ä"}
    refused = json.loads(end_of(start("raise ConfigError('x.yaml:1: mend it')", KVSTORE_LOG="json"))[2])
    assert (refused["level"], refused["message"]) == ("error", "x.yaml:1: mend it")


def test_as_many_files_may_be_open_as_the_system_allows(start: Start) -> None:
    body = "import resource as r; print(len(set(r.getrlimit(r.RLIMIT_NOFILE))))"
    assert end_of(start(body))[1] == "1"
