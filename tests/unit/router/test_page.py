"""The page over HTTP: who gets it, and what a browser is told to do with its files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import aiohttp
import pytest

from kvstore.config import default_config
from kvstore.dashboard.files import CONTENT_SECURITY_POLICY, static_files
from kvstore.router.app import RouterApp
from kvstore.router.controller_client import Controller
from kvstore.router.routes.page import wants_page
from kvstore.router.service import RouterService
from kvstore.transport.http.requests import Head
from kvstore.transport.http.server import Server, start_server

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


@pytest.fixture
async def url(service: RouterService) -> AsyncIterator[str]:
    config = default_config()
    app = RouterApp("0", service, config, cast(Controller, None))
    runner = await start_server(Server(app.handle, config.limits), "127.0.0.1", 0)
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.mark.parametrize(
    ("accept", "is_page"),
    [
        (BROWSER, True), ("text/html", True), ("TEXT/HTML; q=0.5, */*;q=0.1", True),
        ("text/html;q=0.5, application/json;q=0.5", True),
        ("text/html;charset=utf-8;q=0.4,application/json;q=0.3", True),
        ("*/*", False), ("", False), ("application/json", False), ("text/html;q=0", False),
        ("text/html;q=0.5, application/json", False), ("text/*", False),
    ],
)  # fmt: skip
def test_only_who_asks_for_html_gets_the_page(accept: str, is_page: bool) -> None:
    assert wants_page(Head("GET", "/", "", {"accept": accept})) is is_page


async def test_a_browser_gets_the_page_and_a_program_json(url: str, session: aiohttp.ClientSession) -> None:
    async with session.get(url, headers={"Accept": BROWSER}) as page:
        assert page.content_type == "text/html"
        assert page.headers["Vary"] == "Accept"
        assert page.headers["Content-Security-Policy"] == CONTENT_SECURITY_POLICY
        assert (await page.read()).startswith(b"<!doctype html>")
    async with session.get(url) as index:
        assert index.headers["Vary"] == "Accept"
        assert "/v1/events" in (await index.json())["routes"]


@pytest.mark.parametrize("name", sorted(static_files()))
async def test_every_file_is_served_with_its_type_and_the_policy(
    url: str, session: aiohttp.ClientSession, name: str
) -> None:
    async with session.get(f"{url}/page/{name}") as answer:
        assert answer.status == 200
        assert await answer.read() == static_files()[name].body
        assert answer.headers["Content-Type"] == static_files()[name].media_type
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Content-Security-Policy"] == CONTENT_SECURITY_POLICY
        tag = answer.headers["ETag"]
    async with session.get(f"{url}/page/{name}", headers={"If-None-Match": f'W/"other", {tag}'}) as again:
        assert again.status == 304
        assert await again.read() == b""
    async with session.head(f"{url}/page/{name}") as head:
        assert head.status == 200
        assert int(head.headers["Content-Length"]) == len(static_files()[name].body)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/page/none.js", 404), ("/page/%2e%2e/files.py", 404), ("/page/..%2Ffiles.py", 404), ("/page/lib", 404),
        ("/page/", 400), ("/page/%FF", 400), ("/page/app.js?v=1", 400), ("/page/lib%2Fuplot.js", 200),
    ],
)  # fmt: skip
async def test_nothing_but_the_files_is_served(url: str, path: str, status: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    answer: Any = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 %d " % status)


async def test_a_foreign_page_gets_nothing(url: str, session: aiohttp.ClientSession) -> None:
    for headers in ({"Origin": "http://elsewhere.example"}, {"Host": "elsewhere.example"}):
        for path in ("/", "/page/app.js", "/v1/events"):
            async with session.get(f"{url}{path}", headers={"Accept": BROWSER, **headers}) as answer:
                assert answer.status == 403
