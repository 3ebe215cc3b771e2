"""The shell around every process that serves: event loop, signals, pid file, log, refusals.

Owns: `<data_dir>/run/<role>-<id>.pid`, the handlers of SIGINT, SIGTERM and SIGHUP, the limit of open files, the form
of the log.
Promises: one process per role and id on one data_dir; a supervised process ends when its supervisor is gone,
however that one died; a start that is refused is one readable line, never a traceback: with exit code 78 if only a
person can mend it (configuration, data), so that no supervisor tries it for ever, else 2.
Leaves to others: what is served (`main`), starting processes and starting them again (`launcher`).

A pid file is not trusted for being there: kill -9 leaves it behind, and its number may belong to another
else by then. What counts is the lock (flock) that a living process holds on its own pid file; the kernel
drops it with the process.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import gc
import json
import logging
import os
import re
import resource
import signal
import stat
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import uvloop

from kvstore.data_file import Reserve, is_full
from kvstore.environment import StopAsked
from kvstore.errors import ConfigError, DataCorrupt, DataInUse, ForeignData, KvError, LogDamaged

EXIT_REFUSED = 2
EXIT_DISK_FAILED = 74  # EX_IOERR of sysexits.h
EXIT_NEEDS_A_PERSON = 78  # EX_CONFIG of sysexits.h
_PID_RESERVE_BYTES = 256 * 1024

_STDIN = 0
# What may have passed by the next start, and what stays until a person changes it; others are bugs.
_PASSING = {errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.ENOSPC, errno.EDQUOT}
_LASTING = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG,
}  # fmt: skip
_CODES = {
    **dict.fromkeys(_PASSING, EXIT_REFUSED),
    **dict.fromkeys(_LASTING, EXIT_NEEDS_A_PERSON),
    errno.EIO: EXIT_DISK_FAILED,
}
_MENDS = {
    errno.EIO: "the disk failed: look at `dmesg`, and replace it",
    errno.EACCES: "give the user of this process the right to it, or change what cluster.yaml names",
    errno.EPERM: "give the user of this process the right to it, or change what cluster.yaml names",
    errno.EROFS: "mount it for writing, or name another data_dir",
    errno.ENOSPC: "make room: `df -h` and `df -i` show whether bytes or inodes are used up",
    errno.EDQUOT: "make room, or raise the quota",
}
_log = logging.getLogger(__name__)


def run_process(
    *,
    role: str,
    process_id: str,
    data_dir: Path | None,
    supervised: bool,
    json_log: bool = False,
    main: Callable[[StopAsked], Awaitable[None]],
) -> int:
    """Run `main(stop)` to its end and return the exit code.
    0 orderly, 1 a bug (with traceback), 2 refused for now.

    74: the disk failed. 78: refused until a person has mended the configuration or the data.

    `stop` is asked for by SIGTERM, and at once by SIGINT, SIGHUP (unless `nohup` had it ignored) and, if `supervised`,
    by the end of standard input (which must be a pipe then). `data_dir` None: no pid file. `json_log`, or
    KVSTORE_LOG=json in the environment: the log, and why a start was refused, as JSON lines. KVSTORE_LOOP=asyncio in
    the environment: instead of uvloop.
    """
    json_log = json_log or os.environ.get("KVSTORE_LOG") == "json"
    configure_log(f"{role}-{process_id}", json_log)
    raise_open_files_limit()
    try:
        with pid_file(data_dir, role, process_id):
            asyncio_run(_serve(main, supervised))
    except KvError as error:
        return _refuse(f"{role} {process_id}", error.sentences, json_log, refusal_code(error))
    except OSError as error:
        code = _CODES.get(error.errno or 0)
        if code is None:
            _log.exception("%s %s ended by an error", role, process_id)
            return 1
        return _refuse(f"{role} {process_id}", _os_refusal(error), json_log, code)
    except Exception:
        _log.exception("%s %s ended by an error", role, process_id)
        return 1
    return 0


def _refuse(name: str, why: str, json_log: bool, code: int) -> int:
    if json_log:
        _log.error(why)
    else:
        print(f"kvstore {name}: {why}", file=sys.stderr, flush=True)
    return code


def refusal_code(error: KvError) -> int:
    """78 for configuration or data that stay wrong until a person mends them.
    2 for what another start may not find."""
    lasts = isinstance(error, ConfigError | ForeignData | DataCorrupt | LogDamaged) and not isinstance(error, DataInUse)
    return EXIT_NEEDS_A_PERSON if lasts else EXIT_REFUSED


def asyncio_run(main: Awaitable[None]) -> None:
    """`asyncio.run` on uvloop, or on plain asyncio with KVSTORE_LOOP=asyncio."""
    factory = None if os.environ.get("KVSTORE_LOOP") == "asyncio" else uvloop.new_event_loop

    async def entry() -> None:
        await main

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(entry())


def stop_signals() -> list[signal.Signals]:
    """The signals that end a serving process in order.

    SIGINT is among them whatever was inherited: a script's shell ignores it for what it starts with `&`, and `kill
    -INT` of that is meant. SIGHUP that was ignored at the start stays so: that is what `nohup` is for.
    """
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


async def _serve(main: Callable[[StopAsked], Awaitable[None]], supervised: bool) -> None:
    loop = asyncio.get_running_loop()
    stop = StopAsked()
    for signal_number in stop_signals():
        loop.add_signal_handler(signal_number, stop.ask if signal_number is signal.SIGTERM else stop.ask_at_once)
    if supervised:
        _stop_at_end_of_stdin(loop, stop)
    # All that lives until now (modules, classes, routes) lives for ever: no collection need look at it again. The
    # garbage among it, 0.4 MB, stays with it: to look for that takes a tenth of a start.
    gc.freeze()
    # Under load a request makes a hundred objects, and few of them cycles: the default (700, 10, 10) looks too often.
    gc.set_threshold(20_000, 20, 50)
    await main(stop)


def _stop_at_end_of_stdin(loop: asyncio.AbstractEventLoop, stop: StopAsked) -> None:
    """The supervisor holds the other end, and closes it when everything stops.
    When it dies, by kill -9 too, the kernel does."""
    mode = os.fstat(_STDIN).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        raise ConfigError("--supervised needs a pipe as standard input; leave it out when starting by hand.")

    def readable() -> None:
        if not os.read(_STDIN, 4096):
            loop.remove_reader(_STDIN)
            stop.ask_at_once()

    loop.add_reader(_STDIN, readable)


# --- the pid file -------------------------------------------------------------------------------------------


@contextmanager
def pid_file(data_dir: Path | None, role: str, process_id: str) -> Iterator[None]:
    """The pid file of this process, while the context lasts. Raises DataInUse while another living process holds it.

    `data_dir` None: there is none. Raises OSError.
    """
    if data_dir is None:
        yield
        return
    path = data_dir / "run" / f"{role}-{process_id}.pid"
    path.parent.mkdir(parents=True, exist_ok=True)
    _refuse_if_held(path, f"{role} {process_id}")
    reserve = Reserve(data_dir / "pid-files.reserve", _PID_RESERVE_BYTES)
    descriptor = _claim_although_full(path, reserve)
    try:
        reserve.fill()
        yield
    finally:
        if _is_same_file(path, descriptor):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _claim_although_full(path: Path, reserve: Reserve) -> int:
    """As `_claim`, also on a full disk.
    There it takes the room that is kept for it, or writes over what an earlier process left."""
    try:
        return _claim(path)
    except OSError as error:
        if not is_full(error):
            raise
    reserve.give()
    try:
        return _claim(path)
    except OSError as error:
        if not is_full(error) or not path.exists():
            raise
    return _claim_in_place(path)


def _claim(path: Path) -> int:
    """Put a new pid file of this process there, locked; its descriptor. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, f"{os.getpid()}\n".encode())
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # the disk is full
        os.close(descriptor)
        raise
    return descriptor


def _claim_in_place(path: Path) -> int:
    """Write over the pid file of a process that is gone, which takes no room. Raises OSError."""
    pid = f"{os.getpid()}\n".encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.pwrite(descriptor, pid, 0)
        os.ftruncate(descriptor, len(pid))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_if_held(path: Path, name: str) -> None:
    pid = pid_file_holder(path)
    if pid is not None:
        raise DataInUse(f"{name} already runs as pid {pid} on this data_dir ({path}): stop it, or choose another id.")


def pid_file_holder(path: Path) -> str | None:
    """The pid in the file, if its process lives.
    None if there is no such file or it was left behind."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(descriptor, 32).decode(errors="replace").strip()
    finally:
        os.close(descriptor)
    return None


def _is_same_file(path: Path, descriptor: int) -> bool:
    """A successor may have put its own file in this place: that one is left."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


# --- ports --------------------------------------------------------------------------------------------------


class Holder(NamedTuple):
    """The process that listens on a port."""

    pid: int
    name: str


def port_holder(port: int) -> Holder | None:
    """The process that listens on the TCP port, from /proc.

    None where that cannot be told (another user's, not Linux).
    """
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    if not sockets:
        return None
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(_link_target(descriptor) in sockets for descriptor in (process / "fd").iterdir()):
                return Holder(int(process.name), (process / "comm").read_text().strip())
        except OSError:
            continue  # it has ended since, or belongs to another process
    return None


def parent_of(pid: int) -> int | None:
    """The process that started it, 1 if that has ended.
    None if there is no such process, or it cannot be told."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("PPid:")), None)
    except OSError:
        return None


def port_in_use(port: int) -> str:
    """One line for people: which port is taken, by whom if that can be told, and what to do."""
    holder = port_holder(port)
    by = f" by pid {holder.pid} ({holder.name})" if holder else ""
    return f"port {port} is in use{by}: stop that process, or change `listen` in cluster.yaml."


def _listening_inodes(port: int) -> Iterator[str]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            # sl  local_address  rem_address  st  tx:rx  tr:when  retrnsmt  uid  timeout  inode (see proc(5))
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:
                yield fields[9]


def _link_target(descriptor: Path) -> str:
    try:
        return str(descriptor.readlink())
    except OSError:
        return ""


def _os_refusal(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        # The loops name the address in their message only: (('127.0.0.1', 8080): address already in use).
        port = re.search(r"\('[^']*', (\d+)", str(error))
        return port_in_use(int(port[1])) if port else f"{error}: stop the process that listens there."
    where = f"{error.filename}: " if error.filename else ""
    mend = _MENDS.get(error.errno or 0, "mend that, or change what cluster.yaml names")
    return f"{where}{error.strerror or error}; {mend}."


# --- limits and log -----------------------------------------------------------------------------------------


def raise_open_files_limit() -> None:
    """Every client connection is an open file: take as many as the system allows without asking."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        _log.warning("the limit of open files could not be raised")


class _JsonFormatter(logging.Formatter):
    def __init__(self, process_name: str) -> None:
        super().__init__()
        self._process_name = process_name

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "at": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process_name,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure_log(process_name: str, json_log: bool = False) -> None:
    """The root logger to standard error, from INFO: text, or a JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    if json_log:
        handler.setFormatter(_JsonFormatter(process_name))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
