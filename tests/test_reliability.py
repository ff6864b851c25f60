# SPDX-License-Identifier: LGPL-2.1-or-later
"""The report card: a row is what its command said, and the others stay as they were."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from integration import reliability
from integration.reliability import CARD, PROJECT, ROWS, Row


def test_every_row_is_a_target_of_make() -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (PROJECT / "Makefile").read_text(), re.M))
    assert {row.words(60)[0] for row in ROWS} <= targets


def test_the_card_has_no_other_rows() -> None:
    """Each says which command made it, and nobody wrote one by hand."""
    lines = reliability.known(CARD.read_text())
    assert lines.keys() - {"what"} <= {row.what for row in ROWS}
    assert reliability.card(lines) == CARD.read_text()


def test_a_row_is_what_its_command_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Makefile").write_text(
        "good:\n\t@echo noise; echo 7 cases, 0 failures\nbad:\n\t@echo 7 cases, 1 failures; false\n"
    )
    monkeypatch.setattr(reliability, "PROJECT", tmp_path)
    monkeypatch.setattr(reliability, "LOGS", tmp_path / "logs")
    assert shutil.which("make")
    well, text = reliability.run(Row("x", "good ones", "good", r"^(\d+ cases.*)$"), 60)
    assert well
    assert text.startswith("| good ones | 7 cases, 0 failures | ")
    assert text.endswith("| `make good` |")
    well, text = reliability.run(Row("x", "bad ones", "bad", r"^(\d+ cases.*)$"), 60)
    assert not well
    assert "**failed**: 7 cases, 1 failures" in text
