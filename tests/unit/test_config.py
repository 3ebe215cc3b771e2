"""cluster.yaml: what is accepted, and that every refusal names file, line and mend."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from kvstore.addresses import is_loopback, listen_address
from kvstore.cli.serve_options import read_config
from kvstore.config import (
    CONFIG_VARIABLE,
    ClusterConfig,
    Limits,
    decode_config,
    default_config,
    encode_config,
    load_config,
)
from kvstore.errors import ConfigError

SHIPPED = Path(__file__).parents[2] / "cluster.yaml"

GOOD = """\
data_dir: ./data
partitions: 4096
replicas: 1
routers:
  - {id: "0", listen: 127.0.0.1:8080}
controllers:
  - {id: "0", listen: 127.0.0.1:8090}
shards:
  - {id: s1, listen: 127.0.0.1:9101, weight: 2}
  - id: s2
    listen: 127.0.0.1:9102
limits:
  value_bytes_max: 2048
  map_poll_s: 3
"""


def load(tmp_path: Path, text: str) -> ClusterConfig:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return load_config(path)


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert caught.value.detail.startswith(f"{tmp_path}/cluster.yaml:")
    return caught.value.detail.removeprefix(f"{tmp_path}/")


def test_a_setting_is_read_by_its_older_name_and_the_line_is_told(tmp_path: Path) -> None:
    path, told = tmp_path / "cluster.yaml", list[str]()
    text = SHIPPED.read_text().replace("move_freeze_timeout_s: 2.0 ", "move_fence_timeout_s: 3.5 ")
    path.write_text(text)
    assert load_config(path, told.append).limits.move_freeze_timeout_s == 3.5
    line = text[: text.index("move_fence_timeout_s")].count("\n") + 1
    assert told == [f"{path}:{line}: limits.move_fence_timeout_s is called move_freeze_timeout_s now; rename it."]
    load_config(SHIPPED, told.append)
    assert len(told) == 1
    both = text.replace("  move_busy_share", "  move_freeze_timeout_s: 2.0\n  move_busy_share")
    assert "limits.move_freeze_timeout_s stands here a second time; keep one of them." in refusal(tmp_path, both)


def test_a_shard_may_name_the_zone_and_host_of_its_node(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    text = """
routers: [{id: "0", listen: "127.0.0.1:1"}]
controllers: [{id: "0", listen: "127.0.0.1:2"}]
shards:
  - {id: s1, listen: "127.0.0.1:3", zone: a, host: h1}
  - {id: s2, listen: "127.0.0.1:4"}
"""
    path.write_text(text)
    assert [(shard.zone, shard.host) for shard in load_config(path).shards] == [("a", "h1"), ("", "")]
    path.write_text(text.replace("zone: a", "zone: a b"))
    with pytest.raises(ConfigError, match=r":5: shards\[0\]\.zone must be 1 to 64"):
        load_config(path)


def test_a_good_file_is_read_with_its_values_and_the_defaults_of_the_rest(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    assert [(shard.id, shard.weight) for shard in config.shards] == [("s1", 2), ("s2", 1)]
    assert config.limits == msgspec.structs.replace(Limits(), value_bytes_max=2048, map_poll_s=3.0)
    assert config.allowed_hosts == []


def test_a_relative_data_dir_is_relative_to_the_file(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD).data_dir == str(tmp_path / "data")
    assert load(tmp_path, GOOD.replace("./data", "/var/lib/kvstore")).data_dir == "/var/lib/kvstore"


def test_a_data_dir_may_begin_with_the_home_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load(tmp_path, GOOD.replace("./data", "~/kv")).data_dir == str(tmp_path / "home" / "kv")
    assert load(tmp_path, GOOD.replace("./data", "'~'")).data_dir == str(tmp_path / "home")
    assert load(tmp_path, GOOD.replace("./data", "~root/kv")).data_dir == str(Path("~root/kv").expanduser())
    assert load(tmp_path, GOOD.replace("./data", "./~/kv")).data_dir == str(tmp_path / "~" / "kv")
    assert load(tmp_path, GOOD.replace("./data", "a~/kv")).data_dir == str(tmp_path / "a~" / "kv")


def test_a_home_that_is_none_is_refused_and_data_in_a_folder_of_that_name_are_not_left_behind(tmp_path: Path) -> None:
    refused = refusal(tmp_path, GOOD.replace("./data", "~no-such-user/kv"))
    assert "data_dir '~no-such-user/kv' names no user with a home; write the whole path" in refused
    (tmp_path / "~" / "kv").mkdir(parents=True)
    refused = refusal(tmp_path, GOOD.replace("./data", "~/kv"))
    assert f"data_dir '~/kv' may mean {tmp_path}/~/kv, which is there; write ./~/kv, or move it" in refused


def test_the_shipped_file_is_the_default_cluster() -> None:
    assert load_config(SHIPPED) == msgspec.structs.replace(default_config(), data_dir=str(SHIPPED.parent / "data"))


def test_the_shipped_file_names_every_limit_with_its_default_and_a_comment() -> None:
    lines = SHIPPED.read_text().split("\nlimits:\n")[1].splitlines()
    shown = {line.partition(":")[0].strip(): line.partition(":")[2] for line in lines if ":" in line.partition("#")[0]}
    assert list(shown) == list(Limits.__struct_fields__)
    for name, value in msgspec.structs.asdict(Limits()).items():
        number, comment = shown[name].split("#")
        assert float(number) == value
        assert comment.strip()


def test_the_shipped_file_comments_every_key() -> None:
    lines = SHIPPED.read_text().splitlines()
    for key in ClusterConfig.__struct_fields__:
        (at,) = [i for i, line in enumerate(lines) if line.startswith(f"{key}:")]
        assert lines[at - 1].startswith("#")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("value_bytes_max", "value_bytes_mx", "13: limits.value_bytes_mx is unknown; did you mean value_bytes_max?"),
        ("partitions:", "partition:", "2: partition is unknown; did you mean partitions?"),
        ("weight: 2", "wait: 2", "9: shards[0].wait is unknown; did you mean weight?"),
        ("data_dir", "qqq", "1: qqq is unknown; known are allowed_hosts, "),
        ("partitions: 4096", "partitions: many", "2: partitions must be a whole number; 'many' is none"),
        ("partitions: 4096", "partitions: 4096.5", "2: partitions must be a whole number"),
        ("partitions: 4096", "partitions: true", "2: partitions must be a whole number"),
        ("partitions: 4096", "partitions: [1]", "2: partitions must be a whole number; write a single value"),
        ('id: "0", listen: 127.0.0.1:8080', "id: 0, listen: 127.0.0.1:8080", "5: routers[0].id must be a text; put it"),
        ("map_poll_s: 3", "map_poll_s: soon", "14: limits.map_poll_s must be a number"),
        ("map_poll_s: 3", "map_poll_s: 2020-13-45", "14: limits.map_poll_s must be a number"),
        ("  value_bytes_max: 2048\n  map_poll_s: 3", "  - 1", "13: limits must be a mapping"),
        ("partitions: 4096", "partitions: 4000", "2: partitions must be a power of two from 64 to 65536"),
        ("partitions: 4096", "partitions: 32", "2: partitions must be a power of two from 64 to 65536"),
        ("partitions: 4096", "partitions: 131072", "2: partitions must be a power of two from 64 to 65536"),
        ("partitions: 4096", "partitions: 0", "2: partitions must be a power of two from 64 to 65536"),
        ("replicas: 1", "replicas: 6", "3: replicas must be 1 to 5; 2 survives the loss of any one disk"),
        ("replicas: 1", "replicas: 1\nreplicas: 1", "4: replicas stands here a second time; keep one of them"),
        ("id: s2", "id: s1", "10: shards[1].id s1 is that of shards[0] already; choose another"),
        ("id: s2", "id: S2", "10: shards[1].id 'S2' must be 1 to 32 of a-z, 0-9 and -"),
        ("id: s2", "id: -s2", "10: shards[1].id '-s2' must be 1 to 32"),
        ("id: s2", f"id: {'s' * 33}", "10: shards[1].id"),
        ("    listen: 127.0.0.1:9102", "", "10: shards[1].listen is missing; add it"),
        ("127.0.0.1:9102", "127.0.0.1:8080", "11: shards[1].listen port 8080 is that of routers[0].listen already"),
        ("127.0.0.1:9102", "localhost:8090", "11: shards[1].listen port 8090 is that of controllers[0].listen"),
        ("127.0.0.1:9102", "0.0.0.0:9101", "11: shards[1].listen port 9101 is that of shards[0].listen already"),
        ("127.0.0.1:9102", "127.0.0.1", "11: shards[1].listen '127.0.0.1' is no address; write HOST:PORT"),
        ("127.0.0.1:9102", "127.0.0.1:0", "11: shards[1].listen has port 0; choose one"),
        ("127.0.0.1:9102", "127.0.0.1:65536", "11: shards[1].listen '127.0.0.1:65536' is no address"),
        ("weight: 2", "weight: 0", "9: shards[0].weight must be 1 to 1000"),
        ("value_bytes_max: 2048", "value_bytes_max: 0", "13: limits.value_bytes_max must be above 0"),
        (
            "value_bytes_max: 2048",
            "value_bytes_max: 104857600",
            "13: limits.value_bytes_max (104857600) must fit into body_bytes_max (16777216); lower it, or raise",
        ),
        (
            "value_bytes_max: 2048",
            "value_bytes_max: 300000000",
            "13: limits.value_bytes_max must be at most 268435456; store larger ones in parts",
        ),
        (
            "value_bytes_max: 2048",
            "value_bytes_max: 67108864\n  body_bytes_max: 67108864\n  batch_window_bytes: 67108864",
            "13: limits.value_bytes_max (67108864) must fit into channel_bytes_max (67108864); lower it, or raise "
            "channel_bytes_max to 67174400",
        ),
        (
            "map_poll_s: 3",
            "body_bytes_in_flight_max: 4194304",
            "14: limits.body_bytes_in_flight_max (4194304) has no room for body_bytes_max (16777216); raise it to",
        ),
        ("map_poll_s: 3", "map_poll_s: -1.5", "14: limits.map_poll_s must be above 0"),
        (
            "map_poll_s: 3",
            "map_poll_s: 3\n  lease_s: 2.0",
            "15: limits.lease_s must be below limits.failover_after_s, 2",
        ),
        ("map_poll_s: 3", "map_poll_s: 3\n  down_out_s: -1", "15: limits.down_out_s must be above 0"),
        ("map_poll_s: 3", "map_poll_s: .inf", "14: limits.map_poll_s must be above 0 and finite"),
        ("map_poll_s: 3", "map_poll_s: .nan", "14: limits.map_poll_s must be above 0 and finite"),
        ('  - {id: "0", listen: 127.0.0.1:8080}', "  []", "5: routers is empty; list at least one"),
        ('  - {id: "0", listen: 127.0.0.1:8080}', "  ok", "5: routers must be a list"),
        ("replicas: 1", "replicas: 1\nallowed_hosts: ['kv.example:80']", "4: allowed_hosts[0] 'kv.example:80' is no"),
        ("data_dir: ./data", "data_dir: ''", "1: data_dir is empty"),
        ("data_dir: ./data", "data_dir: [", "3: not valid YAML"),
        ("data_dir: ./data", "data_dir: !!python/name:os.system ''", "1: not valid YAML"),
        ("data_dir: ./data", "data_dir: &a [*a]", "1: data_dir must be a text"),
        ("shards:\n", "shards_:\n", "8: shards_ is unknown; did you mean shards?"),
        (
            'controllers:\n  - {id: "0", listen: 127.0.0.1:8090}',
            'controllers:\n  - {id: "0", listen: 127.0.0.1:8090}\n  - {id: "1", listen: 127.0.0.1:8091}',
            "8: controllers[1] is one too many until controllers can share a store; keep one",
        ),
    ],
)
def test_a_mistake_is_refused_with_line_and_mend(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in GOOD
    expected = f"cluster.yaml:{expected}"
    assert refusal(tmp_path, GOOD.replace(old, new, 1))[: len(expected)] == expected


def test_the_same_port_on_two_addresses_is_no_mistake(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD.replace("127.0.0.1:9102", "127.0.0.2:9101")).shards[1].listen == "127.0.0.2:9101"


def test_the_same_id_in_two_roles_is_no_mistake(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD).routers[0].id == load(tmp_path, GOOD).controllers[0].id


def test_an_empty_file_a_missing_one_and_one_that_is_not_text_are_refused(tmp_path: Path) -> None:
    assert "the file is empty" in refusal(tmp_path, "# nothing\n")
    with pytest.raises(ConfigError, match=r"No such file.*--config"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_a_missing_role_is_refused(tmp_path: Path) -> None:
    assert "routers is missing; add it" in refusal(
        tmp_path, GOOD.replace(GOOD.splitlines()[4], "").replace("routers:", "")
    )


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("[::1]:80", ("::1", 80)),
        ("kv.example:1", ("kv.example", 1)),
        ("localhost:0", ("localhost", 0)),
    ],
)
def test_an_address_is_taken_apart(listen: str, expected: tuple[str, int]) -> None:
    assert listen_address(listen) == expected


@pytest.mark.parametrize("listen", ["", ":", "8080", ":8080", "h:", "h:x", "h:-1", "h:70000", "::1:80", "h:１"])
def test_what_is_no_address_is_refused(listen: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        listen_address(listen)


@pytest.mark.parametrize(
    ("listen", "is_own"),
    [
        ("127.0.0.1:80", True), ("127.9.9.9:80", True), ("[::1]:80", True), ("localhost:80", True),
        ("0.0.0.0:80", False), ("[::]:80", False), ("192.168.0.7:80", False), ("kv.example:80", False),
    ],
)  # fmt: skip
def test_only_this_machine_reaches_a_loopback_address(listen: str, is_own: bool) -> None:
    assert is_loopback(listen) is is_own


@pytest.mark.parametrize("encoded", ["", "{", "{}", '{"unknown":1}', "\udc80"])
def test_what_is_no_configuration_that_was_handed_down_is_refused(encoded: str) -> None:
    with pytest.raises(ConfigError):
        decode_config(encoded)


def test_only_a_supervised_process_takes_the_configuration_that_was_handed_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_down = msgspec.structs.replace(default_config(), partitions=64)
    monkeypatch.setenv(CONFIG_VARIABLE, encode_config(handed_down))
    assert read_config(tmp_path / "gone.yaml", supervised=True) == handed_down
    assert read_config(None) == default_config()
    monkeypatch.setenv(CONFIG_VARIABLE, '{"of": "another version"}')
    assert read_config(None, supervised=True) == default_config()
