"""The configurations in kvstore/deploy for nginx and HAProxy, in the real programs before a real cluster."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest

import kvstore.errors
from loadtest.cluster.processes import free_ports
from tests.cluster.actions import Reply, ask, get, wait_until
from tests.cluster.clusters import Cluster

DEPLOY = Path(kvstore.errors.__file__).parent / "deploy"
ROUTER = "127.0.0.1:8080"  # as it stands in the files
PATHS = [
    ("a//b", "a//b"),
    ("a/../b", "a/../b"),
    ("a/./b/", "a/./b/"),
    ("a%2Fb", "a/b"),
    ("a%2f%2F..%2Fb", "a//../b"),
    ("a%252Fb", "a%2Fb"),
    ("a%20%3F%23%26+b", "a ?#&+b"),
    ("gr%C3%BC%C3%9Fe", "grüße"),
    ("%2E", "."),
    ("a;b=c,d:e@f!", "a;b=c,d:e@f!"),
    ("%41%7E~", "A~~"),
    ("x" * 1000, "x" * 1000),
]

NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 128; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    include {folder}/kvstore.conf;
}}
"""


def program(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed: apt-get install nginx-light haproxy")
    return found


class Proxy(NamedTuple):
    """`url`: where it serves; `prefix`: what stands before the paths of the API."""

    name: str
    url: str
    prefix: str = ""


def shipped(name: str, *changes: tuple[str, str]) -> str:
    """The shipped file with these changes, each of which must have something to change."""
    text = (DEPLOY / name).read_text()
    for before, after in changes:
        assert before in text, f"{name} has no {before!r} any more"
        text = text.replace(before, after)
    return text


def nginx(folder: Path, router: str, port: int, *changes: tuple[str, str]) -> list[str]:
    changes = ((ROUTER, router), ("listen 80;", f"listen 127.0.0.1:{port};"), *changes)
    (folder / "kvstore.conf").write_text(shipped("nginx.conf", *changes))
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder))
    return [program("nginx"), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]


def haproxy(folder: Path, router: str, port: int, *changes: tuple[str, str]) -> list[str]:
    changes = ((ROUTER, router), ("bind :80", f"bind 127.0.0.1:{port}"), *changes)
    (folder / "haproxy.cfg").write_text(shipped("haproxy.cfg", *changes))
    return [program("haproxy"), "-db", "-f", str(folder / "haproxy.cfg")]


Command = Callable[..., list[str]]
COMMANDS: dict[str, Command] = {"nginx": nginx, "haproxy": haproxy}


@contextmanager
def before(cluster: Cluster, name: str, folder: Path, *changes: tuple[str, str], prefix: str = "") -> Iterator[Proxy]:
    (port,) = free_ports(1)
    proxy = Proxy(name, f"http://127.0.0.1:{port}", prefix)
    command = COMMANDS[name](folder, urlsplit(cluster.url).netloc, port, *changes)
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            wait_until(lambda: process.poll() is not None or serves(proxy), f"{name} serves")
            assert process.poll() is None, (folder / "log").read_text()
            yield proxy
        finally:
            process.terminate()


def serves(proxy: Proxy) -> bool:
    try:
        return ask(proxy.url, "GET", f"{proxy.prefix}/readyz").status == 200
    except OSError:
        return False


@pytest.fixture(scope="module", params=COMMANDS)
def proxy(
    cluster: Cluster, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    with before(cluster, request.param, tmp_path_factory.mktemp(request.param)) as proxy:
        yield proxy


@pytest.fixture(scope="module", params=COMMANDS)
def prefixed(
    cluster: Cluster, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    """With the lines for a prefix, uncommented."""
    folder = tmp_path_factory.mktemp(f"{request.param}-prefix")
    with before(cluster, request.param, folder, ("# PREFIX ", ""), prefix="/store") as proxy:
        yield proxy


def stored_through(proxy: Proxy, cluster: Cluster, raw: str, key: str) -> bool:
    """Whether a PUT to the raw path writes, and a GET of it reads, exactly that key."""
    own = f"{proxy.name}{proxy.prefix.replace('/', '-')}/"
    key, raw = own + key, f"{proxy.prefix}/v1/kv/{own}{raw}"
    value = uuid.uuid4().bytes
    if ask(proxy.url, "PUT", raw, value).status not in (201, 204):
        return False
    there = get(cluster, key)
    return there.body == value and ask(proxy.url, "GET", raw).body == value


@pytest.mark.parametrize(("raw", "key"), PATHS)
def test_a_key_arrives_as_it_was_sent(proxy: Proxy, cluster: Cluster, raw: str, key: str) -> None:
    assert stored_through(proxy, cluster, raw, key)


@pytest.mark.parametrize(("raw", "key"), [("../../../../x", "../../../../x"), ("a%00b", "a\0b")])
def test_what_nginx_does_not_pass_it_refuses(proxy: Proxy, cluster: Cluster, raw: str, key: str) -> None:
    if proxy.name == "nginx":
        assert ask(proxy.url, "PUT", f"/v1/kv/{raw}", b"v").status == 400
    else:
        assert stored_through(proxy, cluster, raw, key)


@pytest.mark.parametrize(("raw", "key"), PATHS)
def test_a_prefix_that_is_taken_off_the_raw_path_changes_no_key(
    prefixed: Proxy, cluster: Cluster, raw: str, key: str
) -> None:
    assert stored_through(prefixed, cluster, raw, key)
    listed = ask(prefixed.url, "GET", f"/store/v1/kv?prefix={prefixed.name}&limit=1")
    assert len(listed.json["items"]) == 1


def test_a_prefix_that_nginx_takes_off_in_its_usual_way_changes_keys(cluster: Cluster, tmp_path: Path) -> None:
    location = "location /store/ { proxy_pass http://kvstore/; proxy_set_header Host $http_host; }"
    usual = ("location / {", f"{location}\n    location / {{")
    with before(cluster, "nginx", tmp_path, usual, prefix="/store") as proxy:
        changed = {key for raw, key in PATHS if not stored_through(proxy, cluster, raw, key)}
        assert {"a//b", "a//../b"} <= changed


def test_the_host_field_arrives_as_it_was_sent(proxy: Proxy) -> None:
    def asked(host: str, origin: str) -> int:
        with closing(HTTPConnection("127.0.0.1", urlsplit(proxy.url).port, timeout=40)) as connection:
            connection.request("GET", "/v1/kv?limit=1", headers={"Host": host, "Origin": origin})
            return connection.getresponse().status

    assert asked("localhost:4711", "http://localhost:4711") == 200
    assert asked("localhost:4711", "http://localhost:4712") == 403
    assert asked("evil.example", "http://evil.example") == 403


def test_large_bodies_conditions_and_problems_pass(proxy: Proxy, cluster: Cluster) -> None:
    path, value = f"/v1/kv/{proxy.name}-large", b"\0\xff" * 500_000
    assert ask(proxy.url, "PUT", path, value).status in (201, 204)
    answer = ask(proxy.url, "GET", path)
    assert (answer.body, answer.headers["etag"]) == (value, get(cluster, f"{proxy.name}-large").headers["etag"])
    too_large = ask(proxy.url, "PUT", path, bytes(2_000_000))
    assert (too_large.status, too_large.json["code"]) == (413, "value-too-large")


def test_a_client_that_leaves_waits_for_no_lock_any_more(proxy: Proxy, cluster: Cluster) -> None:
    path = f"/v1/locks/{proxy.name}-left"

    def waiting() -> int:
        return int(ask(cluster.url, "GET", path).json["waiting"])

    held: Reply = ask(cluster.url, "POST", path, b'{"ttl": 600}')
    assert held.status == 201
    with socket.create_connection(("127.0.0.1", urlsplit(proxy.url).port or 0)) as client:
        body = b'{"wait": 60}'
        client.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 12\r\n\r\n%s" % (path.encode(), body))
        wait_until(lambda: waiting() == 1, "it waits")
    wait_until(lambda: waiting() == 0, "it waits no more", timeout_s=30)  # its own wait is twice as long
    released = HTTPConnection("127.0.0.1", cluster.port, timeout=40)
    with closing(released):
        released.request("DELETE", path, headers={"Lock-Token": str(held.json["token"])})
        assert released.getresponse().status == 204
