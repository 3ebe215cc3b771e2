"""A real browser (Debian's chromium) on a real cluster: `pytest -n 0 tests/browser`, apart from the other tests.

It needs the Debian packages chromium and chromium-driver. With KVSTORE_SCREENSHOTS=FOLDER its pictures are kept there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from tests.browser.page import Page
from tests.cluster.clusters import Cluster, running, write_config

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,1000"
)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(write_config(tmp_path_factory.mktemp("browser")), options=["--demo"]) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("install Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*_FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture
def url(demo: Cluster) -> str:
    """Where the browser finds the page."""
    return demo.url


@pytest.fixture
def page(driver: webdriver.Chrome, url: str, tmp_path: Path) -> Iterator[Page]:
    """A new page on the cluster; at the end it must have met no error, and asked no other host for anything."""
    folder = Path(os.environ.get("KVSTORE_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    page = Page(driver, url, folder)
    yield page
    page.check()
    page.forget()
