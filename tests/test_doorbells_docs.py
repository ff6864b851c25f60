# SPDX-License-Identifier: LGPL-2.1-or-later
"""The control page is said three times, in words, in C and in Python: all three say the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from xshmd.model import MAX_DOORBELLS
from xshmd.share import control_page
from xshmd.units import PAGE_SIZE

ROOT: Final = Path(__file__).resolve().parent.parent
TABLES: Final = {
    "row": (control_page.ROWS_AT, control_page.ROW_BYTES),
    "port": (control_page.PORTS_AT, control_page.PORTS.size),
    "offer": (control_page.OFFERS_AT, control_page.OFFERS.size),
    "watch": (
        control_page.WATCHES_AT,
        control_page.WATCH.size * control_page.WATCHES_PER_PEER,
    ),
}
"""Where each table of the page begins, and the bytes that a peer has of it."""


def words() -> str:
    return (ROOT / "docs/doorbells.md").read_text()


def header() -> str:
    return (ROOT / "xshmd/resources/guest/xshm_peer.h").read_text()


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_where_it_is_said_to_be(name: str) -> None:
    at, size = TABLES[name]
    assert f"offsetof(struct xshm_control, {name}) == {at:#x}" in header()
    assert f"| {at:#x} + {size} *k* " in words()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAGIC", control_page.MAGIC),
        ("VERSION", control_page.VERSION),
        ("MAX_PEERS", MAX_DOORBELLS),
        ("WATCHES", control_page.WATCHES_PER_PEER),
        ("PAGE", PAGE_SIZE),
    ],
)
def test_a_number_is_the_same_in_c(name: str, value: int) -> None:
    found = re.search(rf"#define XSHM_{name} +(\w+?)u\b", header())
    assert found is not None
    assert int(found[1], 0) == value


def test_the_head_of_the_page_is_in_words() -> None:
    assert f"| 0 | 4 | `{control_page.MAGIC:#x}` |" in words()
    assert f"| 4 | 2 | version, {control_page.VERSION} |" in words()
    assert f"or of dom0 (*k* = {control_page.DOM0})" in words()
