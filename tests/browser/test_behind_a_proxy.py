"""The page behind a proxy that asks for a token: it asks the person, keeps it in memory, and names a missing right."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from selenium.webdriver.common.keys import Keys
from yarl import URL

from tests.browser.page import Page
from tests.cluster.clusters import Cluster

TOKEN_FIELD = "dialog input"
_END_TO_END = {"host", "accept", "content-type", "origin", "if-match", "if-none-match", "last-event-id"}


class Proxy:
    """Lets the files of the page through; for all else wants a token: `all`, `reader` (no writes) or `stranger`."""

    def __init__(self, router: str) -> None:
        self.turned_away = 0
        self.urls: list[str] = []
        self._router = router

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.urls.append(request.raw_path)
        if request.path.startswith("/v1/") and (refusal := self._refusal(request)):
            return refusal
        headers = {name: value for name, value in request.headers.items() if name.lower() in _END_TO_END}
        target = URL(self._router + request.raw_path, encoded=True)
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.request(request.method, target, headers=headers, data=await request.read()) as answer,
        ):
            passed = web.StreamResponse(status=answer.status, headers=_end_to_end(answer))
            await passed.prepare(request)
            async for part in answer.content.iter_any():
                await passed.write(part)
            return passed

    def _refusal(self, request: web.Request) -> web.Response | None:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer" or token not in ("all", "reader", "stranger"):
            self.turned_away += 1
            named = {"WWW-Authenticate": 'Bearer realm="kv"'} if token else {}  # `return 401` of nginx names none
            return web.Response(status=401, text="<h1>401</h1>", headers=named)
        missing = {}
        if token == "stranger":
            missing = {"right": "read"}
        elif token == "reader" and request.method != "GET":
            missing = {"right": "write", "prefix": "browser/"}
        if not missing:
            return None
        problem = {"status": 403, "code": "forbidden", "detail": "The token does not have that right."} | missing
        return web.json_response(problem, status=403, content_type="application/problem+json")


def _end_to_end(answer: aiohttp.ClientResponse) -> dict[str, str]:
    hop_by_hop = {"connection", "keep-alive", "transfer-encoding", "content-length"}
    return {name: value for name, value in answer.headers.items() if name.lower() not in hop_by_hop}


@contextmanager
def served(proxy: Proxy) -> Iterator[str]:
    """Its address, while it is served by a thread of its own."""
    address: Future[str] = Future()
    is_over = asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", proxy.handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        address.set_result(f"http://127.0.0.1:{runner.addresses[0][1]}")
        await is_over.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        yield address.result(30)
    finally:
        loop.call_soon_threadsafe(is_over.set)
        thread.join(30)
        loop.close()


@pytest.fixture(scope="module")
def proxy(demo: Cluster) -> Proxy:
    return Proxy(demo.url)


@pytest.fixture(scope="module")
def proxy_url(proxy: Proxy) -> Iterator[str]:
    with served(proxy) as url:
        yield url


@pytest.fixture
def url(proxy_url: str) -> str:
    return proxy_url


@pytest.fixture
def asked(page: Page) -> Page:
    """A page that has just been opened, and asks for a token."""
    page.refusals = {401, 403}
    page.driver.get(f"{page.url}/#keys")
    _is_asked(page)
    return page


def _is_asked(page: Page) -> None:
    page.until(lambda: "Access token" in page.text_of("dialog"))


def _give(page: Page, token: str) -> None:
    page.type(TOKEN_FIELD, token)
    page.click("Use it", "dialog")


def _is_live(page: Page) -> bool:
    return page.text_of(".connection") == "live"


def test_a_token_is_asked_for_sent_with_every_call_and_kept_in_memory_only(asked: Page, proxy: Proxy) -> None:
    _give(asked, "guessed")
    asked.until(lambda: "That token is not taken here" in asked.text_of("dialog"))
    asked.keep("token-asked-again")
    asked.type(TOKEN_FIELD, "all")
    asked.press(Keys.ENTER)
    asked.until(lambda: _is_live(asked))
    assert not asked.all("dialog")
    asked.type("form.row input", "browser/guarded")
    asked.click("Open")
    asked.until_says("There is no such key yet")
    asked.refusals |= {404}
    asked.click("Put only if absent")
    asked.until_says("Put only if still version")
    asked.click("Delete…")
    asked.click("Delete it")
    asked.until_says("There is no such key yet")
    kept: Any = asked.run("return [{...localStorage}, {...sessionStorage}, document.cookie]")
    assert kept == [{}, {}, ""]
    assert not [url for url in proxy.urls if "guessed" in url or "=all" in url]
    asked.driver.refresh()  # which forgets it
    _is_asked(asked)


def test_without_a_right_a_view_says_which_one_is_missing(asked: Page) -> None:
    _give(asked, "reader")
    asked.until(lambda: _is_live(asked))
    asked.refusals |= {404}
    asked.type("form.row input", "browser/guarded")
    asked.click("Open")
    asked.until_says("There is no such key yet")
    asked.click("Put only if absent")
    asked.until_says("403 forbidden", "The right write for keys that begin with browser/ is missing.")
    asked.keep("token-right-missing")


def test_when_nothing_may_be_seen_that_is_said_and_another_token_can_be_given(asked: Page) -> None:
    _give(asked, "stranger")
    asked.until(lambda: "The right read is missing." in asked.text_of(".refusal"))
    asked.click("Enter a token")
    _give(asked, "all")
    asked.until(lambda: _is_live(asked) and not asked.all(".refusal"))


def test_a_person_who_gives_no_token_is_not_asked_again_by_the_page_itself(asked: Page, proxy: Proxy) -> None:
    asked.driver.get("about:blank")
    asked.driver.get(f"{asked.url}/#locks")  # a view that asks nothing by itself
    _is_asked(asked)
    asked.press(Keys.ESCAPE)
    asked.until(lambda: "401" in asked.text_of(".refusal"))
    before = proxy.turned_away
    asked.until(lambda: proxy.turned_away >= before + 2)  # it goes on trying
    assert not asked.all("dialog")
    asked.click("Enter a token")
    _give(asked, "all")
    asked.until(lambda: _is_live(asked))
