# SPDX-License-Identifier: LGPL-2.1-or-later
"""docs/promises.md says what the rules say, row by row, and leaves nothing out."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from test_policy_rules_each import REGISTRIES

from xshmd.machine import Arch
from xshmd.policy import promises
from xshmd.policy.promises import CHOICES, Combination, Row, refusals

PAGE = Path(__file__).parent.parent / "docs/promises.md"
ROWS = promises.rows()


def refused_by(parts: Combination, arch: Arch) -> set[str]:
    return {str(error.facts["rule"]) for error in refusals(parts, arch)}


def test_the_page_is_what_the_rules_say() -> None:
    assert PAGE.read_text() == promises.markdown(), (
        "run python3 -m xshmd.policy.promises > docs/promises.md"
    )


def test_what_is_usual_is_kept() -> None:
    for arch in Arch:
        assert refusals((), arch) == ()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(v for _, v in row.parts))
def test_each_row_is_refused_and_each_part_of_it_matters(row: Row) -> None:
    for arch in row.arches:
        (error,) = [e for e in refusals(row.parts, arch) if e.facts["rule"] == row.rule]
        assert (error.message, error.hint) == (row.refusal, row.remedy)
        assert row.remedy
        for part in row.parts:
            fewer = tuple(one for one in row.parts if one != part)
            assert row.rule not in refused_by(fewer, arch)
        for more in row.unless:
            assert row.rule not in refused_by((*row.parts, more), arch)


@pytest.mark.parametrize("name", sorted({row.rule for row in ROWS}))
def test_without_its_rule_a_row_is_not_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    removed = 0
    for module, registry in REGISTRIES:
        there = getattr(module, registry)
        left = tuple(rule for rule in there if rule.__name__.replace("_", "-") != name)
        removed += len(there) - len(left)
        monkeypatch.setattr(module, registry, left)
    assert removed
    for row in ROWS:
        if row.rule == name:
            assert all(name not in refused_by(row.parts, arch) for arch in row.arches)


def test_no_combination_is_refused_for_what_the_table_does_not_say() -> None:
    """However many unusual choices are made at once; four thousand, the same at each run."""
    dice = random.Random(5)
    refused = 0
    for _ in range(2000):
        parts = tuple(
            (name, value)
            for name, values in CHOICES.items()
            if (value := dice.choice(values)) != values[0]
        )
        for arch in Arch:
            told = {row.rule for row in ROWS if arch in row.arches and set(row.parts) <= set(parts)}
            found = refused_by(parts, arch)
            assert found <= told, parts
            lifted = {
                row.rule
                for row in ROWS
                if arch in row.arches and set(row.parts) <= set(parts)
                if not set(row.unless) & set(parts)
            }
            assert lifted <= found, parts
            refused += bool(found)
    assert 2000 < refused < 4000
