"""The pictures of the documents: drawn from the code, and committed as drawn."""

from __future__ import annotations

import xml.etree.ElementTree

import pytest

from loadtest.pictures import FOLDER, pictures


def test_the_committed_pictures_are_those_that_the_code_draws() -> None:
    committed = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.svg")}
    assert committed == pictures(), "`python -m loadtest.pictures` draws them again"


@pytest.mark.parametrize("name", sorted(pictures()))
def test_a_picture_is_well_formed(name: str) -> None:
    assert xml.etree.ElementTree.fromstring(pictures()[name]).tag == "{http://www.w3.org/2000/svg}svg"


def test_the_ring_shows_that_only_the_newcomer_gets_partitions() -> None:
    assert "The 16 longer ones moved, all to s4; the others stay" in pictures()["ring.svg"]
