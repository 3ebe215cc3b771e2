"""The journal: what it lists is done; what cannot be believed is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.cli.journal import Journal

WORK = {"import": "/a", "cluster_id": "c"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.kvstore-import"


def written(path: Path, *entries: object) -> None:
    journal = Journal(path, WORK)
    journal.append(entries)
    journal.close()


def test_a_second_run_reads_what_the_first_noted(path: Path) -> None:
    written(path, [1], [2])
    assert Journal(path, WORK).entries() == [[1], [2]]


def test_the_second_run_appends(path: Path) -> None:
    written(path, [1])
    journal = Journal(path, WORK)
    journal.entries()
    journal.append([[2]])
    journal.close()
    assert Journal(path, WORK).entries() == [[1], [2]]


def test_no_journal_means_that_nothing_is_done(path: Path) -> None:
    assert Journal(path, WORK).entries() == []


@pytest.mark.parametrize("other", [{**WORK, "cluster_id": "d"}, {**WORK, "import": "/b"}])
def test_the_journal_of_other_work_is_not_believed_and_replaced(path: Path, other: dict[str, str]) -> None:
    written(path, [1])
    journal = Journal(path, other)
    assert journal.entries() is None
    journal.append([[9]])
    journal.close()
    assert Journal(path, other).entries() == [[9]]


@pytest.mark.parametrize("garbage", [b"\x00\xff\n", b"", b"[1]\n", b"{", b'"\xb3"\n'])
def test_a_file_that_is_no_journal_is_not_believed(path: Path, garbage: bytes) -> None:
    path.write_bytes(garbage)
    assert Journal(path, WORK).entries() is None


@pytest.mark.parametrize("torn", [b"[3", b"[3]"])
def test_a_last_line_that_was_cut_short_does_not_count_and_does_not_spoil_the_next(path: Path, torn: bytes) -> None:
    written(path, [1], [2])
    with path.open("ab") as file:
        file.write(torn)
    journal = Journal(path, WORK)
    assert journal.entries() == [[1], [2]]
    journal.append([[4]])
    journal.close()
    assert Journal(path, WORK).entries() == [[1], [2], [4]]


def test_forget_begins_again(path: Path) -> None:
    written(path, [1], [2], [3])
    journal = Journal(path, WORK)
    journal.entries()
    journal.forget()
    journal.append([[5]])
    journal.close()
    assert Journal(path, WORK).entries() == [[5]]


def test_delete_leaves_no_file(path: Path) -> None:
    journal = Journal(path, WORK)
    journal.append([[1]])
    journal.delete()
    assert not path.exists()
