"""Who may open a channel to a shard: processes of its own session, known, learned or remembered."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from kvstore.shard.hellos import Hellos, SessionFile
from kvstore.transport.sessions import ADOPT, IS_STRANGER, IS_UNSURE, ClusterSession


class Controller:
    """`session`: what it is in; None: it is away."""

    def __init__(self, session: str | None) -> None:
        self.session = session
        self.asked = 0
        self.earlier: list[str] = []

    def hellos(self, folder: Path, *, is_announced: bool = True) -> Hellos:
        """Those of a shard that starts now."""
        self.cluster = cluster = ClusterSession()

        async def ask() -> bool:
            self.asked += 1
            cluster.enter(self.session, ",".join(self.earlier))
            return self.session is not None

        hellos = Hellos("s1", cluster, ask, SessionFile(folder, "s1"))
        if is_announced:
            cluster.enter(self.session)
        return hellos


async def test_the_own_session_is_let_in_without_a_question(tmp_path: Path) -> None:
    controller = Controller("ours")
    assert await controller.hellos(tmp_path).refusal("ours", "peer") is None
    assert controller.asked == 0


async def test_a_stranger_is_refused_and_told_of_once_with_the_mend(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hellos = Controller("ours").hellos(tmp_path)
    with caplog.at_level(logging.ERROR):
        assert [await hellos.refusal("theirs", "127.0.0.1") for _ in range(3)] == [IS_STRANGER] * 3
    (record,) = caplog.records
    assert "127.0.0.1" in record.getMessage()
    assert ADOPT in record.getMessage()


async def test_who_heard_first_that_the_controller_has_started_again_is_let_in(tmp_path: Path) -> None:
    controller = Controller("before")
    hellos = controller.hellos(tmp_path)
    controller.session = "after"
    assert await hellos.refusal("after", "peer") is None
    assert await hellos.refusal("before", "peer") is None  # who has not heard it yet
    assert controller.asked == 1


async def test_who_is_cut_off_since_before_the_controllers_last_start_is_let_in_by_a_shard_that_was_away_then(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Controller("first").hellos(tmp_path)
    controller = Controller("third")
    controller.earlier = ["first", "second"]
    hellos = controller.hellos(tmp_path)
    assert await hellos.refusal("second", "peer") is None
    assert await hellos.refusal("fourth", "peer") == IS_STRANGER
    assert [record.levelname for record in caplog.records] == ["ERROR"]


async def test_while_the_controller_is_away_only_known_sessions_are_let_in_and_no_node_is_called_a_stranger(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    controller = Controller("ours")
    hellos = controller.hellos(tmp_path)
    controller.session = None
    assert await hellos.refusal("ours", "peer") is None
    assert await hellos.refusal("another", "peer") == IS_UNSURE
    assert caplog.records == []


async def test_a_process_that_has_heard_from_no_controller_is_refused_for_now(tmp_path: Path) -> None:
    assert await Controller("ours").hellos(tmp_path).refusal("", "peer") == IS_UNSURE


async def test_a_shard_that_starts_while_the_controller_is_away_lets_its_last_session_in(tmp_path: Path) -> None:
    Controller("ours").hellos(tmp_path)
    away = Controller(None)
    hellos = away.hellos(tmp_path, is_announced=False)
    assert hellos.last == "ours"
    assert await hellos.refusal("ours", "peer") is None
    assert await hellos.refusal("theirs", "peer") == IS_UNSURE
    assert away.cluster.id == ""  # it names none by itself: this may be a copy, at another address


async def test_a_session_that_cannot_be_kept_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    hellos = Controller("ours").hellos(tmp_path / "file" / "folder")
    assert await hellos.refusal("ours", "peer") is None
    assert "cannot be kept" in caplog.text


async def test_a_damaged_memory_lets_no_session_in(tmp_path: Path) -> None:
    (tmp_path / "shard-s1.session").write_bytes(b"\xff\n")
    hellos = Controller(None).hellos(tmp_path, is_announced=False)
    assert await hellos.refusal("ours", "peer") == IS_UNSURE
