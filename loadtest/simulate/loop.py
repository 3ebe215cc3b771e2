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
        self.held: list[Event] = []
        self.context: Context = copy_context()
        self.context.run(_process.set, self)
        self._on_death = on_death

    @property
    def is_undisturbed(self) -> bool:
        """Whether its next event comes, for certain."""
        return self.alive and not self.stands_still and self.dies_after is None

    def kill(self) -> None:
        """No event of it comes any more."""
        if self.alive:
            self.alive = False
            self.held.clear()
            self._on_death()


class Event:
    """A callback that is to come, as a handle of asyncio. `when_s`: of a timer, in virtual time."""

    __slots__ = ("args", "callback", "context", "is_cancelled", "when_s")

    def __init__(self, callback: Any, args: tuple[Any, ...], context: Context, when_s: float | None) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.is_cancelled = False
        self.when_s = when_s

    def cancel(self) -> None:
        self.is_cancelled = True
        self.callback, self.args = None, ()

    def cancelled(self) -> bool:
        return self.is_cancelled


class Timers:
    """Events that are to come at a time, those of one time in the order in which they were begun."""

    def __init__(self) -> None:
        self.heap: list[tuple[float, int, Event]] = []
        self._begun = 0

    def begin(self, timer: Event, when_s: float) -> None:
        self._begun += 1
        heapq.heappush(self.heap, (when_s, self._begun, timer))

    def next_s(self) -> float:
        """When the next one comes that is not cancelled. Raises Hang if there is none."""
        heap = self.heap
        while heap and heap[0][2].is_cancelled:
            heapq.heappop(heap)
        if not heap:
            raise Hang("nothing is ready, and no timer runs: what is waited for will never come")
        return heap[0][0]

    def take_out(self, process: Process) -> list[Event]:
        """All of that process, in the order of their times."""
        taken = sorted(each for each in self.heap if each[2].context.get(_process) is process)
        self.heap = [each for each in self.heap if each[2].context.get(_process) is not process]
        heapq.heapify(self.heap)
        return [event for _, _, event in taken]


class EventLog:
    """All events of a run, in order. `trace` is called with each line; `last` has the last notes."""

    def __init__(self) -> None:
        self.last: deque[str] = deque(maxlen=_LAST_SHOWN)
        self.trace: Callable[[str], None] | None = None
        self._digest = xxhash.xxh3_64()

    @property
    def digest(self) -> str:
        """Of all events so far."""
        return self._digest.hexdigest()

    def note(self, now_s: float, text: str) -> None:
        """Something that a person would want to read."""
        line = f"{now_s:.6f} {text}"
        self._digest.update(line.encode())
        self.last.append(line)
        if self.trace is not None:
            self.trace(line)

    def add(self, now_s: float, process: Process | None, name: str) -> None:
        """A callback is about to run."""
        self._digest.update(f"{now_s:.6f} {name}".encode())
        if self.trace is not None:
            self.trace(f"{now_s:.6f}   {process.name if process else '-'} {name}")


class SimulatedLoop(asyncio.BaseEventLoop):
    """`after_event` is called after each event of a process. `errors`: exceptions that no task has taken."""

    _ready: deque[Event]

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._timers = Timers()
        self._idle_events = 0
        self._tasks: list[asyncio.Task[Any]] = []  # what is pending must not be collected as garbage
        self._tasks_max = _TASKS
        self._is_over = False
        self.events = 0
        self.log = EventLog()
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
    ) -> Event:
        process = _process.get()
        if process is not None:
            when = when / process.rate + process.stood_s
        timer = Event(callback, args, copy_context() if context is None else context, when)
        self._timers.begin(timer, when)
        return timer

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Any, *args: Any, context: Context | None = None
    ) -> Event:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def schedule(self, delay_s: float, callback: Any, *args: Any, context: Context) -> Event:
        """As `call_later`, by no process's clock."""
        timer = Event(callback, args, context, self._now_s + delay_s)
        self._timers.begin(timer, self._now_s + delay_s)
        return timer

    async def sleep(self, seconds: float) -> None:
        """As `asyncio.sleep`."""
        over = self.create_future()
        timer = self.call_at(self.time() + seconds, _settle, over)
        try:
            await over
        finally:
            timer.cancel()

    def block(self, seconds: float) -> None:
        """The running event takes that long."""
        self._now_s += seconds

    def note(self, text: str) -> None:
        """Something that a person would want to read happens now; something was brought forward."""
        self.log.note(self._now_s, text)
        self._idle_events = 0

    def _run_once(self) -> None:
        """One turn: timers that are due, then all that was ready when it began. Raises Hang."""
        ready, timers = self._ready, self._timers.heap
        if not ready:
            self._now_s = max(self._now_s, self._timers.next_s())
        while timers and timers[0][0] <= self._now_s:
            timer = heapq.heappop(timers)[2]
            if not timer.is_cancelled:
                ready.append(timer)
        for _ in range(len(ready)):
            event = ready.popleft()
            if not event.is_cancelled:
                self._run_event(event)

    def _run_event(self, event: Event) -> None:
        context = event.context
        process = context.get(_process)
        if process is not None and not process.is_undisturbed and not self._goes_on(process, event):
            return
        self.events += 1
        self._idle_events += 1
        if self._idle_events > EVENTS_MAX:
            raise Hang(f"{EVENTS_MAX:,} events have brought nothing forward")
        self._now_s += EVENT_S
        name = _name_of(event.callback)
        self.log.add(self._now_s, process, name)
        try:
            context.run(event.callback, *event.args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # as that of a handle of asyncio
            self.call_exception_handler({"message": f"exception in {name}", "exception": error, "handle": event})
        if process is not None and process.alive:
            self.after_event(process)

    def _goes_on(self, process: Process, event: Event) -> bool:
        if not process.alive:
            return False
        if process.stands_still:
            process.held.append(event)
            return False
        if process.dies_after is not None:
            process.dies_after -= 1
            if process.dies_after < 0:
                self.note(f"{process.name} is killed between two events")
                process.kill()
                return False
        return True

    def go_on(self, process: Process) -> None:
        """It stood still; what it should have done in that time comes now."""
        process.stands_still = False
        self._ready.extend(process.held)
        process.held.clear()

    def wake(self, process: Process, slept_s: float) -> None:
        """It stood still for that long, and its clock with it: its timers have as long to go as before."""
        process.stood_s += slept_s
        held, process.held = process.held, []
        for event in [*held, *self._timers.take_out(process)]:
            if event.when_s is None:
                process.held.append(event)
            else:
                event.when_s += slept_s
                self._timers.begin(event, event.when_s)
        self.go_on(process)

    # --- what a loop needs beside that

    def _process_events(self, event_list: Any) -> None:
        """There are no sockets."""

    def _write_to_self(self) -> None:
        """There are no other threads."""

    def _make_task(self, loop: Any, work: Coroutine[Any, Any, Any], context: Context | None = None) -> Any:
        task = asyncio.Task(work, loop=self, context=context, name=getattr(work, "__qualname__", ""))
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
        """Let go of whatever still waits, silently.
        A work may not like to be closed where it waits for its end."""
        self._is_over = True
        disabled = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        asyncio._set_running_loop(self)  # else what is begun at an end would wait in a loop that is never run
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # works that were to be begun by what never began
            while self._tasks:
                tasks, self._tasks = self._tasks, []
                for task in tasks:
                    _let_go(task)
            self._ready.clear()
            self._timers.heap.clear()
            asyncio._set_running_loop(None)
            self.close()
        logging.disable(disabled)

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Context | None = None
    ) -> Event:
        event = Event(callback, args, copy_context() if context is None else context, None)
        if not self._is_over:
            self._ready.append(event)
        return event


def running_process() -> Process | None:
    """The one whose event this is."""
    return _process.get()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _let_go(task: asyncio.Task[Any]) -> None:
    if not task.done():
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        with contextlib.suppress(BaseException):
            task.get_coro().close()
    elif not task.cancelled():
        task.exception()


def _name_of(callback: Any) -> str:
    owner = getattr(callback, "__self__", None)
    if type(owner) is asyncio.Task:
        return owner.get_name()  # that of its coroutine, by `_make_task`
    callback = getattr(callback, "func", callback)
    return str(getattr(callback, "__qualname__", type(callback).__name__))
