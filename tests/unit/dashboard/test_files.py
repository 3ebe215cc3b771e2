"""The page's files: the libraries are those of their releases, nothing points to another host, all of it is small."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from kvstore.dashboard.files import BYTES_MAX, CONTENT_SECURITY_POLICY, DOCUMENTS, INDEX, STATIC, static_files

REPOSITORY = Path(__file__).resolve().parents[3]
OWN = sorted(path for path in STATIC.rglob("*") if path.is_file() and "lib" not in path.parts)


def test_every_library_is_the_one_of_its_release_with_a_licence() -> None:
    manifest = json.loads((STATIC / "lib" / "manifest.json").read_text())
    for entry in manifest:
        body = (STATIC / "lib" / entry["file"]).read_bytes()
        assert hashlib.sha256(body).hexdigest() == entry["sha256"], entry["file"]
        assert re.search(r"\d+\.\d+\.\d+", entry["from"])
        assert entry["license"]
    licences = {path.name for path in (STATIC / "lib").glob("*.LICENSE")}
    named = {entry["file"] for entry in manifest} | licences | {"manifest.json"}
    assert {path.name for path in (STATIC / "lib").iterdir()} == named
    for licence in licences:
        assert any(licence in entry["license"] for entry in manifest)


def test_all_files_together_are_small() -> None:
    assert sum(len(file.body) for file in static_files().values()) <= BYTES_MAX


def test_every_file_has_a_media_type_and_is_served() -> None:
    on_disk = {path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*") if path.is_file()}
    assert on_disk | DOCUMENTS.keys() == static_files().keys()


def test_every_heading_to_which_a_view_links_is_in_its_document() -> None:
    linked = [
        (path.name, *named)
        for path in OWN
        if path.suffix == ".js"
        for named in re.findall(r'\["([^"]+\.md)", "([^"]+)"\]', path.read_text())
    ]
    assert {view for view, _, _ in linked} >= {
        f"{view}.js" for view in ("overview", "ring", "locks", "keys", "failover")
    }
    for view, document, title in linked:
        lines = static_files()[f"docs/{document}"].body.decode().splitlines()
        assert re.search(rf"^#+ {re.escape(title)}$", "\n".join(lines), re.MULTILINE), (view, document, title)


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_no_file_of_ours_names_another_host(path: Path) -> None:
    text = path.read_text()
    hosts = set(re.findall(r"(?:https?:)?//[^\s'\"`<>/]+", text)) - {"http://www.w3.org", "http://127.0.0.1:8080"}
    hosts = {host for host in hosts if re.search(r"//[a-z0-9-]+\.[a-z]", host)}
    assert not hosts


@pytest.mark.parametrize("path", [path for path in OWN if path.suffix == ".js"], ids=lambda path: path.name)
def test_no_script_makes_markup_or_code_from_text(path: Path) -> None:
    text = path.read_text()
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "dangerouslySetInnerHTML", "document.write", "eval("):
        assert word not in text
    assert "setAttribute('style'" not in text
    assert len(text.splitlines()) <= 500


def test_every_file_that_the_page_names_is_there() -> None:
    texts = [static_files()[INDEX].body.decode()]
    named = set(re.findall(r'"/page/([^"]+)"', texts[0]))
    for name, found in static_files().items():
        if name.endswith(".js") and not name.startswith("lib/"):
            named |= {each.removeprefix("./") for each in re.findall(r'from "(\./[^"]+)"', found.body.decode())}
            named |= set(re.findall(r'"/page/([^"]+)"', found.body.decode()))
    assert named <= static_files().keys()


def test_every_file_of_the_repository_that_the_page_names_is_there() -> None:
    named = set()
    for path in OWN:
        named |= set(re.findall(r'\["((?:[a-z_]+/)*[A-Za-z_]+\.py)"', path.read_text()))
    assert "kvstore/placement/ring.py" in named
    assert not [name for name in named if not (REPOSITORY / name).is_file()]


def test_without_scripts_the_page_says_in_three_sentences_what_it_is_and_how_to_ask_with_curl() -> None:
    page = static_files()[INDEX].body.decode()
    plain = page[page.index("<noscript>") : page.index("</noscript>")]
    (paragraph,) = re.findall(r"<p>(.*?)</p>", plain, re.DOTALL)
    assert len(re.findall(r"[.:](?=\s+[A-Z]|$)", " ".join(paragraph.split()))) == 3
    assert plain.count("curl ") >= 4


def test_the_policy_lets_the_page_do_nothing_beyond_its_router() -> None:
    policy = dict(part.strip().partition(" ")[::2] for part in CONTENT_SECURITY_POLICY.split(";"))
    assert policy["default-src"] == "'none'"
    for what in ("script-src", "style-src", "img-src", "connect-src"):
        assert policy[what] == "'self'"
    assert policy["trusted-types"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    page = static_files()[INDEX].body.decode()
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son[a-z]+=", page)
