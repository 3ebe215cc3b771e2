"""Clusters of real processes for tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from loadtest.cluster.processes import free_ports

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Cluster:
    """A running `kvstore up`. `folder` holds its cluster.yaml, data and log."""

    url: str
    folder: Path
    up: subprocess.Popen[str]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def data_dir(self) -> Path:
        return self.folder / "data"

    def pid(self, name: str) -> int:
        """The pid of `shard-s1`, `router-0`, `controller-0`, as its pid file says."""
        return int((self.data_dir / "run" / f"{name}.pid").read_text())

    @property
    def log(self) -> str:
        return (self.folder / "up.log").read_text()


def write_config(folder: Path, shards: int = 4, **settings: object) -> Path:
    """A cluster.yaml with free ports and one copy of every key; `settings` are added (replicas, limits, …)."""
    ports = free_ports(shards + 2)
    config = {
        "data_dir": "./data",
        "replicas": 1,
        "routers": [{"id": "0", "listen": f"127.0.0.1:{ports[0]}"}],
        "controllers": [{"id": "0", "listen": f"127.0.0.1:{ports[1]}"}],
        "shards": [{"id": f"s{n}", "listen": f"127.0.0.1:{ports[n + 1]}"} for n in range(1, shards + 1)],
        **settings,
    }
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@contextmanager
def running(config: Path, env: dict[str, str] | None = None, options: Sequence[str] = ()) -> Iterator[Cluster]:
    """`kvstore up` with that file and options, until the block ends; it must stop cleanly by itself then."""
    with (config.parent / "up.log").open("a") as log:
        up = subprocess.Popen(
            [sys.executable, "-m", "kvstore", "up", "--config", str(config), *options],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=env,
            cwd=REPOSITORY,
        )
        assert up.stdout is not None
        try:
            with closing(up.stdout):
                line = up.stdout.readline()
                assert line.startswith("ready: "), (config.parent / "up.log").read_text()
                yield Cluster(line.removeprefix("ready: ").strip(), config.parent, up)
        finally:
            if up.poll() is None:
                up.terminate()
            try:
                up.wait(15)
            except subprocess.TimeoutExpired:
                up.kill()
                up.wait()
                raise
