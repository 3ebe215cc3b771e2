"""Time, chance and tasks come from the environment alone, and nothing iterates in an order that differs between runs.

So the same seed gives the same run in a simulation. The checker reads the source with `ast`; it is itself tested on
small pieces that break each rule. What cannot be seen there (a set behind a name of another type) is found by the test
that compares the events of two processes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvstore.errors

PACKAGE = Path(kvstore.errors.__file__).parent
FOLDERS = ("store", "storage", "transactions")
EXCEPT = {"storage/sqlite.py", "storage/sqlite_writer.py"}  # they have threads of their own, which are not simulated
PROCESSES = ("placement", "replication", "shard", "router", "controller", "transport")
OF_REAL_PROCESSES = {
    "controller/map_store/sqlite.py",
    "router/app.py",
    "router/events.py",
    "shard/disk_watch.py",
    "transport/answers.py",
    "transport/http/responses.py",
    "transport/http/server.py",
}  # sockets, SQLite, the times of requests, a disk that hangs: what a simulation has others for

_MODULES = frozenset({"time", "random", "secrets", "uuid", "datetime", "threading"})
_OF_ASYNCIO = frozenset({
    "sleep", "wait_for", "timeout", "create_task", "ensure_future", "to_thread", "run_coroutine_threadsafe", "wait",
    "as_completed", "TaskGroup",
})  # fmt: skip
_OF_LOOPS = frozenset({"time", "call_later", "call_at", "create_task", "run_in_executor"})
_OF_OS = frozenset({"urandom", "getrandom", "times"})
_LOCK = ("threading", "Lock")  # it only guards lists, and no thread waits for it in a simulation


def violations(source: str) -> list[str]:
    """What the source takes from elsewhere than the environment, one sentence each, with its line."""
    tree = ast.parse(source)
    return [f"{line}: {what}" for line, what in sorted({*_imports(tree), *_calls(tree), *_loops(tree)})]


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in _MODULES:
                    yield node.lineno, f"import of {alias.name}"
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in _MODULES:
            for alias in node.names:
                if (node.module, alias.name) != _LOCK:
                    yield node.lineno, f"import of {node.module}.{alias.name}"
        elif isinstance(node, ast.ImportFrom) and node.module == "asyncio":
            yield node.lineno, "import from asyncio: name the module where it is used"


def _calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = node.func.value, node.func.attr
        if isinstance(owner, ast.Name) and owner.id == "asyncio" and name in _OF_ASYNCIO:
            if not _only_yields(node, name):
                yield node.lineno, f"call of asyncio.{name}"
        elif isinstance(owner, ast.Name) and owner.id == "os" and name in _OF_OS:
            yield node.lineno, f"call of os.{name}"
        elif name in _OF_LOOPS and _is_a_loop(owner):
            yield node.lineno, f"call of {name} of the event loop"


def _only_yields(node: ast.Call, name: str) -> bool:
    """`asyncio.sleep(0)`: it lets others run, and takes no time."""
    return (
        name == "sleep" and len(node.args) == 1 and isinstance(node.args[0], ast.Constant) and node.args[0].value == 0
    )


def _is_a_loop(owner: ast.expr) -> bool:
    if isinstance(owner, ast.Call):
        return isinstance(owner.func, ast.Attribute) and owner.func.attr in ("get_running_loop", "get_event_loop")
    return (isinstance(owner, ast.Name) and owner.id in ("loop", "_loop")) or (
        isinstance(owner, ast.Attribute) and owner.attr in ("loop", "_loop")
    )


def _loops(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Iteration over what is written, annotated or known as a set; sets of whole numbers have the same order in every
    process. `gather(*tasks)` and `list(tasks)` iterate, too."""
    names = {*_set_names(tree)}
    for node in ast.walk(tree):
        iterated: list[ast.expr] = []
        if isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
            iterated = [node.iter]
        elif isinstance(node, ast.Starred) and isinstance(node.ctx, ast.Load):
            iterated = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("list", "tuple"):
            iterated = node.args[:1]
        for each in iterated:
            if _is_set(each) or _name(each) in names:
                yield each.lineno, "iteration over a set"


def _is_set(node: ast.expr) -> bool:
    return isinstance(node, ast.Set | ast.SetComp) or (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("set", "frozenset")
    )


def _set_names(tree: ast.AST) -> Iterator[str]:
    """Names and attributes of sets of anything but whole numbers, and the two results of `asyncio.wait`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and _names_a_set(node.annotation):
            yield _name(node.target)
        elif isinstance(node, ast.arg) and node.annotation is not None and _names_a_set(node.annotation):
            yield node.arg
        elif isinstance(node, ast.Assign) and "asyncio.wait(" in ast.unparse(node.value):
            for target in node.targets:
                yield from map(_name, target.elts if isinstance(target, ast.Tuple) else ())


def _names_a_set(annotation: ast.expr) -> bool:
    return re.match(r"((frozen)?set|Set)\[(?!int\])", ast.unparse(annotation)) is not None


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_store_takes_time_chance_and_tasks_from_its_environment(folder: str) -> None:
    found = {
        name: said
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        if (name := str(path.relative_to(PACKAGE))) not in EXCEPT
        and (said := violations(path.read_text(encoding="utf-8")))
    }
    assert found == {}


@pytest.mark.parametrize("folder", PROCESSES)
def test_a_process_takes_clocks_and_chance_from_its_environment_and_the_rest_from_its_event_loop(folder: str) -> None:
    """A simulation passes the loop, so timers and tasks of the running loop are simulated, too. Threads are not."""
    found = {
        name: said
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        if (name := str(path.relative_to(PACKAGE))) not in OF_REAL_PROCESSES
        and "demo" not in name
        and (said := [each for each in violations(path.read_text(encoding="utf-8")) if not _by_the_loop(each)])
    }
    assert found == {}


def _by_the_loop(said: str) -> bool:
    return ("call of asyncio." in said and "thread" not in said) or (
        said.endswith("of the event loop") and "run_in_executor" not in said
    )


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import time", "import of time"),
        ("from time import monotonic", "import of time.monotonic"),
        ("from threading import Timer", "import of threading.Timer"),
        ("import random as dice", "import of random"),
        ("from secrets import token_hex", "import of secrets.token_hex"),
        ("from asyncio import sleep", "import from asyncio"),
        ("async def f(): await asyncio.sleep(1)", "call of asyncio.sleep"),
        ("async def f(): await asyncio.sleep(pause_s)", "call of asyncio.sleep"),
        ("async def f(): await asyncio.wait_for(event, 1)", "call of asyncio.wait_for"),
        ("async def f(): await asyncio.wait(tasks)", "call of asyncio.wait"),
        ("asyncio.create_task(work())", "call of asyncio.create_task"),
        ("asyncio.get_running_loop().call_later(1, f)", "call of call_later of the event loop"),
        ("self._loop.time()", "call of time of the event loop"),
        ("os.urandom(8)", "call of os.urandom"),
        ("for each in {a, b}: each()", "iteration over a set"),
        ("x = [f(each) for each in set(all)]", "iteration over a set"),
        ("tasks: set[Task] = g(); gather(*tasks)", "iteration over a set"),
        ("def f(names: frozenset[str]): return [each for each in names]", "iteration over a set"),
        ("self._tasks: set[Task] = g(); x = list(self._tasks)", "iteration over a set"),
    ],
)  # fmt: skip
def test_what_is_taken_from_elsewhere_is_named(source: str, said: str) -> None:
    (found,) = violations(source)
    assert found.startswith(f"1: {said}")


@pytest.mark.parametrize(
    "source",
    [
        "async def f(): await asyncio.sleep(0)",
        "from threading import Lock",
        "x = asyncio.get_running_loop().create_future()",
        "async def f(): await environment.sleep(1)",
        "for each in sorted({a, b}): each()",
    ],
)
def test_what_is_the_same_in_every_run_passes(source: str) -> None:
    assert violations(source) == []
