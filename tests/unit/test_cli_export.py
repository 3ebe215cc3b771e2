"""Export to a file: whole or not at all, and on from where it stopped."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvstore.cli import export_command
from kvstore.cli.commands import main
from kvstore.client import Counted, ListedItem, Page
from kvstore.errors import BadCursor, Unavailable

PAGES = {
    None: Page([ListedItem("a", 1, b"\xff"), ListedItem("b", 2, b"two", 0.0)], "after-b"),
    "after-b": Page([ListedItem("c", 3, b"")], "after-c"),
    "after-c": Page([ListedItem("d", 4, b"four")], None),
}
EXPORTED = (
    b'{"key":"a","version":1,"value_base64":"/w=="}\n'
    b'{"key":"b","version":2,"value":"two","ttl":0.001}\n'
    b'{"key":"c","version":3,"value":""}\n'
    b'{"key":"d","version":4,"value":"four"}\n'
)


class Listing:
    """The part of a client that an export uses; `ends_at`: the cursor at which the store goes away."""

    def __init__(self) -> None:
        self.ends_at: str | None = None
        self.unknown_once: str | None = None
        self.asked: list[str | None] = []
        self.missing: dict[str | None, list[int]] = {}  # by the cursor of the page that lacks them

    def __call__(self, url: str) -> Listing:
        return self

    async def __aenter__(self) -> Listing:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def cluster(self) -> dict[str, Any]:
        return {"cluster_id": "c"}

    async def count(self, prefix: str) -> int:
        return 4

    async def count_what_is_up(self, prefix: str) -> Counted:
        return Counted(4, [])

    async def pages(
        self, prefix: str, *, values: bool, page_size: int, after: str | None = None, skip_down: bool = False
    ) -> AsyncIterator[Page]:
        assert values
        more = True
        while more:
            self.asked.append(after)
            if after is not None and after == self.unknown_once:
                self.unknown_once = None
                raise BadCursor()
            if after is not None and after == self.ends_at:
                raise Unavailable()
            missing = self.missing.get(after, [])
            if missing and not skip_down:
                raise Unavailable()
            page = replace(PAGES[after], missing=missing)
            yield page
            after, more = page.next, page.next is not None


@pytest.fixture
def listing(monkeypatch: pytest.MonkeyPatch) -> Listing:
    listing = Listing()
    monkeypatch.setattr(export_command, "Client", listing)
    return listing


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "all.ndjson"


def run(output: Path, *options: str) -> int:
    return main(["export", "-o", str(output), *options])


def test_a_complete_export_is_the_only_file_left(listing: Listing, output: Path) -> None:
    assert run(output) == 0
    assert output.read_bytes() == EXPORTED
    assert list(output.parent.iterdir()) == [output]


def test_an_export_that_failed_leaves_the_earlier_file_alone(listing: Listing, output: Path) -> None:
    output.write_bytes(b"earlier")
    listing.ends_at = "after-b"
    assert run(output) == 2
    assert output.read_bytes() == b"earlier"


@pytest.mark.parametrize("ends_at", ["after-b", "after-c"])
def test_the_same_command_goes_on_where_it_stopped(listing: Listing, output: Path, ends_at: str) -> None:
    listing.ends_at = ends_at
    assert run(output) == 2
    with output.with_name("all.ndjson.part").open("ab") as part:
        part.write(b'{"key":"torn","value":"' + b"x" * 1000)
    listing.ends_at, listing.asked = None, []
    assert run(output) == 0
    assert listing.asked[0] == ends_at
    assert output.read_bytes() == EXPORTED
    assert list(output.parent.iterdir()) == [output]


# --- what is at the place already -------------------------------------------------------------------------------------


def test_a_link_stays_a_link_and_what_it_leads_to_is_replaced(listing: Listing, output: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    output.symlink_to("elsewhere/there")
    for _ in ("it leads nowhere", "to the earlier export"):
        assert run(output) == 0
        assert output.is_symlink()
        assert [path.name for path in folder.iterdir()] == ["there"]
        assert (folder / "there").read_bytes() == EXPORTED


def test_an_export_that_stopped_goes_on_through_a_link(listing: Listing, output: Path, tmp_path: Path) -> None:
    output.symlink_to(tmp_path / "there")
    listing.ends_at = "after-b"
    assert run(output) == 2
    listing.ends_at, listing.asked = None, []
    assert run(output) == 0
    assert listing.asked[0] == "after-b"
    assert (tmp_path / "there").read_bytes() == EXPORTED


def test_a_fifo_is_written_to(listing: Listing, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(output)
    with ThreadPoolExecutor() as threads:
        read = threads.submit(output.read_bytes)
        assert main(["export", "-o", str(output), "--json"]) == 0
        assert read.result(60) == EXPORTED
    assert output.is_fifo()
    assert list(output.parent.iterdir()) == [output]
    assert json.loads(capsys.readouterr().out)["bytes"] == len(EXPORTED)


def test_a_device_is_written_to(listing: Listing, tmp_path: Path) -> None:
    device = Path("/dev/null") if os.geteuid() else tmp_path / "null"
    if device != Path("/dev/null"):
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    assert run(device) == 0
    assert device.is_char_device()
    assert list(tmp_path.iterdir()) == ([] if os.geteuid() else [device])


def test_a_full_device_is_told(listing: Listing, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Path("/dev/full")) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert Path("/dev/full").is_char_device()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400, 0o664])
def test_a_file_keeps_its_mode_and_no_other_sees_more(listing: Listing, output: Path, mode: int) -> None:
    output.write_bytes(b"earlier")
    output.chmod(mode)
    part = output.with_name("all.ndjson.part")
    listing.ends_at = "after-b"
    assert run(output) == 2
    assert stat.S_IMODE(part.stat().st_mode) == mode
    assert stat.S_IMODE(output.with_name("all.ndjson.kvstore-export").stat().st_mode) == 0o600
    listing.ends_at = None
    assert run(output) == 0
    assert output.read_bytes() == EXPORTED
    assert stat.S_IMODE(output.stat().st_mode) == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away: run the tests as root")
def test_a_file_keeps_its_owner(listing: Listing, output: Path) -> None:
    output.write_bytes(b"earlier")
    os.chown(output, 4711, 4712)
    assert run(output) == 0
    assert (output.stat().st_uid, output.stat().st_gid) == (4711, 4712)


# --- a cursor that is of no use any more ------------------------------------------------------------------------------


def test_a_cursor_that_the_cluster_does_not_know_any_more_begins_again(listing: Listing, output: Path) -> None:
    listing.ends_at = "after-c"
    assert run(output) == 2
    listing.ends_at, listing.asked, listing.unknown_once = None, [], "after-c"
    assert run(output) == 0
    assert listing.asked == ["after-c", None, "after-b", "after-c"]
    assert output.read_bytes() == EXPORTED


def test_a_partial_file_that_lost_its_end_is_not_continued(listing: Listing, output: Path) -> None:
    listing.ends_at = "after-c"
    assert run(output) == 2
    output.with_name("all.ndjson.part").write_bytes(EXPORTED[:10])
    listing.ends_at, listing.asked = None, []
    assert run(output) == 0
    assert listing.asked[0] is None
    assert output.read_bytes() == EXPORTED


def test_an_export_that_skips_what_is_down_is_whole_as_a_file_and_says_what_it_lacks(
    listing: Listing, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listing.missing = {"after-b": [3, 1]}
    assert run(output) == 2
    assert not output.exists()
    assert run(output, "--skip-down", "--json") == 1
    assert output.read_bytes() == EXPORTED
    assert '{"missing":[1,3]}' in capsys.readouterr().err


def test_an_export_that_skips_what_is_down_and_finds_all_up_ends_with_0(listing: Listing, output: Path) -> None:
    assert run(output, "--skip-down") == 0
    assert output.read_bytes() == EXPORTED


def test_what_was_missing_before_an_interruption_is_missing_afterwards(
    listing: Listing, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listing.missing, listing.ends_at = {None: [7]}, "after-c"
    assert run(output, "--skip-down") == 2
    listing.missing, listing.ends_at, listing.asked = {}, None, []
    assert run(output, "--skip-down") == 1
    assert listing.asked[0] == "after-c"
    assert "the keys of 1 partition are missing" in capsys.readouterr().err


def test_a_whole_export_does_not_go_on_from_one_that_skipped_something(listing: Listing, output: Path) -> None:
    listing.missing, listing.ends_at = {None: [7]}, "after-c"
    assert run(output, "--skip-down") == 2
    listing.missing, listing.ends_at, listing.asked = {}, None, []
    assert run(output) == 0
    assert listing.asked[0] is None
