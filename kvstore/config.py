"""cluster.yaml, read strictly, and every limit and time-out of the system in one place.

Owns: the names, units and defaults of all settings; their validation with the line of the file and the mend.
Promises: an unknown key, a wrong type, a double id or a double port never passes silently.
Leaves to others: what the settings do.

The shards listed in the file are the *first* members of a cluster; afterwards the stored cluster map is the
truth.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import msgspec
import yaml

from kvstore.addresses import is_any_address, listen_address
from kvstore.errors import ConfigError

PARTITIONS_MIN = 64
PARTITIONS_MAX = 65_536
WEIGHT_MAX = 1000
DEMO_AWAY_S_MAX = 60.0  # for which the page may have a node killed
REPLICAS_MAX = 5
VALUE_BYTES_MAX = 256 * 1024 * 1024
CONFIG_VARIABLE = "KVSTORE_UP_CONFIG"  # of the environment: the configuration that `kvstore up` read
PLACE_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,64}")
ID_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")

_RENAMED = {"limits.move_fence_timeout_s": "move_freeze_timeout_s"}  # by older name; still read
_KINDS = {int: "a whole number", float: "a number", str: "a text"}


class Limits(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """Every bound on a queue, body, batch, wait or retry. Units are the last part of each name."""

    # what a client may send
    key_bytes_max: int = 1024
    value_bytes_max: int = 1024 * 1024
    body_bytes_max: int = 16 * 1024 * 1024
    ttl_s_max: int = 315_360_000
    list_keys_max: int = 10_000
    owner_bytes_max: int = 256
    lock_ttl_s_max: int = 86_400
    lock_wait_s_max: int = 60
    idempotency_kept_s: float = 600.0
    request_line_bytes_max: int = 16_384
    header_bytes_max: int = 16_384

    # the router: what it takes in at once
    connections_max: int = 4096
    requests_in_flight_max: int = 1024
    body_bytes_in_flight_max: int = 128 * 1024 * 1024
    answer_bytes_in_flight_max: int = 128 * 1024 * 1024
    transfer_timeout_s: float = 30.0
    body_stall_s: float = 5.0
    answer_stall_s: float = 1.0
    answer_wait_s: float = 3.0
    batch_window_ops: int = 512
    batch_window_bytes: int = 32 * 1024 * 1024
    keepalive_timeout_s: float = 75.0
    events_listeners_max: int = 32
    events_write_timeout_s: float = 10.0

    # the channel between router and shard
    channel_ops_max: int = 8192
    channel_bytes_max: int = 64 * 1024 * 1024
    frame_bytes_max: int = 4 * 1024 * 1024
    request_timeout_s: float = 10.0
    reroute_timeout_s: float = 10.0
    reconnect_wait_s_max: float = 1.0

    # the store
    batch_ops_max: int = 1024
    batch_bytes_max: int = 8 * 1024 * 1024
    queue_ops_max: int = 16_384
    queue_bytes_max: int = 128 * 1024 * 1024
    read_queue_ops_max: int = 16_384
    cache_bytes_max: int = 32 * 1024 * 1024
    page_bytes_max: int = 4 * 1024 * 1024
    wal_bytes_max: int = 16 * 1024 * 1024
    log_segment_bytes: int = 32 * 1024 * 1024
    log_bytes_max: int = 1024 * 1024 * 1024
    sync_inline_ms_max: float = 2.0
    undurable_batches_max: int = 2
    apply_delay_s: float = 0.05
    apply_rows: int = 3000
    unapplied_rows_max: int = 20_000
    unapplied_bytes_max: int = 64 * 1024 * 1024
    disk_reserve_bytes: int = 64 * 1024 * 1024
    told_every_s: float = 10.0
    told_timeout_s: float = 2.0
    verify_share: float = 0.1
    snapshot_share: float = 0.67
    snapshot_busy_share: float = 0.1
    snapshot_page_rows_max: int = 2000
    catch_up_share: float = 0.25
    copy_apply_share: float = 0.05
    verify_every_s: float = 86_400.0
    compare_every_s: float = 86_400.0
    tombstone_kept_s: float = 600.0
    lock_waiters_max: int = 1024
    expiry_sweep_s: float = 0.5
    expiry_ops_max: int = 500

    # transactions
    txn_timeout_s: float = 5.0
    txn_read_bytes_max: int = 16 * 1024 * 1024

    # moves of partitions from shard to shard
    moves_at_once_max: int = 4
    moves_of_shard_max: int = 2
    move_group_keys_max: int = 8192
    move_group_bytes_max: int = 16 * 1024 * 1024
    move_page_rows_max: int = 1000
    move_freeze_timeout_s: float = 2.0
    move_busy_share: float = 0.25
    farewell_quiet_s: float = 0.5
    farewell_quiet_s_max: float = 3.0

    # copies of a shard, and who takes over from a node that is silent
    failover_after_s: float = 2.0
    lease_s: float = 1.5
    replica_timeout_s: float = 0.8
    disk_stall_s: float = 2.0
    down_out_s: float = 600.0
    hand_on_timeout_s: float = 2.0
    hand_on_quiet_s: float = 0.3
    hand_on_quiet_s_max: float = 1.5
    early_wait_s: float = 0.25
    early_requests_max: int = 1024

    # the controller and the launcher
    changes_kept_max: int = 100
    map_poll_s: float = 10.0
    map_write_tries_max: int = 20
    settle_timeout_s: float = 2.0
    stop_timeout_s: float = 8.0
    restart_wait_s_max: float = 2.0

    @property
    def frame_read_bytes_max(self) -> int:
        """No frame of the channel is larger.
        It is filled up to `frame_bytes_max`, and the last message of it may be a page with one row too many,
        with what a transaction does to that, or a transaction with all that it read."""
        message = self.page_bytes_max + 5 * self.value_bytes_max + self.body_bytes_max + 2 * self.txn_read_bytes_max
        return 2 * self.frame_bytes_max + message + 1024 * 1024


class RouterConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A router of the file: where it listens, as HOST:PORT."""

    id: str
    listen: str


class ControllerConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A controller of the file: where it listens, as HOST:PORT."""

    id: str
    listen: str


class ShardConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A shard of the file, and the node of its name.

    `host`, `zone`: what its node shares with others that may fail together with it; a zone counts before a host.
    """

    id: str
    listen: str
    weight: int = 1
    host: str = ""
    zone: str = ""


class ClusterConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What cluster.yaml says. `data_dir` is absolute once loaded (a relative one is relative to the file)."""

    routers: list[RouterConfig]
    controllers: list[ControllerConfig]
    shards: list[ShardConfig]
    data_dir: str = "./data"
    partitions: int = 4096
    replicas: int = 1
    allowed_hosts: list[str] = []
    limits: Limits = msgspec.field(default_factory=Limits)


def default_config() -> ClusterConfig:
    """What the shipped cluster.yaml says: one router, one controller, four shards, two copies of every key."""
    return ClusterConfig(
        routers=[RouterConfig(id="0", listen="127.0.0.1:8080")],
        controllers=[ControllerConfig(id="0", listen="127.0.0.1:8090")],
        shards=[ShardConfig(id=f"s{n}", listen=f"127.0.0.1:{9100 + n}") for n in range(1, 5)],
        data_dir=str(Path("data").absolute()),
        replicas=2,
    )


def encode_config(config: ClusterConfig) -> str:
    """The configuration as JSON, for `decode_config`."""
    return msgspec.json.encode(config).decode()


def decode_config(encoded: str) -> ClusterConfig:
    """What `encode_config` made of a configuration that was checked. Raises ConfigError for anything else."""
    try:
        return msgspec.json.decode(encoded, type=ClusterConfig)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ConfigError(f"the configuration that was handed down cannot be read: {error}.") from None


def load_config(path: Path, tell: Callable[[str], object] = lambda sentence: None) -> ClusterConfig:
    """Read cluster.yaml. Raises ConfigError whose detail names file and line, what is wrong and the mend.

    `tell` is called with a sentence for each setting that is read by an older name.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); name another file with --config.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    reader = _Reader(path, text)
    config = reader.read()
    _check(reader, config)
    for sentence in reader.renamed:
        tell(sentence)
    return msgspec.structs.replace(config, data_dir=str(_data_dir(reader, path, config.data_dir)))


def _data_dir(reader: _Reader, path: Path, written: str) -> Path:
    """Absolute. A leading ~ is a home folder."""
    folder = path.absolute().parent / written
    if not written.startswith("~"):
        return folder
    if folder.exists():  # where a version that knew no ~ has put it
        raise reader.error("data_dir", f"{written!r} may mean {folder}, which is there; write ./{written}, or move it")
    try:
        return path.absolute().parent / Path(written).expanduser()
    except RuntimeError:
        raise reader.error("data_dir", f"{written!r} names no user with a home; write the whole path") from None


# --- reading: YAML's node graph knows the lines that plain values have lost --------------------------------

_Struct = TypeVar("_Struct", bound=msgspec.Struct)


class _Reader:
    """Builds the structs from YAML nodes, and remembers each node by name, as in "shards[2].listen"."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._loader = yaml.SafeLoader(text)
        self._nodes: dict[str, yaml.Node] = {}
        self.renamed: list[str] = []

    def read(self) -> ClusterConfig:
        try:
            root = self._loader.get_single_node()
            if root is None:
                raise ConfigError(f"{self._path}:1: the file is empty; start from the shipped cluster.yaml.")
            return self._struct(ClusterConfig, root, "")
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise ConfigError(f"{self._path}:{line}: not valid YAML: {error.problem}; mend the line.") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{self._path}:1: not valid YAML: {error}; mend the file.") from error

    def has(self, name: str) -> bool:
        """It is written in the file."""
        return name in self._nodes

    def error(self, name: str, sentence: str) -> ConfigError:
        """A complaint about what has that name, with the line of it or of what it is missing in."""
        place = name
        while place not in self._nodes:
            place = place.rpartition(".")[0]
        return self._error_at(self._nodes[place], f"{name or 'the file'} {sentence}")

    def _error_at(self, node: yaml.Node, sentence: str) -> ConfigError:
        end = "" if sentence.endswith((".", "?")) else "."
        return ConfigError(f"{self._path}:{node.start_mark.line + 1}: {sentence}{end}")

    def _value(self, kind: Any, node: yaml.Node, name: str) -> Any:
        self._nodes[name] = node
        if get_origin(kind) is list:
            if not isinstance(node, yaml.SequenceNode):
                raise self.error(name, "must be a list; begin each entry with `- `")
            (entry_kind,) = get_args(kind)
            return [self._value(entry_kind, entry, f"{name}[{i}]") for i, entry in enumerate(node.value)]
        if issubclass(kind, msgspec.Struct):
            return self._struct(kind, node, name)
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(name, f"must be {_KINDS[kind]}; write a single value")
        try:
            return msgspec.convert(self._loader.construct_object(node), kind)
        except (msgspec.ValidationError, ValueError):
            mend = f'put it in quotes: "{node.value}"' if kind is str else f"{node.value!r} is none"
            raise self.error(name, f"must be {_KINDS[kind]}; {mend}") from None

    def _struct(self, kind: type[_Struct], node: yaml.Node, name: str) -> _Struct:
        self._nodes[name] = node
        if not isinstance(node, yaml.MappingNode):
            raise self.error(name, "must be a mapping; write `key: value`")
        fields = {field.name: field for field in msgspec.structs.fields(kind)}
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._present_name(key_node, name)
            full_name = f"{name}.{key}" if name else key
            if key not in fields:
                raise self._error_at(key_node, f"{full_name} is unknown; {_nearest(key, list(fields))}")
            if key in values:
                raise self._error_at(key_node, f"{full_name} stands here a second time; keep one of them")
            values[key] = self._value(fields[key].type, value_node, full_name)
        for field in fields.values():
            if field.required and field.name not in values:
                raise self.error(f"{name}.{field.name}" if name else field.name, "is missing; add it")
        return kind(**values)

    def _present_name(self, key_node: yaml.Node, inside: str) -> str:
        """The name of the setting, which may be written by one that it had."""
        written = str(key_node.value)
        full_name = f"{inside}.{written}" if inside else written
        if full_name not in _RENAMED:
            return written
        now = _RENAMED[full_name]
        self.renamed.append(self._error_at(key_node, f"{full_name} is called {now} now; rename it").detail)
        return now


def _nearest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"


# --- what types do not say ---------------------------------------------------------------------------------


def _check(reader: _Reader, config: ClusterConfig) -> None:
    if not config.data_dir:
        raise reader.error("data_dir", "is empty; name a folder")
    if not PARTITIONS_MIN <= config.partitions <= PARTITIONS_MAX or config.partitions.bit_count() != 1:
        sentence = f"must be a power of two from {PARTITIONS_MIN} to {PARTITIONS_MAX}; 4096 suits most clusters"
        raise reader.error("partitions", sentence)
    if not 1 <= config.replicas <= REPLICAS_MAX:
        raise reader.error("replicas", f"must be 1 to {REPLICAS_MAX}; 2 survives the loss of any one disk")
    if len(config.controllers) > 1:
        raise reader.error("controllers[1]", "is one too many until controllers can share a store; keep one")
    for i, host in enumerate(config.allowed_hosts):
        if not re.fullmatch(r"[A-Za-z0-9._-]+", host):
            raise reader.error(f"allowed_hosts[{i}]", f"{host!r} is no host name; write it without a port")
    for i, shard in enumerate(config.shards):
        if not 1 <= shard.weight <= WEIGHT_MAX:
            raise reader.error(f"shards[{i}].weight", f"must be 1 to {WEIGHT_MAX}; 1 is the usual weight")
        for name in ("host", "zone"):
            if getattr(shard, name) and not PLACE_PATTERN.fullmatch(getattr(shard, name)):
                raise reader.error(f"shards[{i}].{name}", "must be 1 to 64 of letters, digits, . _ and -; rename it")
    for name, limit in msgspec.structs.asdict(config.limits).items():
        if not math.isfinite(limit) or limit < 0 or (limit == 0 and name not in _MAY_BE_0):
            sentence = f"must be above 0 and finite, not {limit}; leave it out for the default"
            raise reader.error(f"limits.{name}", sentence)
    _check_times(reader, config.limits)
    _check_sizes(reader, config.limits)
    _check_processes(reader, config)


_MAY_BE_0 = ("down_out_s",)  # never


def _check_times(reader: _Reader, limits: Limits) -> None:
    for name in ("lease_s", "replica_timeout_s"):
        if getattr(limits, name) >= limits.failover_after_s:
            sentence = f"must be below limits.failover_after_s, {limits.failover_after_s:g}; lower it, or raise that"
            raise reader.error(f"limits.{name}", sentence)


_HAS_TO_FIT = (  # one such thing, and where it has to go through: else it would be refused for ever as "too many"
    ("value_bytes_max", ("body_bytes_max", "body_bytes_in_flight_max", "answer_bytes_in_flight_max")),
    ("value_bytes_max", ("batch_window_bytes", "channel_bytes_max", "queue_bytes_max", "txn_read_bytes_max")),
    ("body_bytes_max", ("body_bytes_in_flight_max",)),
    ("page_bytes_max", ("channel_bytes_max", "answer_bytes_in_flight_max")),
)
_ROOM_BESIDE_BYTES = 64 * 1024  # of a value in a message: its key and conditions


def _check_sizes(reader: _Reader, limits: Limits) -> None:
    sizes = msgspec.structs.asdict(limits)
    if limits.value_bytes_max > VALUE_BYTES_MAX:
        raise reader.error("limits.value_bytes_max", f"must be at most {VALUE_BYTES_MAX}; store larger ones in parts")
    for part, wholes in _HAS_TO_FIT:
        for whole in wholes:
            needed = sizes[part] + (_ROOM_BESIDE_BYTES if whole in ("channel_bytes_max", "queue_bytes_max") else 0)
            if needed <= sizes[whole]:
                continue
            if reader.has(f"limits.{part}"):
                mend = f"({sizes[part]}) must fit into {whole} ({sizes[whole]}); lower it, or raise {whole} to {needed}"
                raise reader.error(f"limits.{part}", mend)
            mend = f"({sizes[whole]}) has no room for {part} ({sizes[part]}); raise it to {needed}, or lower {part}"
            raise reader.error(f"limits.{whole}", mend)
    if limits.log_segment_bytes < (needed := limits.body_bytes_max * 3 // 2 + 2**20):
        sentence = f"must be {needed} at least, so that a body of body_bytes_max fits into one record; write {needed}"
        raise reader.error("limits.log_segment_bytes", sentence)


def _check_processes(reader: _Reader, config: ClusterConfig) -> None:
    taken: list[tuple[str, int, str]] = []
    for role, processes in _roles(config):
        if not processes:
            raise reader.error(role, "is empty; list at least one")
        ids: dict[str, str] = {}
        for i, process in enumerate(processes):
            name = f"{role}[{i}]"
            if not ID_PATTERN.fullmatch(process.id):
                sentence = f"{process.id!r} must be 1 to 32 of a-z, 0-9 and -, not beginning with -; rename it"
                raise reader.error(f"{name}.id", sentence)
            if process.id in ids:
                sentence = f"{process.id} is that of {ids[process.id]} already; choose another"
                raise reader.error(f"{name}.id", sentence)
            ids[process.id] = name
            _check_listen(reader, f"{name}.listen", process.listen, taken)


def _check_listen(reader: _Reader, name: str, listen: str, taken: list[tuple[str, int, str]]) -> None:
    try:
        host, port = listen_address(listen)
    except ConfigError as error:
        raise reader.error(name, error.detail) from None
    if port == 0:
        raise reader.error(name, "has port 0; choose one from 1 to 65535, so that others can find it")
    host = "127.0.0.1" if host == "localhost" else host
    for other_host, other_port, other_name in taken:
        if port == other_port and (host == other_host or is_any_address(host) or is_any_address(other_host)):
            raise reader.error(name, f"port {port} is that of {other_name} already; choose another")
    taken.append((host, port, name))


def _roles(config: ClusterConfig) -> list[tuple[str, Sequence[RouterConfig | ControllerConfig | ShardConfig]]]:
    return [("routers", config.routers), ("controllers", config.controllers), ("shards", config.shards)]
