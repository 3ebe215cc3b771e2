"""`kvstore up`: the whole cluster of a cluster.yaml as child processes of one small process.

Owns: which children run, for as long as the controller wants them; their ports.
Promises: a child that dies is started again for as long as the launcher lives, with the configuration that this one
read; no child outlives it, not even after kill -9; all of them have ended within 10 s of a stop.
Leaves to others: whether a cluster may run here (`premises`), keeping children running (`supervisor`), which shards
are to run and what becomes of their files (`roster`), when the cluster is ready (`readiness`), what a child does and
its pid file (`process`), the command line (`cli`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import site
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import msgspec

from kvstore.addresses import address_text, is_any_address, listen_address, on_this_host
from kvstore.config import CONFIG_VARIABLE, ClusterConfig, encode_config, load_config
from kvstore.demo import DemoDoor, check_demo, with_demo
from kvstore.errors import ConfigError, KvError
from kvstore.premises import claim, is_taken, ports_in_use
from kvstore.process import EXIT_REFUSED, raise_open_files_limit, stop_signals
from kvstore.readiness import http_ask, until_copied, until_ready
from kvstore.roster import (
    DesiredShards,
    Files,
    begin_removal,
    decide,
    finish_removal,
    first_shards,
    free_listens,
    is_out_of_date,
    look,
)
from kvstore.supervisor import Child, Log, Supervisor, json_line

_LAUNCH_ANSWER_S = 5.0  # on top of the time for which the controller holds the question open
_LAUNCH_RETRY_S = 0.2
_HELD_RETRY_S = 0.5
# aiohttp loads the system's certificates when it is imported, which takes a tenth of a node's start; a node calls no
# https under `up`.
_NO_CERTIFICATES = {"SSL_CERT_FILE": os.devnull, "SSL_CERT_DIR": os.devnull}


async def up(config_path: Path, *, restart: bool, announce: Callable[[str], None], demo: bool = False) -> int:
    """Run the cluster until SIGINT or SIGTERM, or a SIGHUP that starts nothing again.

    Returns the exit code: 0 stopped, 1 a child died, 2 cannot start.

    It cannot start, either, if one of the first children says so for good (78) before the cluster is ready.
    `announce` gets one line, "ready: URL", when the first router is ready; at the first start of a cluster with copies
    once these are in sync. `restart` False: the first child that dies
    ends everything with 1. A second signal does not wait for the children any longer, it kills them. `demo`: with a
    second router for the play-throughs of the page, and a door through which it kills nodes.
    """
    raise_open_files_limit()  # a few for each child, and whatever the shell left may be less than those
    with ExitStack() as held:
        told: list[str] = []
        try:
            config = load_config(config_path, told.append)
            data_dir = Path(config.data_dir)
            files = look(data_dir)
            ids = first_shards(config, files)
            first = msgspec.structs.replace(config, shards=[shard for shard in config.shards if shard.id in ids])
            refusals = await ports_in_use(first)
            if demo:
                check_demo(first)
            if not refusals:
                held.enter_context(await claim(data_dir))
        except KvError as error:
            refusals = [error.sentences]
        as_json = os.environ.get("KVSTORE_LOG") == "json"
        for line in (*told, *refusals):
            print(json_line("up", line) if as_json else f"kvstore up: {line}", file=sys.stderr, flush=True)
        if refusals:
            return EXIT_REFUSED
        log = Log(as_json=as_json)
        try:
            children = cluster_children(first, config_path.absolute())
            door = DemoDoor() if demo else None
            if door is not None:
                held.callback(door.close)
                children = with_demo(children, partial(router_child, first, config_path.absolute()), door)
            return await _run(config, config_path.absolute(), children, restart, announce, log, not files.data, door)
        finally:
            await asyncio.to_thread(log.close)


async def _run(
    config: ClusterConfig,
    config_path: Path,
    children: Sequence[Child],
    restart: bool,
    announce: Callable[[str], None],
    log: Log,
    is_first_start: bool,
    door: DemoDoor | None,
) -> int:
    start = _Start(children, log)
    supervisor = start.supervisor = Supervisor(config.limits, restart=restart, log=log, on_refusal=start.note_refusal)
    _stop_on_signals(supervisor, log)
    for child in children:
        supervisor.add(child)
    stop_asked = asyncio.create_task(supervisor.stop_asked.wait())
    ready = start.ready = asyncio.create_task(_announce_ready(config, is_first_start, announce, log))
    shards = asyncio.create_task(ShardReconciler(config, config_path, supervisor, log).follow())
    doors = [asyncio.create_task(door.serve(supervisor))] if door is not None else []
    try:
        await asyncio.wait({stop_asked, shards}, return_when=asyncio.FIRST_COMPLETED)
        if shards.done():
            shards.result()
    finally:
        for task in (stop_asked, ready, shards, *doors):
            task.cancel()
        await asyncio.gather(ready, shards, *doors, return_exceptions=True)
        await supervisor.stop()
    if start.refused:
        return EXIT_REFUSED
    return 1 if supervisor.gave_up else 0


class _Start:
    """Until the cluster is ready: a child that says for good that it cannot start ends everything."""

    supervisor: Supervisor
    ready: asyncio.Task[None]

    def __init__(self, children: Sequence[Child], log: Log) -> None:
        self._first = {child.name for child in children}
        self._log = log
        self.refused = False

    def note_refusal(self, child: Child, how: str) -> bool:
        """A child has ended with 78; True if that ends everything. One that joins later must not end what serves."""
        if child.name not in self._first or self.ready.done():
            return False
        self.refused = True
        self._log.write("up", f"{child.name} {how}, for the reason that it gave: stopping everything")
        self.supervisor.stop_asked.set()
        return True


def _stop_on_signals(supervisor: Supervisor, log: Log) -> None:
    def stop() -> None:
        if supervisor.stop_asked.is_set():
            supervisor.kill()
            return
        log.write("up", "stopping all processes; a second signal kills them")
        supervisor.stop_asked.set()

    def hang_up() -> None:
        """A person asks for what was set aside, or the terminal has gone."""
        has_lost_it = had_terminal and not _has_terminal()
        names = [] if has_lost_it else supervisor.retry_set_aside()
        if names:
            log.write("up", f"starting {', '.join(names)} again, as SIGHUP asks")
        elif stops_on_hang_up:
            stop()

    had_terminal = _has_terminal()
    stopping = stop_signals()
    stops_on_hang_up = signal.SIGHUP in stopping  # not under nohup
    loop = asyncio.get_running_loop()
    for number in stopping:
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, hang_up)


def _has_terminal() -> bool:
    """Whether Ctrl-C can reach this process."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


# --- the children of a cluster ---------------------------------------------------------------------------------------


def cluster_children(config: ClusterConfig, config_path: Path) -> list[Child]:
    """All processes that cluster.yaml names; `config_path` is absolute."""
    return [
        *(
            _child(config, "controller", controller.id, controller.listen, config_path, "--data-dir", config.data_dir)
            for controller in config.controllers
        ),
        *(shard_child(config, config_path, shard.id, shard.listen) for shard in config.shards),
        *(router_child(config, config_path, router.id, router.listen) for router in config.routers),
    ]


def router_child(config: ClusterConfig, config_path: Path, router_id: str, listen: str, *options: str) -> Child:
    """A router; `config_path` is absolute."""
    return _child(config, "router", router_id, listen, config_path, "--join", _controller_url(config), *options)


def shard_child(config: ClusterConfig, config_path: Path, shard_id: str, listen: str) -> Child:
    """A shard with its data in the data_dir of cluster.yaml, which need not name it."""
    options = ["--join", _controller_url(config), "--data-dir", config.data_dir]
    if is_any_address(listen_address(listen)[0]):  # all that ask it are on this host
        options += ["--advertise", address_text(*on_this_host(listen))]
    child = _child(config, "shard", shard_id, listen, config_path, *options)
    return child._replace(environment={**child.environment, **_NO_CERTIFICATES})


def _child(config: ClusterConfig, role: str, child_id: str, listen: str, config_path: Path, *options: str) -> Child:
    # -P: no module is taken from the folder where `up` runs; a random.py there would be run in place of Python's own.
    command = (sys.executable, "-P", "-m", "kvstore", role, "serve", child_id, "--listen", listen)
    argv = (*command, *options, "--config", str(config_path), "--supervised")
    # What the file says by the time of a restart is not checked, and is not what the others run with.
    environment = {CONFIG_VARIABLE: encode_config(config), **_where_kvstore_is()}
    return Child(role, child_id, argv, environment)


def _where_kvstore_is() -> dict[str, str]:
    """PYTHONPATH for the children, if this package is not installed: that of this process, and its folder."""
    folder = str(Path(__file__).absolute().parents[1])
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if folder in (*given, *site.getsitepackages(), site.getusersitepackages()):
        return {}
    return {"PYTHONPATH": os.pathsep.join([*given, folder])}


def _controller_url(config: ClusterConfig) -> str:
    return url_of(config.controllers[0].listen)


def url_of(listen: str) -> str:
    """Where on this machine a process is reached that listens there: 0.0.0.0 becomes 127.0.0.1."""
    return f"http://{address_text(*on_this_host(listen))}"


# --- the shards, as the controller wants them ------------------------------------------------------------------------


class ShardReconciler:
    """Keeps running what the controller wants on this host: members whose data lie here, and shards to be added."""

    def __init__(self, config: ClusterConfig, config_path: Path, supervisor: Supervisor, log: Log) -> None:
        self._config = config
        self._config_path = config_path
        self._supervisor = supervisor
        self._log = log
        self._data_dir = Path(config.data_dir)
        self._launch: DesiredShards | None = None
        self._known: set[str] = set()
        self._listens: dict[str, str] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._complaint = ""

    async def follow(self) -> None:
        """For ever. When it is cancelled, what is being stopped is left to the supervisor's `stop`."""
        try:
            later = self._set_aside(look(self._data_dir))
            while True:
                await self._news(_HELD_RETRY_S if later else None)
                later = self._carry_out(self._launch) if self._launch else False
        finally:
            for task in self._ending.values():
                task.cancel()
            await asyncio.gather(*self._ending.values(), return_exceptions=True)

    async def _news(self, timeout_s: float | None) -> None:
        """Until the controller says something new, or a child that was to end has ended.
        It is told so at once."""
        self._changed.clear()
        asking = asyncio.create_task(self._ask())
        changed = asyncio.create_task(self._changed.wait())
        try:
            await asyncio.wait({asking, changed}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                asking.result()
        finally:
            asking.cancel()
            changed.cancel()
            await asyncio.gather(asking, changed, return_exceptions=True)

    async def _ask(self) -> None:
        """One question, which the controller holds open while it has no news; a pause if it does not answer."""
        revision = self._launch.revision if self._launch else 0
        path = f"/v1/launch?after={revision}&running={','.join(self._supervisor.ids('shard'))}"
        address = on_this_host(self._config.controllers[0].listen)
        status, body, reason = await http_ask(*address, path, self._config.limits.map_poll_s + _LAUNCH_ANSWER_S)
        if status == 200:
            try:
                self._launch, self._complaint = msgspec.json.decode(body, type=DesiredShards), ""
                return
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                reason = str(error)
        if status == 204:
            return
        if status and reason != self._complaint:  # it is there, but cannot answer
            self._complaint = reason
            self._log.write("up", f"the controller does not say which shards are to run: {reason}")
        await asyncio.sleep(_LAUNCH_RETRY_S)

    def _carry_out(self, launch: DesiredShards) -> bool:
        """Whether it has to be looked at again soon."""
        if self._supervisor.stop_asked.is_set():
            return False
        files = look(self._data_dir)
        waiting = self._set_aside(files)
        steps = decide(launch, self._config, files, self._supervisor.ids("shard"), self._known)
        self._known |= launch.ids
        for shard_id, listen in steps.start.items():
            if shard_id in files.data and is_out_of_date(self._data_dir, shard_id, launch):
                self._finish_removal(shard_id)
            self._start(shard_id, listen)
        for shard_id in (*steps.stop, *steps.remove):
            if shard_id not in self._ending:
                ending = self._remove(shard_id) if shard_id in steps.remove else self._stop(shard_id)
                self._ending[shard_id] = asyncio.create_task(ending)
        return waiting or bool(steps.later)

    def _set_aside(self, files: Files) -> bool:
        """Finish what an earlier launcher could not: True if a process still has one of the files open."""
        left_over = files.leaving - self._ending.keys()
        for shard_id in left_over - files.held:
            self._finish_removal(shard_id)
        return bool(left_over & files.held)

    def _start(self, shard_id: str, listen: str | None) -> None:
        try:
            if listen is None or self.is_taken(shard_id, listen):
                listen = self._free_listen()
        except ConfigError as error:
            self._log.write("up", f"shard-{shard_id} cannot be started: {error.detail}")
            return
        self._listens[shard_id] = listen
        self._log.write("up", f"starting shard-{shard_id} at {listen}")
        self._supervisor.add(self._child(shard_id), self._again)

    def _again(self, child: Child) -> Child:
        """The same child, at another port if another process has taken its own."""
        with suppress(ConfigError):
            if self.is_taken(child.id, self._listens[child.id]):
                self._listens[child.id] = self._free_listen()
        return self._child(child.id)

    def _child(self, shard_id: str) -> Child:
        return shard_child(self._config, self._config_path, shard_id, self._listens[shard_id])

    def is_taken(self, shard_id: str, listen: str) -> bool:
        """Whether another process listens at that address of the shard, which is told in the log.

        Raises ConfigError.
        """
        taken = is_taken(*listen_address(listen))
        if taken:
            self._log.write("up", f"{listen}, the address of shard-{shard_id}, is in use: taking the next that is free")
        return taken

    def _free_listen(self) -> str:
        """Raises ConfigError if there is none."""
        assert self._launch is not None
        others = [listen_address(listen)[1] for listen in self._listens.values()]
        for listen in free_listens(self._config, self._launch, others):
            if not is_taken(*listen_address(listen)):
                return listen
        raise ConfigError("no port is free: end other processes on this host.")

    async def _stop(self, shard_id: str) -> None:
        self._log.write(
            "up",
            f"shard-{shard_id} is no member of the cluster: stopping it. "
            f"`kvstore shard add {shard_id}` makes it one, shards in cluster.yaml are only the first",
        )
        await self._end(shard_id)

    async def _remove(self, shard_id: str) -> None:
        self._log.write("up", f"shard-{shard_id} has left the cluster: stopping it")
        try:
            begin_removal(self._data_dir, shard_id)
        except OSError as error:
            self._log.write("up", f"the file of shard-{shard_id}: {error}")
        await self._end(shard_id, then=self._finish_removal)
        self._known.discard(shard_id)

    async def _end(self, shard_id: str, then: Callable[[str], None] | None = None) -> None:
        await self._supervisor.remove(f"shard-{shard_id}")
        if then is not None:
            then(shard_id)
        self._listens.pop(shard_id, None)
        self._ending.pop(shard_id, None)
        self._changed.set()

    def _finish_removal(self, shard_id: str) -> None:
        try:
            if path := finish_removal(self._data_dir, shard_id):
                self._log.write("up", f"the file of shard-{shard_id} is kept as {path}")
        except OSError as error:
            self._log.write("up", f"the file of shard-{shard_id} could not be set aside: {error}; move it away")


# --- readiness -------------------------------------------------------------------------------------------------------


async def _announce_ready(
    config: ClusterConfig, is_first_start: bool, announce: Callable[[str], None], log: Log
) -> None:
    listen, say = config.routers[0].listen, partial(log.write, "up")
    await until_ready(listen, say)
    if is_first_start and config.replicas > 1:
        await until_copied(listen, say)
    announce(f"ready: {url_of(listen)}")
