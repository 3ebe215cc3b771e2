"""Failpoints: off unless asked for, and then exactly what was asked for, in a real process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kvstore
from kvstore import failpoints
from kvstore.store import batch

ROOT = Path(kvstore.__file__).parents[1]


def run(points: str | None, program: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "KVSTORE_FAILPOINTS"}
    if points is not None:
        environment["KVSTORE_FAILPOINTS"] = points
    return subprocess.run(
        [sys.executable, "-c", f"from kvstore.failpoints import hit\n{program}"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def test_without_the_variable_nothing_happens() -> None:
    assert failpoints._points == {}
    failpoints.hit("anything")
    done = run(None, "hit('here'); print('alive')")
    assert (done.returncode, done.stdout) == (0, "alive\n")


def test_kill_ends_the_process_as_sigkill_does() -> None:
    done = run("here=kill", "print('before', flush=True); hit('other'); hit('here'); print('after')")
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "before\n")


def test_kill_waits_for_the_nth_time() -> None:
    done = run("here=kill@3", "for n in range(1, 9): print(n, flush=True); hit('here'); hit('other')")
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "1\n2\n3\n")


def test_stop_lets_the_process_stand_still_until_it_is_woken() -> None:
    program = "import subprocess, sys; subprocess.Popen(['sh', '-c', 'sleep 0.5; kill -CONT $PPID']); hit('here')"
    began = time.monotonic()
    done = run("here=stop@1", f"{program}; hit('here'); print('awake')")
    assert (done.returncode, done.stdout) == (0, "awake\n")
    assert time.monotonic() - began > 0.4


def test_points_in_a_file_are_taken_when_there_is_one_and_the_file_goes(tmp_path: Path) -> None:
    file = tmp_path / "points"
    write = f"import pathlib; pathlib.Path({str(file)!r}).write_text"
    program = f"hit('a'); {write}('a=kill@2'); hit('b'); hit('a'); print('once', flush=True); hit('a'); print('twice')"
    done = run(f"@{file}", program)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "once\n")
    assert not file.exists()
    disarmed = f"{write}('a=kill'); hit('b'); {write}(''); hit('a'); print('alive')"
    assert run(f"@{file}", disarmed).stdout == "alive\n"


def test_pause_sleeps_each_time_and_several_points_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(failpoints, "_points", failpoints._parse("a=pause:200;b=pause:5;c=kill@2"))
    monkeypatch.setattr(failpoints, "_hits", {})
    for name in ("a", "b", "a", "c", "d"):
        failpoints.hit(name)
    assert slept == [0.2, 0.005, 0.2]


def test_points_can_be_armed_in_a_running_process_and_disarmed() -> None:
    program = "from kvstore import failpoints as f; hit('here'); f.arm('here=kill'); f.arm(''); hit('here'); "
    quiet = run(None, program + "print(f.active)")
    assert (quiet.returncode, quiet.stdout.strip()) == (0, "False")
    assert run(None, program + "f.arm('here=kill'); hit('there'); hit('here')").returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    "text", ["a", "a=", "a=stopped", "a=killed", "a=kill@x", "a=pause", "a=pause:", "a=pause:soon", "=;="]
)
def test_what_cannot_be_understood_stops_the_start(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # whichever part of it fails
        failpoints._parse(text)


def test_the_list_of_points_is_that_of_the_code() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kvstore").rglob("*.py"))
    found = set(re.findall(r'failpoints\.hit\("([a-z-]+)"\)', source))
    found |= set(re.findall(r'"(txn-[a-z-]+-sent)"', source))  # one is passed on to where it is hit
    steps = set(re.findall(r'\.steps\.append\("([a-z]+)"\)', source))
    steps |= set(batch._STEPS.values())
    assert source.count("failpoints.hit_steps(batch.steps, ") == 2
    found |= {f"{step}-{side}-commit" for step in steps for side in ("before", "after")}
    listed = [point for points in failpoints.POINTS.values() for point in points]
    assert len(listed) == len(set(listed))
    assert set(listed) == found


def test_every_bug_is_planted_at_a_line_of_the_code() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kvstore").rglob("*.py"))
    assert set(re.findall(r'failpoints\.planted\("([a-z-]+)"\)', source)) == failpoints.BUGS.keys()


def test_a_bug_is_planted_by_its_name_and_stays_when_other_points_are_taken() -> None:
    arms = "from kvstore import failpoints as f; f.arm('here=pause:1');"
    program = f"{arms} print(f.planted('early-answer'), f.planted('other'))"
    done = run("early-answer=bug", program)
    assert (done.returncode, done.stdout) == (0, "True False\n")


def test_a_bug_that_is_not_prepared_is_refused() -> None:
    done = run("here=bug", "print('alive')")
    assert done.returncode == 1
    assert "no bug is called 'here'" in done.stderr
