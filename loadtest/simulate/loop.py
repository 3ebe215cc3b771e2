"""An event loop on virtual time: one thread, no sockets, and a clock that jumps when nothing is ready.

Owns: virtual time, the order of events, processes (tasks that die or stand still together), the digest of all events.
Promises: nothing depends on the machine: with the same program and the same random numbers the same events come in the
same order, at the same virtual times, and `digest` says so. Whatever waits for something that never comes is a `Hang`,
and so are events without end that bring nothing forward.
Leaves to others: clocks as a process sees them (`environment`), what happens to processes (`machine`).

Every event belongs to the process in whose context it was scheduled, or to none (clients, the driver). Events of a dead
process are dropped, so its coroutines stop where they are, as those of a killed process do; those of one that stands
still are kept until it goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import warnings
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any

import xxhash

EVENT_S = 2e-6  # what an event takes
EVENTS_MAX = 200_000  # without anything brought forward
_LAST_SHOWN = 60
_TASKS = 1000

_process: ContextVar[Process | None] = ContextVar("process", default=None)


class Hang(Exception):
    """Nothing will ever happen, or too much happens without an end."""


class Killed(BaseException):
    """The process ends here; no handler of errors may take this for one."""


class Process:
    """Tasks that live and die together. `context`: what runs in it belongs to the process.

    `rate`: seconds of its clock per second, `stood_s`: for how long its clock has stood still so far.
    """

    def __init__(self, name: str, on_death: Callable[[], None] = lambda: None, rate: float = 1.0) -> None:
        self.name = name
        self.rate = rate
        self.stood_s = 0.0
        self.alive = True
        self.stands_still = False
        self.dies_after: int | None = None  # so many events
        self.held: list[asyncio.Handle] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.context: Context = copy_context()
        self.context.run(_process.set, self)
        self._on_death = on_death

    def kill(self) -> None:
        """No event of it comes any more."""
        if self.alive:
            self.alive = False
            self.held.clear()
            self._on_death()


class SimulatedLoop(asyncio.BaseEventLoop):
    """`after_event` is called after each event of a process. `trace`: is called with each line of the full log."""

    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._digest = xxhash.xxh3_64()
        self._idle_events = 0
        self._tasks: list[asyncio.Task[Any]] = []  # what is pending must not be collected as garbage
        self._tasks_max = _TASKS
        self.events = 0
        self.last: deque[str] = deque(maxlen=_LAST_SHOWN)
        self.trace: Callable[[str], None] | None = None
        self.after_event: Callable[[Process], None] = lambda process: None
        self.errors: list[str] = []
        self.set_exception_handler(self._note_error)
        self.set_task_factory(self._make_task)  # type: ignore[arg-type]

    # --- time and order

    @property
    def now_s(self) -> float:
        """Virtual time, whatever the clocks of processes show."""
        return self._now_s

    def time(self) -> float:
        """As the running process sees it."""
        process = _process.get()
        return self._now_s if process is None else (self._now_s - process.stood_s) * process.rate

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        process = _process.get()
        if process is not None:
            when = when / process.rate + process.stood_s
        return super().call_at(when, callback, *args, context=context)

    def schedule(self, delay_s: float, callback: Any, *args: Any, context: Context) -> asyncio.TimerHandle:
        """As `call_later`, by no process's clock."""
        return super().call_at(self._now_s + delay_s, callback, *args, context=context)

    def block(self, seconds: float) -> None:
        """The running event takes that long."""
        self._now_s += seconds

    @property
    def digest(self) -> str:
        """Of all events so far."""
        return self._digest.hexdigest()

    def note(self, text: str) -> None:
        """Something that a person would want to read, part of the digest; something was brought forward."""
        line = f"{self._now_s:.6f} {text}"
        self._digest.update(line.encode())
        self.last.append(line)
        self._idle_events = 0
        if self.trace is not None:
            self.trace(line)

    def _run_once(self) -> None:
        """One turn: timers that are due, then all that was ready when it began. Raises Hang."""
        if not self._ready:
            self._jump()
        self._take_due()
        for _ in range(len(self._ready)):
            handle = self._ready.popleft()
            if not handle.cancelled():
                self._run_event(handle)

    def _jump(self) -> None:
        while self._scheduled and self._scheduled[0].cancelled():
            heapq.heappop(self._scheduled)._scheduled = False  # type: ignore[attr-defined]
        if not self._scheduled:
            raise Hang("nothing is ready, and no timer runs: what is waited for will never come")
        self._now_s = max(self._now_s, self._scheduled[0].when())

    def _take_due(self) -> None:
        while self._scheduled and self._scheduled[0].when() <= self._now_s:
            handle = heapq.heappop(self._scheduled)
            handle._scheduled = False  # type: ignore[attr-defined]
            if not handle.cancelled():
                self._ready.append(handle)

    def _run_event(self, handle: asyncio.Handle) -> None:
        process: Process | None = handle._context.get(_process)  # type: ignore[attr-defined]
        if process is not None and not self._goes_on(process, handle):
            return
        self.events += 1
        self._idle_events += 1
        if self._idle_events > EVENTS_MAX:
            raise Hang(f"{EVENTS_MAX:,} events have brought nothing forward")
        self._now_s += EVENT_S
        name = _name_of(handle)
        self._digest.update(f"{self._now_s:.6f} {name}".encode())
        if self.trace is not None:
            self.trace(f"{self._now_s:.6f}   {process.name if process else '-'} {name}")
        handle._run()
        if process is not None and process.alive:
            self.after_event(process)

    def _goes_on(self, process: Process, handle: asyncio.Handle) -> bool:
        if not process.alive:
            return False
        if process.stands_still:
            process.held.append(handle)
            return False
        if process.dies_after is not None:
            process.dies_after -= 1
            if process.dies_after < 0:
                self.note(f"{process.name} is killed between two events")
                process.kill()
                return False
        return True

    def go_on(self, process: Process) -> None:
        """It stood still; what it should have done meanwhile comes now."""
        process.stands_still = False
        self._ready.extend(process.held)
        process.held.clear()

    def wake(self, process: Process, slept_s: float) -> None:
        """It stood still for that long, and its clock with it: its timers have as long to go as before."""
        process.stood_s += slept_s
        timers = [each for each in process.held if isinstance(each, asyncio.TimerHandle)]
        process.held = [each for each in process.held if not isinstance(each, asyncio.TimerHandle)]
        for handle in [*timers, *self._scheduled]:
            if handle._context.get(_process) is process:  # type: ignore[attr-defined]
                handle._when += slept_s  # type: ignore[attr-defined]
        for handle in timers:
            handle._scheduled = True  # type: ignore[attr-defined]
        self._scheduled.extend(timers)
        heapq.heapify(self._scheduled)
        self.go_on(process)

    # --- what a loop needs beside that

    def _process_events(self, event_list: Any) -> None:
        """There are no sockets."""

    def _write_to_self(self) -> None:
        """There are no other threads."""

    def _make_task(self, loop: Any, work: Coroutine[Any, Any, Any], context: Context | None = None) -> Any:
        task = asyncio.Task(work, loop=self, context=context)
        self._tasks.append(task)
        if len(self._tasks) >= self._tasks_max:
            self._tasks = [each for each in self._tasks if not each.done()]
            self._tasks_max = max(_TASKS, 2 * len(self._tasks))
        return task

    def _note_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if "handle" in context and not isinstance(error, Killed):  # others are told when garbage is collected
            self.errors.append(f"{context['message']}: {error!r}")

    def end(self) -> None:
        """Let go of whatever still waits, silently: a work may not like to be closed where it waits for its end."""
        self._over = True
        disabled = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # works that were to be begun by what never began
            for task in self._tasks:
                if not task.done():
                    task._log_destroy_pending = False  # type: ignore[attr-defined]
                    with contextlib.suppress(BaseException):
                        task.get_coro().close()
                elif not task.cancelled():
                    task.exception()
            self._tasks.clear()
            self._ready.clear()
            self._scheduled.clear()
            self.close()
        logging.disable(disabled)

    _over = False

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        if self._over:
            return asyncio.Handle(callback, args, self, context)
        return super().call_soon(callback, *args, context=context)


def running_process() -> Process | None:
    """The one whose event this is."""
    return _process.get()


def _name_of(handle: asyncio.Handle) -> str:
    callback = handle._callback  # type: ignore[attr-defined]
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        return str(owner.get_coro().__qualname__)  # type: ignore[union-attr]
    callback = getattr(callback, "func", callback)
    return str(getattr(callback, "__qualname__", type(callback).__name__))
